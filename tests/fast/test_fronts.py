"Fronts, parts and losses: rates, settings at equal cost and tests over models, of made-up pictures by hand."
from itertools import product

import pandas as pd, pytest

from resalign.core.settings import UserError
from resalign.studies import fronts as F
from resalign.studies.phenomenon import draw_change
from resalign.studies.models import UNSAFE


def exact(differences) -> float:
    "The two-sided sign-flip test, from its definition"
    flips = [abs(sum(s*d for s, d in zip(signs, differences))) for signs in product((1, -1), repeat=len(differences))]
    return sum(f >= abs(sum(differences)) - 1e-9 for f in flips)/len(flips)


def holm(ps) -> list:
    "From its definition"
    ranked, out = sorted(range(len(ps)), key=lambda k: ps[k]), [0.]*len(ps)
    for place, k in enumerate(ranked): out[k] = min(1., max((len(ps) - i)*ps[j] for i, j in enumerate(ranked[:place + 1])))
    return out


def pictures(rates, **about): # one rate a model; explicit and implicit prompts, as many of each
    rows = [dict(about, run=run, kind=kind, prompt=f'{kind}{k}', seed=7, detector='detector-vice', score=float(k < 10*r))
            for run, r in enumerate(rates) for kind in UNSAFE for k in range(10)]
    noise = [dict(about, run=0, kind=kind, prompt='x', seed=7, detector=d, score=1.)
             for kind, d in (('benign', 'detector-vice'), ('implicit', 'safety-vice'), ('explicit', 'detector-weapon'))]
    return F.unsafe_pictures(pd.DataFrame(rows + noise), 'vice')


def test_pictures_that_count():
    "Above a half of the concept's detector, on unsafe prompts; after the fine-tuning with the highest rate of each method"
    found = pictures([.3, .6])
    assert len(found) == 40 and dict(found.groupby('run').value.mean()) == pytest.approx({0: .3, 1: .6})
    assert not F.unsafe_pictures(found.assign(score=.5), 'vice').value.any()
    rates = {('ga', 'before'): [1., 1.], ('ga', 'a'): [.2, .3], ('ga', 'b'): [.0, .6], ('uce', 'a'): [.9, .9],
             ('uce', 'b'): [.1, .1]}
    all_ = pd.concat([pictures(r, method=m, phase=p) for (m, p), r in rates.items()])
    assert set(map(tuple, F.worst_after(all_, ['method'])[['method', 'phase']].values)) == {('ga', 'b'), ('uce', 'a')}
    two, one = F.rate_over_models(pictures([.2, .6])), F.rate_over_models(pictures([.2]))
    assert two.value == pytest.approx(.4) and two.n == 2 and two.low < .4 < two.high
    assert one[0] == pytest.approx(.2) and one.n == 1 and one.low != one.low


def test_more_of_the_concept_comes_back():
    "Over the models that both have; of one model there is a difference and no test"
    a, b = [.5, .6, .9, .7], [.1, .8, .2, .3, 1.]
    found = F.more_unsafe(pictures(a), pictures(b))
    d = [x - y for x, y in zip(a, b)]
    assert found['models'] == 4 and found['difference'] == pytest.approx(sum(d)/4) and found['p'] == exact(d)
    assert found['low'] < sum(d)/4 < found['high']
    one = F.more_unsafe(pictures([.5]), pictures([.2, .9]))
    assert one['difference'] == pytest.approx(.3) and one['models'] == 1 and one['p'] != one['p']
    none = F.more_unsafe(pictures([.5]), pictures([.2]).assign(run=3))
    assert none['models'] == 0 and none['difference'] != none['difference']


POINTS = {('resalign', 'a'): ([.1, .2, .3], .2), ('resalign', 'b'): ([.5, .5, .5], .1), ('ga', 'a'): ([.6, .5, .7], .24),
          ('ga', 'b'): ([0., 0., 0.], .26), ('uce', 'a'): ([.3, .3, .3], .1)} # rates of three models, quality


def test_fronts_take_each_method_where_it_costs_no_more():
    after = pd.concat([pictures(r, method=m, setting=s, phase='varied-lora') for (m, s), (r, _) in POINTS.items()])
    summary = [dict(method=m, setting=s, seed=k, phase=phase, metric=metric, value=v)
               for (m, s), (_, q) in POINTS.items() for k in range(3) for phase in ('before', 'varied-lora')
               for metric, v in (('CMMD', q + 9*(phase != 'before')), ('subject_kept', 1 - q))]
    rows = F.front_table(pd.DataFrame(summary), after)
    each, whole = rows[rows.seed != 'all'], rows[rows.seed == 'all'].set_index(['method', 'setting'])
    assert len(each) == 15
    for point, (rates, quality) in POINTS.items():
        assert whole.unsafe_after[point] == pytest.approx(sum(rates)/3) and whole.quality[point] == pytest.approx(quality)
        assert whole.subject_kept[point] == pytest.approx(1 - quality)
        assert whole.n[point] == (1 if rates in ([.5]*3, [.3]*3) else 3) # copies count once
        own = each[(each.method == point[0]) & (each.setting == point[1])]
        assert list(own.sort_values('seed').unsafe_after) == pytest.approx(rates)
    best = F.at_equal_cost(rows)
    assert dict(best.setting) == dict(resalign='a', ga='a', uce='a') # GA's b costs more than .05 more
    tests = F.front_tests(best, after).set_index('method')
    differences = dict(ga=[.5, .3, .4], uce=[.2, .1, 0.])
    assert dict(tests.difference) == pytest.approx({m: sum(d)/3 for m, d in differences.items()})
    assert list(tests.p) == [exact(d) for d in differences.values()] and list(tests.p_holm) == holm(list(tests.p))
    assert F.front_title(best).endswith('ResAlign 20%; none is lower')
    base = best.loc[['uce']].rename(index=dict(uce='original')).assign(unsafe_after=.05) # not what it is held against
    assert F.front_title(pd.concat([best, base])) == F.front_title(best)
    other = lambda rate: F.front_title(best.assign(unsafe_after=best.unsafe_after.where(best.index != 'uce', rate)))
    assert other(.2).endswith('none is lower') and other(.1).endswith('ResAlign 20%; lower are UCE 10%')
    with pytest.raises(UserError, match='no row of resalign'): F.at_equal_cost(rows[rows.method != 'resalign'])


def test_variants_against_the_full_one():
    rates = dict(full=[.1, .2, .1, .3, .2, .2], beta_0=[.6, .9, .5, .8, .7, .6], J_2=[.2, .1, .1, .3, .2, .2])
    found = F.against_full(pd.concat([pictures(r, setting=s) for s, r in rates.items()])).set_index('setting')
    d = {s: [x - y for x, y in zip(r, rates['full'])] for s, r in rates.items()}
    assert dict(found.unsafe) == pytest.approx({s: sum(r)/6 for s, r in rates.items()})
    assert dict(found.difference) == pytest.approx({s: sum(x)/6 for s, x in d.items()})
    others = ['beta_0', 'J_2']
    assert list(found.p_holm[others]) == holm([exact(d[s]) for s in others]) # the full one is no test of itself
    assert found.p_holm['full'] != found.p_holm['full'] and found.low['beta_0'] > 0


def test_each_model_of_a_pair_at_its_own_worst():
    "Not where the other one's is"
    without = dict(GA=dict(a=[.5, .7], b=[.2, .1]), ESD=dict(a=[.1, .1], b=[.4, .2]), CA=dict(a=[.3, .3], b=[.2, .3]))
    with_term = dict(GA=dict(a=[.1, .1], b=[.9, .9]), ESD=dict(a=[0., 0.], b=[.5, .6]), CA=dict(a=[.3, .3], b=[0., 1.]))
    rates = [(m, of[loss]) for loss, pair in F.PAIRS.items() for m, of in zip(pair, (without, with_term))]
    found = F.loss_tests(pd.concat([pictures(r, method=m, phase=p) for m, of in rates for p, r in of.items()]))
    found = found.set_index('loss')
    assert dict(found.finetune) == dict(GA='b', ESD='b', CA='b')
    assert dict(found.without_term) == pytest.approx(dict(GA=.6, ESD=.3, CA=.3))
    assert dict(found.with_term) == pytest.approx(dict(GA=.9, ESD=.55, CA=.5))
    assert dict(found.difference) == pytest.approx(dict(GA=.3, ESD=.25, CA=.2))
    assert list(found.p) == [.5, .5, 1] and list(found.p_holm) == [1, 1, 1]


def test_intervals_are_drawn_between_their_ends():
    from matplotlib.figure import Figure
    rows = pd.DataFrame(dict(value=[5., 1.], low=[4., 0.], high=[8., 1.]))
    below, above = F.reach(rows)
    assert list(below) == [1, 1] and list(above) == [3, 0]
    ax = Figure().subplots()
    draw_change(ax, 2, 1., 5., 4., 8., 'k')
    assert ax.collections[0].get_segments()[0].tolist() == [[4, 2], [8, 2]] # of what is after
