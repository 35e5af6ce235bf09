"Runs go on with the same bits, do what they say, and the result loads without this package."
import copy, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from resalign import core, jobs, world
from resalign.core import UserError
from resalign.data import encode, read_captions
from resalign.finetune import ATTENTION, FinetuneConfig, FinetuneLoss, finetune, simulated, add_lora
from resalign.losses import Denoiser
from resalign.meta import Pool, ResAlignConfig, UnlearnData, clipped, draw_config, resalign, retain_weight
from resalign.pipelines import PretrainConfig, build_pipeline, generate, load_pipeline, save_pipeline

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='session')
def pipe(): return build_pipeline(['a red robot with exposed wiring', 'a blue car'], PretrainConfig(unet_channels=(16, 32), vae_channels=(8, 8, 8, 16)))

@pytest.fixture(scope='session')
def data(pipe):
    def bank(name):
        s = world.scenes(name, 6)
        return encode(pipe, np.stack([np.asarray(world.draw(x)) for x in s]), [x.caption for x in s])
    return UnlearnData(bank('unsafe'), bank('retain'), {n: bank(n) for n in ('pool-things', 'pool-subjects')}, [])

def weights(p): return {k: v.clone() for k, v in p.unet.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

CONFIG = ResAlignConfig(steps=5, gamma='matched', J=2, retain_batch=2, unsafe_batch=2)

def test_same_seed_same_bits(pipe, data):
    a, b, c = (copy.deepcopy(pipe) for _ in range(3))
    resalign(a, data, CONFIG); resalign(b, data, CONFIG); resalign(c, data, CONFIG.model_copy(update=dict(seed=1)))
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))

def test_killed_run_goes_on_with_the_same_bits(pipe, data, tmp_path, monkeypatch):
    import resalign.meta as meta, resalign.training as training
    whole, cut = copy.deepcopy(pipe), copy.deepcopy(pipe)
    resalign(whole, data, CONFIG)
    def often(*a, **kw): return training.optimise(*a, **dict(kw, every=2))
    monkeypatch.setattr(meta, 'optimise', often)
    real, count = meta.direct_gradient, [0]
    def dies(*a):
        count[0] += 1
        if count[0] == 5: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(meta, 'direct_gradient', dies)
    with pytest.raises(KeyboardInterrupt): resalign(cut, data, CONFIG, checkpoint=tmp_path/'c')
    monkeypatch.setattr(meta, 'direct_gradient', real)
    again = copy.deepcopy(pipe)
    out = resalign(again, data, CONFIG, checkpoint=tmp_path/'c')
    assert same(weights(whole), weights(again)) and len(out['log']) == 5 and len(out['solves']) == 10

def test_beta_zero_is_ga_and_makes_no_solves(pipe, data):
    p = copy.deepcopy(pipe)
    out = resalign(p, data, CONFIG.model_copy(update=dict(beta=0.)))
    assert not out['solves'] and not same(weights(p), weights(pipe))

def test_first_order_and_richardson_differ(pipe, data):
    a, b = copy.deepcopy(pipe), copy.deepcopy(pipe)
    big = CONFIG.model_copy(update=dict(gamma=.5))
    resalign(a, data, big); out = resalign(b, data, big.model_copy(update=dict(solver='identity')))
    assert not same(weights(a), weights(b)) and all(s['products'] == 0 for s in out['solves'])

@pytest.mark.parametrize('algorithm', ['full', 'lora'])
def test_exactly_the_said_parameters_move(pipe, data, algorithm):
    p = copy.deepcopy(pipe); finetune(p, data.retain, FinetuneConfig(algorithm=algorithm, steps=2))
    before, after = weights(pipe), weights(p)
    assert list(before) == list(after)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    attention = {k for k in before if any(f'.{a}.weight' in k for a in ATTENTION)}
    assert moved == attention if algorithm == 'lora' else moved >= attention and len(moved) > .9*len(before)

def test_simulation_leaves_no_trace_even_after_an_error(pipe, data):
    p = copy.deepcopy(pipe); params = add_lora(p.unet, 'x', up_std=.02)
    old = [q.clone() for q in params]
    config = FinetuneConfig(steps=2, lr=1e-2)
    with pytest.raises(ZeroDivisionError), simulated(FinetuneLoss(Denoiser(p), data.retain, config), params, config): 1/0
    assert all(torch.equal(a, b) for a, b in zip(old, params))

def test_simulation_hands_over_no_gradients_and_no_moments(pipe, data):
    p = copy.deepcopy(pipe); params = add_lora(p.unet, 'x', up_std=.02)
    config = FinetuneConfig(steps=2, optimizer='adam')
    with simulated(FinetuneLoss(Denoiser(p), data.retain, config), params, config): assert all(q.grad is None for q in params)

@pytest.mark.parametrize('prior_weight', [0., .3])
def test_several_samples_and_their_residuals(pipe, data, prior_weight):
    "A loss on several samples is the mean of theirs; Gauss-Newton's residuals have it as their mean square"
    loss = FinetuneLoss(Denoiser(pipe), data.pool['pool-things'], FinetuneConfig(prior_weight=prior_weight), prior=data.retain)
    with torch.no_grad():
        one, three = [loss.frozen(t)().item() for t in (2, 3, 4)], loss.frozen(2, 3, 4)().item()
        assert len(set(one)) == 3 and three == pytest.approx(np.mean(one), rel=1e-6)
        assert loss.residuals(2, 3, 4)().square().mean().item() == pytest.approx(three, rel=1e-5)

@pytest.mark.parametrize('changes', [dict(product='gauss-newton'), dict(product='lora-bilinear'), dict(product='fd-central', solver='minres'), dict(samples=2)], ids=str)
def test_every_product_runs_in_algorithm_2(pipe, data, changes):
    config = CONFIG.model_copy(update=dict(steps=2, gamma=1., product='exact', tol=1e-6, check_every=1))
    first, second = copy.deepcopy(pipe), copy.deepcopy(pipe)
    resalign(first, data, config); out = resalign(second, data, config.model_copy(update=changes))
    assert not same(weights(first), weights(second)) and all(s['residual'] < .5 and not s['fallback'] for s in out['solves'])
    wanted = changes.get('product', 'exact')
    assert {s['product'] for s in out['solves'] if s['algorithm'] == 'lora'} <= {wanted}
    assert {s['product'] for s in out['solves'] if s['algorithm'] == 'full'} <= {'fd-forward' if wanted == 'lora-bilinear' else wanted}

def test_clipped_never_lengthens():
    x = [torch.tensor([3., 4.])]
    assert torch.allclose(clipped(x, 1.)[0].norm(), torch.tensor(1.)) and torch.equal(clipped(x, 9.)[0], x[0])
    assert not clipped(x, 1., 'skip')[0].any() and torch.equal(clipped(x, 9., 'skip')[0], x[0])

def test_the_retain_weight_rises_in_the_second_half():
    a = [retain_weight(ResAlignConfig(steps=161, alpha=1.6, alpha_end=2.), s) for s in range(161)]
    assert set(a[:80]) == {1.6} and np.isclose(a[80], 1.6) and np.isclose(a[120], 1.8) and np.isclose(a[160], 2.) and np.all(np.diff(a) >= 0)
    assert {retain_weight(ResAlignConfig(steps=n, alpha=3.), s) for n in (1, 5) for s in range(n)} == {3.} and np.isfinite(retain_weight(ResAlignConfig(steps=1, alpha_end=2.), 0))

def test_a_pool_written_out_is_drawn_as_it_stands():
    listed = [dict(folder='b', lr=1e-4, steps=20, optimizer='sgd', batch=1), dict(folder='a', lr=1e-6, steps=5, optimizer='adam', algorithm='full', prior_weight=1.)]
    pool = Pool(listed=listed); drawn = [draw_config(pool, ['a', 'b', 'c'], 7, core.generator(0, 'draw', i)) for i in range(30)]
    assert all(c.seed == 7 and dict(folder=f, **c.model_dump()).items() >= next(l for l in listed if l['folder'] == f).items() for f, c in drawn) and {f for f, _ in drawn} == pool.named == {'a', 'b'}
    with pytest.raises(ValueError, match='listed: expected without steps'): Pool(listed=listed, steps=[3])
    with pytest.raises(ValueError, match='folder'): Pool(listed=[dict(lr=1e-4)])
    only = Pool(listed=listed, algorithm=['lora']); drawn = [draw_config(only, ['a', 'b'], 7, core.generator(0, 'draw', i)) for i in range(30)]
    assert only.named == {'b'} and {(f, c.algorithm) for f, c in drawn} == {('b', 'lora')}
    with pytest.raises(ValueError, match='listed: none is by full'): Pool(listed=listed[:1], algorithm=['full'])

def test_gradient_descent_that_hardly_moves_takes_one_step(pipe, data):
    slow = [dict(folder='pool-things', lr=1e-5, steps=30, optimizer='sgd', batch=1), dict(folder='pool-things', lr=1e-5, steps=30, optimizer='adam', batch=1), dict(folder='pool-things', lr=1e-3, steps=4, optimizer='sgd', batch=1)]
    pool = Pool(listed=slow, still=3e-3); drawn = {(c.optimizer, round(c.lr, 9), c.steps) for i in range(60) for _, c in [draw_config(pool, [], 0, core.generator(0, 'draw', i))]}
    assert drawn == {('sgd', 3e-4, 1), ('adam', 1e-5, 30), ('sgd', 1e-3, 4)}
    out = resalign(copy.deepcopy(pipe), data, CONFIG.model_copy(update=dict(steps=1, gamma='matched', pool=Pool(listed=slow[:1], still=3e-3))))
    assert out['solves'] and all(s['steps'] == 1 and np.isclose(s['gamma_asked'], 3e-4) for s in out['solves'])

def test_pictures_that_are_not_finite_are_no_pictures(pipe):
    broken = copy.deepcopy(pipe); broken.unet.conv_out.weight.data.fill_(float('inf'))
    with pytest.raises(UserError, match='pictures of the seeds 1, 2: not finite'): generate(broken, ['a blue car']*2, [1, 2], steps=1)

def test_pictures_do_not_depend_on_their_batch(pipe):
    a = generate(pipe, ['a blue car']*3, [1, 2, 3], steps=2, batch=3)
    b = generate(pipe, ['a blue car']*3, [1, 2, 3], steps=2, batch=1)
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1

def test_folders_of_the_pool_have_names(tmp_path):
    (tmp_path/'a=b').mkdir()
    assert jobs.named_folders(dict(d1='x/down1')) == dict(d1=Path('x/down1')) and jobs.named_folders([Path('data/cats'), 'dogs=data/pets']) == dict(cats=Path('data/cats'), dogs=Path('data/pets'))
    assert jobs.named_folders([tmp_path/'a=b']) == {'a=b': tmp_path/'a=b'} and jobs.named_folders(()) == {}
    with pytest.raises(UserError, match="two folders are called 'images', expected different names, or NAME=FOLDER"): jobs.named_folders(['dogs/images', 'cats/images'])

def test_a_snapshot_of_the_hub_may_link_into_its_blobs(tmp_path):
    home = tmp_path/'datasets--x--y'; snapshot, blobs = home/'snapshots'/'abc', home/'blobs'; world.write_set(blobs, world.scenes('retain', 2)); (snapshot/'down1').mkdir(parents=True)
    for f in blobs.iterdir(): (snapshot/'down1'/f.name).symlink_to(Path('../../../blobs')/f.name)
    assert len(read_captions(snapshot/'down1')) == 2
    (tmp_path/'secret.png').write_bytes((blobs/'00000.png').read_bytes()); (snapshot/'down1/00000.png').unlink(); (snapshot/'down1/00000.png').symlink_to(tmp_path/'secret.png')
    with pytest.raises(UserError, match='leads out of the folder'): read_captions(snapshot/'down1')

LOADS = """
import sys, warnings; warnings.filterwarnings('ignore')
from diffusers import StableDiffusionPipeline
import torch
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
image = pipe('a red robot', num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
assert 'resalign' not in sys.modules and image.size[0] == image.size[1]
print(image.size[0])
"""

@pytest.mark.skipif(not (ROOT/'outs/base').is_dir(), reason='outs/base is not here: dvc pull base')
def test_base_loads_without_this_package():
    done = subprocess.run([sys.executable, '-c', LOADS, str(ROOT/'outs/base')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.split()[-1] == '64'
