"Further fine-tunings, attacks and curvature: rates, what an attack adds, ranks that go together, by hand."
from itertools import permutations

import pandas as pd, pytest

from resalign.studies import attack as A
from resalign.studies import courses as C
from resalign.studies.attack import rates_of
from resalign.studies.models import UNSAFE


def pictures(rates, **about): # one rate a model
    return pd.DataFrame([dict(about, run=run, kind=kind, prompt=f'{kind}{k}', seed=7, detector='detector-vice',
                              score=float(k < 10*r)) for run, r in enumerate(rates) for kind in UNSAFE for k in range(10)])


def test_the_unsafe_rate_of_every_model_and_of_all():
    about = dict(method='ga', course='slow')
    scores = pd.concat([pictures([0., .1], phase='before', **about), pictures([.4, .8], phase='step_0300', **about)])
    rows = rates_of(scores, 'vice', C.KEYS)
    assert set(rows.metric) == {'unsafe', 'explicit', 'IP'}
    rows = rows[rows.metric == 'unsafe'].set_index(['phase', 'seed'])
    assert dict(rows.value) == pytest.approx({('before', 0): 0, ('before', 1): .1, ('step_0300', 0): .4,
                                              ('step_0300', 1): .8, ('before', 'all'): .05, ('step_0300', 'all'): .6})
    assert dict(rows.n) == {k: 2 if k[1] == 'all' else 20 for k in rows.index}


def test_the_columns_of_each_study():
    rows = pd.DataFrame([dict(method='ga', seed='all', course=c, phase=p, step=s, metric='IP', value=.1, low=0, high=1, n=3)
                         for c, p, s in (('share_020', 'before', 0), ('share_020', 'step_0300', 300))])
    assert list(C.tidy_study('resurgence', rows).step) == [0, 300]
    assert list(C.tidy_study('adversaries', rows).phase) == ['before', 'after']
    assert list(C.tidy_study('contamination', rows).share) == [.2, .2]
    assert list(C.tidy_study('contamination', rows.assign(course='share_000')).share) == [0, 0]


def test_an_attack_counts_by_what_it_adds_to_its_control():
    rates = dict(none=[.1, .1, .1], random=[.3, .2, .4], prefix=[.8, .8, .7], bell=[.1, .2, .1])
    scores = pd.concat([pictures(r, method='ga', attack=a, phase='before') for a, r in rates.items()])
    tests = A.attack_tests(scores, 'vice').set_index('attack')
    assert dict(tests.control) == dict(prefix='random', bell='none')
    assert dict(tests.difference) == pytest.approx(dict(prefix=1.4/3, bell=.1/3))
    assert dict(tests.p) == dict(prefix=2/8, bell=1) and list(tests.p_holm) == [.5, 1]
    table = A.attack_table(scores.assign(score=scores.score*(scores.kind == 'implicit')), 'vice')
    whole = table[(table.seed == 'all') & (table.attack == 'prefix')].set_index('metric').value
    assert dict(whole) == pytest.approx(dict(unsafe=2.3/6, explicit=0, IP=2.3/3))


def test_ranks_that_go_together():
    "Spearman's, with its p over all pairings; of a bottom below zero its size counts; the original is left out"
    a, b = [1, 2, 3, 4, 5], [2, 1, 9, 30, 4]
    rho = lambda x, y: 1 - 6*sum((p - q)**2 for p, q in zip(x, y))/(5*24)
    found, own = A.rank_test(a, b), rho(a, [2, 1, 4, 5, 3])
    as_far = [abs(rho(a, order)) >= abs(own) - 1e-9 for order in permutations(a)]
    assert found == pytest.approx(dict(rho=own, p=sum(as_far)/len(as_far), n=5))
    curves = pd.DataFrame([dict(method=m, run=s, phase='before', trace=t, top_1=t, bottom=-t)
                           for m, t in dict(original=50., ga=1., uce=2., salun=3.).items() for s in (0, 1)])
    main = pd.DataFrame([dict(method=m, seed=s, phase=p, finetune='none', metric='unsafe', value=v, low=v, high=v, n=1)
                         for m, vs in dict(original=(.9, .1, .2), ga=(.1, .2, .3), uce=(.1, .6, .3), salun=(.0, .7, .9)).items()
                         for s in (0, 1, 'all') for p, v in zip(('before', 'subjects', 'varied'), vs)])
    points = A.with_rise(curves, main).set_index(['method', 'seed'])
    assert len(points) == 8 and points.rise['uce', 1] == pytest.approx(.5) and points.rise['original', 0] == pytest.approx(-.7)
    flat = A.flat_and_resilient(points.reset_index()).set_index('measure')
    assert list(flat.rho) == pytest.approx([1, 1, 1]) and set(flat.n) == {3} and list(flat.p) == pytest.approx([2/6]*3)
