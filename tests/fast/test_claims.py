"""Every rule of the ledger on both sides of its boundary; and each claim against made-up tables in which all hold, and
against the one change by which it must not."""

import functools

import numpy as np, pandas as pd, pytest

from resalign.core.settings import params
from resalign.measure.statistics import UNTESTABLE
from resalign.studies import claims as C
from resalign.studies import attack, fronts, hypergradients, phenomenon, table as main_table
from each import each

SEEDS = [str(s) for s in range(11)]
LIMIT = .0687/.3598


def series(*values): return pd.Series(values, [str(k) for k in range(len(values))], dtype=float)
def exact(n): return 1/2**n
def same(t, effect, models, p, least=None):
    return np.allclose(t, (effect, models, p, exact(models) if least is None else least), equal_nan=True)


# ------------------------------------------------------------------ tests and families

def test_a_test():
    "Effect in the claimed direction, over the models that both have, as many as it takes for a p"
    six = series(*np.arange(6)/10)
    assert same(C.lower(six, six + .1), .1, 6, exact(6)) and same(C.lower(six + .1, six), -.1, 6, 1, exact(6))
    assert C.lower(six, six + .1*(-1)**np.arange(6))[:2] == (0, 6)
    five, four = six.iloc[:5], six.iloc[:4]
    assert same(C.lower(five, six + .1), .1, 5, exact(5))
    assert same(C.lower(four, six + .1), .1, 4, np.nan, np.nan)         # 1/16 at best
    assert C.lower(six, six[::-1] + .1).effect == pytest.approx(.1)     # by name, not by place
    assert C.lower(series(1, 1, 1), pd.Series(dtype=float)).models == 0
    lost = six.where(six.index != '3')
    assert C.lower(lost, six + .1).models == 5

    # one model of seven the other way: 8 of the 128 sums are as large; and all but one are at least minus that
    mixed = series(1, 1, 1, 1, 1, 1, -1)
    assert same(C.lower(series(*[0]*7), mixed), 5/7, 7, 8/128)
    assert same(C.lower(mixed, series(*[0]*7)), -5/7, 7, 127/128, exact(7))

    # zero in exact numbers is zero
    thirds = series(*[.1 + .2]*8)
    assert same(C.lower(series(*[.3]*8), thirds), 0, 8, 1, exact(8)) and thirds.iloc[0] != .3
    assert verdicts([[C.lower(series(*[.3]*8), thirds)]]) == ['not reproduced']


def test_one(p, effect=.1, models=8): return C.Test(effect, models, p, exact(models))
test_one.__test__ = False
def some(*ps): return [test_one(p) for p in ps]
def passes(n, models=8): return [test_one(exact(models), models=models)]*n
def wrong(effect): return [test_one(exact(8), effect)]

def verdicts(claims): return [C.judged(*c) for c in C.families(claims)]
def holding(claims): return [C.held(tests) for _, tests in C.families(claims)]

R, P, N = 'reproduced', 'partly', 'not reproduced'

@each('claims, expected', [
    ([passes(1)]*12, [R]*12),                                             # 12/256
    ([passes(1)]*13, [UNTESTABLE]*13),                                    # 13/256
    ([passes(1, 9)]*13, [R]*13),
    ([passes(9)]*12, [R]*12),                                             # a claim is one test, however many it has
    ([passes(40)], [R]), ([passes(40), passes(1)], [R, R]),
    ([passes(5) + wrong(0.)], [P]), ([passes(5) + wrong(-.1)], [P]),      # zero agrees with nothing; the other sign
    ([wrong(-.1)], [N]), ([wrong(0.)], [N]), ([wrong(-.1)*2], [N]),
    ([some(.0499)], [R]), ([some(.05)], [N]), ([some(.0501)], [N]),
    ([some(.0499, .0499, .0499)], [R]),                                   # the largest, which nothing is added to
    ([some(.0499, .05)], [N]), ([some(.0249, .05)], [P]), ([some(.0251, .05)], [N]), # 2*.0249 of two tests
    ([some(.0249), some(.0499)], [R, R]), ([some(.0251), some(.03)], [N, N]),        # two claims
    ([some(.02, .0249), some(.9)], [R, N]), ([some(.02, .0251), some(.9)], [N, N]),
    ([some(.012, .2), some(.9, .9)], [P, N]), ([some(.013, .2), some(.9, .9)], [N, N]), # 4 tests
    ([some(.004, .01), some(.004, .3), some(.2), [C.VOID]], [R, P, N, UNTESTABLE]),
    ([passes(1) + [C.VOID]], [P]), ([some(.9) + [C.VOID]], [N]),        # nothing holds that could have
    ([passes(13) + [C.VOID]], [UNTESTABLE]), ([passes(12) + [C.VOID]], [P]), # 13 tests, and no claim
    ([passes(1), *[passes(1) + [C.VOID]]*2, *[[C.VOID]]*20], [R, P, P] + [UNTESTABLE]*20), # no members of the family
    ([passes(1)]*12 + [passes(1) + [C.VOID]], [R]*12 + [UNTESTABLE]),      # 12 claims, 13 tests
    ([passes(1, 11) + passes(1, 5)]*2, [P, P]), ([passes(1, 11) + [test_one(.9, models=5)]]*2, [P, P]),
    ([[test_one(.9, models=11), test_one(.9, models=5)]]*2, [N, N]),      # one of two could have held
    ([[C.VOID]], [UNTESTABLE]), ([[C.Test(.1, 4, np.nan, np.nan)]*2], [UNTESTABLE]), ([[]], ['not run yet']),
    ([[], passes(1)], ['not run yet', R])])
def test_verdicts(claims, expected):
    assert verdicts(claims) == expected

def test_all_tests_hold_only_in_claims_that_are_reproduced():
    "And a claim of one test is never partly reproduced"
    rng = np.random.default_rng(0)
    for _ in range(300):
        claims = [[C.VOID if rng.random() < .1 else test_one(p, rng.choice([.1, .1, .1, -.1]))
                   for p in rng.choice([.004, .008, .012, .02, .03, .2], rng.integers(1, 4))] for _ in range(rng.integers(1, 6))]
        for tests, hold, verdict in zip(claims, holding(claims), verdicts(claims)):
            assert hold < len(tests) or verdict == R
            assert len(tests) > 1 or verdict != P
            assert verdict != R or all(t.effect > 0 and t.p < .05 for t in tests)
            assert (hold > 0) == (verdict == P) or verdict == R

def test_the_weakest():
    "Of a claim's tests: the smallest effect, the fewest models, the largest p, now and at best"
    tests = [C.Test(.1, 9, .03, .002), C.Test(.2, 8, .001, .004)]
    assert C.weakest(tests) == C.weakest(tests[::-1]) == (.1, 8, .03, .004)
    assert C.weakest(tests[:1]) == tests[0]
    assert C.weakest([]) is C.VOID and C.weakest([*tests, C.VOID]) is C.VOID

def test_holm():
    tests = C.corrected([C.Test(.1, 8, p, least) for p, least in ((.04, .03), (.001, .002), (np.nan, np.nan), (.02, .001))])
    assert np.allclose([t.p for t in tests], [.04, .003, np.nan, .04], equal_nan=True)
    assert np.allclose([t.least for t in tests], [.03, .004, np.nan, .003], equal_nan=True)
    claims = [some(.01, .02), some(.015), some(.001) + [C.VOID]]
    (a, in_a), (b, in_b), (void, in_void) = C.families(claims) # two claims, four tests
    assert np.allclose([a.p, b.p, a.least], [.03, .03, 2*exact(8)]) and np.isnan([void.p, void.least]).all()
    assert np.allclose([t.p for t in in_a + in_b], [.03, .03, .03]) and np.isclose(in_void[0].p, .004)


# ------------------------------------------------------------------ made-up tables in which every claim holds

METHODS = ['original', 'ga', 'uce', 'esd-x', 'safegen', 'advunlearn', 'lcfdsd-ng', 'esd-retain', 'ca-retain',
           'resalign-esd', 'resalign-ca', 'resalign-first-order', 'resalign']
LEFT = dict(zip(METHODS, (.8, .5, .3, .6, .615, .62, .63, .4, .35, .12, .11, .04, .02))) # after fine-tuning


def tidy(columns, values, **same): # values: keys -> value, in the order of the first columns; the last is the metric
    "A row a model, larger from seed to seed; one of all models, and other metrics, which no test may read"
    rows = []
    for keys, v in values.items():
        for k, seed in enumerate([*SEEDS, 'all']):
            value = 9. if seed == 'all' else v*(1 + .01*k)
            rows.append(dict(zip(columns, keys), seed=seed, value=value) | same)
    rows = pd.DataFrame(rows)
    unread = [rows[rows.metric == 'unsafe'].assign(metric=m, value=.4) for m in ('IP', 'explicit')]
    return pd.concat([rows, *unread], ignore_index=True)


def look(columns=('method', 'phase', 'finetune', 'metric')):
    values = {}
    for m in METHODS:
        values[m, 'before', 'none', 'unsafe'] = .8 if m == 'original' else .01
        values |= {(m, d, a, 'unsafe'): LEFT[m] for d in ('subjects', 'varied') for a in ('full', 'lora')}
        values |= {(m, 'before', 'none', 'objects'): .9, (m, 'before', 'none', 'CMMD'): .1,
                   (m, 'subjects', 'lora', 'objects'): 0., (m, 'subjects', 'lora', 'CMMD'): 9.}
    return tidy(columns, values).reindex(columns=main_table.COLUMNS)

def undone():
    rows = [dict(concept='vice', method=m, seed=s, finetune=f'{d}-{a}', metric=k, n=60, before=.8 if m == 'original' else .05,
                 after=.3 if k == 'unsafe' else 0.) for m in ('original', 'ga', 'uce', 'salun') for s in range(4)
            for d in ('subjects', 'varied') for a in ('full', 'lora') for k in ('unsafe', 'IP', 'objects')]
    return pd.DataFrame(rows)[phenomenon.COLUMNS]

def front():
    points = {('original', 'as chosen'): (.9, .1), ('ga', 'deep'): (.1, .9), ('ga', 'cheap'): (.5, .22), ('ga', 'mild'): (.6, .1),
              ('uce', 'a'): (.4, .2), ('esd-x', 'dear'): (.01, .9), ('resalign', 'a'): (.02, .2), ('resalign', 'b'): (.3, .1)}
    rows = [dict(method=m, setting=name, seed=s, unsafe_after=v*(1 + .01*k), quality=q, subject_kept=.5, n=1)
            for (m, name), (v, q) in points.items() for k, s in enumerate([*SEEDS, 'all'])]
    return pd.DataFrame(rows).reindex(columns=fronts.FRONT)

def variants():
    left = dict(beta_0=.6, one=.4, mixture_alone=.3, lora_alone=.3, full_alone=.3, full=.2, K_5=.1)
    values = {('ga', v, p, 'unsafe'): x if p == 'varied-lora' else .01 for v, x in left.items() for p in ('before', 'varied-lora')}
    values |= {('ga', v, 'before', 'CMMD'): x for v, x in dict(beta_02=.1, full=.2, beta_095=.3).items()}
    return tidy(('method', 'setting', 'phase', 'metric'), values).reindex(columns=fronts.ABLATION)

def twice(key, places, left):
    values = {(m, c, p, k): .8 if (m, p) == ('original', 'before') else left[m] if p == 'after' else .01
              for m in left for c in places for p in ('before', 'after') for k in ('unsafe', 'plasticity')}
    return tidy(('method', key, 'phase', 'metric'), values)

def adversaries():
    places = ['dreambooth', 'custom', 'svdiff', 'inversion', 'shaded', 'pool_same']
    return twice('course', places, dict(original=.8, ga=.7, uce=.6, resalign=.1))

def shares():
    t = twice('share', (0., .01, .05, .1, .2, 1.), dict(original=.8, ga=.7, uce=.6, resalign=.1))
    t.loc[(t.metric == 'plasticity') & (t.seed != 'all'), 'value'] = .5
    return t

def long_runs():
    left = dict(original=.8, ga=.7, uce=.6, resalign=.1)
    values = {(m, c, s, k): (.8 if m == 'original' else .01) if s == 0 else left[m]
              for m in left for c in ('rank_4', 'slow', 'rank_16') for s in (0, 25, 500) for k in ('unsafe',)}
    return tidy(('method', 'course', 'step', 'metric'), values)

def attacks():
    kinds = ('none', 'random', 'redraw', 'prefix', 'bell', 'noise', 'completion')
    values = {(m, a, p, k): .8 if m == 'original' else .1 for m in ('original', 'resalign') for a in kinds
              for p in ('before', 'varied-lora') for k in ('unsafe',)}
    return tidy(('method', 'attack', 'phase', 'metric'), values).reindex(columns=attack.ATTACK)

def landscape():
    "Traces of either sign: what counts is their size"
    traces = dict(original=-9., resalign=-1., uce=2., salun=-3., ga=4., **{'esd-x': -5., 'ca-retain': 6.})
    rows = [dict(method=m, seed=s, trace=v*(1 + .01*k), top_1=v, bottom=-v, before=.01, rise=abs(v)/10)
            for m, v in traces.items() for k, s in enumerate(SEEDS)]
    return pd.DataFrame(rows)

def slopes():
    "A slope of 1, predicted with an error"
    error = {'moreau-1': .5, 'first-order': 1., 'adjoint': .1}
    rows = [dict(finetuning='lora-sgd', where=w, seed=s, length=n, direction=d, method=m, measured=1., predicted=1 + e*n)
            for m, e in error.items() for w in ('start', 'late') for s in range(6) for n in (.1, 1.) for d in (0, 1)]
    return pd.DataFrame(rows).reindex(columns=hypergradients.COLUMNS)


WORLD = dict(phenomenon=undone(), main=look(), fronts=front(), ablation=variants(), adversaries=adversaries(),
             contamination=shares(), resurgence=long_runs(), attack=attacks(), landscape=landscape(), hypergradients=slopes())
for t in WORLD.values(): t['seed'] = t.seed.astype(str) # as `read_table` reads it
CLAIMS = C.all_claims()

@pytest.fixture(autouse=True, scope='module')
def once():
    "All sign flips of one list of differences are tried once"
    known = functools.cache(lambda d, alternative: C_SIGN_FLIP(np.array(d), alternative))
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(C, 'sign_flip', lambda d, alternative: known(tuple(d), alternative))
        yield

C_SIGN_FLIP = C.sign_flip


def judge(name, table) -> dict: # claim -> verdict
    own = CLAIMS[CLAIMS.table == name]
    found = C.family_of(own.find, C.Numbers(C.TABLES[name][1](table), table))
    return {id: C.judged(f.claim, f.tests) for id, f in zip(own.id, found)}

def find(id, table): # Finding, before any correction
    claim = CLAIMS.set_index('id').loc[id]
    return C.found(claim.find, C.Numbers(C.TABLES[claim.table][1](table), table))

def test_every_claim_holds_where_all_is_as_claimed():
    assert set(WORLD) == set(C.TABLES) and set(CLAIMS.table) == {*C.TABLES, ''}
    wrong = {id: v for name, t in WORLD.items() for id, v in judge(name, t).items() if v != 'reproduced'}
    assert not wrong


def changed(name, to, **where):
    "The table with another value of every model in some rows; columns may be named by a prefix of the value"
    t = WORLD[name].copy()
    column = to.pop('column', 'value') if isinstance(to, dict) else 'value'
    rows = np.logical_and.reduce([t[k].isin(v if isinstance(v, (list, tuple)) else [v]) for k, v in where.items()])
    assert rows.any()
    t.loc[rows, column] = to['to'] if isinstance(to, dict) else to
    return t

S, V = dict(phase='subjects'), dict(phase='varied')

BREAKS = [ # table, new value, rows, claims that change, each with its verdict
    ('main', .005, dict(method='esd-x', **S, metric='unsafe'), {'returns-esd-x': P, 'below-published': P}), # below its start
    ('main', .01, dict(method='safegen', **V, finetune='full', metric='unsafe'), {}),                       # the mean still rises
    ('main', .004, dict(method='advunlearn', **V, metric='unsafe'), {'returns-advunlearn': P, 'below-published': P}),
    ('main', .005, dict(method='lcfdsd-ng', phase=['subjects', 'varied'], metric='unsafe'),
     {'returns-lcfdsd-ng': 'not reproduced', 'below-published': P, 'below-all': P}),
    ('main', .41, dict(method='safegen', phase='before', metric='unsafe'), {}), # the original has .84 in the mean
    ('main', .43, dict(method='safegen', phase='before', metric='unsafe'),
     {'returns-safegen': UNTESTABLE, 'below-published': P, 'below-all': P}),
    ('main', .41, dict(method='esd-retain', phase='before', metric='unsafe'), {}),
    ('main', .43, dict(method='esd-retain', phase='before', metric='unsafe'), {'term-helps-esd': UNTESTABLE, 'below-all': P}),
    ('main', .43, dict(method='resalign-ca', phase='before', metric='unsafe'), {'above-ascent-ca': UNTESTABLE}),
    ('main', .43, dict(method='resalign', phase='before', metric='unsafe'), {}), # the rate after is what counts
    ('main', .01, dict(metric=['IP', 'explicit']), {}),
    ('main', .2, dict(method='resalign', **S, metric='unsafe'),
     {'stays-low': P, 'solving-helps': P, 'above-ascent-esd': P, 'above-ascent-ca': P}),
    ('main', .015, dict(method='uce', phase=['subjects', 'varied'], metric='unsafe'), {'below-all': P}),
    ('main', .02, dict(method='resalign-first-order', **V, metric='unsafe'), {'solving-helps': P}),
    ('main', .5, dict(method='resalign-esd', **V, metric='unsafe'), {'term-helps-esd': P}),
    ('main', .01, dict(method='resalign-esd', **V, metric='unsafe'), {'above-ascent-esd': P}),
    ('main', .1, dict(method='ca-retain', **S, metric='unsafe'), {'term-helps-ca': P}),
    ('main', .015, dict(method='resalign-ca', **S, metric='unsafe'), {'above-ascent-ca': P}),
    ('main', .8, dict(method='resalign', metric='objects', phase='before'), {'quality-kept': 'not reproduced'}),
    ('main', .14, dict(method='resalign', metric='CMMD', phase='before'), {}), # .1 of the original, and .05
    ('main', .17, dict(method='resalign', metric='CMMD', phase='before'), {'distance-kept': 'not reproduced'}),
    ('main', .06, dict(method='original', metric='CMMD', phase='before'), {}),
    ('main', .03, dict(method='original', metric='CMMD', phase='before'), {'distance-kept': 'not reproduced'}),
    ('main', -9., dict(method='resalign', metric='CMMD', phase='before'), {}),
    ('main', .3, dict(method='original', **S, metric='unsafe'), {'stays-low': P}), # the original itself has lost it
    ('ablation', .3, dict(setting='one', phase='varied-lora', metric='unsafe'),
     {'component-configurations': 'not reproduced'}),
    ('ablation', .3, dict(setting='beta_0', phase='varied-lora', metric='unsafe'), {'component-hypergradient': 'not reproduced'}),
    ('ablation', .2, dict(setting='mixture_alone', phase='varied-lora', metric='unsafe'),
     {'component-data': 'not reproduced', 'component-pool': P}),
    ('ablation', .1, dict(setting='lora_alone', phase='varied-lora', metric='unsafe'), {'component-pool': P}),
    ('ablation', .1, dict(setting='full_alone', phase='varied-lora', metric='unsafe'), {'component-pool': P}),
    ('ablation', .25, dict(setting='K_5', phase='varied-lora', metric='unsafe'), {'component-solve': 'not reproduced'}),
    ('ablation', .05, dict(setting='beta_095', phase='before', metric='CMMD'), {'beta-costs': P}),
    ('ablation', .4, dict(setting='beta_02', phase='before', metric='CMMD'), {'beta-costs': P}),
    ('adversaries', .2, dict(method='resalign', course='inversion', phase='after', metric='unsafe'), {'unseen-methods': P}),
    ('adversaries', .2, dict(method='resalign', course='shaded', phase='after', metric='unsafe'), {'unseen-data': 'not reproduced'}),
    ('adversaries', .2, dict(method='original', course='shaded', phase='after', metric='unsafe'), {'unseen-data': UNTESTABLE}),
    ('adversaries', .7, dict(method='resalign', course='pool_same', phase='after', metric='unsafe'), {}),
    ('contamination', .7, dict(method='resalign', share=.01, phase='after', metric='unsafe'), {'contaminated': P}),
    ('contamination', .7, dict(method='resalign', share=.2, phase='after', metric='unsafe'),
     {'contaminated': P, 'contaminated-below': P}),
    ('contamination', .41, dict(method='uce', phase='before', metric='unsafe'), {}),
    ('contamination', .43, dict(method='uce', phase='before', metric='unsafe'), {'contaminated-below': P}),
    ('contamination', .43, dict(method=['ga', 'uce'], phase='before', metric='unsafe'), {'contaminated-below': UNTESTABLE}),
    ('contamination', .9, dict(method='resalign', share=[0., 1.], phase='after', metric='unsafe'), {}),
    ('contamination', .35, dict(method='resalign', share=.2, phase='after', metric='plasticity'),
     {'contaminated-learns': 'not reproduced'}),
    ('resurgence', .7, dict(method='resalign', course='slow', step=25, metric='unsafe'), {'long-runs': P}),
    ('resurgence', .7, dict(method='resalign', course='rank_16', step=500, metric='unsafe'), {'long-runs': P}),
    ('resurgence', .05, dict(method='uce', step=500, metric='unsafe'), {'long-runs-below': P}),
    ('resurgence', .41, dict(method='ga', step=0, metric='unsafe'), {}),
    ('resurgence', .43, dict(method='ga', step=0, metric='unsafe'), {'long-runs-below': P}),
    ('attack', .7, dict(method='resalign', attack='prefix', phase='before', metric='unsafe'), {'withstands-prefix': P}),
    ('attack', .7, dict(method='resalign', attack='bell', phase='varied-lora', metric='unsafe'), {'withstands-bell': P}),
    ('attack', .7, dict(method='resalign', attack='noise', metric='unsafe'), {'withstands-noise': 'not reproduced'}),
    ('attack', .7, dict(method='resalign', attack='completion', phase='before', metric='unsafe'), {'withstands-completion': P}),
    ('attack', .9, dict(method='resalign', attack=['none', 'random', 'redraw'], metric='unsafe'), {}),
    ('landscape', dict(column='trace', to=-8.), dict(method='resalign'), {'flat': 'not reproduced', 'flatter': P}),
    ('landscape', dict(column='rise', to=.1), {'method': ['uce', 'salun', 'ga', 'esd-x', 'ca-retain', 'resalign']},
     {'flatter': 'not reproduced'}),
    ('hypergradients', dict(column='predicted', to=3.), dict(method='moreau-1', length=1.), {'predicts': 'not reproduced'}),
    ('hypergradients', dict(column='predicted', to=3.), dict(method='moreau-1', length=.1), {}),
    ('phenomenon', dict(column='after', to=.01), dict(finetune=['varied-full', 'varied-lora'], metric='unsafe'), {'comes-undone': P}),
    ('phenomenon', dict(column='after', to=.01), dict(method='ga', metric='unsafe'), {}), # the others outweigh it
    ('phenomenon', dict(column='before', to=.7), dict(method='ga', metric='unsafe'), {}), # had not unlearned, and is left out
    ('phenomenon', dict(column='before', to=.11), dict(method='original', metric='unsafe'), {}), # twice .05, and more
    ('phenomenon', dict(column='before', to=.09), dict(method='original', metric='unsafe'), {'comes-undone': UNTESTABLE}),
    ('phenomenon', dict(column='before', to=.7), dict(method=['ga', 'uce', 'salun']), {'comes-undone': UNTESTABLE}),
    ('fronts', dict(column='unsafe_after', to=.01), dict(method='ga', setting='cheap'),
     {'below-ga': 'not reproduced', 'below-fronts': P}),
    ('fronts', dict(column='unsafe_after', to=.01), dict(method='uce'), {'below-fronts': P}),
    ('fronts', dict(column='quality', to=.9), dict(method='ga'), {'below-ga': UNTESTABLE})] # and the others are compared

@each('k', range(len(BREAKS)))
def test_a_claim_reads_what_it_says(k):
    name, to, rows, expected = BREAKS[k]
    got = judge(name, changed(name, to, **rows))
    assert {id: v for id, v in got.items() if v != 'reproduced'} == expected


# ------------------------------------------------------------------ words

def test_words():
    main = WORLD['main']
    mean = 1 + .01*np.mean(range(11))
    pct = lambda x: f'{100*x*mean:.1f}%'
    assert find('returns-safegen', main).ours == ' -> '.join(map(pct, (.01, .615, .615)))
    half = changed('main', .5, method='safegen', phase='before', metric='unsafe')
    assert find('returns-safegen', half).ours.endswith(': had not unlearned')
    assert find('stays-low', main).ours == f'{pct(.01)} -> subjects {pct(.02)}, varied {pct(.02)}'
    assert f"unsafe rate below {LIMIT:.0%} of the original's {pct(.8)}" in find('stays-low', main).test
    gone = find('stays-low', changed('main', .3, method='original', phase='subjects', metric='unsafe')).ours
    assert gone.endswith('; the original itself falls: subjects 30.0%')
    assert find('below-all', main).ours == f'{pct(.02)}, better than UCE ({pct(.3)})'
    assert find('below-published', main).ours == '; '.join(f'{d}: {pct(.02)}, better than ESD-x ({pct(.6)})' for d in C.DATA)
    level = changed('main', .3, method=['uce', 'resalign'], phase=['subjects', 'varied'], metric='unsafe')
    assert find('below-all', level).ours == '30.0%, as good as UCE (30.0%)'
    above = changed('main', .4, method='resalign', phase=['subjects', 'varied'], metric='unsafe')
    assert find('below-all', above).ours == f'40.0%, worse than UCE ({pct(.3)})'
    idle = find('below-all', changed('main', .5, method=['safegen', 'uce'], phase='before', metric='unsafe'))
    assert idle.ours == f'{pct(.02)}, better than CA + retain ({pct(.35)}); UCE, SafeGen had not unlearned'
    assert idle.test == 'unsafe rate below that of 8, at after' and [t.models for t in idle.tests] == [11, 0, 11, 0, 11, 11, 11, 11]
    alone = find('term-helps-esd', changed('main', .5, method='esd-retain', phase='before', metric='unsafe'))
    assert alone.ours.endswith(f'varied: {pct(.12)}, nothing to compare; ESD + retain had not unlearned')
    assert [t is C.VOID for t in alone.tests] == [True, True]
    assert find('quality-kept', main).ours == f'Original {pct(.9)}, ResAlign {pct(.9)}'
    assert find('distance-kept', main).ours == f'ResAlign {.1*mean:.3g}, Original {.1*mean:.3g}'
    assert find('distance-kept', main).test == "CMMD less than 0.05 above the original's"
    assert find('below-ga', WORLD['fronts']).ours == f'2.0%, better than GA + retain ({50*mean:.1f}%)'.replace('2.0', f'{2*mean:.1f}')
    dear = changed('fronts', dict(column='quality', to=.9), method='ga')
    assert find('below-ga', dear).ours.endswith(', nothing to compare')
    assert find('flatter', WORLD['landscape']).ours.startswith('rank correlation: trace 1.00, top_1 1.00')
    assert find('predicts', WORLD['hypergradients']).ours == f'moreau-1 {np.log10(.5):.3g}, first-order 0'

def test_what_a_zero_can_not_show():
    "A rate of zero can't be lowered; and two rates of zero are no difference"
    none = changed('main', 0., method='resalign-first-order', phase='varied', metric='unsafe')
    assert [t.models for t in find('solving-helps', none).tests] == [11, 0]
    both = changed('main', 0., method=['safegen'], phase=['before', 'subjects'], metric='unsafe')
    assert find('returns-safegen', both).tests[0][:3] == (0, 11, 1)
    assert judge('main', both)['returns-safegen'] == 'partly'

def test_too_few_models():
    few = {n: WORLD['main'][WORLD['main'].seed.isin(SEEDS[:n])] for n in (3, 4, 5, 8, 9)}
    for n in (3, 4): # by themselves
        assert set(judge('main', few[n]).values()) == {UNTESTABLE}
        assert all(np.isnan(t.p) and t.models == n for t in find('stays-low', few[n]).tests)
    for n in (5, 8): # in this family
        assert set(judge('main', few[n]).values()) == {UNTESTABLE}
        assert find('stays-low', few[n]).tests[0].p == exact(n)
    assert set(judge('main', few[9]).values()) == {R} # 14 claims, however many tests

    # some of the methods: their claims are no members of the family, and can't be reproduced
    some = WORLD['main'][(WORLD['main'].method != 'safegen') | WORLD['main'].seed.isin(SEEDS[:3])]
    got = {id: v for id, v in judge('main', some).items() if v != R}
    assert got == {'returns-safegen': UNTESTABLE, 'below-published': P, 'below-all': P}


# ------------------------------------------------------------------ the ledger

GPU = pd.DataFrame([('sd14_seconds published', 6., 'a GPU'), ('sd14_gb published', 43.6, 'a GPU')],
                   columns=['name', 'value', 'device'])

@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path))
    (tmp_path/'tables').mkdir()
    return tmp_path/'tables'

def line(id): return C.ledger().set_index('id').loc[id]


def test_nothing_was_run_yet(tables):
    t = C.ledger()
    assert list(t) == 'id claim paper ours test p verdict stage command'.split() and t.id.is_unique and t.claim.is_unique
    assert set(t[t.stage != ''].verdict) == {'not run yet'} and set(t[t.stage == ''].verdict) == {UNTESTABLE}
    assert set(t[t.stage == ''].id) == {'other-models', 'cost'} and t.p.isna().all() and set(t.ours) == {''}
    assert (t.command[t.stage != ''] == 'dvc repro ' + t.stage[t.stage != '']).all()
    assert t.command[t.stage == ''].str.startswith('none: ').all()
    assert '{' not in ''.join(t.paper) and line('stays-low').paper == '0.1% -> 1.9% -> 6.9%'

def test_a_ledger(tables):
    "Each study comes by itself; a table that lacks a method says so; the file has three digits"
    WORLD['main'].to_csv(tables/'main.csv', index=False)
    variants = WORLD['ablation']
    variants[variants.seed.isin(SEEDS[:9]) & (variants.setting != 'K_5')].to_csv(tables/'ablation.csv', index=False)
    GPU.to_csv(tables/'bench_gpu.csv', index=False)
    C.write_ledger()
    t = pd.read_csv(tables/'claims.csv', keep_default_na=False).set_index('id')
    of = CLAIMS.groupby('table').id.agg(set)
    assert set(t.index[t.verdict == 'reproduced']) == (of['main'] | of['ablation']) - {'component-solve'}
    assert t.verdict['component-solve'] == 'not run yet' and t.ours['component-solve'] == 'the table lacks K_5, after, unsafe'
    assert t.test['stays-low'].endswith(': 2 of 2 hold') and t.test['below-all'].endswith(': 8 of 8 hold')
    assert t.p['stays-low'] == f'{len(of["main"])*exact(11):.3g}' # a claim counts once, however many tests it has
    assert t.p['beta-costs'] == f'{5*exact(9):.3g}' # without the missing one
    assert t.ours['cost'] == 'random weights, a GPU: 48 min, 44 GB'

def test_how_many_models_it_takes(tables):
    "Of all claims of the table, those that were run; too few is what can't reach it"
    GPU.to_csv(tables/'bench_gpu.csv', index=False)
    variants = WORLD['ablation']
    def of(models, rows=variants): rows[rows.seed.isin(SEEDS[:models])].to_csv(tables/'ablation.csv', index=False)
    of(3)
    low = line('beta-costs')
    assert low.verdict == UNTESTABLE and low.ours.endswith(' (3 models: too few, it takes 7)') and np.isnan(low.p) # 6/128
    of(6)
    low = line('beta-costs')
    assert low.verdict == UNTESTABLE and low.ours.endswith(' (6 models: too few, it takes 7)')
    assert low.test.endswith(': 0 of 2 hold') and low.p == pytest.approx(6*exact(6))
    of(7)
    enough = line('beta-costs') # 6/128, though none of its tests would hold among 9
    assert enough.verdict == R and 'too few' not in enough.ours and enough.test.endswith(': 2 of 2 hold')
    assert enough.p == pytest.approx(6*exact(7))
    of(6, variants[variants.setting != 'K_5'])
    assert line('beta-costs').ours.endswith(' (6 models: too few, it takes 7)') # 5/64
    rest = variants[~variants.setting.isin(['K_5', 'beta_0', 'beta_02'])]
    of(5, rest)
    assert line('component-pool').ours.endswith(' (5 models: too few, it takes 6)') # 3/64
    of(6, rest)
    left = line('component-pool') # three claims are left
    assert left.verdict == R and 'too few' not in left.ours and left.p == pytest.approx(3*exact(6))
    assert set(C.ledger().set_index('id').verdict[['component-solve', 'component-hypergradient', 'beta-costs']]) == {'not run yet'}

    # one variant of a claim has fewer
    few = variants[(variants.setting != 'lora_alone') | variants.seed.isin(SEEDS[:3])]
    of(11, few)
    assert line('component-pool').verdict == P and line('component-pool').test.endswith(': 2 of 3 hold')
    assert line('component-pool').ours.endswith(' (3 models: too few, it takes 7)') and np.isnan(line('component-pool').p)
    assert line('component-data').verdict == R and 'too few' not in line('component-data').ours

    # six models are enough beside claims that are no members of the family
    few = variants[~variants.setting.isin(['beta_0', 'K_5', 'lora_alone']) | variants.seed.isin(SEEDS[:3])]
    of(6, few)
    assert line('component-data').verdict == R and 'too few' not in line('component-data').ours


def test_the_ledger_in_words(tmp_path):
    rows = [('1', 'one', 'p', 'o', 'reproduced'), ('2', 'two', 'q', '', 'not run yet'), ('3', 'three', '', 'r', 'reproduced')]
    pd.DataFrame(rows, columns='id claim paper ours verdict'.split()).to_csv(tmp_path/'claims.csv', index=False)
    text = C.ledger_in_words(tmp_path)
    cells = [[c.strip() for c in row.strip('|').split('|')] for row in text.splitlines() if row.startswith('|')]
    assert cells[0] == ['claim', 'paper', 'here', 'verdict']
    assert cells[2:] == [['one', 'p', 'o', '**reproduced**'], ['two', 'q', '', '**not run yet**'],
                         ['three', '', 'r', '**reproduced**']]
    assert text.endswith('\n\n3 claims: 2 reproduced, 1 not run yet.')
