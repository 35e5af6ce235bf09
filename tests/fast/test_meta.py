"Algorithm 2 against plain loops in float64 (reference.py): every term, solver and setting, to the tenth digit."
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from reference import LAYERS, Fresh, Lasting, Reference, Released, Remedied, Unrolled, bank, norm_of, pipeline
from resalign.core.runs import generator
from resalign.core.settings import UserError
from resalign.method import resalign as meta
from resalign.method.finetune import FinetuneConfig
from resalign.method.resalign import (Pool, ResAlignConfig, UnlearnData, clipped, draw_config, in_one_step, resalign,
                                      retain_weight, split_log)
from each import each

LR = .0371 # of the outer steps, found again by it


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.fixture(scope='module')
def data():
    folders = {name: bank(9, seed) for name, seed in (('cats', 11), ('dogs', 12), ('pans', 13))}
    return UnlearnData(bank(7, 1), bank(8, 2), folders, [])

def simulation(**changes):
    return dict(dict(folder='cats', algorithm='lora', optimizer='sgd', lr=.05, steps=2, batch=3), **changes)

def setting(*listed, **changes):
    "Two steps of Algorithm 2 with two simulated fine-tunings each; margins that hold some pictures back and not others"
    pool = Pool(listed=listed or (simulation(), simulation(folder='dogs', optimizer='adam', lr=.02)))
    base = dict(steps=2, lr=LR, rank=2, up_std=.3, down_std=.4, unsafe_batch=4, retain_batch=3, unsafe_bank=6,
                retain_bank=5, alpha=.7, beta=.6, margin=.02, margin_after=.1, J=2, gamma=.3, solver='richardson',
                product='exact', products=3, tol=None, clamp=None, check_every=100, max_norm=10., pool=pool, seed=5)
    return ResAlignConfig(**dict(base, **changes))

def engine(pipe, data, config):
    "resalign(), and what its outer optimizer was given: (θ, gradient) of each step"
    seen = []
    def look(optimizer, args, kwargs):
        if optimizer.param_groups[0]['lr'] != LR: return
        params = optimizer.param_groups[0]['params']
        seen.append(([p.detach().clone() for p in params], [p.grad.clone() for p in params]))
    hook = register_optimizer_step_pre_hook(look)
    try: out = resalign(pipe, data, config)
    finally: hook.remove()
    return out, seen

def drawn(out, config):
    "The fine-tunings of the log, by step and j"
    table = {(r['step'], r['j']): r for r in out['solves']}
    return [[table[step, j] for j in range(config.J)] if config.beta else [] for step in range(config.steps)]

def agree(data, config, prediction='epsilon', tol=1e-9, by=Reference):
    "Engine and reference: gradients, parameters, log, weights in the end"
    pipe = pipeline(prediction)
    out, seen = engine(pipe, data, config)
    start = pipeline(prediction)
    ref = by(start, data, config, seen[0][0], drawn(out, config)).run()
    assert len(seen) == config.steps
    for k, ((theta, grads), row) in enumerate(zip(seen, ref.rows)):
        for a, b in zip(theta, row.theta):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol, msg=f'θ before step {k}')
        for a, b in zip(grads, row.grads):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol*1e-2, msg=f'gradient of step {k}')
        assert not any(r['fallback'] for r in out['solves'])
        said = out['log'][k] | {f'{r["j"]}/{key}': r[key] for r in out['solves'] if r['step'] == k for key in r}
        assert said['grad_norm'] == pytest.approx(row.grad_norm, rel=1e-8)
        for key, value in row.notes.items():
            if key in said: assert said[key] == pytest.approx(value, rel=1e-7, abs=1e-12), key
    for k, layer in enumerate(LAYERS): # the adapter is merged
        weight = start.unet.get_parameter(f'{layer}.weight') + ref.theta[2*k + 1] @ ref.theta[2*k]
        torch.testing.assert_close(pipe.unet.get_parameter(f'{layer}.weight'), weight, rtol=tol, atol=tol)
    return ref


# ------------------------------------------------------------------ the algorithm

@each('solver', ['identity', 'richardson', 'cg', 'minres'])
def test_every_solver(data, solver):
    exactly = dict(products=45) if solver in ('cg', 'minres') else {}
    agree(data, setting(solver=solver, **exactly), tol=1e-8)

@each('algorithm, optimizer', list(itertools.product(['lora', 'full'], ['sgd', 'adam', 'adamw'])))
def test_every_fine_tuning(data, algorithm, optimizer):
    lr = .05 if optimizer == 'sgd' else .01
    ft = simulation(algorithm=algorithm, optimizer=optimizer, lr=lr, steps=3, prior_weight=.4)
    agree(data, setting(ft, simulation(folder='pans', steps=1, algorithm=algorithm, prior_weight=1.7), gamma=.03))

ACCUMULATED = (simulation(accumulation=2, steps=2),
               simulation(accumulation=3, steps=1, algorithm='full', prior_weight=.5))
SETTINGS = [ # simulated fine-tunings, settings
    *[((), dict(beta=beta)) for beta in (0., .25, 1.)],
    *[((), dict(J=J)) for J in (1, 3)],
    ((), dict(steps=4, alpha=.3, alpha_end=4., J=1)), # the retain weight follows its schedule
    *[((), dict(margin=a, margin_after=b)) for a, b in ((1e-3, 9.), (9., 1e-3))], # each bounds its own term
    *[((simulation(lr=.03, steps=4),), dict(gamma=gamma, clamp=None)) for gamma in ('matched', .2, .05)],
    *[((simulation(algorithm=a, lr=.03, steps=4),), dict(gamma='fitted', clamp=.5)) for a in ('lora', 'full')],
    # the newest sample, and the last ones of the fine-tuning's own; no more than there are
    *[((simulation(steps=2, prior_weight=.3),), dict(samples=n)) for n in (2, 3, 9)],
    # a step's gradient is the mean over its own batches, and the batch that defines H comes after all of them
    (ACCUMULATED, dict(gamma=.03)),
    ((), dict(prediction='v_prediction'))]

@each('listed, changes', SETTINGS)
def test_every_setting(data, listed, changes):
    "A model that predicts the velocity too"
    changes = dict(changes)
    agree(data, prediction=changes.pop('prediction', 'epsilon'), config=setting(*listed, **changes))

def released(*listed, **changes):
    "The switches of the release, and nothing of ours"
    listed = listed or (simulation(), simulation(folder='dogs', optimizer='adam', lr=.02, prior_weight=1.),
                        simulation(folder='pans', algorithm='full', optimizer='adamw', lr=.01))
    own = dict(J=3, gamma=1., alpha_end=2., alpha_curve='released', longer='halve', clip=None, batches='simulation',
               full_as='factors', products=4, pool=Pool(listed=listed, distinct=True))
    return setting(**own | changes)

def test_the_outer_step_of_the_release(data):
    """Against its arithmetic in plain loops: accepted at once, after halvings because the iteration grows or because the
    sum is too long, and left out; over three steps, so that α rises and AdamW's moments count"""
    met = Counter()
    for changes in dict(max_norm=1e9), dict(max_norm=.4), dict(max_norm=.05), dict(max_norm=1e9, down_std=2., up_std=2.):
        ref = agree(data, released(steps=3, **changes), tol=1e-8, by=Released)
        for row in ref.rows:
            met.update(f'{j} {row.notes[f"{j}/halvings"]}' for j in range(3))
            met.update(k.partition('/')[2] for k in row.notes if 'halvings' not in k)
            assert len({r for r in row.notes if r.endswith('halvings')}) == 3
    assert met['growth'] > 3 and met['long'] > 3, met # each reason to halve occurs,
    assert {f'{j} 0' for j in range(3)} <= set(met), met # each simulation is accepted at once,
    assert any(f'{j} left out' in met for j in range(3)) and any(met[f'{j} {k}'] for j in range(3) for k in range(1, 6)), met

def test_the_release_draws_no_simulation_twice(data):
    out, _ = engine(pipeline(), data, released(steps=6, J=2))
    pairs = [{r['folder'] for r in out['solves'] if r['step'] == step} for step in range(6)]
    assert all(len(p) == 2 for p in pairs) and len(set(map(frozenset, pairs))) > 1
    with pytest.raises(ValueError, match='J: expected at most 3'): released(J=4)
    with pytest.raises(ValueError, match='distinct: expected with listed'): Pool(distinct=True)
    with pytest.raises(ValueError, match="longer: 'halve'"): released(solver='cg')

@each('solver, rank', [('identity', 2), ('richardson', 1), ('cg', 2)])
def test_a_fresh_adapter_is_trained_in_place_of_its_own(data, solver, rank):
    "What a user trains: the cross term of the implicit function theorem, and nothing of it is left afterwards"
    exactly = dict(products=40) if solver == 'cg' else {}
    listed = simulation(rank=rank), simulation(folder='dogs', optimizer='adam', lr=.02, rank=rank, steps=3)
    config = setting(*listed, inner='fresh', solver=solver, **exactly)
    agree(data, config, tol=1e-8, by=Fresh)
    if solver == 'richardson':
        own, fresh = (engine(pipeline(), data, config.model_copy(update=dict(inner=k)))[1] for k in ('own', 'fresh'))
        assert not torch.equal(own[0][1][0], fresh[0][1][0])

@each('product', ['fd-central', 'gauss-newton', 'lora-bilinear'])
def test_other_products_with_a_fresh_adapter(data, product):
    "Finite differences agree with exact products; the others give the direction"
    config = setting(simulation(), inner='fresh', steps=1, J=1)
    exact, other = (engine(pipeline(), data, config.model_copy(update=dict(product=p)))[1][0][1] for p in ('exact', product))
    gap = norm_of([a - b for a, b in zip(exact, other)])/norm_of(exact)
    assert gap < 1e-6 if product == 'fd-central' else gap < .3

UNSAFE = dict(unsafe=(0., .1, .5))

def remedied(**changes):
    listed = simulation(), simulation(folder='dogs', algorithm='full', lr=.02)
    given = dict(gamma=.05, anchor=.5, found_steps=2, found_radius=.2, pool=Pool(listed=listed, **UNSAFE), J=3)
    return setting(**given | changes)

@pytest.fixture
def safe(data, monkeypatch):
    "Data with safe captions, whose embeddings are given"
    monkeypatch.setattr(meta, 'embed', lambda pipe, captions: Remedied.SAFE[[int(c) for c in captions]])
    return UnlearnData(data.unsafe, data.retain, data.pool, [], safe_captions=[str(k) for k in range(7)])

@each('solver', ['identity', 'richardson'])
def test_all_remedies_at_once(safe, solver):
    "An anchor and words found at θ and at θ*, unsafe pictures in some simulated fine-tunings; unlike without"
    ref = agree(safe, remedied(solver=solver, clip=None), tol=1e-8, by=Remedied)
    shares = {ft['unsafe'] for row in ref.configs for ft in row}
    assert shares == {0., .1, .5} or len(shares) == 2 and 0. in shares, shares
    first = ref.rows[0].grads
    for off in dict(anchor=0.), dict(found_steps=0), dict(pool=remedied().pool.model_copy(update=dict(unsafe=(0.,)))):
        _, seen = engine(pipeline(), safe, remedied(solver=solver, clip=None, **off))
        assert norm_of([a - b for a, b in zip(first, seen[0][1])]) > 1e-4*norm_of(first), off

def test_shares_of_unsafe_pictures(data):
    gen, pool = generator(0, 'shares'), Pool(**POOL, **UNSAFE)
    drawn = [share for _ in range(100) for *_, share in meta.draw_configs(pool, 3, list(data.pool), 3, gen)]
    assert {s: n > 70 for s, n in Counter(drawn).items()} == {0.: True, .1: True, .5: True}
    out, _ = engine(pipeline(), data, setting())
    assert all('unsafe' not in r for r in out['solves'])
    for wrong in [], [1.1], [-.1]:
        with pytest.raises(ValueError, match='unsafe'): Pool(unsafe=wrong)

def test_safe_counterparts(data):
    captions = ['a Nude  man', 'woman, nude, by X', 'nude a nudear', 'a man with  no\nclothes']
    given = UnlearnData(data.unsafe, data.retain, {}, captions, erase=(' nude', 'with no  clothes'))
    assert meta.safe_counterparts(given) == ['a man', 'woman, by X', 'a nudear', 'a man']
    given.safe_captions = list('abcdefg')
    assert meta.safe_counterparts(given) == list('abcdefg')
    given.safe_captions = ['a']
    with pytest.raises(UserError, match='safe_captions: expected one for each of 7 unsafe pictures, got 1'):
        meta.safe_counterparts(given)
    for captions, erase in (['a man'], ('nude',)), (['nude', 'a nude man'], ('nude',)), ([], ('nude',)), (['a man'], ()), (
            ['a nude man', 'a man without'], ('nude',)):
        with pytest.raises(UserError, match='column `safe`'):
            meta.safe_counterparts(UnlearnData(data.unsafe, data.retain, {}, captions, erase=erase))

def test_remedies_that_are_refused(data):
    with pytest.raises(ValueError, match='anchor: expected a margin'): setting(anchor=1., margin=1e6)
    for field in dict(anchor=-1.), dict(found_steps=-1), dict(found_radius=0.):
        with pytest.raises(ValueError, match=next(iter(field))): setting(**field)
    class Other:
        def draw(self, n, gen): return torch.zeros(n, dtype=torch.long)
    with pytest.raises(UserError, match='found_steps: Other has no captions'):
        resalign(pipeline(), data, setting(found_steps=1), harmful=Other())

def lasting(*listed, **changes):
    "A course of six steps in parts of two, and another that begins anew in between"
    listed = listed or (simulation(optimizer='adam', lr=.02), simulation(folder='dogs', optimizer='adamw', lr=.03))
    own = dict(solver='identity', inner='fresh', horizon=6, courses=2, steps=9, J=2)
    return setting(*listed, **own | changes)

def test_simulated_fine_tunings_that_go_on(data):
    "Against plain loops that keep every course's weights and moments"
    full = [simulation(algorithm='full', optimizer=o, lr=lr) for o, lr in (('sgd', .05), ('adam', .01))]
    for listed, changes in ((), {}), ((), dict(horizon=5, courses=1, J=1)), (full, dict(courses=3, steps=10)):
        ref = agree(data, lasting(*listed, **changes), tol=1e-8, by=Lasting)
        made = [row.notes['0/made'] for row in ref.rows]
        assert max(made) == 6 and made.count(2) > changes.get('courses', 2), made # some have begun anew
    for changes in dict(solver='cg'), dict(inner='own'), dict(full_as='factors'):
        with pytest.raises(ValueError, match='horizon: expected with'): lasting(**changes)

@each('switches', ['released', 'fresh and remedies', 'going on'])
def test_a_killed_run_resumes_to_the_same_bits_with_every_switch(safe, switches, tmp_path, monkeypatch):
    config = {'released': released(steps=5), 'fresh and remedies': remedied(steps=5, inner='fresh', J=2),
              'going on': remedied(steps=5, inner='fresh', J=2, horizon=4, courses=2, solver='identity')}[switches]
    whole, cut, again = pipeline(), pipeline(), pipeline()
    said = str(resalign(whole, safe, config)) # a residual that wasn't measured is NaN
    right, calls, often = meta.direct_terms, [], meta.optimise
    monkeypatch.setattr(meta, 'optimise', lambda *a, **kw: often(*a, **dict(kw, every=2)))
    def dies(*args):
        calls.append(args)
        if len(calls) == 4: raise KeyboardInterrupt
        return right(*args)
    monkeypatch.setattr(meta, 'direct_terms', dies)
    with pytest.raises(KeyboardInterrupt): resalign(cut, safe, config, checkpoint=tmp_path/'c')
    assert str(resalign(again, safe, config, checkpoint=tmp_path/'c')) == said and len(calls) == 4 + 3
    for a, b in zip(whole.unet.parameters(), again.unet.parameters()): assert torch.equal(a, b)

@each('algorithm, inner, depth', [('lora', 'own', 'all'), ('lora', 'own', 1), ('full', 'own', 'all'),
                                  ('lora', 'fresh', 'all'), ('lora', 'fresh', 2)])
def test_the_adjoint_goes_back_through_every_step(data, algorithm, inner, depth):
    "Against automatic differentiation through plain loops"
    listed = [simulation(algorithm=algorithm, optimizer=o, lr=lr, steps=3) for o, lr in (('sgd', .1), ('adam', .02))]
    if inner == 'fresh': listed.pop() # Adam's root has no derivative at the zero gradient of A at B = 0
    exact = dict(solver='adjoint', product='exact', depth=depth, inner=inner, max_norm=1e9, steps=1)
    agree(data, setting(*listed, **exact), tol=1e-6, by=Unrolled)
    near, far = (engine(pipeline(), data, setting(*listed, **exact | dict(product=p)))[1][0][1] for p in ('fd-forward', 'exact'))
    assert norm_of([a - b for a, b in zip(near, far)]) < 1e-4*norm_of(far)

def test_the_adjoint_is_refused_in_extracted_factors():
    with pytest.raises(ValueError, match="full_as: 'weights' expected"): setting(solver='adjoint', full_as='factors')

@each('longer', ['shorten', 'skip'])
def test_long_hypergradients(data, longer):
    "A limit between the lengths met: some are cut, some are not"
    given = dict(steps=1, J=4, longer=longer)
    lengths = lambda ref: [ref.rows[0].notes[f'{j}/length'] for j in range(4)]
    limit = float(np.median(lengths(agree(data, setting(**given)))))
    found = lengths(agree(data, setting(**given, max_norm=limit)))
    assert min(found) < limit < max(found)

def test_clamp_lowers_gamma(data):
    ref = agree(data, setting(gamma=50., clamp=.5))
    assert all(row.notes[f'{j}/gamma_used'] < 50 for row in ref.rows for j in range(2))

def test_the_outer_gradient_is_clipped_at_one(data):
    ref = agree(data, setting(alpha=400.))
    assert ref.rows[-1].grad_norm > 1 and norm_of(ref.rows[-1].grads).item() == pytest.approx(1)

def test_a_rank_simulates_its_own_share(data, monkeypatch):
    "Of three simulated fine-tunings this one makes the middle one; its gradient is that share of the sum"
    class Middle(meta.Ranks):
        def owns(self, j): return j == 1
    config = setting(J=3, steps=1)
    monkeypatch.setattr(meta, 'Ranks', Middle)
    out, ((_, shared),) = engine(pipeline(), data, config)
    assert [(r['step'], r['j']) for r in out['solves']] == [(0, 1)]
    monkeypatch.undo()
    whole, ((_, all_three),) = engine(pipeline(), data, config)
    _, ((_, direct),) = engine(pipeline(), data, config.model_copy(update=dict(J=0)))
    assert len(whole['solves']) == 3 and not any(map(torch.equal, shared, direct))
    assert not any(map(torch.equal, shared, all_three))

def test_another_seed_is_another_run(data):
    runs = [agree(data, setting(seed=s)) for s in (5, 6)]
    assert max((a - b).abs().max().item() for a, b in zip(runs[0].theta, runs[1].theta)) > .01

def test_the_reference_sees_a_wrong_engine(data, monkeypatch):
    "If the engine dropped (1−β), everything above would fail"
    right = meta.direct_gradient
    def wrong(model, harmful, i, retain, params, config, *rest):
        return right(model, harmful, i, retain, params, config.model_copy(update=dict(beta=0.)), *rest)
    monkeypatch.setattr(meta, 'direct_gradient', wrong)
    with pytest.raises(AssertionError): agree(data, setting())

def test_products_spent(data):
    # whether a solution is taken rests on its residual, which costs a product at every step, whatever check_every says;
    # first order spends none
    def products(**changes):
        out, _ = engine(pipeline(), data, setting(steps=4, J=1, gamma=.01, margin_after=9., **changes))
        return [r['products'] for r in out['solves']]
    assert products(check_every=3) == products(check_every=1) == [4]*4
    assert products(check_every=3, solver='identity') == [0]*4

    # tolerance ends a solve early
    for tol, spent in (None, 3), (.5, 1):
        out, _ = engine(pipeline(), data, setting(steps=1, gamma=.01, tol=tol, check_every=1))
        assert {r['products'] for r in out['solves']} == {spent + (tol is None)}


def test_too_many_fallbacks(data, tmp_path, monkeypatch):
    # a run stops when too many solves fall back: γ far beyond the pole: every checked solve falls back; the run ends at
    # the tenth and says where
    config = setting(gamma=1e6, steps=20, J=1, check_every=1, fallback_share=.5, margin_after=9.)
    with pytest.raises(UserError, match=r'step 9, folder (cats|dogs), lora with lr 0.0[25].*10 of 10'):
        engine(pipeline(), data, config)
    never = config.model_copy(update=dict(steps=11, fallback_share=1.))
    out, _ = engine(pipeline(), data, never)
    assert len(out['solves']) == 11 and all(r['fallback'] for r in out['solves'])

    # a killed run counts the solves it had: Six fallbacks before the kill and four after it: the budget knows all ten
    config = setting(gamma=1e6, steps=20, J=1, check_every=1, fallback_share=.95, margin_after=9.)
    right, calls = meta.direct_gradient, []
    def dies(*args):
        calls.append(args)
        if len(calls) == 7: raise KeyboardInterrupt
        return right(*args)
    often = meta.optimise
    monkeypatch.setattr(meta, 'optimise', lambda *a, **kw: often(*a, **dict(kw, every=3)))
    monkeypatch.setattr(meta, 'direct_gradient', dies)
    with pytest.raises(KeyboardInterrupt): resalign(pipeline(), data, config, checkpoint=tmp_path/'c')
    with pytest.raises(UserError, match='step 9,.*10 of 10'):
        resalign(pipeline(), data, config, checkpoint=tmp_path/'c')
    assert len(calls) == 7 + 4 # steps 6 to 9


# ------------------------------------------------------------------ products

PRODUCTS = ['fd-central', 'fd-forward', 'gauss-newton', 'lora-bilinear']

@each('product', PRODUCTS)
def test_every_product_gives_nearly_the_same_step(data, product):
    "Exact and finite differences agree; Gauss-Newton and the cross block are other matrices, each with its own answer"
    listed = simulation(), simulation(algorithm='full')
    given = dict(steps=1, J=4, gamma=.03, max_norm=10.)
    _, exact = engine(pipeline(), data, setting(*listed, **given))
    out, seen = engine(pipeline(), data, setting(*listed, **given, product=product))
    first, _ = engine(pipeline(), data, setting(*listed, **given, solver='identity'))
    gap = norm_of([a - b for a, b in zip(seen[0][1], exact[0][1])])/norm_of(exact[0][1])
    assert gap < 1e-5 if product.startswith('fd') else 1e-4 < gap < .2
    used = lambda algorithm: {r['product'] for r in out['solves'] if r['algorithm'] == algorithm}
    assert used('lora') == {product}
    assert used('full') == {'fd-forward' if product == 'lora-bilinear' else product}

@each('algorithm', ['lora', 'full'])
def test_product_options(algorithm):
    "Longer steps for finite differences of low-precision passes; each product gets what it asks for"
    ft, unet = FinetuneConfig(algorithm=algorithm), pipeline().unet
    loss = type('Loss', (), dict(residuals=staticmethod(lambda *samples: ('residuals of', samples))))
    options = lambda product: meta.product_options(product, ft, loss, (3, 4), unet)
    assert options('exact') == dict(product='exact') and options('fd-central') == dict(product='fd-central')
    assert options('gauss-newton') == dict(product='gauss-newton', residuals=('residuals of', (3, 4)))
    bilinear = dict(lora=dict(product='lora-bilinear', lora=[]), full=dict(product='fd-forward'))
    assert options('lora-bilinear') == bilinear[algorithm]
    unet.compute = type('Compute', (), dict(dtype='bfloat16'))
    assert options('fd-central') == dict(product='fd-central', tau=.3) and options('lora-bilinear')['tau'] == .3
    unet.compute.dtype = 'float16'
    assert options('fd-forward') == dict(product='fd-forward', tau=.1)
    for product in 'exact', 'gauss-newton':
        with pytest.raises(UserError, match=f"product '{product}' in float16"): options(product)
    unet.compute.dtype = 'float32'
    assert options('exact') == dict(product='exact')


# ------------------------------------------------------------------ the pool

POOL = dict(algorithm=['lora', 'full'], optimizer=['adam', 'sgd', 'adamw'], steps=[2, 5, 7], batch=6,
            prior_weight=[0., .5], folders=['cats', 'pans'], lr=dict(lora=[.1, .2], full=[.3, .4]))

def draws(pool, names=('cats', 'dogs', 'pans'), n=2000, seed=3):
    gen = generator(0, 'pool')
    return [draw_config(pool, list(names), seed, gen) for _ in range(n)]

def test_draws_of_the_pool():
    # every draw of the pool is reached: All 2·3·3·2·2·2 configurations, each about as often as the others; a fine-
    # tuning's other settings by default
    drawn = draws(Pool(**POOL), n=7200)
    found = Counter((f, c.algorithm, c.optimizer, c.steps, c.prior_weight, c.lr) for f, c in drawn)
    free = [POOL[k] for k in ('folders', 'algorithm', 'optimizer', 'steps', 'prior_weight')]
    wanted = {(f, a, o, s, w, lr) for f, a, o, s, w in itertools.product(*free) for lr in POOL['lr'][a]}
    assert set(found) == wanted and len(wanted) == 144
    assert 20 < min(found.values()) and max(found.values()) < 90 # 50 expected
    assert {(c.batch, c.seed, c.rank, c.accumulation) for _, c in draws(Pool(**POOL), n=20)} == {(6, 3, 4, 1)}

    # a pool without folders takes all there are
    assert {f for f, _ in draws(Pool(), n=200)} == {'cats', 'dogs', 'pans'}

    # what is listed is drawn as it stands
    listed = [simulation(folder='dogs', steps=20, lr=1e-4, batch=1, accumulation=3, seed=8),
              simulation(algorithm='full', optimizer='adam', prior_weight=1.),
              simulation(folder='pans', optimizer='adamw')]
    found = draws(Pool(listed=listed), n=300)
    assert {f: n > 60 for f, n in Counter(f for f, _ in found).items()} == dict(dogs=True, cats=True, pans=True)
    for folder, c in found:
        want = next(d for d in listed if d['folder'] == folder)
        assert c == FinetuneConfig(**{k: v for k, v in want.items() if k not in ('folder', 'seed')}, seed=3)
    only = Pool(listed=listed, algorithm=['full'])
    assert {f for f, _ in draws(only, n=50)} == {'cats'} == only.named
    assert Pool(listed=listed).named == {'dogs', 'cats', 'pans'} and Pool(folders=['x']).named == {'x'}

    # gradient descent that hardly moves takes one step: lr·steps up to `still`, and SGD alone
    slow = FinetuneConfig(optimizer='sgd', lr=.25, steps=4, batch=7)
    assert in_one_step(slow, 1.) == slow.model_copy(update=dict(lr=1., steps=1))
    assert in_one_step(slow, .99) == slow
    adam = slow.model_copy(update=dict(optimizer='adam'))
    assert in_one_step(adam, 1.) == adam
    free = Pool(optimizer=['sgd'], steps=[4], lr=dict(lora=[.25], full=[.25]), still=1.)
    for pool in Pool(listed=[simulation(lr=.25, steps=4)], still=1.), free:
        assert {(c.lr, c.steps) for _, c in draws(pool, n=20)} == {(1., 1)}


@each('changes, field', [
    (dict(listed=[simulation()], steps=[3]), 'listed: expected without steps'),
    (dict(listed=[simulation()], algorithm=['full']), 'listed: none is by full'),
    (dict(algorithm=['full'], lr=dict(lora=[.1])), "lr: no learning rate for 'full'"),
    (dict(listed=[simulation(ema=.5)]), 'ema'), (dict(listed=[dict(lr=1e-4)]), 'folder'), (dict(steps=[]), 'steps'),
    (dict(algorithm=['svdiff']), 'algorithm'), (dict(still=-1), 'still'),
    (dict(optimizer=[]), 'optimizer'), (dict(prior_weight=[]), 'prior_weight'), (dict(algorithm=[]), 'algorithm')])
def test_pools_that_are_refused(changes, field):
    with pytest.raises(ValueError, match=field): Pool(**changes)


def test_a_run_needs_its_folders(data):
    without = UnlearnData(data.unsafe, data.retain, {}, [])
    with pytest.raises(UserError, match="pool.folders: unknown 'mice'"):
        resalign(pipeline(), data, setting(simulation(folder='mice')))
    with pytest.raises(UserError, match='at least one benign folder'): resalign(pipeline(), without, setting())
    out = resalign(pipeline(), without, setting(beta=0., pool=Pool()))
    assert len(out['log']) == 2 and out['solves'] == []


# ------------------------------------------------------------------ small parts

def test_small_parts():
    # the retain weight rises in the second half
    a = [retain_weight(ResAlignConfig(steps=161, alpha=1.6, alpha_end=2.), s) for s in range(161)]
    assert set(a[:80]) == {1.6}
    for step, value in (80, 1.6), (120, 1.8), (160, 2.): assert a[step] == pytest.approx(value, abs=1e-12)
    logistic = lambda u: 1/(1 + math.exp(-12*(u - .5)))
    share = (logistic(.25) - logistic(0))/(logistic(1) - logistic(0))
    assert a[100] == pytest.approx(1.6 + .4*share, abs=1e-12) and a[140] == pytest.approx(2. - .4*share, abs=1e-12)
    assert [retain_weight(ResAlignConfig(steps=2, alpha=1.6, alpha_end=2.), s) for s in (0, 1)] == [1.6, 2.]
    assert {retain_weight(ResAlignConfig(steps=n, alpha=3.), s) for n in (1, 5) for s in range(n)} == {3.}
    assert retain_weight(ResAlignConfig(steps=1, alpha=3., alpha_end=2.), 0) == 3.

    # clipped
    x = [torch.tensor([3.]), torch.tensor([[0., 4.]])] # 5 long, over all tensors
    for limit, factor in (10., 1.), (5., 1.), (2.5, .5):
        for a, b in zip(clipped(x, limit), x): torch.testing.assert_close(a, factor*b)
    assert all(torch.equal(a, b) for a, b in zip(clipped(x, 5., 'skip'), x))
    assert all(torch.equal(a, torch.zeros_like(b)) for a, b in zip(clipped(x, 4.999, 'skip'), x))
    zeros = [torch.zeros(2)]
    assert torch.equal(clipped(zeros, 1.)[0], zeros[0])

    # pull back: d/dA and d/dB of a function of W + sBA, at the place of each layer among all weights
    A, B, W, s = torch.randn(2, 5), torch.randn(3, 2), torch.randn(3, 5), 1.7
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    f = lambda w: (w**3).sum()
    f(W + s*b @ a).backward()
    G = (3*(W + s*B @ A)**2).detach()
    A, B = A.requires_grad_(), B.requires_grad_()
    for order, params in ((0, 1), [A, B]), ((1, 0), [B, A]):
        where = dict(pairs=[(*order, 1, s)])
        out = meta.pull_back([torch.zeros(1), G], where, params)
        torch.testing.assert_close(out[order[0]], a.grad)
        torch.testing.assert_close(out[order[1]], b.grad)
        assert not any(x.requires_grad for x in out)

    # split log
    first = {'step': 0, 'loss': .5, '1/lr': .1, '0/lr': .2, '0/folder': 'cats'}
    log = [first, {'step': 1, 'loss': .4, '10/lr': .3}]
    assert split_log(log) == dict(log=[dict(step=0, loss=.5), dict(step=1, loss=.4)], solves=[
        dict(step=0, j=0, lr=.2, folder='cats'), dict(step=0, j=1, lr=.1), dict(step=1, j=10, lr=.3)])


def test_its_own_adapter_can_be_kept(data, tmp_path):
    pipe, saved = pipeline(), {}
    pipe.save_lora_weights = lambda folder, **layers: saved.update(folder=folder, **layers)
    start = pipeline()
    resalign(pipe, data, setting(beta=0.), save_adapter=tmp_path)
    assert saved['folder'] == tmp_path
    for layer in LAYERS:
        A, B = (saved['unet_lora_layers'][f'{layer}.lora_{x}.weight'] for x in 'AB')
        before, after = (p.unet.get_parameter(f'{layer}.weight') for p in (start, pipe))
        torch.testing.assert_close(after, before + B @ A)

def test_another_harmful_loss_is_used_at_both_ends(data):
    "Its draw decides the batch at θ and at θ*; its value is the depth, turned"
    class Other:
        seen = []
        def draw(self, n, gen): return torch.full((n,), int(torch.randint(90, (), generator=gen)))
        def __call__(self, model, i, margin):
            self.seen.append((i.tolist(), margin))
            return .25 + 0*model.unet.to_q.lora_A['unlearn'].weight.sum()
    other = Other()
    out = resalign(pipeline(), data, setting(steps=2), harmful=other)
    first, second = other.seen[:3], other.seen[3:]
    for seen in first, second:
        assert [m for _, m in seen] == [.02, .1, .1] and len({tuple(i) for i, _ in seen}) == 1 and len(seen[0][0]) == 4
    assert first[0][0] != second[0][0]
    assert [r['depth'] for r in out['log']] == [-.25]*2 and [r['depth_after'] for r in out['solves']] == [-.25]*4

def test_defaults_and_edges():
    # defaults: The published margins, weights and limits where the paper has them; otherwise the smoke setting
    assert ResAlignConfig().model_dump(exclude={'pool'}) == dict(
        steps=2, lr=2e-3, rank=4, up_std=.002, down_std=.008, unsafe_batch=8, retain_batch=8, retain_bank=16, alpha=8.,
        alpha_end=None, beta=.8, margin=.1, margin_after=.15, unsafe_bank=16, J=1, gamma=1., solver='cg',
        product='fd-forward', samples=1, products=4, tol=.03, clamp=.5, check_every=10, max_norm=.2, longer='shorten',
        depth='all', fallback_share=.5, seed=0, alpha_curve='stretched', clip=1., batches='step', inner='own', full_as='weights',
        horizon=0, courses=4, anchor=0., found_steps=0, found_radius=.1)
    assert Pool().model_dump() == dict(
        algorithm=('lora', 'full'), optimizer=('adam', 'sgd'), steps=(2, 3), batch=2, prior_weight=(0., 1.),
        folders=(), lr=dict(lora=(1e-3,), full=(1e-4,)), listed=(), still=0., distinct=False, unsafe=(0.,))
    for field in 'steps', 'margin', 'margin_after', 'max_norm', 'samples':
        with pytest.raises(ValueError, match=field): ResAlignConfig(**{field: 0})
    assert UnlearnData(None, None, {}, []).retain_captions == () == UnlearnData(None, None, {}, []).erase

    # settings at their edges: One weight of prior preservation is enough; a simulated fine-tuning ends at θ*, not at an
    # average
    assert Pool(prior_weight=[0.]).prior_weight == (0.,)
    assert Pool(listed=[simulation(ema=0.)]).listed[0].ema == 0
    for ema in .5, -.5, 1., -1.:
        with pytest.raises(ValueError, match='ema'): Pool(listed=[simulation(ema=ema)])
