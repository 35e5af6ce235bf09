"""The evaluators: one interface, deterministic training, strict loading. The full training's figures are on the page."""
import json, shutil

import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from resalign import detectors as D
from resalign.core import UserError, sha256

TINY = dict(pictures=120, heldout=40, epochs=dict(wiring=1, reader=1, clip=1, mhsc=1))
NAMES = 'wiring clip-score mhsc aesthetics reader'.split()


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    there = tmp_path_factory.mktemp('evaluators')/'made'
    D.train_evaluators(there, **TINY)
    return there

@pytest.fixture(scope='session')
def ev(folder): return D.load_evaluators(folder)

@pytest.fixture(scope='session')
def drawings(): return D.Drawings(D.drawn(30, 'heldout'))

@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'copy')
    return tmp_path/'copy'


# ------------------------------------------------------------------ interface

@pytest.mark.parametrize('name', NAMES)
def test_interface(ev, drawings, name):
    e = ev[name]
    s = e(drawings.images, drawings.captions)
    assert list(ev) == NAMES and e.name == name and e.version == D.VERSION and len(e.hash) == 64
    assert s.shape == (len(drawings),) and s.dtype == np.float64 and np.isfinite(s).all()
    assert e(drawings.images[:0], []).shape == (0,)

def test_batches_do_not_matter(ev, drawings):
    x, c = drawings.images[:9], drawings.captions[:9]
    for e in ev.values(): np.testing.assert_allclose(e(x, c, batch=5), e(x, c), atol=1e-3)

def test_ranges(ev, drawings):
    for k in ('wiring', 'mhsc'):
        s = ev[k](drawings.images)
        assert ev[k].threshold == .5 and 0 <= s.min() and s.max() <= 1
    assert abs(ev['clip-score'](drawings.images, drawings.captions)).max() <= 100.001
    a = ev['aesthetics'](drawings.images)
    assert 1 <= a.min() and a.max() <= 10

@pytest.mark.parametrize('bad', [np.zeros((2, 64, 64, 3)), np.zeros((64, 64, 3), 'uint8'), np.zeros((2, 3, 64, 64), 'uint8')])
def test_only_uint8_pictures(ev, bad):
    with pytest.raises(UserError, match='expected uint8'): ev['wiring'](bad)

def test_other_sizes_are_brought_to_64(ev): assert ev['wiring'](np.zeros((2, 96, 80, 3), 'uint8')).shape == (2,)

def test_clip_score_needs_prompts(ev, drawings):
    for prompts in (None, ['one']):
        with pytest.raises(UserError, match='one prompt a picture'): ev['clip-score'](drawings.images, prompts)

def test_reader(ev, drawings):
    words, f = ev['reader'].read(drawings.images), ev['reader'].features(drawings.images)
    assert {k: len(v) for k, v in words.items()} == dict.fromkeys(('thing', 'colour', 'place'), len(drawings))
    assert set(words['thing']) <= set(D.THINGS) and f.shape == (len(drawings), 64)
    module = ev['reader'].module
    np.testing.assert_allclose(module(torch.tensor(drawings.images).permute(0, 3, 1, 2)).numpy(), f, atol=1e-4)


# ------------------------------------------------------------------ files

def test_hashes_are_of_the_files(folder, ev):
    files = {'wiring': 'wiring', 'clip-score': 'clip', 'mhsc': 'mhsc', 'aesthetics': 'aesthetics', 'reader': 'reader'}
    assert {k: e.hash for k, e in ev.items()} == {k: sha256(folder/D.FILES[f]) for k, f in files.items()}
    assert len({e.hash for e in ev.values()}) == 5

def test_files_are_small_float32(folder):
    for f in D.FILES.values(): assert {t.dtype for t in load_file(folder/f).values()} <= {torch.float32, torch.int64}
    assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) < 6e6
    assert {p.suffix for p in folder.rglob('*') if p.is_file()} <= {'.safetensors', '.json', '.txt'}

def test_clip_is_in_the_usual_format(folder, ev, drawings):
    clip, tok = CLIPModel.from_pretrained(folder/'clip').eval(), CLIPTokenizer.from_pretrained(folder/'clip')
    with torch.inference_mode():
        x = D.as_tensor(drawings.images[:4])
        out = clip(**tok(drawings.captions[:4], padding=True, return_tensors='pt'), pixel_values=2*x - 1)
    want = 100*torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    np.testing.assert_allclose(ev['clip-score'](drawings.images[:4], drawings.captions[:4]), want.numpy(), atol=1e-3)
    assert tok.decode(tok('A zorb robot').input_ids, skip_special_tokens=True) == 'a zorb robot'

def test_training_again_gives_the_same(folder, tmp_path):
    card = D.train_evaluators(tmp_path/'again', **TINY)
    assert card == json.loads((folder/'card.json').read_text())
    assert {k: sha256(tmp_path/'again'/f) for k, f in D.FILES.items()} == {k: sha256(folder/f) for k, f in D.FILES.items()}

def test_wiring_and_mhsc_share_no_weights(folder):
    tensors = {k: {t.numpy().tobytes() for t in load_file(folder/D.FILES[k]).values() if t.numel() > 100} for k in ('wiring', 'clip', 'mhsc')}
    assert not tensors['wiring'] & (tensors['clip'] | tensors['mhsc'])

@pytest.mark.parametrize('file', ['card.json', 'clip/config.json', *D.FILES.values()])
def test_missing_file(copy, file):
    (copy/file).unlink()
    with pytest.raises(UserError, match=f'{file}: no such file, expected'): D.load_evaluators(copy)

@pytest.mark.parametrize('name', D.FILES)
def test_wrong_tensors(copy, name):
    file = copy/D.FILES[name]; good = load_file(file); first = next(k for k in good if good[k].ndim)
    for bad in ({k: v for k, v in good.items() if k != first}, good | {first: torch.zeros(1, 2, 3)}, good | dict(extra=torch.zeros(2))):
        save_file(bad, file)
        with pytest.raises(UserError, match='expected shape'): D.load_evaluators(copy)

def test_not_safetensors(copy):
    torch.save(dict(a=torch.zeros(1)), copy/'wiring.safetensors')
    with pytest.raises(UserError, match='wiring.safetensors: not a whole safetensors file'): D.load_evaluators(copy)

@pytest.mark.parametrize('name', ['mhsc', 'aesthetics'])
def test_heads_belong_to_their_clip(copy, name):
    save_file(load_file(copy/D.FILES[name]), copy/D.FILES[name], metadata=dict(clip='0'*64))
    with pytest.raises(UserError, match='fitted to the CLIP 00000000'): D.load_evaluators(copy)

def test_a_failed_training_leaves_what_was_there(copy, monkeypatch):
    def broken(*a, **k): raise RuntimeError('stop')
    monkeypatch.setattr(D, 'fit_mhsc', broken); before = sha256(copy)
    with pytest.raises(RuntimeError): D.train_evaluators(copy, **TINY)
    assert sha256(copy) == before and [p.name for p in copy.parent.iterdir()] == ['copy']


# ------------------------------------------------------------------ data and figures

def test_twins_differ_in_wiring_only(drawings):
    robots = [i for i, s in enumerate(drawings.scenes) if s.thing == 'robot']
    for i in robots:
        j = int(drawings.twin[i]); a, b = drawings.scenes[i], drawings.scenes[j]
        assert int(drawings.twin[j]) == i and a.wired != b.wired and (a.colour, a.place, a.style, a.seed) == (b.colour, b.place, b.style, b.seed)
    others = set(range(len(drawings))) - set(robots)
    assert all(int(drawings.twin[i]) == i for i in others)

def test_heldout_is_held_out():
    key = lambda s: (s.seed, s.thing, s.colour, s.place)
    assert not {key(s) for s in D.drawn(300)} & {key(s) for s in D.drawn(300, 'heldout')}

@pytest.mark.parametrize('how', D.DEGRADE)
def test_degrade(drawings, how):
    x = drawings.images[:6]
    weak, strong = (np.abs(D.degrade(x, how, l).astype(float) - x).mean() for l in (0, 1))
    assert 0 < weak and (weak == strong if how == 'half' else weak < strong)
    assert np.array_equal(D.degrade(x, how, .5), D.degrade(x, how, .5)) and D.degrade(x, how).dtype == np.uint8

def test_detector_card():
    c = D.detector_card([.95, .75, .35, .05], [1, 0, 1, 0])
    assert (c['recall'], c['fpr'], c['accuracy']) == (.5, .5, .5)
    assert c['ece'] == pytest.approx((.05 + .75 + .65 + .05)/4, abs=1e-4) and sum(b['n'] for b in c['bins']) == 4
