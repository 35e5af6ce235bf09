"Hours of the paper's main table, and which outer steps are timed, by hand."
import pandas as pd, pytest

from resalign.studies import scaling as S

COST = dict(gradient=2., forward=1., simulated=50., full=3., decode=4.)


def study(**more):
    methods = dict(plain=S.Work(), long=S.Work(steps=10, gradients=3, forwards=5, simulated=2))
    return S.PaperStudy(methods=methods, seeds=3, data=2, finetune=100, pictures=dict(IP=6, US=4), sampling_steps=5,
                        tflops=.5, utilisation=(.2, .4), gpus=(1, 8), **more)


def test_hours_by_hand():
    "A picture takes 5 guided steps and a decoding; each method is looked at before and after both data sets"
    evaluate, finetune, unlearn = 10*(2*5*1 + 4), 100*3, 10*(3*2 + 5*1 + 2*50)
    work = S.tasks(study(), COST).set_index(['method', 'kind'])
    of = {'evaluate': (3, evaluate), 'fine-tune': (2, finetune)}
    want = {(m, k): v for m, own in (('plain', 0), ('long', unlearn)) for k, v in dict(of, unlearn=(1, own)).items()}
    assert {key: (row.times, row.tflop) for key, row in work.iterrows()} == want
    found = S.gpu_hours(work.reset_index(), study()).set_index(['gpus', 'utilisation'])
    total, chain = 3*(2*(3*evaluate + 2*finetune) + unlearn), unlearn + finetune + evaluate
    for (g, u), row in found.iterrows():
        hour = .5*u*3600 # TFLOP
        wait = (g - 1)/g*chain # no GPU may start the last chain later than when the others run dry
        assert list(row) == pytest.approx([total/hour, max(total/g, chain)/hour, (total/g + wait)/hour])
    assert set(found.index) == {(g, u) for g in (1, 8) for u in (.2, .4)} and total/8 < chain < total


def test_outer_steps_are_timed_where_each_process_has_one(monkeypatch):
    monkeypatch.setattr(S, 'outer_steps_on', lambda n, J, steps, settings: [J/n]*(steps - 1))
    rows = pd.DataFrame(S.step_times([1, 2, 4], [1, 2], 3))
    assert set(rows.what) == {'outer step'} and list(rows.repeat) == [0, 1]*5
    assert list(zip(rows.workers, rows.x, rows.seconds))[::2] == [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 2, 1), (2, 4, 2)]
