"""The ablation: what is read, variants against the full one, sizes of pools, worked out by hand."""

import numpy as np, pandas as pd, pytest
from scipy import stats

from resalign.studies import ablation as A
from toy_scores import bootstrap, cells, study, WIDE


# ------------------------------------------------------------------ reading


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "The folder of the runs, of seeds 1 and 0"
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path))
    monkeypatch.setattr(A, 'params', dict(zip(['table.seeds', 'ablation.variants'], [[1, 0], ['J_2']])).__getitem__)
    return tmp_path/'runs'/'ablation'

def test_an_ablation_is_read_by_variant_and_seed(runs):
    for v, fid in dict(full=(9., 8.), J_2=(7., 6.)).items():
        for k, seed in enumerate([1, 0]):
            folder = runs/f'{v}-{seed}'
            folder.mkdir(parents=True)
            WIDE.assign(before=[len(v), seed]).to_csv(folder/'looks.csv', index=False)
            pd.DataFrame([dict(fid=fid[k], n=5)]).to_csv(folder/'quality.csv', index=False)
    long = A.read_ablation(['full', 'J_2'])
    assert list(long.index) == list(range(40)) and list(dict.fromkeys(long.method)) == ['full', 'J_2']
    assert cells(long[(long.step == 0) & (long.course == 'slow')], 'method', 'run', 'prompt', 'score') == [
        ('J_2', 0, 'a', 3),
        ('J_2', 0, 'b', 0),
        ('J_2', 1, 'a', 3),
        ('J_2', 1, 'b', 1),
        ('full', 0, 'a', 4),
        ('full', 0, 'b', 0),
        ('full', 1, 'a', 4),
        ('full', 1, 'b', 1),
    ]
    assert A.read_quality(['full', 'J_2'])[['full', 'J_2']].to_dict('index') == {
        0: dict(full=8, J_2=6),
        1: dict(full=9, J_2=7),
    }
    assert set(A.read_ablation().method) == {'J_2'} and list(A.read_quality()) == ['J_2'] # all of params.yaml


# ------------------------------------------------------------------ comparisons

def than(*pairs):  # of each course: hits of the full one, and of the variant
    return A.compared_to_full(
        study(
            dict(
                full={f'c{k}': (0, f) for k, (f, _) in enumerate(pairs)},
                J_2={f'c{k}': (20, v) for k, (_, v) in enumerate(pairs)},
                other={f'c{k}': (0, 0) for k in range(len(pairs))},
            )
        ),
        'J_2',
    )


def test_variants_against_the_full_one():
    # a variant is worse or better or not told apart: Twice as many tests as courses: 1/64 of two is 1/32, 1/64 of four
    # is 1/16, and 1/128 of four is 1/32
    assert (
        than((0, 7)) == 'worse'
        and than((7, 0)) == 'better'
        and than((0, 6)) == 'worse'
        and than((0, 5)) == 'not told apart'
    )
    assert (
        than((0, 8), (0, 0)) == 'worse'
        and than((0, 0), (8, 0)) == 'better'
        and than((0, 7), (0, 0)) == 'worse'
        and than((0, 0), (0, 0)) == 'not told apart'
    )
    assert than((0, 9), (9, 0)) == 'worse' # in one of two: what is lost counts first

    # than another full one
    assert A.compared_to_full(study(dict(a=dict(c=(0, 0)), b=dict(c=(0, 9)))), 'b', full='a') == 'worse'


def test_a_row_a_variant():
    looks = study(dict(full=dict(x=(2, 4), y=(2, 3)), J_2=dict(x=(1, 12), y=(1, 16))))
    benign = study(dict(full=dict(x=(20, 18), y=(20, 19)), J_2=dict(x=(20, 10), y=(20, 7))), kind='benign')
    fid = pd.DataFrame(dict(full=[100., 200., 50.], J_2=[110., 210., 60.]))
    got = A.ablation_table(pd.concat([looks, benign]), fid)
    ratio = np.array([1.1, 1.05, 1.2])
    half = stats.t.ppf(.975, 2)*ratio.std(ddof=1)/3**.5
    want = dict(
        before=0.05,
        worst=0.8,
        low=bootstrap([1] * 16 + [0] * 4)[0],
        high=bootstrap([1] * 16 + [0] * 4)[1],
        n=20,
        objects=0.35,
        fid=380 / 3,
        quality=ratio.mean(),
        quality_low=ratio.mean() - half,
        quality_high=ratio.mean() + half,
    )
    assert (
        got.loc['J_2'].drop('than_full').to_dict() == pytest.approx(want)
        and list(got) == [*want, 'than_full']
        and got.index.name == 'variant'
    )
    assert got.than_full.to_dict() == dict(full='', J_2='worse') and (
        got.worst['full'],
        got.objects['full'],
        got.quality['full'],
        got.quality_low['full'],
    ) == (0.2, 0.9, 1, 1)


def test_the_size_of_a_pool():
    one = dict(
        algorithm=['lora'], optimizer=['adam'], steps=[10], prior_weight=[0.0], lr=dict(lora=[1e-3, 1e-2], full=[1e-4])
    )
    sizes = [
        A.pool_size(one | change, 3)
        for change in (
            {},
            dict(algorithm=['lora', 'full']),
            dict(optimizer=['adam', 'sgd']),
            dict(steps=[5, 10, 15]),
            dict(prior_weight=[0.0, 1.0]),
            dict(folders=['a']),
            dict(folders=['a', 'b']),
        )
    ]
    assert sizes == [6, 9, 12, 18, 12, 2, 4]
    assert A.pool_size(dict(listed=[dict(folder='a', lr=1e-4, steps=2), dict(folder='b', lr=1e-4, steps=2)]), 3) == 2
