"""The adjoint against what can be computed without it: unrolling with double backward, on optimizers written out from
their papers; whole fine-tunings, moved and run again; TorchOpt."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from resalign.method import hypergrad
from resalign.method.hypergrad import *
from resalign.method.hypergrad import flat
from systems import *
from each import each

SHAPES = (), (3, 4), (3,), (2, 3) # a gain and a small network: 22 parameters
SIZE = 22
X, Y = [randn(8, 6, 4, seed=60).unbind(0), randn(8, 6, 2, seed=61).unbind(0)]


# ------------------------------------------------------------------ a fine-tuning, in place and as a function

def loss_at(theta, k, weight=1.):
    "L_k of a list of tensors: each step has its own batch"
    gain, W1, b, W2 = theta
    return weight * (gain * torch.tanh(torch.nn.functional.linear(X[k].to(b), W1, b)) @ W2.T - Y[k].to(b)).square().mean()

def harm_at(theta): return (loss_at(theta, 7) + .1 * theta[1].sin().sum()).double()
def start(dtype=F64, seed=0): return [(1. * randn(*s, seed=seed + i)).to(dtype).requires_grad_() for i, s in enumerate(SHAPES)]
def pieces(x): return [p.reshape(s) for p, s in zip(x.split([math.prod(s) for s in SHAPES]), SHAPES)]

def losses_of(theta, k, case):
    "Of one step: accumulation gives two, prior preservation adds a term"
    prior = lambda: .5 * loss_at(theta, (k + 3) % 7) if case.get('prior') else 0
    return [lambda j=j: loss_at(theta, (k + j) % 7) + prior() for j in range(case.get('accumulation', 1))]

def record(case, steps, dtype=F64, depth='all', theta=None, **kwargs):
    "A real optimizer's fine-tuning"
    params = start(dtype) if theta is None else [t.clone().requires_grad_() for t in theta]
    path = Trajectory(case['kind'](params, **case['options']), depth, **kwargs)
    for k in range(steps): path.step(*losses_of(params, k, case), max_norm=case.get('max_norm'))
    return path

def sgd(x, s, g, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    "On vectors; s: what is remembered"
    g = g + weight_decay * x
    if momentum: s = g if s is None else momentum * s + (1 - dampening) * g
    return x - lr * (g if not momentum else g + momentum * s if nesterov else s), s

def adam(x, s, g, lr, betas=(.9, .999), eps=1e-8, weight_decay=0, amsgrad=False, decoupled=False, frozen_v=False):
    k, m, v, largest = s or (0, 0 * x, 0 * x, 0 * x)
    if not decoupled: g = g + weight_decay * x
    k, m, v = k + 1, betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    largest = torch.where(v.detach() > largest.detach(), v, largest)
    corrected = (largest if amsgrad else v) / (1 - betas[1]**k)
    if frozen_v: corrected = corrected.detach()
    change = lr * m / (1 - betas[0]**k) / (corrected.sqrt() + eps)
    return x * (1 - lr * weight_decay if decoupled else 1) - change, (k, m, v, largest)

def plain(case):
    if case['kind'] is torch.optim.SGD: return lambda x, s, g: sgd(x, s, g, **case['options'])
    decoupled = case['kind'] is torch.optim.AdamW
    return lambda x, s, g: adam(x, s, g, **(dict(weight_decay=.01 if decoupled else 0) | case['options']),
                                decoupled=decoupled, frozen_v=case.get('frozen_v', False))

def unrolled_truth(case, steps, depth=None):
    "dL_harm(θ_T)/dθ_{T−depth}, with what the optimizer remembers there held constant"
    x, s, first = flat(start()).clone(), None, 0 if depth is None else steps - depth
    for k in range(steps):
        if k == first: x, s = x.detach().requires_grad_(), constant(s)
        if k == first: origin = x
        live = x if x.requires_grad else x.detach().requires_grad_()
        terms = losses_of(pieces(live), k, case)
        g, = torch.autograd.grad(sum(f() for f in terms) / len(terms), live, create_graph=True)
        if case.get('max_norm'): g = g * torch.clamp(case['max_norm'] / (g.norm() + 1e-6), max=1)
        x, s = plain(case)(live, s, g)
    if first == steps: origin = x = x.detach().requires_grad_()
    return torch.autograd.grad(harm_at(pieces(x)), origin)[0], x.detach()

def constant(s):
    if isinstance(s, tuple): return tuple(constant(v) for v in s)
    return s.detach() if isinstance(s, torch.Tensor) else s

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
CASES = {
    'SGD': dict(kind=SGD, options=dict(lr=.1)),
    'momentum': dict(kind=SGD, options=dict(lr=.05, momentum=.9, dampening=.1, weight_decay=.02)),
    'Nesterov': dict(kind=SGD, options=dict(lr=.05, momentum=.8, nesterov=True)),
    'Adam': dict(kind=ADAM, options=dict(lr=.01)),
    'Adam with decay': dict(kind=ADAM, options=dict(lr=.02, weight_decay=.1, betas=(.8, .95), eps=1e-3)),
    'AMSGrad': dict(kind=ADAM, options=dict(lr=.03, amsgrad=True, betas=(.5, .6))),
    'AdamW': dict(kind=ADAMW, options=dict(lr=.01)),
    'frozen second moments': dict(kind=ADAM, options=dict(lr=.01), frozen_v=True),
}
WAYS = {'plain': {}, 'clipped': dict(max_norm=.5), 'accumulated': dict(accumulation=2),
        'all of it': dict(max_norm=.7, accumulation=2, prior=True)}

def through(path, case, product='exact'):
    return adjoint(lambda: harm_at(path.params), path, product=product, frozen_v=case.get('frozen_v', False))


# ------------------------------------------------------------------ unrolling

@each('name', CASES)
@each('way', WAYS)
def test_adjoint_is_unrolled_differentiation(name, way):
    "To rounding with exact products, to 1e-6 with finite differences, at one gradient a step"
    case = CASES[name] | WAYS[way]
    truth, end = unrolled_truth(case, 6)
    path = record(case, 6)
    assert rel(path.params, [end]) < 1e-13 # the same fine-tuning
    for product, tol in ('exact', 1e-12), ('fd-forward', 1e-6), ('fd-central', 1e-7):
        x, report, harm = through(path, case, product)
        assert rel(x, [truth]) < tol, (product, rel(x, [truth]))
        assert [t.shape for t in x] == [p.shape for p in path.params] and harm == pytest.approx(harm_at(path.params).item())
        assert (report.steps, report.depth, report.products, report.fallback, report.noise) == (6, 6, 6, False, 0)
        assert report.growth == pytest.approx((flat(x).norm()/torch.autograd.functional.jacobian(lambda v: harm_at(pieces(v)), end).norm()).item())
        if product == 'fd-forward': assert report.gradients <= 6 + 2 # the first finds its step

@settings(max_examples=30)
@given(st.sampled_from(sorted(CASES)), st.sampled_from(sorted(WAYS)), st.integers(0, 7), st.integers(1, 7),
       st.sampled_from((F64, torch.float32)))
def test_depths_and_dtypes(name, way, depth, steps, dtype):
    "The last K steps, with the optimizer's state before them held constant; float32 with float32's accuracy"
    case, depth = CASES[name] | WAYS[way], min(depth, steps)
    truth, end = unrolled_truth(case, steps, depth)
    path = record(case, steps, dtype, depth)
    assert len(path.steps) == depth
    x, report, _ = through(path, case, 'fd-forward')
    assert rel(x, [truth]) < (1e-6 if dtype == F64 else 5e-3) and all(t.dtype == dtype for t in x)
    assert (report.depth, report.steps) == (depth, steps)
    assert rel(record(case, steps, dtype).params, path.params) == 0

# ------------------------------------------------------------------ whole fine-tunings

def scheduled(theta, case, dropout=True):
    "Two groups, a learning rate that changes, dropout: the end, and the trajectory"
    params = [t.clone().requires_grad_() for t in theta]
    groups = [dict(params=params[:2]), dict(params=params[2:], lr=.5*case['options']['lr'])]
    optimizer = case['kind'](groups, **case['options'])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    torch.manual_seed(5)
    path = Trajectory(optimizer)
    for k in range(5):
        masks = lambda k=k: loss_at([params[0], torch.nn.functional.dropout(params[1], .3), *params[2:]], k)
        path.step(masks, max_norm=2.)
        scheduler.step()
    return path

@each('name', CASES)
def test_a_start_that_is_moved(name):
    "What L_harm(θ_T) does when θ₀ moves and the fine-tuning is run again"
    case = CASES[name]
    if case.get('frozen_v'): return
    theta, direction, h = [t.detach() for t in start()], like(start(), 30), 1e-5
    path = scheduled(theta, case)
    x, report, _ = through(path, case, 'exact')
    ends = [harm_at(scheduled([t + s*h*d for t, d in zip(theta, direction)], case).params).item() for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2*h)
    assert (flat(x) @ flat(direction)).item() == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert abs((flat(torch.autograd.grad(harm_at(path.params), path.params)) @ flat(direction)).item() - slope) > 1e-3*abs(slope)

def test_a_fine_tuning_keeps_its_bits():
    "Parameters, state and random numbers of a loop without a recorder; and all of it is still there after the adjoint"
    for case, dtype, depth in itertools.product((CASES['momentum'], CASES['AdamW']), (torch.float32, torch.bfloat16), (0, 2, 'all')):
        params, noisy = start(dtype), lambda ps: loss_at([torch.nn.functional.dropout(p, .2) for p in ps], 0)
        optimizer = case['kind'](params, **case['options'])
        torch.manual_seed(1)
        for _ in range(4):
            noisy(params).backward()
            torch.nn.utils.clip_grad_norm_(params, .5)
            optimizer.step()
            optimizer.zero_grad()
        drawn, recorded = torch.rand(3), start(dtype)
        path = Trajectory(case['kind'](recorded, **case['options']), depth)
        torch.manual_seed(1)
        for _ in range(4): path.step(lambda: noisy(recorded), max_norm=.5)
        state = torch.get_rng_state()
        assert torch.equal(torch.rand(3), drawn)
        torch.set_rng_state(state)
        through(path, case, 'fd-forward')
        assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in recorded)
        assert all(torch.equal(p, q) for p, q in zip(params, recorded))
        moments = [path.optimizer.state_dict()['state'], optimizer.state_dict()['state']]
        for i in moments[0]:
            for k, v in moments[0][i].items(): assert torch.equal(v, moments[1][i][k]), k

def test_low_precision():
    "Differences against double backward on the same trajectory. bfloat16 wants central ones"
    for (dtype, product, tol), name in itertools.product(
            [(torch.float32, 'fd-forward', 2e-3), (torch.bfloat16, 'fd-central', .06)], ('momentum', 'Adam', 'AdamW')):
        path = record(CASES[name], 6, dtype)
        (x, report, _), (exact, *_) = [through(path, CASES[name], p) for p in (product, 'exact')]
        assert rel(x, exact) < tol and not report.fallback, (name, dtype, rel(x, exact))
        assert all(t.dtype == dtype for t in x)

@each('name', ('SGD', 'momentum', 'Adam', 'AdamW'))
def test_float32_parameters_of_a_bfloat16_network(name):
    "Against the truth in float64: with bfloat16's τ a few percent, with float32's nothing but noise"
    params = start(torch.float32)
    path = Trajectory(CASES[name]['kind'](params, **CASES[name]['options']))
    for k in range(6): path.step(lambda k=k: loss_at([p.bfloat16() for p in params], k).float())
    told, untold = [adjoint(lambda: harm_at(params), path, product='fd-central', tau=tau)[0] for tau in (TAU[torch.bfloat16][0], 1e-3)]
    truth = unrolled_truth(CASES[name], 6)[0]
    assert rel(told, [truth]) < .06 and rel(untold, [truth]) > .1, (rel(told, [truth]), rel(untold, [truth]))

@pytest.mark.filterwarnings('ignore')
@each('name', ('SGD', 'Adam', 'AdamW'))
def test_torchopt_agrees(name):
    torchopt = pytest.importorskip('torchopt')
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(F64)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.copy_(randn(*p.shape, seed=i))
    origin = [p.detach().clone() for p in net.parameters()]
    loss = lambda k: (net(X[k]) - Y[k]).square().mean()
    path = Trajectory(CASES[name]['kind'](net.parameters(), lr=.01))
    for k in range(6): path.step(lambda k=k: loss(k))
    ours = {product: adjoint(lambda: loss(7), path, product=product)[0] for product in ('exact', 'fd-forward')}
    theirs = dict(SGD=torchopt.MetaSGD, Adam=torchopt.MetaAdam, AdamW=torchopt.MetaAdamW)[name]
    with torch.no_grad():
        for p, o in zip(net.parameters(), origin): p.copy_(o)
    first = list(net.parameters())
    torch.set_default_dtype(F64) # its 1 − βᵏ would be a float32
    try:
        optimizer = theirs(net, lr=.01)
        for k in range(6): optimizer.step(loss(k))
        truth = torch.autograd.grad(loss(7), first)
    finally: torch.set_default_dtype(torch.float32)
    assert rel(ours['exact'], truth) < 1e-10 and rel(ours['fd-forward'], truth) < 1e-6, [rel(x, truth) for x in ours.values()]


# ------------------------------------------------------------------ edges

def test_parameters_without_a_gradient():
    "Adam divides zero by ε there: no number comes of it that isn't finite, and no noise in the others"
    for kind, factor in (ADAM, 1.), (ADAMW, (1 - .01*.1)**5):
        used, idle, late = torch.tensor([1., 2.], requires_grad=True), torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
        path = Trajectory(kind([used, idle, late], lr=.01, weight_decay=.1 if kind is ADAMW else 0))
        for k in range(5): path.step(lambda k=k: used.pow(4).sum() + 0*idle.sum() + (late.square().sum() if k > 2 else 0))
        x, report, _ = adjoint(lambda: used.sum() + (idle*torch.tensor([1., 2, 3])).sum() + late.sum(), path)
        close(x[1], factor*torch.tensor([1., 2, 3]), 1e-6)
        assert flat(x).isfinite().all() and report.growth < 2 and not report.fallback
    v = torch.tensor([0., 4.], dtype=F64, requires_grad=True)
    y = hypergrad.root(v)
    assert y.tolist() == [0, 2] and torch.autograd.grad(y.sum(), v)[0].tolist() == [0, .25]

def test_memory_is_the_trajectory():
    "As computed beforehand; K steps of it; anywhere; and none after `clear`"
    for name, copies in ('SGD', 2), ('momentum', 3), ('Adam', 4), ('AMSGrad', 5):
        path = record(CASES[name], 6, torch.float32, 3)
        assert path.nbytes == trajectory_bytes(path.optimizer, 3) == 3*copies*SIZE*4, name
        assert not any(t.requires_grad for s in path.steps for t in (*s.theta, *s.grads)) # no graph
        x = flat(through(path, CASES[name])[0])
        elsewhere = record(CASES[name], 6, torch.float32, 3, device='cpu')
        assert torch.equal(x, flat(through(elsewhere, CASES[name])[0]))
        path.clear()
        assert path.nbytes == 0 and path.made == 6

def test_in_the_middle_of_a_run():
    "A recorder that comes later holds constant what the optimizer has remembered by then"
    case = CASES['AdamW']
    params = start()
    optimizer = ADAMW(params, **case['options'])
    for k in range(3):
        loss_at(params, k).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = Trajectory(optimizer)
    for k in range(3, 6): path.step(lambda k=k: loss_at(params, k))
    assert rel(through(path, case)[0], [unrolled_truth(case, 6, 3)[0]]) < 1e-12

def test_refusals():
    p = torch.ones(2, requires_grad=True)
    for build, message in ((lambda: Trajectory(torch.optim.RMSprop([p])), 'RMSprop: expected SGD, Adam or AdamW'),
                           (lambda: Trajectory(type('Adam', (ADAM,), {})([p])), 'Adam: expected SGD'),
                           (lambda: Trajectory(SGD([p]), -1), 'depth -1'), (lambda: Trajectory(SGD([p]), 'some'), "depth 'some'"),
                           (lambda: Trajectory(SGD([torch.ones(2)])), r'params\[0\]')):
        with pytest.raises(ValueError, match=message): build()
    path = record(CASES['Adam'], 4)
    with pytest.raises(ValueError, match="product 'gauss-newton'"): through(path, {}, 'gauss-newton')
    with torch.no_grad(): path.params[0] += .1
    with pytest.raises(ValueError, match='step 3: the parameters are 0.1 away'): through(path, {})
    path = record(CASES['SGD'], 2)
    path.optimizer.register_step_pre_hook(lambda optimizer, *_: [p.grad.mul_(2) for p in path.params] and None)
    path.step(lambda: loss_at(path.params, 0))
    with pytest.raises(ValueError, match='step 2'): through(path, {})

def test_what_is_not_finite_falls_back():
    "1e38·(1 − 10) is no float32"
    p = torch.tensor([1.], requires_grad=True)
    path = Trajectory(SGD([p], lr=1.))
    path.step(lambda: 5*p.square().sum())
    x, report, _ = adjoint(lambda: 1e38*p.sum(), path)
    assert report.fallback and x[0].item() == pytest.approx(1e38) and 'not finite' in report.reason
    x, report, _ = adjoint(lambda: 1e3*p.sum(), path)
    assert not report.fallback and x[0].item() == pytest.approx(-9e3, rel=1e-3) and report.h_norm == pytest.approx(10, rel=1e-3)

def test_a_loss_that_is_another_one_by_now():
    "The loop's variable in a lambda is looked up when it is called: at the end, all steps would have the last batch"
    for product in PRODUCTS[:3]:
        params = start()
        path = Trajectory(ADAM(params, lr=.01))
        for k in range(4): path.step(lambda: loss_at(params, k))
        with pytest.raises(ValueError, match='step 2: its loss is .* now and was .*lambda k=k'): through(path, {}, product)

def test_statistics_move_with_the_fine_tuning_alone():
    "BatchNorm's statistics move with the fine-tuning, not with the adjoint"
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2)).to(F64)
    path = Trajectory(ADAM(net.parameters(), lr=.01))
    for k in range(3): path.step(lambda k=k: (net(X[k]) - Y[k]).square().mean())
    before = {k: v.clone() for k, v in net.named_buffers()}
    assert before['1.num_batches_tracked'] == 3
    adjoint(lambda: (net(X[7]) - Y[7]).square().mean(), path)
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
