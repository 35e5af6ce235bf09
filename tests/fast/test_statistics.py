"""Intervals, tests, corrections and verdicts over models, against plain writings of the formulas and scipy."""

from itertools import product

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from each import each
from resalign.core.settings import UserError
from resalign.measure import statistics as S

NAN, INF = float('nan'), float('inf')
few = settings(max_examples=15, deadline=None, derandomize=True)
small = st.lists(st.integers(-4, 4), min_size=2, max_size=7)


def pictures(rows): # model -> prompt -> values: columns
    flat = [(v, m, p) for m, prompts in rows.items() for p, values in prompts.items() for v in values]
    return [list(column) for column in zip(*flat)]

def wilson_of_none(n, z=stats.norm.ppf(.975)): return z*z/(n + z*z) # the upper end for 0 of n

def refused(words, f, *args, **kw):
    with pytest.raises(UserError, match=words) as e: f(*args, **kw)
    assert '\n' not in str(e.value)


# ------------------------------------------------------------------ means and resamples

ROWS = {'a': {0: [1, 0], 1: [1]}, 'b': {0: [.5], 1: [.25], 2: [0]}, 'c': {7: [1]}}

def test_a_model_is_the_mean_of_its_prompts_which_are_means_of_their_pictures():
    values, models, prompts = pictures(ROWS)
    assert dict(S.model_means(values, models, prompts)) == dict(a=.75, b=.25, c=1)
    assert dict(S.model_means(values, models)) == dict(a=pytest.approx(2/3), b=.25, c=1)
    order = np.random.default_rng(0).permutation(len(values))
    shuffled = [np.array(x, dtype=object)[order] for x in (values, models, prompts)]
    assert dict(S.model_means(*shuffled)) == dict(a=.75, b=.25, c=1)


def plain_resamples(rows, n, rng): # one model, one prompt at a time
    values = [list(map(np.mean, prompts.values())) for prompts in rows.values()]
    for _ in range(n):
        models = [values[rng.integers(len(values))] for _ in values]
        yield np.mean([np.mean([m[rng.integers(len(m))] for _ in m]) for m in models])

def test_resamples_draw_models_and_then_prompts_within():
    table = S._by_prompt(*pictures(ROWS))
    found = S.model_resamples(table, 20_000, seed=3)
    plain = np.array(list(plain_resamples(ROWS, 6000, np.random.default_rng(1))))
    assert np.isclose(found.mean(), 2/3, atol=.005) # .75, .25 and 1
    between = np.var([.75, .25, 1])
    within = np.mean([np.var([.5, 1])/2, np.var([.5, .25, 0])/3, 0])
    assert np.isclose(found.var(), (between + within)/3, rtol=.04)
    assert stats.ks_2samp(found.round(9), plain.round(9)).statistic < .025 # same distribution, atom by atom
    assert (found >= 0).all() and found.max() == 1
    assert (found == S.model_resamples(table, 20_000, seed=3)).all()

def test_a_model_with_fewer_prompts_never_draws_what_fills_its_row_up():
    values, models, prompts = pictures({0: {k: [1] for k in range(9)}, 1: {0: [1]}, 2: {0: [1], 1: [1]}})
    assert (S.model_resamples(S._by_prompt(values, models, prompts), 500) == 1).all()


# ------------------------------------------------------------------ intervals

@each('n, level', [(2, .95), (3, .95), (5, .9), (8, .95), (40, .99)])
def test_quantiles_of_a_normal_bootstrap_give_students_interval(n, level):
    # a normal bootstrap distribution has variance s² (n-1)/n², s² the unbiased one: with s = 1
    x = stats.norm.ppf(S.expanded(n, level))*np.sqrt((n - 1)/n)/np.sqrt(n)
    assert np.isclose(x, stats.t.interval(level, n - 1, 0, 1/np.sqrt(n))[0])

def test_an_interval_is_quantiles_of_the_resamples():
    columns = pictures(ROWS)
    got = S.model_interval(*columns, resamples=500, seed=4, level=.9)
    q = S.expanded(3, .9)
    low, high = np.quantile(S.model_resamples(S._by_prompt(*columns), 500, 4), [q, 1 - q])
    assert got == (pytest.approx(2/3), low, high, 3)

def test_where_everything_agrees_the_interval_is_that_of_the_prompts():
    for value, bounds, low, high in ((0, (0, 1), 0, wilson_of_none(3)), (1, (0, 1), 1 - wilson_of_none(3), 1),
                                     (0, (-1, 1), -wilson_of_none(3), wilson_of_none(3)), (7, None, 7, 7)):
        columns = pictures({0: {k: [value] for k in range(3)}, 1: {k: [value] for k in range(5)}})
        assert S.model_interval(*columns, bounds) == pytest.approx((value, low, high, 2))

@few
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=2, max_size=5), st.integers(0, 9))
def test_an_interval_holds_the_mean_and_stays_where_values_are(models, seed):
    columns = pictures({m: {p: [v] for p, v in enumerate(hits)} for m, hits in enumerate(models)})
    got = S.model_interval(*columns, resamples=300, seed=seed)
    copies = all(hits == models[0] for hits in models) and len(set(models[0])) > 1
    assert 0 <= got.low <= got.high <= 1 and got.n == (1 if copies else len(models))
    assert np.isclose(got.value, np.mean([np.mean(hits) for hits in models]))
    mirror = S.model_interval(1 - np.array(columns[0]), *columns[1:], resamples=300, seed=seed)
    assert np.allclose([mirror.low, mirror.high], [1 - got.high, 1 - got.low])

def test_copies_of_a_model_count_once():
    "With the interval over its prompts; two models that draw the concept never are two"
    hits = np.tile([1]*6 + [0]*14, 9)
    got = S.model_interval(hits, np.repeat(range(9), 20), np.tile(range(20), 9))
    own = np.random.default_rng(0).choice(hits[:20], (4000, 20)).mean(1)
    assert got.n == 1 and np.allclose([got.low, got.high], np.quantile(own, [.025, .975]), atol=.051)
    assert S.model_interval(0*hits, np.repeat(range(9), 20), np.tile(range(20), 9)).n == 9
    narrow = S.model_interval(hits, np.repeat(range(9), 20), np.tile(range(20), 9), level=.6, seed=1)
    assert [narrow.low, narrow.high] == pytest.approx(stats.binom.ppf([.2, .8], 20, .3)/20)

def test_more_models_narrow_an_interval_and_more_pictures_do_not():
    def width(models, prompts):
        hits = np.arange(models)[:, None]%2*np.ones(prompts)
        got = S.model_interval(hits.ravel(), np.repeat(range(models), prompts), np.tile(range(prompts), models))
        return got.high - got.low
    assert width(4, 10) == width(4, 400) > 1.4*width(16, 10)

@each('words, args', [
    ('at least two models, got 1', ([1, 0], ['a', 'a'], [0, 1])),
    ('at least two models, got 0', ([], [], [])),
    ('one each a picture, got 2, 1, 1', ([1, 0], ['a'])),
    ('one each a picture, got 2, 2, 3', ([1, 0], ['a', 'b'], [1, 2, 3])),
    ('values: 1: expected a finite number, got nan', ([1, NAN], ['a', 'b'])),
    ('expected numbers', (['x', 'y'], ['a', 'b'])),
    ('models: 1: expected a name', ([1, 0, 1], [0, NAN, 1])),
    ('models: 0: expected a name', ([1, 0], [None, 'b'])),
    ('prompts: 1: expected a name', ([1, 0], ['a', 'b'], ['p', None])),
    ('values in 0 to 1, got 0 to 2', ([0, 2], ['a', 'b'])),
    ('values in -1 to 1, got -3 to 0', ([0, -3], ['a', 'b'], None, (-1, 1)))])
def test_intervals_that_cannot_be_are_refused(words, args): refused(words, S.model_interval, *args)


# ------------------------------------------------------------------ tests over models

def all_flips(d): return np.array(list(product([1, -1], repeat=len(d))))@np.array(d)

@few
@given(small)
def test_sign_flips_against_every_flip_written_out(d):
    sums = all_flips(d) # whole numbers: ties are exact
    for scale in (1/7, 1e12):
        shrunk = np.array(d)*scale
        assert np.isclose(S.sign_flip(shrunk), (abs(sums) >= abs(sum(d))).mean())
        assert np.isclose(S.sign_flip(shrunk, 'greater'), (sums >= sum(d)).mean())
        assert np.isclose(S.sign_flip(shrunk, 'less'), (sums <= sum(d)).mean())

def pratt(d): # signed ranks: zeros are ranked, and then have no sign
    return np.sign(d)*stats.rankdata(np.abs(d))

@few
@given(small)
def test_wilcoxon_against_every_flip_of_the_ranks(d):
    # a zero's flip changes nothing: taken or not, the share is the same
    sums = all_flips(pratt(d))
    scaled = np.array(d)/7
    assert np.isclose(S.wilcoxon(scaled), (abs(sums) >= abs(sum(pratt(d)))).mean())
    assert np.isclose(S.wilcoxon(scaled, 'greater'), (sums >= sum(pratt(d))).mean())

def test_wilcoxon_agrees_with_scipys_table_where_nothing_is_tied():
    d = np.random.default_rng(0).normal(.4, 1, 9)
    for alternative in ('two-sided', 'less', 'greater'):
        assert np.isclose(S.wilcoxon(d, alternative), stats.wilcoxon(d, method='exact', alternative=alternative).pvalue)

@few
@given(small.filter(any), st.integers(0, 720))
def test_tests_know_neither_order_nor_names_of_the_methods(d, k):
    shuffled = np.random.default_rng(k).permutation(d)
    for test in (S.sign_flip, S.wilcoxon):
        p = test(d)
        assert S.smallest_p(len(d)) <= p + 1e-12 and p <= 1
        assert np.isclose(p, test(shuffled)) and np.isclose(p, test(-np.array(d)))
        assert np.isclose(test(d, 'greater'), test(-np.array(d), 'less'))

def test_fractions_that_should_tie_do():
    assert S.sign_flip([.1, .2, -.3]) == S.sign_flip([1/3]*3 + [-1]) == 1
    assert S.sign_flip([.1 + .2, -.3, .5]) == S.sign_flip([3, -3, 5])
    assert S.wilcoxon([.1 + .2, -.3, .5]) == S.wilcoxon([3, -3, 5])
    assert S.sign_flip([0, 0]) == S.wilcoxon([0, 0, 0]) == 1

def test_beyond_the_exact_number_flips_are_drawn():
    d = np.r_[np.ones(15), -np.ones(4)] # P(|sum| >= 11) of 19 signs
    exact = 2*stats.binom.cdf(4, 19, .5)
    assert np.isclose(S.sign_flip(d), exact, rtol=.1) and S.sign_flip(d) != exact
    d = d[3:]
    assert len(d) == S.ALL_FLIPS and np.isclose(S.sign_flip(d), 2*stats.binom.cdf(4, 16, .5), rtol=1e-12)

@each('words, d', [('at least two models, got 1', [1]), ('at least two models, got 0', []),
                   ('model 1: expected a finite', [1, NAN]), ('model 0: expected a finite', [INF, 1])])
def test_tests_that_cannot_be_are_refused(words, d):
    for name in ('sign_flip', 'wilcoxon'): refused(f'{name}: .*{words}', getattr(S, name), d)

def test_an_unknown_alternative_is_refused():
    for name in ('sign_flip', 'wilcoxon'): refused(f'{name}: alternative', getattr(S, name), [1, 2], 'lower')

def test_differences_are_paired_by_model():
    assert dict(S.differences(pd.Series({3: .5, 1: .25}), {1: .5, 3: .5})) == {3: 0, 1: -.25}
    refused('model 2 is in b only', S.differences, {1: 0}, {1: 0, 2: 0})
    refused('b: model 1: expected a finite', S.differences, {1: 0}, {1: INF})
    refused('a: expected one number a model', S.differences, pd.Series([1., 2.], index=[0, 0]), {0: 1})


# ------------------------------------------------------------------ what can be reached

def test_the_smallest_p_is_that_of_one_sign_in_every_model():
    for n in range(2, 9):
        d = np.arange(1, n + 1)
        for test in (S.sign_flip, S.wilcoxon):
            assert np.isclose(test(d), S.smallest_p(n)) and np.isclose(test(d, 'greater'), S.smallest_p(n, 1, 'greater'))
    assert np.allclose(S.holm([S.sign_flip(range(1, 9))]*5), S.smallest_p(8, 5))

def test_models_needed_are_the_first_that_do():
    for claims, alpha in product((1, 2, 7, 28, 100), (.05, .01)):
        n = S.models_needed(claims, alpha)
        assert S.smallest_p(n, claims) < alpha <= S.smallest_p(n - 1, claims)
    assert [S.models_needed(k) for k in (1, 6, 28)] == [6, 8, 11]

def test_reach_in_words():
    words = S.reach_in_words(3)
    assert 'below 0.25' in words and 'nothing is significant' in words and words.endswith('It takes 6 models.')
    assert 'below 0.047' in S.reach_in_words(8, 6) and 'significant at 0.05.' in S.reach_in_words(8, 6)
    assert 'and 28 claims' in S.reach_in_words(8, 28) and 'takes 11 models' in S.reach_in_words(8, 28)
    one_sided = S.reach_in_words(3, alternative='greater')
    assert 'below 0.12' in one_sided and one_sided.endswith('It takes 5 models.') # 1/2^5 is below .05


# ------------------------------------------------------------------ Holm

def plain_holm(p):
    out, least = [0]*len(p), 0
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        least = max(least, min(1, (len(p) - rank)*p[k]))
        out[k] = least
    return out

@settings(few, max_examples=8) # statsmodels collects garbage at each call
@given(st.lists(st.sampled_from([0, .001, .01, .02, .02, .04, .3, 1]) | st.floats(0, 1), max_size=9))
def test_holm_against_its_loop(p):
    got = S.holm(p)
    assert np.allclose(got, plain_holm(p))
    assert (got >= np.array(p) - 1e-12).all() and (got <= 1).all()

def test_what_was_not_tested_is_no_member_of_the_family():
    assert np.allclose(S.holm([NAN, .03, NAN, .01]), [NAN, .03, NAN, .02], equal_nan=True)
    assert np.isnan(S.holm([NAN, NAN])).all() and len(S.holm([])) == 0

def test_what_is_no_p_is_refused():
    for bad in (-.1, 1.5, INF): refused('holm: p 1: expected a number in 0..1', S.holm, [.5, bad])
    refused('expected a list of p', S.holm, [[.1]])


# ------------------------------------------------------------------ two methods

def method(rates, prompts=10):
    return pd.concat([pd.DataFrame(dict(run=run, prompt=range(prompts), seed=1, score=np.arange(prompts) < r*prompts))
                      for run, r in rates.items()]).astype(dict(score=float))

def test_two_methods_are_compared_model_by_model():
    a, b = method({0: .1, 1: .8, 2: .5, 3: .6}), method({0: .1, 1: .2, 2: .1, 3: .7})
    got = S.compare(a, b.sample(frac=1, random_state=0), resamples=400, seed=2)
    d = [0, .6, .4, -.1]
    assert got['models'] == 4 and got['agree'] == 2 # of zero and of the other sign: no
    assert np.allclose([got['a'], got['b'], got['difference']], [.5, .275, .225])
    assert got['p'] == S.sign_flip(d) == (abs(all_flips([0, 6, 4, -1])) >= 9).mean()
    assert got['p_wilcoxon'] == S.wilcoxon(d)
    x = a.assign(d=a.score - b.score)
    assert (got['low'], got['high']) == S.model_interval(x.d, x.run, x.prompt, (-1, 1), resamples=400, seed=2)[1:3]
    assert S.compare(b, a)['difference'] == -got['difference'] and S.compare(a, a)['agree'] == 0
    assert S.compare(a, a)['p'] == 1
    assert S.compare(a, b, alternative='greater')['p'] == S.sign_flip(d, 'greater')
    ranks = all_flips(pratt([0, 6, 4, -1]))
    assert S.compare(a, b, alternative='greater')['p_wilcoxon'] == (ranks >= 5).mean() # 4 + 3 - 2

def test_scores_are_hits_above_a_threshold_or_numbers():
    a, b = method({0: .1, 1: .8}), method({0: .3, 1: .3})
    scaled = lambda t: t.assign(score=t.score*40 + 10)
    assert S.compare(scaled(a), scaled(b), threshold=20) == S.compare(a, b)
    assert S.compare(scaled(a), scaled(b), threshold=60)['difference'] == 0
    assert np.isclose(S.compare(scaled(a), scaled(b), threshold=None)['difference'], 40*.15)

def test_methods_that_do_not_match_are_refused():
    a, b = method({0: .1, 1: .8}), method({0: .3, 1: .3})
    refused('run 1 is in a only', S.compare, a, b[b.run == 0])
    refused('run 1 is in b only', S.compare, a[a.run == 0], b)
    refused('19 of 20 and 19 match', S.compare, a, b[:-1])
    refused('20 match|19 of 20 and 20', S.compare, a, b.assign(prompt=[*b.prompt[:-1], 99]))
    refused('b: expected one row for each run, prompt, seed', S.compare, a, pd.concat([b, b]))
    refused("a: column 'run' is missing", S.compare, a.drop(columns='run'), b)
    refused("b: column 'score' is missing", S.compare, a, b.drop(columns='score'))
    refused('a: expected finite scores', S.compare, a.assign(score=NAN), b)
    refused('a: expected at least one picture', S.compare, a[:0], b)
    refused('at least two models, got 1', S.compare, a[a.run == 0], b[b.run == 0])


# ------------------------------------------------------------------ verdicts

@each('said, direction, effect, p, more', [
    ('reproduced', 'lower', -.3, .01, {}),
    ('reproduced', 'higher', [.1, .2], [.01, .049], {}),
    ('partly', 'higher', [.1, .2], [.01, .05], {}), # at alpha isn't below it
    ('partly', 'lower', [-.1, .2], [.01, .01], {}),
    ('partly', 'lower', [-.1, NAN], [.01, NAN], {}), # a test without a number holds nothing
    ('not reproduced', 'lower', .3, .001, {}),
    ('not reproduced', 'lower', -.3, .4, {}),
    ('not reproduced', 'lower', [0, 0], [0, 0], {}),
    ('not reproduced', 'higher', 0, 0, {}),
    ('not testable here', 'lower', [], [], {}),
    ('not testable here', 'lower', NAN, .01, {}),
    ('not testable here', 'lower', -.3, NAN, {}),
    ('not testable here', 'lower', -.69, .25, dict(smallest=.25)),
    ('not testable here', 'lower', -.69, .05, dict(smallest=.05)),
    ('not reproduced', 'lower', -.69, .05, dict(smallest=.049)),
    ('reproduced', 'lower', -.69, .05, dict(smallest=.05, alpha=.1))])
def test_verdicts(said, direction, effect, p, more): assert S.verdict(direction, effect, p, **more) == said

@few
@given(st.lists(st.tuples(st.sampled_from([-.2, 0., .2]), st.sampled_from([.001, .2])), min_size=1, max_size=4))
def test_the_opposite_claim_never_holds_too(tests):
    effect, p = zip(*tests)
    both = S.holds('lower', effect, p) & S.holds('higher', effect, p)
    assert not both.any()
    assert S.verdict('lower', effect, p) == S.verdict('higher', [-e for e in effect], p)

def test_what_is_no_claim_is_refused():
    refused("verdict: direction: unknown 'less'", S.verdict, 'less', 1, .5)
    refused('one p an effect, got 2 and 1', S.verdict, 'lower', 1, [.5, .5])


# ------------------------------------------------------------------ pairs told apart

RATES = pd.DataFrame(dict(a=[.9, .8, .9, .7, .8, .9, .8, .9], b=[.1, .2, .1, .1, .3, .2, .1, .1],
                          c=[.2, .1, .1, .1, .3, .2, .1, .1], d=[.5, .5, .5] + [NAN]*5, e=[.5] + [NAN]*7))

def test_pairs_against_tests_one_by_one():
    pairs = S.discrimination(RATES)
    assert list(zip(pairs.a, pairs.b)) == [(x, y) for k, x in enumerate('abcde') for y in 'abcde'[k + 1:]]
    p = []
    for row in pairs.itertuples():
        d = (RATES[row.a] - RATES[row.b]).dropna()
        assert row.models == len(d)
        p.append(S.sign_flip(d) if len(d) > 1 else NAN)
        assert np.isclose(row.difference, d.mean() if len(d) > 1 or row.b == 'e' else NAN)
    assert np.allclose(pairs.p, p, equal_nan=True) and np.allclose(pairs.p_holm, S.holm(p), equal_nan=True)
    assert list(pairs.apart) == [row.p_holm < .05 for row in pairs.itertuples()]
    apart = S.discrimination(RATES[['a', 'b', 'c']])
    assert list(apart.apart) == [True, True, False]
    assert S.told_apart(apart).startswith('2 of 3 pairs are told apart. With 8 models and 3 claims')
    assert list(S.discrimination(RATES[['a', 'b']], test=S.wilcoxon).p) == [S.wilcoxon(RATES.a - RATES.b)]

def test_pairs_with_one_method_alone_are_fewer_to_correct_for():
    "Whichever column it has; the most models that a pair has are what can be reached"
    for against, others in (('a', 'bcde'), ('c', 'abde'), ('e', 'abcd')):
        pairs = S.discrimination(RATES, against=against)
        assert [{x, y} for x, y in zip(pairs.a, pairs.b)] == [{against, x} for x in others]
        tested = pairs.dropna(subset='p')
        assert list(tested.p_holm) == pytest.approx(plain_holm(list(tested.p)))
    said = S.told_apart(S.discrimination(RATES))
    assert said.startswith('2 of 10 pairs') and 'With 8 models and 6 claims' in said # e has one model


def test_before_and_after_the_worst_fine_tuning_in_the_order_of_the_table():
    "Of all models; a model has its own worst; without a metric that counts all unsafe prompts it is IP"
    rates = dict(uce=(.1, .3, .7), ga=(0., .6, .2), original=(.9, .8, .5))
    at = [('before', 'none'), ('varied', 'lora'), ('subjects', 'full')]
    rows = [dict(method=m, seed=seed, phase=phase, finetune=how, metric=metric, value=v, low=v - .1, high=v + .2, n=3)
            for m, values in rates.items() for seed, shift in (('all', 0), (0, 1))
            for (phase, how), v in zip(at, (values[0], *np.roll(values[1:], shift)))
            for metric, v in (('unsafe', v), ('IP', v/2), ('explicit', .99))]
    main = pd.DataFrame(rows)
    found = S.before_after(main)
    assert list(found.index) == list(rates) and list(found.finetune) == ['subjects-full', 'varied-lora', 'varied-lora']
    assert list(found.before) == [.1, 0, .9] and list(found.after) == [.7, .6, .8]
    assert np.allclose(found[['low', 'high']], [[.6, .9], [.5, .8], [.7, 1.]])
    assert list(S.before_after(main, 0).finetune) == ['varied-lora', 'subjects-full', 'subjects-full']
    assert list(S.before_after(main[main.metric != 'unsafe']).after) == [.35, .3, .4]

def test_the_square_of_pairs():
    pairs = S.discrimination(RATES[['a', 'b', 'c']])
    square, difference = S.matrix(pairs), S.matrix(pairs, 'difference')
    assert list(square) == list(square.index) == ['a', 'b', 'c'] and np.isnan(np.diag(square)).all()
    assert square.loc['a', 'b'] == square.loc['b', 'a'] == 1 and square.loc['b', 'c'] == square.loc['c', 'b'] == 0
    off = difference.to_numpy()[~np.eye(3, dtype=bool)]
    assert np.allclose(difference.fillna(0), -difference.fillna(0).T) and off[0] > .6

def test_alike_is_never_apart():
    same = S.discrimination(pd.DataFrame({m: np.arange(12)/12 for m in 'xyz'}))
    assert not same.apart.any() and (same.p == 1).all()

def test_rates_that_are_no_table_are_refused():
    refused('expected two methods, got 1', S.discrimination, RATES[['a']])
    refused('one row a model', S.discrimination, pd.concat([RATES, RATES]))
