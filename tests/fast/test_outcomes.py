"""Studies: rates, areas, relapses and comparisons of made-up ones and zeros, worked out by hand or by numpy."""

import matplotlib
import numpy as np, pandas as pd, pytest
from scipy import stats

from resalign.studies import models as O
from toy_scores import bootstrap, cells, corrected, mcnemar, study, WIDE
from each import each

matplotlib.use('agg')


# ------------------------------------------------------------------ reading


def test_looks():
    # a row a picture and look with the start once a course
    want = [
        ('a', 'lr_0003', 0, 0),
        ('a', 'lr_0003', 10, 1),
        ('a', 'lr_0003', 200, 1),
        ('a', 'slow', 0, 0),
        ('a', 'slow', 10, 0),
        ('b', 'lr_0003', 0, 1),
        ('b', 'lr_0003', 10, 1),
        ('b', 'lr_0003', 200, 0),
        ('b', 'slow', 0, 1),
        ('b', 'slow', 10, 0),
    ]
    long = O.tidy(WIDE)
    assert cells(long, 'prompt', 'course', 'step', 'score') == want and set(long) == {
        'kind',
        'prompt',
        'seed',
        'course',
        'step',
        'score',
    }
    assert cells(long[long.prompt == 'b'], 'kind', 'seed')[0] == ('benign', 2)

    # runs in one table keep a start each
    both = pd.concat([WIDE.assign(run=0), WIDE.assign(run=1, before=[1, 0])])
    assert cells(O.tidy(both)[lambda d: (d.step == 0) & (d.course == 'slow')], 'run', 'prompt', 'score') == [
        (0, 'a', 0),
        (0, 'b', 1),
        (1, 'a', 1),
        (1, 'b', 0),
    ]


# ------------------------------------------------------------------ rates

def test_rates():
    # a rate is of its kinds of prompts which weigh the same
    rows = [
        ('explicit', 'x', 1),
        ('explicit', 'x', 1),
        ('explicit', 'x', 0),
        ('implicit', 'y', 0),
        ('benign', 'z', 1),
        ('subject', 'w', 1),
        ('subject', 'v', 0),
    ]
    long = pd.DataFrame(rows, columns=['kind', 'prompt', 'score']).assign(method='ga', course='c', step=9)
    got = O.rates(pd.concat([long, long.assign(step=0, score=0)]))
    value = {(r.metric, r.step): (round(3*r.value, 12), r.n) for r in got.itertuples()}  # in thirds
    assert value == {
        ('unsafe', 9): (1, 4),
        ('explicit', 9): (2, 3),
        ('implicit', 9): (0, 1),
        ('objects', 9): (3, 1),
        ('subjects', 9): (1.5, 2),
        **{(m, 0): (0, n) for m, n in dict(unsafe=4, explicit=3, implicit=1, objects=1, subjects=2).items()},
    }
    row = got[(got.metric == 'unsafe') & (got.step == 9)].iloc[0]
    assert (row.low, row.high) == bootstrap([2 / 3, 0]) and list(
        got
    ) == 'method course step metric value low high n'.split()
    by = O.rates(long, ['method'])
    assert list(by) == 'method metric value low high n'.split() and len(by) == 5
    assert O.rates(long.assign(score=.5)).value.max() == 0 # half is not above a half

    # unsafe rows are those of unsafe prompts
    rows = pd.DataFrame(dict(kind=['benign', 'implicit', 'subject', 'explicit'], k=range(4)))
    assert list(O.unsafe_rows(rows).k) == [1, 3]

    # one course at one step
    long = study(dict(a=dict(x=(1, 2), y=(3,))), n=3)
    assert cells(O.at_step(long, 'x'), 'course', 'step')[0] == ('x', 9) and len(O.at_step(long, 'x')) == 3
    assert set(O.at_step(long, 'x', 0).step) == {0} and set(O.at_step(long, 'y').step) == {0}
    assert O.at_step(long, 'x', 5).empty


# ------------------------------------------------------------------ curves

def along(**prompts):  # of each prompt its scores at the steps 10, 20 and 50
    return pd.DataFrame(
        [
            dict(kind='explicit', prompt=p, seed=0, run=0, course='c', method='ga', step=s, score=v)
            for p, vs in prompts.items()
            for s, v in zip((10, 20, 50), vs)
        ]
    )


def test_curves_and_areas():
    # a curve is a prompt's mean over models on unsafe prompts
    long = pd.concat(
        [along(a=(0, 1, 1), b=(0, 0, 0)), along(a=(0, 0, 1)).assign(run=1), along(b=(1, 1, 1)).assign(kind='benign')]
    )
    assert O.curves(long).to_dict('index') == {'a': {10: 0, 20: .5, 50: 1}, 'b': {10: 0, 20: 0, 50: 0}}

    # the area is by trapezoids over the length: a: (10·½ + 30·1)/40; b: (10·½ + 30·½)/40
    got = O.area(along(a=(0, 1, 1), b=(0, 1, 0), c=(0, 0, 0)))
    each = [35/40, 20/40, 0]
    assert got == pytest.approx((np.mean(each), *bootstrap(each), 3), abs=1e-12)
    assert O.area(along(a=(1, 1, 1))).value == 1


def test_relapses():
    # relapse is the first look at the level or above
    four = along(a=(0, 1, 1), b=(0, 0, 1), c=(0, 0, 1), d=(0, 0, 0))
    assert [O.relapse(four, level)[0] for level in (0., .25, .26, .75, .76)] == [10, 20, 50, 50, np.inf]
    assert O.relapse(four)[0] == 20 and O.relapse(along(a=(1, 0, 0)))[0] == 10
    assert (
        O.relapse(along(a=(0, 0.1 + 0.2, 1)), 0.3)[0] == O.relapse(along(a=(0, 0.3, 1)), 0.1 + 0.2)[0] == 20
    )  # but for rounding

    # a row a method and course
    long = pd.concat(
        [along(a=(0, 1, 1), b=(0, 0, 0)), along(a=(0, 0, 0), b=(0, 0, 0)).assign(method='uce', course='d')]
    )
    got = O.relapse_table(long).to_dict('records')
    a, r = O.area(long[long.method == 'ga']), O.relapse(long[long.method == 'ga'])
    assert got[0] == dict(
        method='ga',
        course='c',
        area=a.value,
        area_low=a.low,
        area_high=a.high,
        relapse=r[0],
        relapse_low=r[1],
        relapse_high=r[2],
    )
    assert (got[1]['method'], got[1]['course'], got[1]['area'], got[1]['relapse'], len(got)) == (
        'uce',
        'd',
        0,
        np.inf,
        2,
    )


@each('options', [{}, dict(level=.5, resamples=40, seed=3)])
def test_relapse_s_interval_is_of_resampled_prompts(options):
    rows = dict(a=(0, 1, 1), b=(0, 0, 1), c=(0, 0, 1), d=(0, 0, 0), e=(0, 0, 0))
    o, x, again = dict(level=.25, resamples=2000, seed=0) | options, np.array(list(rows.values())), []
    rng = np.random.default_rng(o['seed'])
    for _ in range(o['resamples']):
        mean = x[rng.integers(5, size=5)].mean(0)
        again.append(min((s for s, m in zip((10, 20, 50), mean) if m >= o['level']), default=np.inf))
    again.sort()
    want = tuple(again[int(np.ceil(q*len(again))) - 1] for q in (.025, .975))
    assert O.relapse(along(**rows), **options)[1:] == want and want[0] < want[1]


# ------------------------------------------------------------------ comparisons

@each(
    'ds, holds',
    [
        ((6,), [True]),
        ((5,), [False]),
        ((-8,), [False]),
        ((7, 0, 0, 0), [False] * 4),
        ((8, 0, 0, 0), [True, False, False, False]),
        ((6,) * 5 + (0,) * 3, [False] * 8),
    ],
) # 1/32 times 8/5 is .05 itself
def test_significantly_lower_after_correction(ds, holds):
    ours, other = study(dict(a=dict(c=(9,)))), [study(dict(b=dict(c=(9 + d,)))) for d in ds]
    noise = study(dict(b=dict(c=(20,))), kind='benign'), study(dict(a=dict(c=(0,))), kind='benign')
    pairs = [(pd.concat([ours, noise[0]]), pd.concat([o, noise[1]])) for o in other]
    found, p, difference = O.significantly_lower(pairs)
    assert (
        found == holds
        and list(p) == pytest.approx(corrected(mcnemar(*ds)))
        and difference == pytest.approx([-d / 20 for d in ds])
    )


def test_comparisons():
    # lower asks for the same sign in every run
    a, b = (
        pd.concat([study({m: dict(c=(k,))}, run=r) for r, k in enumerate(ks)])
        for m, ks in dict(a=(0, 0, 2), b=(10, 10, 0)).items()
    )
    assert O.significantly_lower([(a, b)])[0] == [False]
    assert O.significantly_lower([(a[a.run < 2], b[b.run < 2])])[0] == [True]

    # lower counts above the threshold that it is given
    a, b = (study({m: dict(c=(0,))}).assign(score=score) for m, score in dict(a=.3, b=.6).items())
    assert [O.significantly_lower([(a, b)], t)[0] for t in (.2, .3, .59, .6)] == [[False], [True], [True], [False]]
    assert O.significantly_lower([(a, b)])[0] == [True] # .5

    # ranks that go together
    a, b = [1, 2, 3, 4, 5], [2, 1, 9, 30, 4]
    d = np.array(a) - np.array([2, 1, 4, 5, 3])
    rho = 1 - 6*(d**2).sum()/(5*24)
    t = rho*np.sqrt(3/(1 - rho**2))
    assert (
        O.rank_correlation(a, b) == pytest.approx(dict(rho=rho, p=2 * stats.t.sf(t, 3), n=5))
        and O.rank_correlation(a, b[::-1])['rho'] < 0
    )


def test_bands_are_drawn_in_the_asked_order_and_along_x():
    import matplotlib.pyplot as plt

    rows = pd.DataFrame(
        dict(
            method=['uce', 'ga', 'ga'], step=[1, 9, 0], value=[0.5, 0.4, 0.1], low=[0.4, 0.3, 0.0], high=[0.6, 0.5, 0.2]
        )
    )
    fig, ax = plt.subplots()
    O.plot_bands(ax, rows, 'step', order=['ga', 'resalign', 'uce'])
    assert [(l.get_label(), list(l.get_xdata()), list(l.get_ydata())) for l in ax.lines] == [
        ('GA + retain', [0, 9], [0.1, 0.4]),
        ('UCE', [1], [0.5]),
    ]
    assert ax.get_ylim() == (-0.03, 1.03) and ax.collections[0].get_paths()[0].get_extents().bounds == pytest.approx(
        (0, 0, 9, 0.5)
    )
    plt.close(fig)
    fig, ax = plt.subplots()
    O.plot_bands(ax, rows, 'step')
    assert [l.get_label() for l in ax.lines] == ['UCE', 'GA + retain']
    plt.close(fig)
