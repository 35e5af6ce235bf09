"Systems whose hypergradient is known: quadratics of given spectra, a small network, LoRA layers, dense oracles."
import math

import torch

from resalign.method.hypergrad import LoraPair, flat

F64 = torch.float64
SHAPES = (), (3,), (2, 2), (1, 4) # a number, a vector, matrices: 12 parameters
N = 12
ITERATIVE = 'richardson', 'cg', 'minres'


def close(a, b, tol=1e-12): torch.testing.assert_close(a, b, rtol=tol, atol=tol)
def rel(a, b): return ((flat(a).double() - flat(b).double()).norm() / flat(b).double().norm()).item()
def generator(seed): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(shape, dtype=F64, generator=generator(seed))

def leaves(x, dtype=F64):
    "A vector of N numbers as parameters of all SHAPES"
    parts = x.split([math.prod(s) for s in SHAPES])
    return [p.reshape(s).to(dtype).clone().requires_grad_() for p, s in zip(parts, SHAPES)]

def vector(params): return torch.cat([p.reshape(-1) for p in params])

def symmetric(eigenvalues, seed=0):
    Q = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return (Q * torch.as_tensor(eigenvalues, dtype=F64)) @ Q.T

def quadratic(H, c=None, at=None, dtype=F64):
    "Parameters, and L = ½xᵀHx + cᵀx"
    params = leaves(torch.zeros(N, dtype=F64) if at is None else at, dtype)
    H, c = H.to(dtype), (torch.zeros(N) if c is None else c).to(dtype)
    return params, lambda: (vector(params) @ H @ vector(params)) / 2 + c @ vector(params)

def network(dtype=F64, seed=0):
    "Parameters, loss and residuals of a small smooth network with a scalar gain"
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.SiLU(), torch.nn.Linear(6, 2)).to(dtype)
    gain = torch.tensor(1.3, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.copy_(.5 * randn(*p.shape, seed=seed + i))
    X, Y = randn(16, 4, seed=90).to(dtype), randn(16, 2, seed=91).to(dtype)
    def residuals(): return (gain * net(X) - Y).to(torch.promote_types(dtype, torch.float32))
    return [gain, *net.parameters()], lambda: residuals().square().mean(), residuals

def lora(size=1., seed=0):
    "Two LoRA layers; `size` in units of the published initialisation"
    shapes = (6, 8), (4, 6)
    pairs = []
    for k, (o, i) in enumerate(shapes):
        A = (.008 * size * randn(2, i, seed=seed + 3 * k)).requires_grad_()
        B = (.002 * size * randn(o, 2, seed=seed + 3 * k + 1)).requires_grad_()
        pairs.append(LoraPair(A, B, randn(o, i, seed=seed + 3 * k + 2) / i**.5, 1.5))
    X, Y = randn(40, 8, seed=80), randn(40, 4, seed=81)
    def loss():
        W1, W2 = [p.weight + p.scale * p.B @ p.A for p in pairs]
        return (torch.tanh(X @ W1.T) @ W2.T - Y).square().mean()
    return [t for p in pairs for t in (p.A, p.B)], loss, pairs

def dense(loss, params):
    "The Hessian by torch's own means, row by row"
    grads = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
    grad = torch.cat([g.reshape(-1) for g in grads])
    return torch.stack([flat(torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)) for g in grad])

def oracle(H, gamma, g): return torch.linalg.solve(torch.eye(len(H), dtype=F64) + gamma * H, flat(g).double())
def like(params, seed=7): return [randn(*p.shape, seed=seed + i).to(p.dtype) for i, p in enumerate(params)]
def exactly(method): return dict(method=method, max_products=300 if method == 'richardson' else N, tol=1e-13)

SPECTRA = {'convex': torch.linspace(0, 1, N), 'mirror': torch.linspace(-1, 1, N), 'concave': -torch.linspace(0, 1, N),
           'one number': torch.ones(N), 'one negative': torch.tensor([-1.] + [0.] * (N - 1)), 'zero': torch.zeros(N)}

def fine_tuning(x): return (x[0] * x[1:4].sin().sum() + x[4:].tanh() @ x[:8]) + .1 * x.pow(4).sum()
def harm(x): return (x - torch.linspace(-1, 1, N, dtype=F64)).square().sum() + (x[0] * x[-1]).cos()
