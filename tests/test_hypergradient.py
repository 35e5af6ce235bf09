"""The hypergradient over many systems: properties (hypothesis), torch's gradcheck through the argmin, curvlinops."""
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from resalign.method.hypergrad import *
from resalign.method.hypergrad import flat, unflat
from systems import *
from each import each


# ------------------------------------------------------------------ properties

@st.composite
def systems(draw):
    "H symmetric of any signs, γ with γρ(H) ≤ 0.9, and a seed"
    eigenvalues = draw(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=N, max_size=N))
    scale, reach, seed = draw(st.floats(1e-3, 1e3)), draw(st.floats(.05, .9)), draw(st.integers(0, 10**6))
    return scale * symmetric(eigenvalues, seed), reach / (scale * max(1e-3, *map(abs, eigenvalues))), seed

@settings(max_examples=40)
@given(systems())
def test_solvers_agree_with_the_dense_solve(system):
    H, gamma, seed = system
    params, loss = quadratic(H)
    g = like(params, seed)
    for method in ITERATIVE:
        x, report = solve(MoreauOperator(loss, params, gamma), g, **exactly(method))
        assert rel(x, [oracle(H, gamma, g)]) < 1e-9 and not report.fallback, method

@settings(max_examples=25)
@given(systems(), st.floats(-3, 3), st.sampled_from(ITERATIVE))
def test_solve_is_linear(system, a, method):
    H, gamma, seed = system
    params, loss = quadratic(H)
    g, h = like(params, seed), like(params, seed + 50)
    def x(rhs): return flat(solve(MoreauOperator(loss, params, gamma), rhs, **exactly(method))[0])
    close(x([a * s + t for s, t in zip(g, h)]), a * x(g) + x(h), 1e-8)

@settings(max_examples=40)
@given(systems(), st.integers(1, 6), st.sampled_from(SOLVERS))
def test_the_reported_residual_is_the_true_one(system, k, method):
    H, gamma, seed = system
    params, loss = quadratic(H)
    g = like(params, seed)
    x, report = solve(MoreauOperator(loss, params, gamma), g, method, k, check=True, bound=math.inf)
    true = flat(g) - flat(x) - report.gamma_used * H @ flat(x)
    assert report.residual == pytest.approx((true.norm() / flat(g).norm()).item(), rel=1e-6, abs=1e-12)
    assert report.h_norm <= torch.linalg.matrix_norm(H, 2).item() * (1 + 1e-9)

@settings(max_examples=40)
@given(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=N, max_size=N), st.floats(.1, 50),
       st.sampled_from(('cg', 'minres')))
def test_no_saddle_is_passed_on(eigenvalues, gamma, method):
    "With any γ: either the system solved is that of a minimum, or the answer is x = g and says so"
    H = symmetric(eigenvalues)
    params, loss = quadratic(H)
    g = like(params)
    x, report = solve(MoreauOperator(loss, params, gamma), g, method, N)
    if report.fallback: assert torch.equal(flat(x), flat(g)) and report.reason
    else:
        values = torch.linalg.eigvalsh(H)
        assert 1 + report.gamma_used * values[0] > 0
        assert report.residual <= .5 and (report.gamma_used == gamma or 'lowered' in report.reason)


@pytest.mark.filterwarnings('ignore')
def test_curvlinops_agrees():
    linop = pytest.importorskip('curvlinops')
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).to(F64)
    X, Y = randn(16, 4, seed=90), randn(16, 2, seed=91)
    params, mse = list(net.parameters()), torch.nn.MSELoss()
    H = linop.HessianLinearOperator(net, mse, params, [(X, Y)])
    GGN = linop.GGNLinearOperator(net, mse, params, [(X, Y)])
    for seed in range(3):
        v = like(params, seed)
        close(flat(MoreauOperator(lambda: mse(net(X), Y), params, 1.).hvp(v)), H @ flat(v))
        gauss_newton = MoreauOperator(None, params, 1., 'gauss-newton', residuals=lambda: net(X) - Y)
        close(flat(gauss_newton.hvp(v)), GGN @ flat(v))

def newton(theta, loss_at, gamma):
    "argmin L(x) + ‖x − θ‖²/2γ"
    x = theta.clone()
    for _ in range(30):
        grad = torch.autograd.functional.jacobian(loss_at, x) + (x - theta) / gamma
        if grad.norm() < 1e-13: break
        A = torch.autograd.functional.hessian(loss_at, x) + torch.eye(len(x), dtype=F64) / gamma
        x = x - torch.linalg.solve(A, grad)
    return x


def through_the_argmin(gamma, **options):
    "θ ↦ L_harm(θ*(θ)), with the hypergradient as its backward"
    class End(torch.autograd.Function):
        @staticmethod
        def forward(ctx, theta):
            params = leaves(newton(theta.detach(), fine_tuning, gamma))
            losses = [lambda f=f: f(vector(params)) for f in (harm, fine_tuning)]
            start = unflat(theta.detach(), params)
            ctx.x, ctx.report, value = hypergradient(*losses, params, gamma, start=start, **options)
            assert ctx.report.stationarity < 1e-10
            return torch.tensor(value, dtype=F64)
        @staticmethod
        def backward(ctx, up): return up * flat(ctx.x)
    return End.apply

@each('method', ITERATIVE)
def test_gradcheck_through_the_argmin(method):
    "The start is moved, the proximal problem solved again: torch's own gradcheck, float64"
    theta = (.4 * randn(N, seed=8)).requires_grad_()
    assert torch.autograd.gradcheck(through_the_argmin(.2, **exactly(method)), theta, eps=1e-6, atol=1e-7, rtol=1e-6)

def test_gradcheck_sees_a_wrong_answer():
    theta = (.4 * randn(N, seed=8)).requires_grad_()
    wrong = through_the_argmin(.2, method='identity')
    assert not torch.autograd.gradcheck(wrong, theta, eps=1e-6, atol=1e-7, rtol=1e-6, raise_exception=False)

def test_gradcheck_through_a_quadratics_argmin():
    "In closed form, on an indefinite H: θ* = (I + γH)⁻¹(θ − γc)"
    H, c, gamma = symmetric(SPECTRA['mirror']), randn(N, seed=3), .9
    A = torch.eye(N, dtype=F64) + gamma * H
    theta = randn(N, seed=8).requires_grad_()
    end = torch.linalg.solve(A, theta - gamma * c)
    direct, = torch.autograd.grad(harm(end), theta)
    params, loss = quadratic(H, c, at=end.detach())
    x, report, value = hypergradient(lambda: harm(vector(params)), loss, params, gamma, 'cg', max_products=N,
                                     start=unflat(theta.detach(), params))
    close(flat(x), direct, 1e-10)
    assert report.stationarity < 1e-12 and value == pytest.approx(harm(end).item())

@pytest.mark.gpu
def test_cuda_gives_the_same_answer():
    "and leaves both generators alone"
    params, loss, _ = network()
    H = dense(loss, params)
    there = [p.detach().cuda().requires_grad_() for p in params]
    def loss_there():
        gain, W1, b1, W2, b2 = there
        X, Y = randn(16, 4, seed=90).cuda(), randn(16, 2, seed=91).cuda()
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(X, W1, b1))
        far = gain * torch.nn.functional.linear(hidden, W2, b2) - Y
        return far.square().mean() + 0 * torch.rand((), device='cuda')
    g, states = like(params), (torch.get_rng_state(), torch.cuda.get_rng_state())
    for product in 'exact', 'fd-central':
        x, report = solve(MoreauOperator(loss_there, there, .1, product), [t.cuda() for t in g], 'cg', 30, tol=1e-12)
        assert x[0].is_cuda and rel([t.cpu() for t in x], [oracle(H, .1, g)]) < 1e-6
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.cuda.get_rng_state())


# ------------------------------------------------------------------ several processes

RANK = '''
import sys, torch
from resalign.method.hypergrad import FallbackBudget, SolveReport, TooManyFallbacks
rank, meeting = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group('gloo', init_method=f'file://{meeting}', rank=rank, world_size=2)
budget = FallbackBudget(share=.5, least=6)
bad = SolveReport('cg', 'exact', 1., 1., fallback=True, reason='saddle seen by rank 1')
good = SolveReport('cg', 'exact', 1., 1.)
try:
    for step in range(9):
        for j in range(1 + rank): budget.count(bad if rank else good) # rank 1 has two solves a step, both fall back
        budget.agree()
        print(f'step {step}: {budget.fallbacks} of {budget.solves}', flush=True)
except TooManyFallbacks as e: print(e, flush=True)
torch.distributed.barrier() # neither waits for the other
torch.distributed.destroy_process_group()
'''

def test_processes_stop_together(tmp_path):
    "One of two falls back: both stop after the same step, with the same words, and neither waits"
    run = lambda rank: subprocess.Popen([sys.executable, '-c', RANK, str(rank), str(tmp_path/'meeting')], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ranks = [run(0), run(1)]
    said = [p.communicate(timeout=120) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], said
    (one, _), (two, _) = said
    assert one == two and one.splitlines() == [
        'step 0: 2 of 3',
        '4 of 6 solves fell back to x = g, more than 50% of them; the latest report says: saddle seen by rank 1']
