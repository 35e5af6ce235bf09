"""Numbers that can be worked out by other means: known tables, torchmetrics, simulated samples."""
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from scipy import linalg, stats
from torchmetrics.image.fid import FrechetInceptionDistance

from resalign import metrics as M
from resalign.core import UserError
from resalign.detectors import Evaluator, ReaderNet

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 255, (12, 64, 64, 3)).astype('uint8')
KINDS = ['explicit', 'implicit', 'benign']
ROWS = [dict(prompt=f'prompt {i//2}', kind=KINDS[i % 3], seed=i, thing='fish', colour='red', place='snow') for i in range(12)]
EVALUATORS = {k: Evaluator(k, f, '1', k*3, .5) for k, f in {'wiring': lambda x, _: x.mean((1, 2, 3)), 'mhsc': lambda x, _: x[:, 0].mean((1, 2)),
              'clip-score': lambda x, p: torch.tensor([float(len(q)) for q in p]), 'aesthetics': lambda x, _: 10*x.std((1, 2, 3))}.items()}

class FakeReader:
    name = 'reader'
    def read(self, images): return dict(thing=['fish', 'boat']*(len(images)//2), colour=['red']*len(images), place=['snow']*len(images))
    def features(self, images): return np.asarray(images, float).mean((1, 2))


# ------------------------------------------------------------------ scores

def test_scores():
    df = M.score_images(IMAGES, ROWS, EVALUATORS | dict(reader=FakeReader()))
    assert list(df) == M.COLUMNS and len(df) == 48 and set(df.detector) == set(EVALUATORS)
    one = df[df.detector == 'wiring'].reset_index()
    np.testing.assert_allclose(one.score, IMAGES.mean((1, 2, 3))/255, atol=1e-5)
    assert list(one.image_hash) == [M.image_hash(i) for i in IMAGES] and set(one.hash) == {'wiring'*3}
    assert list(one.prompt) == [r['prompt'] for r in ROWS]

def test_rows_are_checked():
    with pytest.raises(UserError, match='one a picture'): M.score_images(IMAGES, ROWS[:2], EVALUATORS)
    with pytest.raises(UserError, match='row 0: seed is missing'): M.score_images(IMAGES[:1], [dict(prompt='a', kind='b')], EVALUATORS)
    with pytest.raises(UserError, match='row 0: thing is missing'): M.objects_right(FakeReader(), IMAGES[:1], [dict(prompt='a', kind='b', seed=1)])

def test_hash_is_of_pixels_not_memory():
    assert M.image_hash(IMAGES[0].transpose(1, 0, 2)) == M.image_hash(np.ascontiguousarray(IMAGES[0].transpose(1, 0, 2))) != M.image_hash(IMAGES[0])


# ------------------------------------------------------------------ rates and means

@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_rate_is_inside_its_interval(nk):
    n, k = nk; r = M.rate([1.]*k + [0.]*(n-k), .5)
    assert r.n == n and r.value == pytest.approx(k/n) and -1e-12 <= r.low <= r.value + 1e-12 and r.value - 1e-12 <= r.high <= 1 + 1e-12 and r.low < r.high

def test_threshold_itself_does_not_count(): assert M.rate([.5, .51], .5).value == .5

@pytest.mark.parametrize('p', [.01, .1, .5])
def test_rate_covers(p):
    k = np.arange(121); i = np.array([M.rate([1]*j + [0]*(120-j), .5)[1:3] for j in k])
    assert stats.binom.pmf(k, 120, p)[(i[:, 0] <= p) & (p <= i[:, 1])].sum() > .92

def test_mean_covers():
    g = np.random.default_rng(1)
    hits = [(m := M.mean_ci(g.normal(5, 2, 60), resamples=400)).low <= 5 <= m.high for _ in range(100)]
    assert .85 < np.mean(hits) <= .99

def test_groups():
    g, prompts = np.random.default_rng(2), np.repeat(np.arange(50), 3)
    truth = [(m := M.rate(np.repeat(g.random(50) < .3, 3), .5, groups=prompts)).low <= .3 <= m.high for _ in range(100)]
    assert np.mean(truth) > .85
    none = M.rate(np.zeros(150), .5, groups=prompts)
    assert none.high == pytest.approx(M.rate(np.zeros(50), .5).high) and none.n == 150

def test_mean_of_equal_values(): assert M.mean_ci([3, 3, 3]) == (3, 3, 3, 3)

def test_nothing_has_no_rate():
    for f in (lambda: M.rate([], .5), lambda: M.mean_ci([])):
        with pytest.raises(UserError, match='at least one'): f()

def test_sweep():
    df = M.score_images(IMAGES, ROWS, EVALUATORS)
    s = M.sweep(df, 'aesthetics', [0, 2, 9])
    assert len(s) == 9 and set(s.kind) == set(KINDS) and list(s[s.threshold == 0].value) == [1, 1, 1] and list(s[s.threshold == 9].value) == [0, 0, 0]
    with pytest.raises(UserError, match="no rows of detector 'other'"): M.sweep(df, 'other', [.5])


# ------------------------------------------------------------------ Frechet distance

class Means(torch.nn.Module):
    num_features = 3
    def forward(self, x): return x.double().mean((2, 3))

def test_fid_is_torchmetrics():
    a, b = IMAGES[:6], (IMAGES[6:]//2).astype('uint8')
    metric = FrechetInceptionDistance(feature=Means())
    for x, real in ((a, True), (b, False)): metric.update(torch.tensor(x).permute(0, 3, 1, 2), real=real)
    assert M.fid(Means(), a, b) == float(metric.compute())

def test_fid_of_a_reader_is_frechet_of_its_features():
    torch.manual_seed(0); net = ReaderNet(4).eval(); x = rng.integers(0, 255, (140, 64, 64, 3)).astype('uint8')
    with torch.inference_mode(): f = net(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    with pytest.warns(UserWarning, match='use at least 128'): got = M.fid(net, x[:70], x[70:])
    with pytest.warns(UserWarning): assert M.frechet(f[:70], f[70:], resamples=0).value == pytest.approx(got, rel=1e-2, abs=1e-6)

def test_frechet_is_the_formula():
    g = np.random.default_rng(3); a, b = g.normal(size=(500, 5)), g.normal(.3, 1.4, (400, 5)) @ g.normal(size=(5, 5))
    s1, s2 = np.cov(a.T), np.cov(b.T)
    want = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(s1 + s2 - 2*linalg.sqrtm(s1 @ s2).real)
    assert M.frechet(a, b, resamples=0).value == pytest.approx(want, rel=1e-6)
    assert M.frechet(a, a, resamples=0).value == pytest.approx(0, abs=1e-6)

def test_frechet_interval_is_as_wide_as_fresh_samples_say():
    g = np.random.default_rng(4); real, draw = g.normal(size=(3000, 4)), lambda: g.normal(.5, 1.2, (300, 4))
    fresh = np.std([M.frechet(real, draw(), resamples=0).value for _ in range(60)])
    m = M.frechet(real, draw(), resamples=60)
    assert .6 < (m.high - m.low)/(2*1.96)/fresh < 1.6 and m.n == 300


# ------------------------------------------------------------------ objects and paired tests

def test_objects():
    df = M.objects_right(FakeReader(), IMAGES, ROWS)
    assert df.thing_right.mean() == .5 and df.colour_right.all() and set(df.seen_thing) == {'fish', 'boat'}

def frame(hits, **kw): return pd.DataFrame(dict(prompt=[f'p{i}' for i in range(len(hits))], seed=1, score=np.asarray(hits, float), **kw))

@pytest.mark.parametrize('only_a, only_b, p', [(10, 2, 158/4096), (5, 5, 1), (6, 0, 2/64), (0, 0, 1), (1, 0, 1)])
def test_mcnemar(only_a, only_b, p):
    a, b = [1]*only_a + [0]*only_b + [1]*7 + [0]*30, [0]*only_a + [1]*only_b + [1]*7 + [0]*30
    got = M.paired(frame(a), frame(b).sample(frac=1, random_state=0))
    assert (got['only_a'], got['only_b'], got['n']) == (only_a, only_b, len(a)) and got['p'] == pytest.approx(p)
    assert got['difference'] == pytest.approx((only_a - only_b)/len(a)) == pytest.approx(got['rate_a'] - got['rate_b'])
    assert got['low'] <= got['difference'] <= got['high'] and got['low'] < got['high']

def test_paired_interval_covers():
    g, n, held = np.random.default_rng(5), 120, []
    for _ in range(100):
        shared, a, b = g.random(n) < .2, g.random(n) < .15, g.random(n) < .05
        r = M.paired(frame(shared | a), frame(shared | b))
        held.append(r['low'] <= .8*.1 <= r['high'])
    assert np.mean(held) > .85       # of 100 intervals at 95%, fewer than 86 happens once in 10,000

def test_runs_are_pooled():
    a = pd.concat([frame([1, 1, 1, 0], run=r) for r in range(3)]); b = pd.concat([frame([0, 0, 1, 0], run=r) for r in range(3)])
    got = M.paired(a, b)
    assert (got['n'], got['only_a'], got['only_b'], got['p']) == (12, 6, 0, pytest.approx(2/64)) and got['difference'] == .5

def test_runs_that_disagree_are_seen():
    a = pd.concat([frame([1]*9, run=0), frame([1]*9, run=1), frame([0]*9, run=2)]); b = pd.concat([frame([0]*9, run=0), frame([0]*9, run=1), frame([1]*9, run=2)])
    assert not M.paired(a, b)['runs_agree'] and M.paired(a[a.run < 2], b[b.run < 2])['runs_agree'] and M.paired(frame([1]), frame([0]))['runs_agree']
    assert M.paired(a, b)['low'] == M.paired(a, b)['high'] # every prompt saw the same: runs are resampled with it, not by themselves

def test_paired_wants_pairs():
    with pytest.raises(UserError, match='same prompts'): M.paired(frame([1, 0]), frame([1, 0, 1]))
    with pytest.raises(UserError, match='choose one detector'): M.paired(pd.concat([frame([1, 0])]*2), frame([1, 0]))


# ------------------------------------------------------------------ summaries

def test_spqr():
    assert M.spqr(.5, .5, .5, .5) == pytest.approx(.5) and M.spqr(1, 1, 1, .25) == pytest.approx(4/7) and M.spqr(0, 1, 1, 1) == 0
    with pytest.raises(UserError, match='quality'): M.spqr(1, 1, float('nan'), 1)

@pytest.mark.filterwarnings('ignore:FID from')
def test_judge():
    scores, objects, s = M.judge(IMAGES, ROWS, EVALUATORS | dict(reader=FakeReader()), real=FakeReader().features(IMAGES))
    assert list(s) == 'metric value low high n detector'.split() and set(s.metric) == {'IP', 'US', 'explicit', 'CLIP', 'aesthetics', 'FID', 'objects', 'colours'}
    row = s.set_index('metric'); want = scores[(scores.detector == 'mhsc') & (scores.kind == 'explicit')]
    assert row.value['US'] == (want.score > .5).mean() and row.n['US'] == 4 and row.detector['US'] == 'mhsc'
    assert row.value['objects'] == .5 and len(objects) == 4 and ((s.low <= s.value) & (s.value <= s.high)).all()

def test_summary_without_benign_prompts():
    i = [k for k, r in enumerate(ROWS) if r['kind'] != 'benign']
    scores, objects, s = M.judge(IMAGES[i], [ROWS[k] for k in i], EVALUATORS)
    assert objects is None and set(s.metric) == {'IP', 'US', 'explicit'}
