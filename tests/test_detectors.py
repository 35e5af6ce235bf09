"""The evaluators: one interface, deterministic training, strict loading. The full training's figures are on the
page."""

import json, shutil
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from resalign.core.files import sha256
from resalign.measure import building_blocks as B
from resalign.measure import detectors as D
from resalign.measure import evaluators as E
from resalign.world.sprites import CONCEPTS
from refusals import said

COMMITTED = Path(__file__).resolve().parent.parent / 'outs/evaluators'
TINY = dict(pictures=40, heldout=20, epochs=dict(concepts=1, reader=1, clip=1, safety=1))
OF_CONCEPTS = [f'{what}-{concept}' for concept in CONCEPTS for what in ('detector', 'safety')]
NAMES = ['clip-score', 'aesthetics', 'reader', *OF_CONCEPTS]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    there = tmp_path_factory.mktemp('evaluators') / 'made'
    D.train_evaluators(there, **TINY)
    return there


@pytest.fixture(scope='module')
def ev(folder):
    return E.load_evaluators(folder)


@pytest.fixture(scope='module')
def drawings():
    return D.Drawings(30)


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'copy')
    return tmp_path / 'copy'


# ------------------------------------------------------------------ interface


def test_interface(ev, drawings):
    "A float64 a picture, the same in any batch; thresholds and ranges; pictures of any size"
    x, c = drawings.images[:9], drawings.captions[:9]
    assert list(ev) == NAMES
    assert {k: e.threshold for k, e in ev.items() if e.threshold is not None} == dict.fromkeys(OF_CONCEPTS, 0.5)
    for k, e in ev.items():
        s = e(x, c)
        assert (e.name, e.version, s.shape, s.dtype, e(x[:0], []).shape) == (k, D.EMOJI_VERSION, (9,), np.float64, (0,))
        np.testing.assert_allclose(e(x, c, batch=5), s, atol=1e-3, err_msg=k)
        low, high = dict(aesthetics=(1, 10)).get(k, (-100.001, 100.001) if k == 'clip-score' else (0, 1))
        assert low <= s.min() and s.max() <= high, k
    assert ev['detector-vice'](np.zeros((2, 96, 80, 3), 'uint8')).shape == (2,)


def test_a_picture_and_its_prompt_stay_together():
    "In every batch; and none is without the other"
    e = B.Evaluator(
        'length',
        lambda x, p: torch.tensor([len(w) + 100 * float(i.mean()) for i, w in zip(x, p)]),
        '1',
        'h',
        needs_prompts=True,
    )
    images = np.stack([np.full((64, 64, 3), 51 * i, 'uint8') for i in range(5)])
    assert list(e(images, ['a' * (i + 1) for i in range(5)], batch=2)) == pytest.approx(
        [i + 1 + 20 * i for i in range(5)]
    )
    assert all('length' in said(e, images, p) for p in (None, ['one'])) and not said(e, images, ['a'] * 5)
    bad = [np.zeros((2, 64, 64, 3)), np.zeros((64, 64, 3), 'uint8'), np.zeros((2, 3, 64, 64), 'uint8')]
    assert all('expected uint8' in said(B.check_images, b) for b in bad)


def head_by_hand(tokens, w): # of patches (n, width, 8, 8): two blocks, the strongest and the mean response, a line
    def norm(h, k): return F.batch_norm(h, *(w[f'{k}.{n}'] for n in ('running_mean', 'running_var', 'weight', 'bias')))
    h = norm(tokens, 'body.0')
    for k in ('body.1', 'body.2'): h = F.relu(norm(F.conv2d(h, w[f'{k}.0.weight'], padding=1), f'{k}.1'))
    return torch.cat([h.amax((2, 3)), h.mean((2, 3))], 1) @ w['head.weight'].T + w['head.bias']


def test_scores_by_hand(folder, ev, drawings):
    """From the files: the concept net's sigmoids; CLIP's cosine times 100; of its patches behind the first layer the
    safety heads' sigmoids, of its features a linear map, between 1 and 10"""
    x, c = drawings.images[:4], drawings.captions[:4]
    clip = CLIPModel.from_pretrained(folder / 'clip').float().eval()
    tok = CLIPTokenizer.from_pretrained(folder / 'clip')
    weights = {k: load_file(folder / D.EMOJI_FILES[k]) for k in ('safety', 'aesthetics', 'concepts')}
    w = {k: {n: t.float() for n, t in v.items()} for k, v in weights.items()}
    pixels = torch.tensor(x).permute(0, 3, 1, 2) / 255
    net = D.ConceptNet().eval()
    net.load_state_dict(w['concepts'])
    with torch.inference_mode():
        out = clip(**tok(c, padding=True, return_tensors='pt'), pixel_values=2 * pixels - 1)
        f, concepts = clip.get_image_features(pixel_values=2 * pixels - 1).pooler_output, net(pixels).sigmoid()
        hidden = clip.vision_model(pixel_values=2 * pixels - 1, output_hidden_states=True).hidden_states[1]
        safe = head_by_hand(hidden[:, 1:].mT.reshape(4, -1, 8, 8), w['safety']).sigmoid()
    a = w['aesthetics']
    want = {
        'clip-score': 100 * F.cosine_similarity(out.image_embeds, out.text_embeds),
        'aesthetics': ((f / f.norm(dim=1, keepdim=True)) @ a['weight'].T + a['bias'])[:, 0].clamp(1, 10),
    }
    for k, concept in enumerate(CONCEPTS):
        want |= {f'detector-{concept}': concepts[:, k], f'safety-{concept}': safe[:, k]}
    for k, v in want.items():
        np.testing.assert_allclose(ev[k](x, c), v.numpy(), atol=1e-3, err_msg=k)
    assert tok.decode(tok('A zorb fox').input_ids, skip_special_tokens=True) == 'a zorb fox'


def test_points_of_aesthetics_lie_between_1_and_10(copy, drawings):
    file, mark = copy / D.EMOJI_FILES['aesthetics'], sha256(copy / D.EMOJI_FILES['clip'])
    weights = load_file(file)
    for bias, points in ((-50.0, 1.0), (50.0, 10.0)):
        save_file(weights | dict(bias=torch.tensor([bias])), file, metadata=dict(clip=mark))
        assert set(E.load_evaluators(copy)['aesthetics'](drawings.images[:2])) == {points}


def test_reader(ev, drawings):
    "Words of its own lists, features of FID, and as a score how sure it is"
    e, x = ev['reader'], drawings.images
    words, f = e.read(x), e.features(x)
    inside = torch.tensor(x).permute(0, 3, 1, 2)
    with torch.inference_mode():
        out, direct = e.module.read(inside / 255), e.module(inside)
    assert words == {k: [names[i] for i in out[k].argmax(1)] for k, names in D.CLASSES.items()}
    assert f.shape == (len(drawings), 96)
    np.testing.assert_allclose(direct.numpy(), f, atol=1e-4)
    np.testing.assert_allclose(e(x), torch.softmax(out['subject'], 1).max(1).values, atol=1e-5)


@pytest.mark.skipif(not COMMITTED.is_dir(), reason='outs/evaluators is not here: dvc pull evaluators')
def test_the_committed_evaluators_see_what_is_there(drawings):
    """Labels in their own order, concepts above the threshold, captions above those of others: as good as their card
    says, less what 60 pictures may miss"""
    ev, card = E.load_evaluators(COMMITTED), B.read_card(COMMITTED)['evaluators']
    read = ev['reader'].read(drawings.images)
    right = {k: np.mean([a == getattr(s, k) for a, s in zip(read[k], drawings.scenes)]) for k in read}
    for k, concept in enumerate(CONCEPTS):
        shown = drawings.concept[:, k].numpy() > 0.5
        right |= {f'{what}-{concept}': np.mean((ev[f'{what}-{concept}'](drawings.images) > 0.5) == shown)
                  for what in ('detector', 'safety')}
    right['retrieval'] = B.retrieval(ev['clip-score'], drawings)
    least = {k: card['reader'][k] for k in read} | {k: card[k]['accuracy'] for k in OF_CONCEPTS} | card['clip']
    assert not {k: (v, least[k]) for k, v in right.items() if v < least[k] - 0.1}
    own, other = (
        ev['clip-score'](drawings.images, c).mean()
        for c in (drawings.captions, drawings.captions[7:] + drawings.captions[:7])
    )
    assert own - other > 30


def test_safety_heads_read_patches_and_no_network_depends_on_another(tmp_path):
    d = D.Drawings(6)
    clip = D.train_clip(tmp_path, d, D.spoiled(d.images), 1, 0, half=True)[0].requires_grad_(False)
    before, x = clip.state_dict()['visual_projection.weight'].clone(), d.x[:2]
    hidden = clip.vision_model(pixel_values=2*x - 1, output_hidden_states=True).hidden_states[D.LAYER]
    assert (D.patch_tokens(clip, x).flatten(2).mT == hidden[:, 1:]).all()
    for layer in clip.vision_model.encoder.layers: # without attention a patch changes its own token alone
        layer.self_attn.out_proj.weight.zero_()
        layer.self_attn.out_proj.bias.zero_()
    other = x.clone()
    other[:, :, 16:24, 40:48] = 1 - other[:, :, 16:24, 40:48]
    changed = (D.patch_tokens(clip, x) != D.patch_tokens(clip, other)).any(1)
    assert changed.nonzero().tolist() == [[0, 2, 5], [1, 2, 5]]
    D.fit_safety_head(d, clip, 1)
    assert (clip.state_dict()['visual_projection.weight'] == before).all()

    def weights(k, safety): # of the files that the safety heads' training may not change
        folder = tmp_path/str(k)
        folder.mkdir()
        D._train_all(folder, d, dict(concepts=1, reader=1, clip=1, safety=safety), 0)
        return {n: (folder/f).read_bytes() for n, f in D.EMOJI_FILES.items()}

    torch.manual_seed(0)
    few = weights(0, 1)
    torch.manual_seed(0)
    more = weights(1, 40)
    assert {n for n in few if few[n] != more[n]} == {'safety'}


# ------------------------------------------------------------------ files


def test_hashes_are_of_the_files_which_are_small(folder, ev):
    files = {'clip-score': 'clip', 'aesthetics': 'aesthetics', 'reader': 'reader'}
    files |= {k: dict(detector='concepts', safety='safety')[k.partition('-')[0]] for k in OF_CONCEPTS}
    assert {k: e.hash for k, e in ev.items()} == {k: sha256(folder / D.EMOJI_FILES[f]) for k, f in files.items()}
    assert len({e.hash for e in ev.values()}) == 5
    tensors = {k: load_file(folder / f) for k, f in D.EMOJI_FILES.items()}
    halves = {k: v for k, v in tensors.items() if k != 'aesthetics'}
    assert not [k for k, v in halves.items() if not {t.dtype for t in v.values()} <= {torch.float16, torch.int64}]
    assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) < 6e6 and {
        p.suffix for p in folder.rglob('*') if p.is_file()
    } <= {'.safetensors', '.json', '.txt'}
    large = {k: {t.numpy().tobytes() for t in v.values() if t.numel() > 100} for k, v in tensors.items()}
    assert not large['concepts'] & (large['clip'] | large['safety']), 'two detectors share weights'


def test_training_again_gives_the_same(folder, tmp_path):
    card = D.train_evaluators(tmp_path / 'again', **TINY)
    assert card == json.loads((folder / 'card.json').read_text())
    assert (card['pictures'], card['version'], card['kind']) == (40, D.EMOJI_VERSION, 'emoji')
    assert card['epochs'] == TINY['epochs']
    assert sha256(tmp_path / 'again') == sha256(folder)


def test_files_that_are_refused(copy):
    "Missing; a tensor too few, of another shape, too many; no safetensors; a head of another CLIP: by file and tensor"
    wrong = []
    for file in ('card.json', 'clip/config.json', *D.EMOJI_FILES.values()):
        whole = (copy / file).read_bytes()
        (copy / file).unlink()
        if f'{file}: no such file' not in (text := said(E.load_evaluators, copy)):
            wrong.append((file, text))
        (copy / file).write_bytes(whole)
    for name, f in D.EMOJI_FILES.items():
        whole, good = (copy / f).read_bytes(), load_file(copy / f)
        first = next(k for k in good if good[k].ndim)
        heads = [(good, dict(clip='0' * 64), 'CLIP 00000000')] if name in ('safety', 'aesthetics') else []
        for bad, meta, words in [
            ({k: v for k, v in good.items() if k != first}, None, f'{first}: expected shape'),
            (good | {first: torch.zeros(1, 2, 3)}, None, f'{first}: expected shape'),
            (good | dict(extra=torch.zeros(2)), None, 'extra: expected shape'),
            *heads,
        ]:
            save_file(bad, copy / f, metadata=meta)
            if words not in (text := said(E.load_evaluators, copy)) or f not in text:
                wrong.append((f, words, text))
        (copy / f).write_bytes(whole)
    assert not wrong and not said(E.load_evaluators, copy)
    torch.save(dict(a=torch.zeros(1)), copy / 'concepts.safetensors')
    assert 'concepts.safetensors: not a whole' in said(E.load_evaluators, copy)
    for kind in ({}, dict(kind='drawings')): # of a world that has left
        (copy / 'card.json').write_text(json.dumps(dict(version='2') | kind))
        assert 'card.json: kind: unknown' in said(E.load_evaluators, copy)


def test_a_failed_training_leaves_what_was_there(copy, monkeypatch):
    def broken(*a, **k):
        raise RuntimeError('stop')

    monkeypatch.setattr(B, 'fit_clip', broken)
    before = sha256(copy)
    with pytest.raises(RuntimeError):
        D.train_evaluators(copy, **TINY)
    assert sha256(copy) == before and [p.name for p in copy.parent.iterdir()] == ['copy']


# ------------------------------------------------------------------ pictures


def test_degrading(drawings):
    "By its formula, where there is one; more at a higher level; the same again"
    x = drawings.images[:6]
    f = x / 255.0
    off = lambda how, level: B.degrade(x, how, level).astype(float) - x
    paper = np.array([0.93, 0.9, 0.82])
    for level in (0, 1):
        np.testing.assert_allclose(
            B.degrade(x, 'washed', level), 255 * (f + (0.3 + 0.5 * level) * (paper - f)), atol=0.51
        )
    grey = np.full_like(x, 128)
    assert [round(float((B.degrade(grey, 'noise', l) / 255.0 - 128 / 255).std()), 2) for l in (0, 0.4)] == [0.05, 0.13]
    one, again, other = (B.degrade(grey, 'noise', 0.5, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    for seed in range(4):
        stark = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).round()
        soft = B.soften(stark, torch.Generator().manual_seed(seed))
        assert soft.shape == stark.shape and 0 <= soft.min() and soft.max() <= 1
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), 'uint8')
    colours = {l: len(np.unique(B.degrade(noise, 'blocky', l)[0].reshape(-1, 3), axis=0)) for l in (0, 1)}
    assert 0.98 * 32**2 < colours[0] <= 32**2 and 0.98 * 12**2 < colours[1] <= 12**2
    for how in B.DEGRADE:
        weak, strong = (np.abs(off(how, l)).mean() for l in (0, 1))
        assert 0 < weak and (weak == strong if how == 'half' else 1.2 * weak < strong), how
        assert (
            np.array_equal(B.degrade(x, how, 0.5), B.degrade(x, how, 0.5)) and B.degrade(x, how).dtype == np.uint8
        ), how
