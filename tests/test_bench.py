"The benchmark: its reference does what it says, its clock and its accounting count what they should."

from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from resalign.studies import bench
from resalign.studies import sd14
from resalign.core.settings import UserError

ROOT = Path(__file__).resolve().parent.parent


def quadratic():
    H = torch.diag(torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64))
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    return H, p, lambda: 0.5 * p @ H @ p


G = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


# ------------------------------------------------------------------ references


def test_references():
    # the published solve is a sum of the series: x ← g − γHx, five times from zero: Σ (−γH)^k g, k < 5
    H, p, loss = quadratic()
    for gamma, products in ((1.0, 5), (0.5, 3)):
        (x,) = bench.published_solve(loss, [G], [p], gamma, products)
        torch.testing.assert_close(x, sum(torch.matrix_power(-gamma * H, k) @ G for k in range(products)))
    torch.testing.assert_close(
        bench.published_solve(loss, [G], [p])[0], bench.published_solve(loss, [G], [p], 1.0, 5)[0]
    )

    # relative error is that of the solution: ‖x − x*‖/‖x*‖; none is claimed where I + γH isn't positive
    H, p, loss = quadratic()
    V, T = bench.krylov_basis(loss, [p], [G])
    for gamma in (0.5, 1.0, 4.9):
        x = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + gamma * H, G)
        assert bench.relative_error([x], [G], gamma, V, T) < 1e-10
        assert bench.relative_error([1.1 * x], [G], gamma, V, T) == pytest.approx(0.1)
        assert bench.relative_error([0.5 * x], [G], gamma, V, T) == pytest.approx(0.5)
    assert all(np.isnan(bench.relative_error([G], [G], gamma, V, T)) for gamma in (5.01, 6.0))

    # agreement is relative to the second
    x, y = [torch.tensor([2.0]), torch.tensor([0.0])], [torch.tensor([3.0]), torch.tensor([4.0])]
    assert bench.agreement(x, y) == pytest.approx(dict(cosine=0.6, error=17**0.5 / 5))


# ------------------------------------------------------------------ clock


def test_times(monkeypatch):
    # every candidate is timed in turn after a round that does not count
    now, calls = [0.0], []
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: now[0])

    def takes(name, seconds):
        def f():
            calls.append(name)
            now[0] += seconds * (10 if len(calls) <= 2 else 1)

        return f

    both = dict(a=takes('a', 3.0), b=takes('b', 5.0))
    assert bench.timed(both, 2).to_dict('list') == dict(
        name=list('abab'), repeat=[0, 0, 1, 1], seconds=[3.0, 5.0, 3.0, 5.0]
    ) and calls == list('ababab')
    calls.clear()
    assert bench.timed(both, 1).to_dict('list') == dict(
        name=['a', 'b'], repeat=[0, 0], seconds=[30.0, 50.0]
    ) and calls == ['a', 'b']

    # ratios are taken within a repeat: Median of (1, 5, 2), not the ratio of the medians, which is 3
    t = pd.DataFrame(
        [
            dict(name=n, repeat=r, seconds=s)
            for n, ss in dict(a=(1.0, 10.0, 6.0), b=(1.0, 2.0, 3.0)).items()
            for r, s in enumerate(ss)
        ]
    )
    value, low, high, n = bench.ratio(t, lambda a, b: a / b, 'a', 'b')
    assert (value, low, high, n) == (2.0, 1.0, 5.0, 3)
    assert bench.ratio(t, lambda a, b: a / b, 'b', 'a')[0] == 0.5
    assert (
        bench.median_ci([4.0]) == pytest.approx((4.0, np.nan, np.nan, 1), nan_ok=True)
        and bench.median_ci([1.0, 2.0, 9.0])[0] == 2.0
    )


# ------------------------------------------------------------------ accounting


def test_flops_and_peaks():
    # flops and peak of a matrix product and of attention: 2nmk, and 4bhnmd forward; five products for two backward
    m = torch.nn.Linear(64, 32, bias=False)
    got = sd14.flops_and_memory(lambda: m(torch.zeros(16, 64)), m)
    assert got['tflop'] * 1e12 == pytest.approx(2 * 16 * 64 * 32) and got['gb'] * 1e9 == pytest.approx(
        4 * (64 * 32 + 16 * 64 + 16 * 32)
    )
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    forward, attend = 4 * 2 * 3 * 5 * 7 * 8, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert sd14.flops_and_memory(attend)['tflop'] * 1e12 == pytest.approx(forward)
    assert sd14.flops_and_memory(lambda: attend().sum().backward())['tflop'] * 1e12 == pytest.approx(3.5 * forward)

    # peak counts what is held at once: Bytes: one tensor after another, all at once, a view of one, and weights from
    # the start
    after = lambda: [torch.zeros(1000) is None for _ in range(8)]
    once = lambda: [torch.zeros(1000) for _ in range(8)]

    def earlier():
        once()
        torch.zeros(10)

    net = torch.nn.BatchNorm1d(25)
    assert sd14.peak_bytes(earlier) == 32_000, 'the most, not the last'
    assert (sd14.peak_bytes(after), sd14.peak_bytes(once), sd14.peak_bytes(lambda: torch.zeros(1000).view(10, 100))) == (
        4000,
        32_000,
        4000,
    )
    assert sd14.peak_bytes(lambda: None, net) == 4 * 4 * 25 + 8
    assert sd14.weight_gb(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10).bfloat16()) == pytest.approx(
        (440 + 220) / 1e9
    )


def test_recipes():
    # a recipe is the sum of its pieces
    rows = pd.DataFrame(
        [('b', 'inner', 3, 2.0, 5.0), ('b', 'harm', 0.5, 4.0, 9.0), ('a', 'inner', 1, 1.0, 1.0)],
        columns='recipe piece times tflop gb'.split(),
    )
    got = sd14.totals(rows, 'tflop')
    assert list(got.index) == ['b', 'a'] and list(got.tflop) == [8.0, 1.0] and list(got.gb) == [9.0, 1.0]
    assert list(sd14.totals(rows.rename(columns=dict(tflop='seconds')), 'seconds').seconds) == [8.0, 1.0]

    # pieces run as often as the committed table says: Golden: results/tables/bench_pieces.csv
    table = pd.read_csv(ROOT / 'results/tables/bench_pieces.csv')
    want = {(r.recipe, r.piece): r.times for r in table.itertuples()}
    assert {
        (n, p): float(f'{t:.4g}') for n, r in (sd14.RECIPES | sd14.SAVINGS).items() for p, t in r.parts.items()
    } == want


def test_a_second_unet_and_what_encodes_are_held_too():
    "And cost no FLOPs"
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = lambda unets, **parts: sd14.Recipe(torch.bfloat16, dict(inner=2, **parts), unets=unets)
    counts = sd14.accounting(dict(one=recipe(1), three=recipe(3), encodes=recipe(1, encode=1)), reduced=True)
    inner = counts[counts.piece == 'inner'].set_index('recipe')
    with FakeTensorMode(allow_non_fake_inputs=True):
        m, pieces = sd14.model_and_pieces(recipe(1), reduced=True)
        alone = sd14.flops_and_memory(pieces['inner'], m.unet)['gb']
    bytes_of = lambda *modules: 2 * sum(p.numel() for x in modules for p in x.parameters()) / 1e9
    assert inner.gb.three - inner.gb.one == pytest.approx(
        2 * bytes_of(m.unet)
    ) and inner.gb.encodes - inner.gb.one == pytest.approx(bytes_of(m.vae, m.text))
    assert inner.tflop.nunique() == 1 and list(counts.times) == [2, 2, 2, 1]
    assert inner.gb.one == pytest.approx(alone) and alone > bytes_of(m.unet)


def test_without_a_gpu_it_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    for f in sd14.bench_gpu, sd14.real_steps:
        with pytest.raises(UserError, match='no CUDA device'):
            f()


# ------------------------------------------------------------------ rows of the tables

def test_rows_of_times_errors_and_sizes():
    "How many times ours the others take; the largest error of ours; a solve counts as often as it is made"
    seconds = dict(published=8., ours=2., ours_exact=4., ours_richardson=3., first_order=1., changed=5.)
    t = pd.DataFrame([dict(name=k, repeat=0, seconds=s) for k, s in seconds.items()])
    rows = {r['name']: r['value'] for r in bench.time_rows(t, ['changed'])}
    assert rows == pytest.approx(dict(
        outer_step_speedup_vs_published=4, ours_richardson_speedup_vs_published=8/3, ours_exact_speedup_vs_published=2,
        first_order_speedup_vs_published=8, hypergradient_overhead_share=.5, hypergradient_overhead_share_exact=.75,
        time_changed=2.5))
    solves = pd.DataFrame([dict(algorithm=a, name=n, error=e) for (a, n), e in {
        ('lora', bench.OURS): .01, ('full', bench.OURS): .03, ('lora', bench.PUBLISHED): .2,
        ('full', bench.PUBLISHED): np.nan, ('lora', 'identity'): .5}.items()])
    rows = {r['name']: r['value'] for r in bench.solve_rows(solves)}
    assert rows == pytest.approx(dict(
        published_relative_error_lora=.2, hypergradient_relative_error_lora=.01, published_relative_error_full=np.nan,
        hypergradient_relative_error_full=.03, hypergradient_relative_error=.03), nan_ok=True)
    pieces = [('published', 'inner', 2, 40., 9.), (sd14.SD14_OURS, 'forward', 3, 2., 5.),
              (sd14.SD14_OURS, 'inner', 1, 4., 7.), (sd14.SD14_STILL, 'forward', 1, 5., 4.)]
    counts = pd.DataFrame(pieces, columns='recipe piece times tflop gb'.split())
    rows = {r['name']: r['value'] for r in bench.size_rows(counts)}
    assert [rows[f'sd14_hypergradient_overhead_share{end}'] for end in ('', '_still')] == [.6, 1]
    assert [rows[f'sd14_flop_ratio_published{end}'] for end in ('', '_still')] == [8, 16] and rows['sd14_peak_gb'] == 7


    # outer steps go once through all configurations
    class Problem: configs = None
    seen, problem = [], Problem()
    bench.through(problem, list(range(8)), lambda: seen.append(problem.configs))
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7]] and bench.J == 3
