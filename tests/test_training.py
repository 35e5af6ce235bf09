"Runs go on with the same bits, do what they say, and the result loads without this package."
import copy, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from resalign.use.jobs import named_folders
from resalign.world.emoji import pictures
from resalign.core.settings import UserError
from resalign.model.data import encode
from resalign.method.resalign import ResAlignConfig, UnlearnData, resalign
from resalign.model.pipelines import PretrainConfig, build_pipeline, generate
from made import set_of

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='session')
def pipe(): return build_pipeline(['a fox with a dagger', 'a bear'], PretrainConfig(unet_channels=(16, 32), vae_channels=(8, 8, 8, 16)))

@pytest.fixture(scope='session')
def data(pipe):
    def bank(name):
        drawn = set_of(name, 6)
        return encode(pipe, pictures(drawn), [s.caption for s in drawn])
    return UnlearnData(bank('unsafe'), bank('retain'), {n: bank(n) for n in ('pool-things', 'pool-subjects')}, [])

def weights(p): return {k: v.clone() for k, v in p.unet.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

CONFIG = ResAlignConfig(steps=5, gamma='matched', J=2, retain_batch=2, unsafe_batch=2)

def test_same_seed_same_bits(pipe, data):
    a, b, c = (copy.deepcopy(pipe) for _ in range(3))
    resalign(a, data, CONFIG); resalign(b, data, CONFIG); resalign(c, data, CONFIG.model_copy(update=dict(seed=1)))
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))

def test_killed_run_goes_on_with_the_same_bits(pipe, data, tmp_path, monkeypatch):
    from resalign.core import training
    from resalign.method import resalign as meta
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

def test_pictures_that_are_not_finite_are_no_pictures(pipe):
    broken = copy.deepcopy(pipe); broken.unet.conv_out.weight.data.fill_(float('inf'))
    with pytest.raises(UserError, match='pictures of the seeds 1, 2: not finite'): generate(broken, ['a bear']*2, [1, 2], steps=1)

def test_pictures_do_not_depend_on_their_batch(pipe):
    a = generate(pipe, ['a bear']*3, [1, 2, 3], steps=2, batch=3)
    b = generate(pipe, ['a bear']*3, [1, 2, 3], steps=2, batch=1)
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1

def test_folders_of_the_pool_have_names(tmp_path):
    (tmp_path/'a=b').mkdir()
    assert named_folders(dict(d1='x/down1')) == dict(d1=Path('x/down1')) and named_folders([Path('data/cats'), 'dogs=data/pets']) == dict(cats=Path('data/cats'), dogs=Path('data/pets'))
    assert named_folders([tmp_path/'a=b']) == {'a=b': tmp_path/'a=b'} and named_folders(()) == {}
    with pytest.raises(UserError, match="two folders are called 'images', expected different names, or NAME=FOLDER"): named_folders(['dogs/images', 'cats/images'])

LOADS = """
import sys, warnings; warnings.filterwarnings('ignore')
from diffusers import StableDiffusionPipeline
import torch
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
image = pipe('a fox', num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
assert 'resalign' not in sys.modules and image.size[0] == image.size[1]
print(image.size[0])
"""

@pytest.mark.skipif(not (ROOT/'outs/base').is_dir(), reason='outs/base is not here: dvc pull base')
def test_base_loads_without_this_package():
    done = subprocess.run([sys.executable, '-c', LOADS, str(ROOT/'outs/base')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.split()[-1] == '64'
