"What the engine must never do: pass a divergence on, report a residual that isn't true, leave traces in a model."
import itertools
import math

import pytest
import torch
import torch.utils.checkpoint

from resalign.method import hypergrad
from resalign.method.hypergrad import *
from resalign.method.hypergrad import flat
from systems import *
from each import each


# ------------------------------------------------------------------ divergence

def hidden(share, top=1., rest=.05):
    "One large eigenvalue, in which g has hardly a part: H and g. A power step or two do not see it."
    H = torch.diag(torch.cat([torch.tensor([top]), torch.linspace(rest/5, rest, N - 1)]).double())
    return H, [p.detach() for p in leaves(torch.cat([torch.tensor([share]), torch.ones(N - 1)]).double())]

@each('share', (1., .1, .01, 1e-3, 1e-4, 1e-5, 0.))
def test_a_divergence_is_not_passed_on(share):
    "With a γ of 50/‖H‖, whatever is checked: γ that the products show to be too large is lowered, or the answer is g"
    H, g = hidden(share)
    params, loss = quadratic(H)
    for clamp, check, bound, power in itertools.product((.5, None), (True, False), (.5, math.inf), (1, 5)):
        x, report = solve(MoreauOperator(loss, params, 50.), g, 'richardson', clamp=clamp, check=check, bound=bound, power=power)
        case = clamp, check, bound, power, report
        if report.fallback: assert torch.equal(flat(x), flat(g)) and report.reason, case
        else:
            assert report.gamma_used * report.h_norm < 1, case
            solution = oracle(H, report.gamma_used, g)
            assert bound == math.inf or rel(x, [solution]) < 1.5*report.residual + 1e-12, case
        if clamp and power == 5 and share > 1e-4: assert not report.fallback and rel(x, [oracle(H, report.gamma_used, g)]) < .01, case
        if not clamp and share > 1e-4: assert report.fallback and 'diverges' in report.reason, case

@each('method', SOLVERS)
@each('product', ('exact', 'fd-forward', 'lora-bilinear'))
def test_a_check_changes_the_report_alone(method, product):
    "Every γ, far beyond the pole too, and factors for which the closed form is wrong"
    for size, reach, clamp in itertools.product((1., 150.), (.3, 3., 100.), (None, .5)):
        params, loss, pairs = lora(size)
        gamma = reach / torch.linalg.matrix_norm(dense(loss, params), 2).item()
        (x, checked), (y, unchecked) = [
            solve(MoreauOperator(loss, params, gamma, product, lora=pairs), like(params), method, clamp=clamp, check=check)
            for check in (True, False)]
        assert rel(x, y) < 1e-12 and checked.fallback == unchecked.fallback, (size, reach, clamp)
        assert method != 'identity' or (checked.residual > 0 and math.isnan(unchecked.residual))

def test_gamma_is_lowered_for_no_further_product():
    "The terms of the series are power steps: five products, the last of which is the residual; more only where asked for"
    H, g = hidden(.1)
    params, loss = quadratic(H)
    for options, spent in (dict(), 5), (dict(power=9), 9), (dict(clamp=None, bound=math.inf, check=False, power=9), 4):
        report = solve(MoreauOperator(loss, params, 50.), g, 'richardson', **(dict(clamp=.5) | options))[1]
        assert report.products == spent, report
    x, report = solve(MoreauOperator(loss, params, 50.), g, 'richardson', 40, clamp=.5, tol=1e-3)
    true = (flat(g) - flat(x) - report.gamma_used*H @ flat(x)).norm() / flat(g).norm()
    assert report.residual == pytest.approx(true.item()) and report.residual <= 1e-3 and report.products < 20

def test_powers_and_their_sum():
    H, g = symmetric(SPECTRA['mirror']), randn(N, seed=3)
    terms = [term for term, _ in zip(hypergrad.powers(lambda v: H @ v, g), range(6))]
    for i, (v, _) in enumerate(terms):
        close(g.norm()*hypergrad.next_term(terms, 1., i)*v, torch.linalg.matrix_power(H, i) @ g, 1e-12)
        assert v.norm().item() == pytest.approx(1)
    close(g.norm()*hypergrad.neumann(terms, .7), sum(torch.linalg.matrix_power(-.7*H, i) @ g for i in range(6)), 1e-12)
    assert hypergrad.next_term(terms, .7, 5) == pytest.approx((torch.linalg.matrix_power(.7*H, 5) @ g).norm().item()/g.norm().item())
    assert hypergrad.next_term(terms, .7, 6) is None
    # a thousand terms of a small H and a large γ: neither power leaves the range of numbers
    params, loss = quadratic(1e-3*H)
    x, report = solve(MoreauOperator(loss, params, 990.), like(params), 'richardson', 3000, tol=1e-12)
    assert report.products > 1000 and rel(x, [oracle(1e-3*H, 990., like(params))]) < 1e-9 and not report.fallback
    # nothing overflows into an exception
    params, loss = quadratic(H)
    x, report = solve(MoreauOperator(loss, params, 1e200), like(params), 'richardson')
    assert report.fallback and torch.equal(flat(x), flat(like(params)))


# ------------------------------------------------------------------ finite differences

def tilted(dtype, slope):
    "A network with a large linear term, which has no curvature but hides that of the rest"
    params, loss, _ = network(dtype)
    slopes = like(params, 40)
    return params, lambda: loss() + slope*sum((s*p).sum() for s, p in zip(slopes, params))

@each('slope', (0., 1., 30., 300., 3e3, 3e5))
def test_the_residual_of_finite_differences_is_true(slope):
    "In float32, against the dense Hessian in float64"
    params, loss = tilted(F64, slope)
    H = dense(loss, params)
    gamma = .5 / torch.linalg.matrix_norm(H, 2).item()
    low, low_loss = tilted(torch.float32, slope)
    g = like(low)
    b = flat(g).double()
    for method, product in itertools.product(('cg', 'richardson'), ('fd-central', 'fd-forward')):
        x, report = solve(MoreauOperator(low_loss, low, gamma, product), g, method, 10, bound=math.inf)
        true = ((b - flat(x).double() - gamma*H @ flat(x).double()).norm() / b.norm()).item()
        assert true < 1.5*report.residual + (3e-3 if product == 'fd-forward' else 5e-4), (method, product, true, report.residual)

def test_noise_is_added_where_the_aim_is_missed():
    params, loss = tilted(torch.float32, 3e5)
    op = MoreauOperator(loss, params, 1., 'fd-forward')
    op.hvp(like(params))
    assert .03 < op.kernel.noise <= 1
    x, g = torch.ones(4), torch.tensor([1., 1, 1, 3])
    assert hypergrad.with_noise(op, .1, x, g) == pytest.approx(.1 + op.kernel.noise*2/math.sqrt(12))
    assert hypergrad.with_noise(op, None, x, g) is None
    clean, clean_loss, _ = network(torch.float32)
    op = MoreauOperator(clean_loss, clean, 1., 'fd-forward')
    op.hvp(like(clean))
    assert op.kernel.noise == 0 and hypergrad.with_noise(op, .1, x, g) == .1
    flat_loss = MoreauOperator(lambda: sum(p.sum() for p in clean), clean, 1., 'fd-central')
    flat_loss.hvp(like(clean))
    assert flat_loss.kernel.noise == 1 # nothing is known of a curvature that no step shows


# ------------------------------------------------------------------ what is given back, and what is refused

class Counted(torch.nn.Module):
    "A buffer that is replaced, not written to"
    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(()))
        self.register_buffer('nothing', None)

    def forward(self, x):
        self.seen = self.seen + 1
        return x

def with_statistics():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), Counted(), torch.nn.SiLU(), torch.nn.Linear(6, 2))
    X, Y = randn(16, 4, seed=90).float(), randn(16, 2, seed=91).float()
    residuals = lambda: torch.utils.checkpoint.checkpoint(net, X, use_reentrant=False) - Y
    return net, list(net.parameters()), residuals, lambda: residuals().square().mean()

@each('product', PRODUCTS[:4])
@each('method', SOLVERS)
def test_statistics_are_as_they_were(product, method):
    "BatchNorm's, under checkpointing, which runs the network again in the backward"
    net, params, residuals, loss = with_statistics()
    loss().backward() # statistics that are not those of a new module
    before, objects = {k: v.clone() for k, v in net.named_buffers()}, dict(net.named_buffers())
    assert before['2.seen'] == 2 and before['1.running_mean'].any()
    x, report, _ = hypergradient(lambda: loss() + net(randn(8, 4).float()).square().sum(), loss, params, .1, method,
                                 product=product, residuals=residuals, start=[p.detach() + .1 for p in params])
    now = dict(net.named_buffers())
    assert all(torch.equal(now[k], v) and now[k] is objects[k] for k, v in before.items())
    with pytest.raises(ZeroDivisionError), kept_buffers(): loss() / (1 / 0)
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    loss()
    assert net[2].seen == 3 # outside, they move

def test_a_tensor_listed_twice_is_refused():
    "Exact products would count it once, finite differences twice"
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for product in PRODUCTS:
        with pytest.raises(ValueError, match='expected every tensor once'): MoreauOperator(lambda: (a*b).sum(), [a, b, a], 1., product)
        with pytest.raises(ValueError, match='expected every tensor once'): hypergradient(None, None, [a, b, a], 1., product=product)
