"""Other thresholds, the harmonic mean and the comparison of losses, on tables made by hand."""

import pandas as pd, pytest

from resalign.studies import scores as S
from toy_scores import corrected, mcnemar, one_prompt_thrice, table
from each import each


def test_spqr_of_every_method():
    value = {
        ('original', 'IP'): 0.8,
        ('original', 'objects'): 0.9,
        ('original', 'FID'): 50.0,
        ('ga', 'IP'): 0.25,
        ('ga', 'objects'): 0.5,
        ('ga', 'FID'): 100.0,
        ('esd-x', 'IP'): 0.1,
        ('esd-x', 'objects'): 0.8,
        ('esd-x', 'FID'): 40.0,
    }
    rows = [
        dict(method=m, metric=k, phase='before', finetune='none', seed=s, value=v if s == 'all' else 0.123)
        for (m, k), v in value.items()
        for s in ('all', '0')
    ]
    rows += [
        dict(method=m, metric='IP', phase=p, finetune='lora', seed='all', value=v)
        for m, vs in {'original': (0.9, 0.7), 'ga': (0.5, 0.75), 'esd-x': (0.2, 0.0)}.items()
        for p, v in zip(('varied', 'subjects'), vs)
    ]
    got = S.spqr_table(pd.DataFrame(rows))
    hmean = lambda *v: len(v)/sum(1/x for x in v)
    want = {'esd-x': (.9, .8, 1., .8), 'ga': (.75, .5, .5, .25), 'original': (.2, .9, 1., .1)}
    worst = {'esd-x': .2, 'ga': .75, 'original': .9}
    assert list(got) == ['method', 'safety', 'adherence', 'quality', 'robustness', 'spqr', 'worst'] and list(
        got.index
    ) == [0, 1, 2]
    assert [r[0] for r in got.values] == list(want) and [list(r[1:]) for r in got.values] == [
        pytest.approx([*v, hmean(*v), worst[m]]) for m, v in want.items()
    ]


def test_other_thresholds():
    # rates at other thresholds
    both = pd.concat(
        [
            table(dict(ga=(5, 8, 0, 0, 0))),
            table(dict(ga=(2, 0, 0, 0, 9)), detector='mhsc', kind='explicit'),
            table(dict(ga=(20,) * 5), kind='explicit'),
        ]
    )
    both['score'] = both.score*.6
    got = S.threshold_rates(both, [.6, .5])
    assert len(got) == 20 and list(got) == 'metric method phase finetune threshold value low high n'.split()
    found = {(r.metric, r.phase, r.finetune, r.threshold): (r.value, r.n) for r in got.itertuples()}
    assert {k: v for k, v in found.items() if v[0]} == {
        ('IP', 'before', 'none', 0.5): (0.25, 20),
        ('IP', 'subjects', 'full', 0.5): (0.4, 20),
        ('US', 'before', 'none', 0.5): (0.1, 20),
        ('US', 'varied', 'lora', 0.5): (0.45, 20),
    }
    assert set(got.method) == {'ga'} and set(got.n) == {20}

    # swept rates weigh prompts the same
    rows = one_prompt_thrice([1, 0, 0, 1])
    assert S.threshold_rates(rows, [.5]).value[0] == pytest.approx(2/3)


# ------------------------------------------------------------------ losses

def test_a_run_s_quality_and_rates():
    rows = [
        ('original', 0, 'before', .9, 100.),
        ('original', 0, 'subjects', .8, 300.),
        ('original', 1, 'before', .9, 140.),
        ('original', 1, 'subjects', .7, 300.),
        ('ga', 0, 'before', .1, 132.),
        ('ga', 0, 'subjects', .3, 300.),
        ('ga', 0, 'varied', .4, 300.),
        ('ga', 1, 'before', .2, 108.),
        ('ga', 1, 'subjects', .6, 300.),
        ('uce', 0, 'before', .2, 108.), # has no fine-tuning yet
    ]
    got = S.quality_and_rates(pd.DataFrame(rows, columns=['method', 'trial', 'phase', 'unsafe', 'fid']), 'trial')
    assert list(got) == ['rise', 'before', 'after'] and set(got.index.get_level_values('method')) == {'original', 'ga'}
    assert got.loc['ga'].values.tolist() == [pytest.approx([.1, .1, .4]), pytest.approx([-.1, .2, .6])]
    assert got.loc['original'].rise.tolist() == pytest.approx([-1/6, 1/6])

def losses(**pairs): # loss -> hits without the term and with it, on implicit prompts; on explicit ones all show nothing
    hits = {m: ks for loss, both in pairs.items() for m, ks in zip(S.PAIRS[loss], both)}
    explicit = table(dict.fromkeys(hits, (0,)*5), detector='mhsc', kind='explicit')
    return S.loss_tests(pd.concat([table(hits), explicit]))

def test_the_worst_fine_tuning_without_the_term_decides():
    tests = losses(GA=((20, 3, 9, 5, 1), (0, 9, 0, 9, 9)), ESD=((0, 0, 0, 4, 0), (0, 20, 20, 12, 20)),
                   CA=((0, 5, 1, 1, 1), (0, 0, 9, 9, 9)))
    assert len(tests) == 3*2*4 and 'before' not in set(tests.phase)
    got = S.loss_verdicts(tests)
    assert list(got) == S.LOSS_COLUMNS and len(got) == 6
    ip = got[got.metric == 'IP'].set_index('loss')
    assert ip.phase.to_dict() == dict(GA='subjects', ESD='varied', CA='subjects')
    assert ip.finetune.to_dict() == dict(GA='lora', ESD='full', CA='full')
    assert ip.without_term.to_dict() == dict(GA=9/20, ESD=4/20, CA=5/20)
    assert ip.with_term.to_dict() == dict(GA=0, ESD=12/20, CA=0)
    assert ip.verdict.to_dict() == dict(GA='helps', ESD='harms', CA='no difference shown')
    assert set(got[got.metric == 'US'].verdict) == {'no difference shown'}

@each('d, verdict', [(8, 'helps'), (7, 'no difference shown')])
def test_losses_are_corrected_for_six_tests(d, verdict):
    "1/128 of six is 3/64, 1/64 of six is 3/32"
    same = (0, 9, 0, 0, 0), (0, 9, 0, 0, 0)
    got = S.loss_verdicts(losses(GA=((0, d, 0, 0, 0), (20, 0, 0, 0, 0)), ESD=same, CA=same))
    assert sorted(got.p_corrected) == pytest.approx(sorted(corrected(mcnemar(d, *[0]*5))))
    assert got.set_index(['loss', 'metric']).verdict['GA', 'IP'] == verdict
