"""The hypergradient against what can be computed without it: dense matrices and formulas.

Properties, gradcheck and other libraries: tests/test_hypergradient.py."""
import inspect
import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint

from resalign.method import hypergrad
from resalign.method.hypergrad import *
from resalign.method.hypergrad import FrozenLoss, LoraPair, flat
from systems import *
from each import each


# ------------------------------------------------------------------ quadratics, where everything is known

@each('method', ITERATIVE)
def test_quadratic(method):
    "Every spectrum, γ up to 0.9: the dense solution, an honest residual, shapes kept"
    for (name, spectrum), gamma in itertools.product(SPECTRA.items(), (0., .5, .9)):
        H = symmetric(spectrum)
        params, loss = quadratic(H, randn(N, seed=3), at=randn(N, seed=4))
        g = like(params)
        x, report = solve(MoreauOperator(loss, params, gamma), g, **exactly(method))
        assert rel(x, [oracle(H, gamma, g)]) < 1e-10, (name, gamma)
        assert not report.fallback and report.gamma_used == gamma and report.residual < 1e-11, (name, gamma)
        assert [t.shape for t in x] == [p.shape for p in params]

@each('product', ('exact', 'fd-central', 'fd-forward'))
def test_products_of_a_quadratic(product):
    H = symmetric(SPECTRA['mirror'])
    params, loss = quadratic(H, randn(N, seed=3), at=randn(N, seed=4))
    v = like(params)
    close(flat(MoreauOperator(loss, params, 1., product).hvp(v)), H @ flat(v), 1e-13 if product == 'exact' else 1e-7)

@each('low', (1e-3, -.98))
def test_cg_ends_after_n_products(low):
    "Some codes' residual grows instead. Condition numbers 500 and 100, definite and indefinite H"
    H = symmetric(torch.cat([torch.tensor([low]), torch.linspace(0, 1, N - 1)]), seed=5)
    params, loss = quadratic(H)
    g = like(params)
    x, report = solve(MoreauOperator(loss, params, 1. if low < 0 else 1e3), g, 'cg', max_products=N)
    A = torch.eye(N, dtype=F64) + report.gamma_used * H
    assert ((A @ flat(x) - flat(g)).norm() / flat(g).norm()).item() < 1e-10 and report.products <= N
    assert report.gamma_used == report.gamma_asked

def test_krylov_spaces():
    # krylov residuals fall
    H = symmetric(SPECTRA['mirror'])
    params, loss = quadratic(H)
    for method in 'cg', 'minres':
        residuals = [solve(MoreauOperator(loss, params, .8), like(params), method, k)[1].residual for k in range(1, N + 1)]
        assert residuals[-1] < 1e-12 and residuals[3] < residuals[0]
        if method == 'minres': assert all(b <= a * (1 + 1e-9) + 1e-14 for a, b in zip(residuals, residuals[1:]))

    # fewer eigenvalues fewer products: Three different eigenvalues: three products are all there is to know
    params, loss = quadratic(symmetric([1.] * 4 + [-.5] * 4 + [.25] * 4))
    x, report = solve(MoreauOperator(loss, params, .8), like(params), 'cg', max_products=N)
    assert report.products == 3 and report.residual < 1e-12
    close(torch.tensor([report.lambda_min, report.lambda_max]), torch.tensor([-.5, 1.]), 1e-6)

    # a closed space at any scale: One direction of curvature: the space closes after two products, and nothing is
    # divided by rounding errors
    for scale in 1e-9, 1., 1e9:
        report = solved(scale*symmetric([1.] + [0.]*(N - 1)), .5/scale, max_products=N)
        assert report.products == 2 and report.residual < 1e-12

@each('k', (1, 2, 4))
def test_cg_and_minres_by_their_definitions(k):
    "On the span of g, Hg, ...: CG's residual is orthogonal to it, MINRES's is the shortest"
    H, gamma = symmetric(SPECTRA['mirror']), .8
    params, loss = quadratic(H)
    g = flat(like(params)).double()
    A, K = torch.eye(N, dtype=F64) + gamma * H, [g]
    for _ in range(k - 1): K.append(H @ K[-1])
    V = torch.linalg.qr(torch.stack(K, 1)).Q
    answers = dict(cg=V @ torch.linalg.solve(V.T @ A @ V, V.T @ g),
                   minres=V @ torch.linalg.lstsq(A @ V, g[:, None]).solution[:, 0])
    assert (answers['cg'] - answers['minres']).norm() > 1e-3
    for method, x in answers.items():
        found, report = solve(MoreauOperator(loss, params, gamma), like(params), method, k, bound=math.inf)
        close(flat(found), x, 1e-9)
        assert report.residual == pytest.approx(((g - A @ x).norm() / g.norm()).item(), rel=1e-7)

def test_norms():
    # the largest stretch of a few power steps
    H = torch.diag(torch.tensor([3., -1.], dtype=F64))
    v = torch.ones(2, dtype=F64)
    one, two = math.sqrt(5), math.sqrt((81 + 1) / (9 + 1))
    for products, norm in (0, 0.), (1, one), (2, two), (60, 3.):
        assert hypergrad.norm_by_power(lambda x: H @ x, v, products) == pytest.approx(norm)
    assert hypergrad.norm_by_power(lambda x: 0 * x, v, 5) == 0.

    # power steps
    calls = []
    assert hypergrad.norm_by_power(lambda v: calls.append(1) or 0*v, torch.ones(2), 5) == 0 and len(calls) == 1
    assert hypergrad.norm_by_power(lambda v: 1e12*v, torch.ones(2), 5) == pytest.approx(1e12)

    # norms are of the operator not of its argument
    H = symmetric([-3., 1.] + [.5]*(N - 2))
    for size in 1e-3, 1e3:
        assert solved(H, .1, 'richardson', size, bound=math.inf).h_norm <= 3 + 1e-9
    report = solved(H, .1, max_products=N)
    assert report.h_norm == pytest.approx(3)
    assert report.lambda_min == pytest.approx(-3) and report.lambda_max == pytest.approx(1)

@each('asked, lambda_min, h_norm, clamp, halvings, used', [
    (1., 0., 4., .5, 10, .125), (1., 0., 4., None, 10, 1.), (1., 0., 0., .5, 10, 1.), (.1, 0., 4., .5, 10, .1),
    (1., -.98, 0., None, 10, 1.),
    (1., -.995, 0., None, 10, .5), (8., -1., 0., None, 10, .5), (8., -1., 0., None, 2, 2.), (8., -1., 0., None, 0, 8.)])
def test_safe_gamma(asked, lambda_min, h_norm, clamp, halvings, used):
    "At most clamp/‖H‖; then halved while 1 + γλ_min is 0.01 or less, as often as allowed"
    assert hypergrad.safe_gamma(asked, lambda_min, h_norm, clamp, halvings) == used

def test_richardson():
    # an early end of richardson reports its residual
    H = symmetric(SPECTRA['mirror'])
    params, loss = quadratic(H)
    g = like(params)
    x, report = solve(MoreauOperator(loss, params, .5), g, 'richardson', 50, tol=.05)
    true = (flat(g) - flat(x) - .5 * H @ flat(x)).norm() / flat(g).norm()
    assert type(report.residual) is float and report.residual == pytest.approx(true.item()) and report.residual <= .05
    assert report.products < 10

    # richardson may pass through zero: H = I, γ = 1: the second iterate is zero, which has no ‖Hx‖/‖x‖
    params, loss = quadratic(torch.eye(N, dtype=F64))
    x, report = solve(MoreauOperator(loss, params, 1.), like(params), max_products=3, bound=math.inf)
    assert report.h_norm == pytest.approx(1) and flat(x).isfinite().all()

    # richardsons tolerance is relative
    H = symmetric(torch.full((N,), .5, dtype=F64))
    for size in 1e-3, 1e3:
        assert solved(H, .5, 'richardson', size, max_products=50, tol=1e-3, check=False).products == 5


@each('k', (1, 2, 4, 7))
def test_richardson_is_the_neumann_series(k):
    H, gamma = symmetric(SPECTRA['mirror']), .6
    params, loss = quadratic(H)
    g = like(params)
    x, report = solve(MoreauOperator(loss, params, gamma), g, 'richardson', max_products=k)
    series = sum((-gamma)**i * torch.linalg.matrix_power(H, i) @ flat(g) for i in range(k + 1))
    published = torch.zeros(N, dtype=F64) # from zero, K = k + 1
    for _ in range(k + 1): published = flat(g) - gamma * H @ published
    close(flat(x), series); close(flat(x), published)
    assert report.products == k + 1 # one of them for the residual
    assert solve(MoreauOperator(loss, params, gamma), g, 'richardson', max_products=k, check=False, bound=math.inf)[1].products == k


def test_reports():
    # identity and zero
    params, loss = quadratic(symmetric(SPECTRA['mirror']))
    g, op = like(params), MoreauOperator(loss, params, .5)
    x, report = solve(op, g, 'identity')
    assert torch.equal(flat(x), flat(g)) and op.products == report.products == 0 and op.loss.evaluations == 0 and not report.fallback
    _, report = solve(op, g, 'identity', check=True)
    close(torch.tensor(report.residual), .5 * (symmetric(SPECTRA['mirror']) @ flat(g)).norm().float() / flat(g).norm().float(), 1e-6)
    for method in SOLVERS:
        x, report = solve(op, [0 * t for t in g], method)
        assert not flat(x).any() and report.products in (0, 1) and not report.fallback

    # reasons in words
    H = symmetric(SPECTRA['convex'])
    report = hypergrad.SolveReport('cg', 'exact', 1., 1.)
    assert (report.products, report.reason, report.fallback) == (0, '', False)
    report.note('one')
    report.note('two')
    assert report.reason == 'one; two' and report.asdict()['reason'] == 'one; two'
    assert solved(H, .5, max_products=N).reason == ''
    assert solved(H, .5, 'identity').reason == 'residual not asked'
    assert solved(H, .5, 'richardson').reason == '' and solved(H, 5., 'cg', max_products=N).reason == ''
    assert 'diverges' in solved(H, 5., 'richardson', bound=math.inf).reason
    assert 'diverges' not in solved(H, .8, 'richardson', bound=math.inf).reason
    even = symmetric(torch.full((N,), .1, dtype=F64))
    for gamma, diverges in (5., False), (15., True):
        assert ('diverges' in solved(even, gamma, 'richardson', bound=math.inf).reason) is diverges
    saddle = solved(symmetric([-1.] + [.5]*(N - 1)), 1.2, 'minres', max_products=N, halvings=0)
    assert saddle.fallback and 'saddle' in saddle.reason and '= -0.2' in saddle.reason
    doubted = solved(H, 50., 'cg', max_products=1, bound=1e-3)
    assert doubted.fallback and 'residual ' in doubted.reason and 'above 0.001' in doubted.reason

    # each solve counts its own products
    params, loss = quadratic(symmetric(SPECTRA['convex']))
    op = MoreauOperator(loss, params, .5)
    assert [solve(op, like(params), 'cg', 3)[1].products for _ in range(2)] == [3, 3]
    _, report = solve(op, [torch.zeros_like(p) for p in params])
    assert (report.residual, report.products) == (0, 0)

    # numbers not tensors
    params, loss, _ = network()
    start = [p.detach() + .01 for p in params]
    x, report, harm = hypergradient(lambda: params[0]*2., loss, params, .1, start=start)
    assert {type(harm), type(report.stationarity), type(report.residual), type(report.h_norm)} == {float}
    assert harm == pytest.approx(2.6)


# ------------------------------------------------------------------ networks: torch, curvlinops and finite differences as oracles

def test_exact_products():
    "Against torch, finite differences and dense matrices"
    # exact is torchs hessian
    params, loss, _ = network()
    v = like(params)
    for retain in True, False:
        close(flat(MoreauOperator(loss, params, 1., retain=retain).hvp(v)), dense(loss, params) @ flat(v))

    # exact is the derivative of the gradient
    params, loss, _ = network()
    v, h = like(params), 1e-6
    def gradient(step):
        with hypergrad.moved(params, v, step): return flat(torch.autograd.grad(loss(), params))
    close(flat(MoreauOperator(loss, params, 1.).hvp(v)), (gradient(h) - gradient(-h)) / (2 * h), 1e-7)

    # unused and linear parameters count as zero
    a, b, unused = torch.tensor(2., requires_grad=True), torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    x, report = solve(MoreauOperator(lambda: a**2 + b.sum(), [a, b, unused], 1.), [torch.tensor(3.), torch.ones(3), torch.ones(2)], 'cg')
    close(flat(x), torch.tensor([1., 1, 1, 1, 1, 1]), 1e-6)

    # attention is differentiated twice
    params, loss = attention()
    v = like(params)
    with double_backward_attention(): H = dense(loss, params)
    close(flat(MoreauOperator(loss, params, 1.).hvp(v)), H @ flat(v))
    close(flat(MoreauOperator(loss, params, 1., 'fd-central').hvp(v)), H @ flat(v), 1e-7)

    # checkpointing changes nothing
    params, loss = attention()
    saving = lambda: torch.utils.checkpoint.checkpoint(loss, use_reentrant=False)
    v = like(params)
    close(flat(MoreauOperator(saving, params, 1.).hvp(v)), flat(MoreauOperator(loss, params, 1.).hvp(v)), 1e-14)


def test_gauss_newton():
    # gauss newton is jtj
    params, loss, residuals = network()
    r = residuals().reshape(-1)
    J = torch.stack([flat(torch.autograd.grad(e, params, retain_graph=True)) for e in r])
    v, op = like(params), MoreauOperator(loss, params, 1., 'gauss-newton', residuals=residuals)
    close(flat(op.hvp(v)), 2 / len(r) * J.T @ (J @ flat(v)))
    x, report = solve(MoreauOperator(loss, params, 1e3, 'gauss-newton', residuals=residuals), v, 'cg', 60, tol=1e-10)
    assert report.lambda_min > -1e-10 and report.gamma_used == 1e3 and report.residual < 1e-8 # never a saddle

    # gauss newton of a parameter that nothing depends on
    params, loss, residuals = network()
    idle = torch.ones(2, dtype=F64, requires_grad=True)
    *_, zero = MoreauOperator(loss, [*params, idle], 1., 'gauss-newton', residuals=residuals).hvp(like([*params, idle]))
    assert not zero.any()

# ------------------------------------------------------------------ precision and repetition

@each('product', PRODUCTS)
@each('dtype', (F64, torch.float32, torch.bfloat16))
def test_repeated_products_are_bit_identical(dtype, product):
    "A noisy loss too: the noise is drawn inside"
    params, loss, residuals = network(dtype)
    noisy = lambda: loss() * (1 + .1 * torch.rand(()))
    pairs = [LoraPair(params[1], params[3], torch.zeros(2, 4, dtype=dtype, requires_grad=True), 1.)] # A (6, 4), B (2, 6)
    if product == 'lora-bilinear': noisy = lambda: ((pairs[0].weight + params[3] @ params[1]) @ torch.rand(4, 5).to(dtype)).float().square().mean()
    op = MoreauOperator(noisy, params, 1., product, residuals=residuals, lora=pairs)
    v, w = like(params), like(params, 70)
    first = flat(op.hvp(v)); op.hvp(w)
    assert torch.equal(first, flat(op.hvp(v))) and first.any()
    if product == 'lora-bilinear': assert torch.equal(flat(op.true_hvp(v)), flat(op.true_hvp(v)))

def test_graphs_are_kept_and_freed():
    # retained and rebuilt graphs are bit identical
    params, loss, _ = network(torch.float32)
    v = like(params)
    kept, rebuilt = [MoreauOperator(loss, params, 1., retain=r) for r in (True, False)]
    for _ in range(3): assert torch.equal(flat(kept.hvp(v)), flat(rebuilt.hvp(v)))
    assert kept.loss.evaluations == 1 and rebuilt.loss.evaluations == 3

    # one graph by default: Kept from the first product on, by the operator and by `hypergradient`
    params, loss, _ = network()
    op = MoreauOperator(loss, params, .1)
    for _ in range(3): op.hvp(like(params))
    assert op.truth.evaluations == 1
    alone = hypergrad.Exact(FrozenLoss(loss, params), params)
    for _ in range(3): alone(like(params))
    assert alone.loss.evaluations == 1
    calls = []
    hypergradient(lambda: params[0]*1., lambda: calls.append(1) or loss(), params, .1, 'cg', max_products=3)
    assert len(calls) == 1

    # the operator is a map and frees its graph
    H = symmetric(SPECTRA['mirror'])
    params, loss = quadratic(H)
    v = like(params)
    with MoreauOperator(loss, params, .7) as op:
        close(flat(op(v)), flat(v) + .7*H @ flat(v), 1e-12)
        assert op.kernel.base is not None
    assert op.kernel.base is None

@each('dtype, product, tol', [(torch.float32, 'exact', 1e-4), (torch.float32, 'fd-central', 2e-3), (torch.float32, 'fd-forward', 1e-2),
                                                 (torch.bfloat16, 'exact', .03), (torch.bfloat16, 'fd-central', .1), (torch.bfloat16, 'fd-forward', .15)])
def test_low_precision(dtype, product, tol):
    "Against the float64 answer of the same network, at γ‖H‖ = 0.5"
    params, loss, _ = network()
    H = dense(loss, params)
    gamma, g = .5 / torch.linalg.matrix_norm(H, 2).item(), like(params)
    truth = oracle(H, gamma, g)
    low, low_loss, _ = network(dtype)
    for method in 'richardson', 'cg':
        x, report = solve(MoreauOperator(low_loss, low, gamma, product), [t.to(dtype) for t in g], method, 10)
        assert all(t.dtype == dtype for t in x) and not report.fallback, report
        assert rel(x, [truth]) < tol, (method, rel(x, [truth]))


@each('product', ('exact', 'fd-central', 'fd-forward'))
def test_no_gradient_at_all(product):
    "At a minimum, and for a loss that does not know its parameters"
    H = symmetric(torch.linspace(.5, 1, N))
    params, loss = quadratic(H)
    v = like(params)
    close(flat(MoreauOperator(loss, params, 1., product).hvp(v)), H @ flat(v), 1e-6)
    elsewhere = torch.ones(2, requires_grad=True)
    assert not flat(MoreauOperator(lambda: elsewhere.sum(), params, 1., product).hvp(v)).any()


# ------------------------------------------------------------------ random numbers inside the loss

@each('product', ('exact', 'fd-central'))
@each('method', ITERATIVE)
def test_dropout_is_frozen_and_the_generator_untouched(method, product):
    "The system is that of one mask; outside, nothing was drawn"
    params, H = leaves(randn(N, seed=4)), symmetric(SPECTRA['mirror'])
    def loss(): return (torch.nn.functional.dropout(vector(params), .5) @ H @ vector(params).tanh() + (torch.randn(N, dtype=F64) @ vector(params)).square()) / 30
    torch.manual_seed(11)
    op, state = MoreauOperator(loss, params, .3, product), torch.get_rng_state()
    x, report = solve(op, like(params), **{**exactly(method), 'tol': 1e-12 if product == 'exact' else 1e-7, 'halvings': 0})
    assert torch.equal(state, torch.get_rng_state())
    frozen = dense(FrozenLoss(loss, params), params)
    assert not report.fallback and rel(x, [oracle(frozen, .3, like(params))]) < (1e-9 if product == 'exact' else 1e-5)
    torch.rand(1) # another sample, another system
    assert rel(MoreauOperator(loss, params, .3).hvp(like(params)), op.hvp(like(params))) > 1e-2

def test_stationarity_belongs_to_the_same_sample():
    "even where the harmful loss draws numbers of its own in between"
    params = leaves(randn(N, seed=4))
    ft = lambda: (vector(params) * torch.randn(N, dtype=F64)).square().sum()
    start, gamma = like(params), .01
    torch.manual_seed(2)
    expected = (flat(FrozenLoss(ft, params).gradient()) + (flat(params) - flat(start)) / gamma).norm().item()
    _, report, _ = hypergradient(lambda: (vector(params) * torch.randn(N, dtype=F64)).sum(), ft, params, gamma, 'identity', start=start)
    assert report.stationarity == expected

@each('product', PRODUCTS)
def test_a_gradient_met_on_the_way_is_not_computed_again(product):
    params, loss, pairs = lora()
    op = MoreauOperator(loss, params, .1, product, residuals=lambda: loss().sqrt()[None], lora=pairs)
    op.hvp(like(params))
    spent = op.truth.evaluations
    found = stationarity(op, params)
    assert op.truth.evaluations - spent == (product == 'gauss-newton') # which needs the residuals' derivative only
    assert found == pytest.approx(flat(torch.autograd.grad(loss(), params)).norm().item())


# ------------------------------------------------------------------ attention, checkpointing, LoRA

def attention(dtype=F64):
    params = [randn(8, 8, seed=i).to(dtype).div(3).requires_grad_() for i in range(3)]
    X = randn(2, 5, 8, seed=9).to(dtype)
    def loss():
        q, k, v = [(X @ p).reshape(2, 5, 2, 4).transpose(1, 2) for p in params]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).square().mean()
    return params, loss


def test_lora_bilinear():
    # lora bilinear near the initialisation
    params, loss, pairs = lora()
    H, v = dense(loss, params), like(params)
    op = MoreauOperator(loss, params, .5 / torch.linalg.matrix_norm(H, 2).item(), 'lora-bilinear', lora=pairs)
    assert rel(op.hvp(v), [H @ flat(v)]) < 5e-3 and op.products == 0
    x, report = solve(op, v)
    assert rel(x, [oracle(H, op.gamma, v)]) < 5e-3 and report.residual < 5e-3 and report.products == 1 and not report.fallback
    assert not any(p.weight.requires_grad for p in pairs)

    # lora spectrum is a mirror
    params, loss, pairs = lora()
    values = torch.linalg.eigvalsh(dense(loss, params))
    for p in pairs: p.weight.requires_grad_()
    top = max(torch.linalg.matrix_norm(p.scale * G, 2) for p, G in zip(pairs, torch.autograd.grad(loss(), [p.weight for p in pairs])))
    close(values[[0, -1]], torch.stack([-top, top]), 1e-2)

    # lora bilinear far away is noticed
    params, loss, pairs = lora(150.)
    H, g = dense(loss, params), like(params)
    gamma = .9 / torch.linalg.matrix_norm(H, 2).item()
    x, report = solve(MoreauOperator(loss, params, gamma, 'lora-bilinear', lora=pairs), g, bound=math.inf)
    true = flat(g) - flat(x) - report.gamma_used * H @ flat(x)
    assert report.residual == pytest.approx((true.norm() / flat(g).norm()).item(), rel=1e-2) and report.residual > .1
    x, report = solve(MoreauOperator(loss, params, gamma, 'lora-bilinear', lora=pairs), g, bound=.1)
    assert report.fallback and torch.equal(flat(x), flat(g))

    # lora bilinear at a saddle
    params, loss, pairs = lora()
    g, ask = like(params), 4 / torch.linalg.matrix_norm(dense(loss, params), 2).item()
    x, report = solve(MoreauOperator(loss, params, ask, 'lora-bilinear', lora=pairs), g)
    assert report.gamma_used <= ask / 4 and report.residual < .5 and not report.fallback
    x, report = solve(MoreauOperator(loss, params, ask, 'lora-bilinear', lora=pairs), g, halvings=0)
    assert report.fallback and torch.equal(flat(x), flat(g))


def test_lora_pairs():
    # lora pairs of a model: What PEFT's layers look like: convolutions and switched-off adapters are left out
    def layer(weight, active=('default',)):
        m = torch.nn.Module()
        m.base_layer = torch.nn.Module(); m.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        m.lora_A, m.lora_B = [torch.nn.ModuleDict({'default': torch.nn.Linear(*s, bias=False)}) for s in ((4, 2), (2, 3))]
        m.scaling, m.active_adapters = {'default': .5}, list(active)
        return m
    model = torch.nn.Sequential(layer(torch.zeros(3, 4)), layer(torch.zeros(3, 4, 1, 1)), layer(torch.zeros(3, 4), active=()))
    pair, = hypergrad.lora_pairs(model)
    assert pair.A is model[0].lora_A['default'].weight and pair.B.shape == (3, 2) and pair.scale == .5

    # lora pairs deep inside: In a model that isn't a sequence, beside a module that wraps a layer without being LoRA
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = torch.nn.Linear(2, 2)
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wrapped, self.block = Wrapped(), torch.nn.Sequential(torch.nn.Linear(3, 4))
    from peft import LoraConfig, inject_adapter_in_model
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=['block.0']), Model())
    pair, = hypergrad.lora_pairs(model)
    assert pair.A.shape == (2, 3) and pair.B.shape == (4, 2) and pair.weight.shape == (4, 3)


# ------------------------------------------------------------------ safeguards

def saddle(gamma=4.):
    H = symmetric(SPECTRA['mirror'])
    params, loss = quadratic(H)
    return H, like(params), lambda: MoreauOperator(loss, params, gamma)

@each('method', ('cg', 'minres'))
def test_a_saddle_lowers_gamma(method):
    H, g, op = saddle()
    x, report = solve(op(), g, method, N)
    assert report.gamma_asked == 4 and report.gamma_used == .5 and not report.fallback # 4 and 2 are beyond the pole, 1 is at it
    close(flat(x), oracle(H, .5, g), 1e-10)
    assert 'γ lowered' in report.reason and report.products <= N # no product for the smaller γ
    assert report.lambda_min == pytest.approx(-1) and report.lambda_max == pytest.approx(1)

@each('method', ITERATIVE)
def test_a_saddle_is_flagged(method):
    H, g, op = saddle()
    x, report = solve(op(), g, method, N, halvings=0)
    assert report.fallback and torch.equal(flat(x), flat(g)) and report.gamma_used == 4
    assert ('diverges' if method == 'richardson' else 'saddle') in report.reason
    x, report = solve(op(), g, method, N, halvings=0, bound=math.inf) # asked for: the number, as it is
    assert report.fallback == torch.equal(flat(x), flat(g)) == (method == 'richardson') and report.reason # but for a divergence

def test_what_falls_back_and_what_does_not():
    # the pole itself: 1 + γλ = 0 for every λ: the projected matrix is singular
    params, loss = quadratic(-torch.eye(N, dtype=F64))
    for method in 'cg', 'minres':
        x, report = solve(MoreauOperator(loss, params, 1.), like(params), method, halvings=0)
        assert report.fallback and torch.equal(flat(x), flat(like(params)))

    # what is not finite falls back
    params = leaves(torch.ones(N, dtype=F64))
    loss = lambda: (vector(params) - 1).abs().sqrt().sum() # no derivative here
    for method in ITERATIVE:
        x, report = solve(MoreauOperator(loss, params, 1.), like(params), method)
        assert report.fallback and torch.equal(flat(x), flat(like(params))) and 'finite' in report.reason

    # an error in the loss comes through
    params, _ = quadratic(torch.eye(N, dtype=F64))
    with pytest.raises(ZeroDivisionError): solve(MoreauOperator(lambda: 1 / 0, params, 1.), like(params))

@each('method', ITERATIVE)
def test_clamp(method):
    H, g, op = saddle(100.)
    x, report = solve(op(), g, method, N, clamp=.5, power=12)
    assert .499 < report.gamma_used < .52 and not report.fallback and report.residual < 1e-2
    assert report.products == (N + 1 if method == 'richardson' else N)


def test_budget_of_fallbacks():
    # budget
    good, bad = SimpleNamespace(fallback=False, reason=''), SimpleNamespace(fallback=True, reason='saddle')
    budget = FallbackBudget(share=.5, least=4)
    for r in bad, bad, bad: budget.count(r)
    with pytest.raises(TooManyFallbacks, match='4 of 4 solves.*saddle'): budget.count(bad)
    budget = FallbackBudget(share=.5, least=4)
    for r in (good, bad) * 20: budget.count(r)
    with pytest.raises(TooManyFallbacks): budget.count(bad)
    never = FallbackBudget(share=1.)
    for _ in range(50): never.count(bad)

    # budget stops a run
    H, g, op = saddle()
    budget, done = FallbackBudget(least=3), 0
    with pytest.raises(TooManyFallbacks):
        for _ in range(10): budget.count(solve(op(), g, 'cg', halvings=0)[1]); done += 1
    assert done == 2


P = leaves(torch.ones(N, dtype=F64))
BAD_OPERATORS = {'product': dict(product='magic'), 'gamma': dict(gamma=-1.), 'finite': dict(gamma=math.nan), 'expected a finite': dict(gamma=math.inf),
                 'at least one': dict(params=[]), r'params\[0\]': dict(params=[2 * P[0]]), r'params\[1\]': dict(params=[P[0], torch.ones(2)]),
                 'residuals=': dict(product='gauss-newton'), 'lora=': dict(product='lora-bilinear'),
                 'A and B': dict(product='lora-bilinear', lora=[LoraPair(torch.ones(1, 2), torch.ones(2, 1), torch.ones(2, 2), 1.)])}

@each('message', BAD_OPERATORS)
def test_bad_operators(message):
    asked = {'loss': lambda: vector(P).square().sum(), 'params': P, 'gamma': 1., **BAD_OPERATORS[message]}
    with pytest.raises(ValueError, match=message): MoreauOperator(**asked)
    with pytest.raises(ValueError, match=message): hypergradient(lambda: 1 / 0, asked.pop('loss'), **asked) # before anything is computed

BAD_SOLVES = {'method': dict(method='magic'), 'max_products': dict(max_products=0), 'tol': dict(tol=-1.), 'clamp': dict(clamp=math.nan),
              'same shape': dict(g=like(P)[:2]), 'one tensor': dict(g=[t.reshape(-1) for t in like(P)]), 'finite numbers': dict(g=[t / 0 for t in like(P)])}

@each('message', BAD_SOLVES)
def test_bad_solves(message):
    op = MoreauOperator(lambda: vector(P).square().sum(), P, 1.)
    with pytest.raises(ValueError, match=message): solve(op, **{'g': like(P), **BAD_SOLVES[message]})
    assert op.products == 0


# ------------------------------------------------------------------ the two calls that others make

def test_hypergradient_as_the_meta_loop_calls_it():
    params, loss, _ = network(torch.float32)
    harm_loss = lambda: sum(p.square().sum() for p in params)
    g, value = [2 * p.detach() for p in params], sum(p.detach().square().sum() for p in params).item()
    x, report, harm = hypergradient(harm_loss, loss, params, .1, method='identity', product='exact', max_products=4)
    assert torch.equal(flat(x), flat(g)) and harm == value and report.products == 0
    with torch.no_grad(): x, report, harm = hypergradient(harm_loss, loss, params, .1, method='richardson', product='exact', max_products=4)
    H = dense(loss, params).double()
    series = sum((-.1)**i * torch.linalg.matrix_power(H, i) @ flat(g).double() for i in range(5))
    assert rel(x, [series]) < 1e-5 and harm == value and report.products == 5
    assert all(p.grad is None for p in params) and not any(t.requires_grad for t in x)
    row = report.asdict()
    assert row['method'] == 'richardson' and row['gamma_asked'] == row['gamma_used'] == .1 and row['residual'] < .1
    assert {'products', 'lambda_min', 'lambda_max', 'h_norm', 'stationarity', 'fallback', 'reason', 'product'} < row.keys()

def test_unrolling():
    # unrolled descent on a quadratic: T steps have the Jacobian (I − ηH)ᵀ; with γ = ηT the proximal one differs from it
    # at second order
    H, c = symmetric(SPECTRA['mirror']), randn(N, seed=3)
    def step(lr): return lambda theta, t: [th - lr * d for th, d in zip(theta, unflat_live(H @ vector(theta) + c))]
    def unflat_live(x): return [p.reshape(s) for p, s in zip(x.split([math.prod(s) for s in SHAPES]), SHAPES)]
    errors = []
    for lr in .01, .005:
        x, end, value = unrolled(step(lr), leaves(randn(N, seed=4)), 10, lambda theta: harm(vector(theta)))
        g, = torch.autograd.grad(harm(e := vector(end).requires_grad_()), e)
        close(flat(x), torch.linalg.matrix_power(torch.eye(N, dtype=F64) - lr * H, 10).T @ g)
        assert value == pytest.approx(harm(e).item())
        params, loss = quadratic(H, c, at=e.detach())
        moreau, *_ = hypergradient(lambda: harm(vector(params)), loss, params, lr * 10, 'cg', max_products=N)
        errors.append(rel(moreau, x))
    assert errors[0] < 1e-2 and errors[0] / errors[1] == pytest.approx(4, rel=.2)

    # unrolling leaves its start alone
    start = [torch.ones(2, dtype=F64), torch.ones(1, dtype=F64)]
    grads, end, value = unrolled(lambda theta, t: [theta[0]*2, theta[1]], start, 3, lambda theta: theta[0].sum())
    assert [g.tolist() for g in grads] == [[8., 8.], [0.]] and value == 16. # zero where nothing depends on it
    assert not any(t.requires_grad for t in [*start, *end]) and start[0].tolist() == [1., 1.]


# ------------------------------------------------------------------ vectors of tensors

def test_vectors_of_tensors(monkeypatch):
    # flat and unflat: End to end, in float32 or better, without a graph
    low, high = (torch.ones(2, dtype=d, requires_grad=True) for d in (torch.bfloat16, F64))
    assert flat([low]).dtype == torch.float32 and flat([low, high]).dtype == flat([high, low]).dtype == F64
    assert not flat([low]).requires_grad
    wide, = hypergrad.widened([low])
    assert wide.dtype == torch.float32 and not wide.requires_grad
    assert [t.shape for t in hypergrad.unflat(torch.arange(7.), [torch.ones(()), torch.ones(2, 3)])] == [(), (2, 3)]

    # the shorter unknown is solved for
    sizes, solver = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, 'cholesky_ex', lambda A: sizes.append(len(A)) or solver(A))
    for m, n in (2, 5), (5, 2), (3, 3):
        K, p, q = .1*randn(m, n), randn(n, 2), randn(m, 2, seed=1)
        a, b = hypergrad.solve_cross(K, p, q)
        close(a + K.T @ b, p, 1e-12)
        close(b + K @ a, q, 1e-12)
    assert sizes == [2, 2, 3]

@each('product', ['exact', 'fd-forward'])
def test_products_come_in_the_dtype_asked_for(product):
    params, loss, _ = network(torch.bfloat16)
    v = [d.requires_grad_() for d in like(params)]
    Hv = MoreauOperator(loss, params, 1., product).hvp(v)
    assert [(h.dtype, h.requires_grad) for h in Hv] == [(torch.bfloat16, False)]*len(v)


# ------------------------------------------------------------------ the step of a finite difference

class Steps:
    "A gradient field, and how far from the start it has been asked for"
    def __init__(self, field, start=(1., 0.)):
        self.field, self.start, self.asked = field, torch.tensor(start, dtype=F64), []
        self.params = [self.start.clone().requires_grad_()]

    def gradient(self):
        "As of a FrozenLoss"
        here = self.params[0].detach().clone()
        self.asked.append((here - self.start).norm().item())
        return [self.field(here)]

    def product(self, *v, **kw):
        made = hypergrad.FiniteDifference(self, self.params, **dict(dict(central=False), **kw))
        return [made([torch.tensor(x, dtype=F64)]) for x in v]

def lengths(steps): return pytest.approx(steps, rel=1e-6, abs=1e-20)
SHORTEST = torch.finfo(F64).eps**.5

def test_steps_of_finite_differences():
    # the step grows to what is aimed at: g = hx: the relative change of the gradient is the relative length; however
    # small h
    for h in 1., 1e-6:
        steps = Steps(lambda x: h*x)
        (Hv,), = steps.product((3., 0.), tau=.01)
        assert steps.asked == lengths([0., SHORTEST, .01])
        close(Hv, torch.tensor([3.*h, 0.], dtype=F64), 1e-6)

    # the step stays between its bounds
    linear, start = Steps(lambda x: torch.ones_like(x)), torch.tensor([1., 0.], dtype=F64)
    steep = Steps(lambda x: 1e12*(x - start) + 1)
    linear.product((1., 0.))
    steep.product((1., 0.))
    assert linear.asked == lengths([0., SHORTEST, .01]) and steep.asked == lengths([0., SHORTEST])
    from_zero = Steps(lambda x: torch.ones_like(x), (0., 0.))
    from_zero.product((1., 0.))
    assert from_zero.asked == lengths([0., SHORTEST, .01])
    far = Steps(lambda x: torch.ones_like(x), (300., 400.))
    far.product((1., 0.))
    assert far.asked == lengths([0., 500*SHORTEST, 5.])
    central = Steps(lambda x: torch.ones_like(x))
    central.product((1., 0.), central=True)
    assert central.asked == lengths([0., SHORTEST, SHORTEST, .03, .03])

    # eight steps are enough: A gradient that jumps by the same amount however short the step: the length falls by 3.5
    # each time
    steps = Steps(lambda x: torch.stack([x[0], .035*(x[1] != 0)]))
    steps.product((1., 0.), (0., 1.), (1., 0.), tau=.01)
    assert steps.asked == lengths([0., SHORTEST, .01, *(.01/3.5**k for k in range(8)), .01])

    # no direction costs nothing
    steps = Steps(lambda x: x)
    (Hv,), = steps.product((0., 0.))
    assert not Hv.any() and not steps.asked


@each('factor, tries', [(.34, 1), (.32, 2), (2.9, 1), (3.1, 2)])
def test_a_step_within_a_factor_of_three_is_kept(factor, tries):
    "The first product settles the length; along another direction the gradient changes `factor` times as fast"
    steps = Steps(lambda x: torch.stack([x[0], factor*x[1]]))
    steps.product((1., 0.), (0., 1.), (1., 0.), tau=.001)
    again = [.001/factor]*(tries - 1)
    assert steps.asked == lengths([0., SHORTEST, .001, .001, *again, .001]) # the third starts at the first one's length


def test_finite_differences():
    # central differences look both ways: By default; the error of a cubic's is of second order, a forward difference's
    # of first
    steps = Steps(lambda x: x**3)
    (central,), = steps.product((1., 0.), central=True, tau=.03)
    (forward,), = steps.product((1., 0.), central=False, tau=.03)
    assert steps.asked == lengths([0., SHORTEST, SHORTEST, .01, .01, 0., SHORTEST, .01])
    assert central[0] - 3 == pytest.approx(1e-4, rel=.01) and forward[0] - 3 == pytest.approx(.03, rel=.02)
    assert hypergrad.FiniteDifference(steps, steps.params).central is True

    # what is aimed at by dtype: (central, forward), of the coarsest dtype among the parameters
    aims = {F64: (1e-5, 1e-7), torch.float32: (.03, 1e-3), torch.float16: (.1, .1), torch.bfloat16: (.3, .3)}
    for dtype, pair in aims.items():
        params = [torch.ones(2, dtype=F64), torch.ones(2, dtype=dtype)]
        assert tuple(hypergrad.FiniteDifference(None, params, central).tau for central in (True, False)) == pair

    # a forward difference costs two gradients where the shortest step will do
    H, at = symmetric(torch.linspace(2., 3., N)), randn(N, seed=4)
    params, loss = quadratic(H, -.8 * H @ at, at, dtype=torch.float32)
    op = MoreauOperator(loss, params, 1., 'fd-forward')
    op.hvp(like(params)); stationarity(op, params)
    assert op.loss.evaluations == 2

    # finite differences give the parameters back
    params, loss, _ = network(torch.bfloat16)
    before, calls = flat(params).clone(), []
    def fails(): calls.append(0); return loss() if len(calls) < 2 else 1 / 0
    for product in 'fd-central', 'fd-forward':
        MoreauOperator(loss, params, 1., product).hvp(like(params))
        assert torch.equal(flat(params), before)
        calls.clear()
        with pytest.raises(ZeroDivisionError): MoreauOperator(fails, params, 1., product).hvp(like(params))
        assert torch.equal(flat(params), before)


# ------------------------------------------------------------------ products, once more


def test_parts_of_lora_bilinear():
    # lora parameters coarser than the weight: The blocks are in the weight's precision, products in the parameters'
    params, loss, pairs = lora(30.)
    v, gamma = like(params), .1
    fine = hypergrad.LoraBilinear(FrozenLoss(loss, params), params, pairs)
    expected, inverse = fine(v), fine.inverse(v, gamma)
    coarse = [LoraPair(p.A.detach().float().requires_grad_(), p.B.detach().float().requires_grad_(), p.weight, p.scale)
              for p in pairs]
    low = [t for p in coarse for t in (p.A, p.B)]
    X, Y = randn(40, 8, seed=80), randn(40, 4, seed=81)
    def same():
        W1, W2 = [p.weight + p.scale*p.B.double() @ p.A.double() for p in coarse]
        return (torch.tanh(X @ W1.T) @ W2.T - Y).square().mean()
    kernel = hypergrad.LoraBilinear(FrozenLoss(same, low), low, coarse)
    w = [d.float() for d in v]
    assert rel(kernel.inverse(w, gamma), inverse) < 1e-5 and rel(kernel(w), expected) < 1e-5 # inverse first

    # the check of lora bilinear is one forward difference
    params, loss, pairs = lora()
    op = MoreauOperator(loss, params, 1., 'lora-bilinear', lora=pairs)
    op.hvp(like(params))
    before = op.loss.evaluations
    op.true_hvp(like(params))
    first = op.loss.evaluations - before # the first one may look for its step
    op.true_hvp(like(params))
    assert first <= 8 and op.loss.evaluations - before - first == 1

    # the closed form halves gamma where it has no answer: Power steps only bound the norm from below: the layer's own
    # system says whether γ was small enough
    params, loss, pairs = lora()
    op = MoreauOperator(loss, params, 1., 'lora-bilinear', lora=pairs)
    asked, inverse = [], op.kernel.inverse
    def reluctant(g, gamma):
        asked.append(gamma)
        return inverse(g, gamma) if gamma <= .25 else None
    op.kernel.inverse = reluctant
    _, report = solve(op, like(params), bound=math.inf)
    assert asked == [1., .5, .25] and report.gamma_used == .25 and report.lambda_min == -report.lambda_max < 0
    op.kernel.inverse = lambda g, gamma: asked.append(gamma)
    _, report = solve(op, like(params), halvings=1)
    assert asked[3:] == [1., .5] and report.fallback


# ------------------------------------------------------------------ what a report says

def solved(H, gamma, method='cg', size=1., **kw):
    params, loss = quadratic(H)
    g = [size*d for d in like(params)]
    return solve(MoreauOperator(loss, params, gamma), g, method, **kw)[1]


def test_what_may_be_asked():
    # numbers that may be asked for
    params, loss = quadratic(symmetric(SPECTRA['convex']))
    op, g = MoreauOperator(loss, params, .5), like(params)
    solve(op, g, tol=0., clamp=0.)
    for wrong in dict(tol=math.inf), dict(clamp=math.inf), dict(tol=-1e-9), dict(tol=math.nan):
        with pytest.raises(ValueError): solve(op, g, **wrong)

    # defaults: Those that the page gives reasons for
    default = lambda f: {k: p.default for k, p in inspect.signature(f).parameters.items()}
    assert default(solve) | dict(op=0, g=0) == dict(
        op=0, g=0, method='cg', max_products=4, tol=None, check=None, clamp=None, power=5, halvings=10, bound=.5)
    assert (default(FallbackBudget)['share'], default(FallbackBudget)['least'], hypergrad.MARGIN) == (.5, 10, .01)

    # an operator belongs to its point
    params, loss = quadratic(torch.eye(N, dtype=F64))
    op = MoreauOperator(loss, params, .5)
    op.hvp(like(params))
    with torch.no_grad(): params[1] += 1
    with pytest.raises(RuntimeError, match='have changed'): op.hvp(like(params))


