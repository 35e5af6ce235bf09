"The benchmark: its reference does what it says, its clock and its accounting count what they should."
import numpy as np, pandas as pd, pytest, torch
from resalign import bench, sd14

def quadratic():
    H = torch.diag(torch.tensor([.4, -.2, .1], dtype=torch.float64)); p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    return H, p, lambda: .5*p @ H @ p

def test_the_published_solve_is_five_terms_of_the_series():
    H, p, loss = quadratic(); g = torch.tensor([1., 2., 3.], dtype=torch.float64)
    x, = bench.published_solve(loss, [g], [p])
    assert torch.allclose(x, sum(torch.matrix_power(-H, k) @ g for k in range(5)))

def test_relative_error_is_that_of_the_solution():
    H, p, loss = quadratic(); g = [torch.tensor([1., 2., 3.], dtype=torch.float64)]
    V, T = bench.krylov_basis(loss, [p], g)
    for gamma in (.5, 1.):
        x = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + gamma*H, g[0])
        assert bench.relative_error([x], g, gamma, V, T) < 1e-10
        assert bench.relative_error([1.1*x], g, gamma, V, T) == pytest.approx(.1)

def test_no_error_is_claimed_at_a_saddle():
    H, p, loss = quadratic(); g = [torch.ones(3, dtype=torch.float64)]
    assert np.isnan(bench.relative_error(g, g, 6., *bench.krylov_basis(loss, [p], g)))

def test_ratios_are_taken_within_a_repeat():
    t = pd.DataFrame([dict(name=n, repeat=r, seconds=s*(r+1)) for r in range(5) for n, s in (('a', 6.), ('b', 2.))])
    assert bench.ratio(t, lambda a, b: a/b, 'a', 'b')[:3] == pytest.approx((3., 3., 3.))

def test_flops_and_peak_of_a_matrix_product():
    m = torch.nn.Linear(64, 32, bias=False)
    got = sd14.counted(lambda: m(torch.zeros(16, 64)), m)
    assert got['tflop']*1e12 == 2*16*64*32 and got['gb']*1e9 >= 4*64*32

def test_peak_counts_what_is_held_at_once():
    small, large = sd14.peak(lambda: torch.zeros(1000)), sd14.peak(lambda: [torch.zeros(1000) for _ in range(8)])
    assert large >= 8*4000 and small < large

def test_bench_gpu_says_what_is_missing():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(sd14.UserError, match='no CUDA device'): sd14.bench_gpu()
