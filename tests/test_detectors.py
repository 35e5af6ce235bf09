"""The evaluators: one interface, deterministic training, strict loading. The full training's figures are on the
page."""

import json, shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch, torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from resalign.core.files import sha256
from resalign.core.runs import generator
from resalign.measure import building_blocks as B
from resalign.measure import detectors as D
from resalign.measure import evaluators as E
from refusals import said

COMMITTED = Path(__file__).resolve().parent.parent / 'outs/evaluators'
TINY = dict(pictures=60, heldout=20, epochs=dict(wiring=1, reader=1, clip=1, mhsc=1))
NAMES = 'wiring clip-score mhsc aesthetics reader'.split()


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
    return D.Drawings(D.drawn(30, 'heldout'))


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'copy')
    return tmp_path / 'copy'


# ------------------------------------------------------------------ interface


def test_interface(ev, drawings):
    "A float64 a picture, the same in any batch; thresholds and ranges; pictures of any size"
    x, c = drawings.images[:9], drawings.captions[:9]
    assert list(ev) == NAMES and {k: e.threshold for k, e in ev.items() if e.threshold is not None} == dict(
        wiring=0.5, mhsc=0.5
    )
    for k, e in ev.items():
        s = e(x, c)
        assert (e.name, e.version, s.shape, s.dtype, e(x[:0], []).shape) == (k, D.VERSION, (9,), np.float64, (0,))
        np.testing.assert_allclose(e(x, c, batch=5), s, atol=1e-3, err_msg=k)
        low, high = dict(aesthetics=(1, 10)).get(k, (-100.001, 100.001) if k == 'clip-score' else (0, 1))
        assert low <= s.min() and s.max() <= high, k
    assert ev['wiring'](np.zeros((2, 96, 80, 3), 'uint8')).shape == (2,)


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


def test_scores_by_hand(folder, ev, drawings):
    """From the files: the wiring net's sigmoid; CLIP's cosine times 100; on its features MHSC's sigmoid and a
    linear map, between 1 and 10"""
    x, c = drawings.images[:4], drawings.captions[:4]
    clip, tok = CLIPModel.from_pretrained(folder / 'clip').eval(), CLIPTokenizer.from_pretrained(folder / 'clip')
    w = {k: load_file(folder / D.FILES[k]) for k in ('mhsc', 'aesthetics', 'wiring')}
    pixels = torch.tensor(x).permute(0, 3, 1, 2) / 255
    net = D.WiringNet().eval()
    net.load_state_dict(w['wiring'])
    with torch.inference_mode():
        out = clip(**tok(c, padding=True, return_tensors='pt'), pixel_values=2 * pixels - 1)
        f, wiring = clip.get_image_features(pixel_values=2 * pixels - 1).pooler_output, net(pixels)
    m, a = w['mhsc'], w['aesthetics']
    h = F.relu(f @ m['0.weight'].T + m['0.bias'])
    h = (h - m['3.running_mean']) / (m['3.running_var'] + 1e-5).sqrt() * m['3.weight'] + m['3.bias']
    want = {
        'wiring': 1 / (1 + (-wiring).exp()),
        'clip-score': 100 * F.cosine_similarity(out.image_embeds, out.text_embeds),
        'mhsc': 1 / (1 + (-(h @ m['4.weight'].T + m['4.bias'])[:, 0]).exp()),
        'aesthetics': ((f / f.norm(dim=1, keepdim=True)) @ a['weight'].T + a['bias'])[:, 0].clamp(1, 10),
    }
    for k, v in want.items():
        np.testing.assert_allclose(ev[k](x, c), v.numpy(), atol=1e-3, err_msg=k)
    assert tok.decode(tok('A zorb robot').input_ids, skip_special_tokens=True) == 'a zorb robot'


def test_points_of_aesthetics_lie_between_1_and_10(copy, drawings):
    file, mark = copy / D.FILES['aesthetics'], sha256(copy / D.FILES['clip'])
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
    assert words == {
        k: [list(names)[i] for i in out[k].argmax(1)]
        for k, names in dict(thing=D.THINGS, colour=D.COLOURS, place=D.PLACES).items()
    }
    assert f.shape == (len(drawings), 64)
    np.testing.assert_allclose(direct.numpy(), f, atol=1e-4)
    np.testing.assert_allclose(e(x), torch.softmax(out['thing'], 1).max(1).values, atol=1e-5)


@pytest.mark.skipif(not COMMITTED.is_dir(), reason='outs/evaluators is not here: dvc pull evaluators')
def test_the_committed_evaluators_see_what_is_there(drawings):
    """Labels in their own order, wiring above the threshold, captions above those of others: as good as their card
    says, less what 33 pictures may miss"""
    ev, card = E.load_evaluators(COMMITTED), json.loads((COMMITTED / 'card.json').read_text())['evaluators']
    read = ev['reader'].read(drawings.images)
    right = {
        k: np.mean(
            [a == getattr(s, k) for a, s in zip(read[k], drawings.scenes) if k != 'colour' or s.style != 'blueprint']
        )
        for k in read
    }
    right |= {k: np.mean((ev[k](drawings.images) > 0.5) == (drawings.wired.numpy() > 0.5)) for k in ('wiring', 'mhsc')}
    least = {k: card['reader'][k] for k in read} | {k: card[k]['accuracy'] for k in ('wiring', 'mhsc')}
    assert not {k: (v, least[k]) for k, v in right.items() if v < least[k] - 0.15}
    own, other = (
        ev['clip-score'](drawings.images, c).mean()
        for c in (drawings.captions, drawings.captions[7:] + drawings.captions[:7])
    )
    assert own - other > 0.5 * (card['clip-score']['own'] - card['clip-score']['other']) > 0


# ------------------------------------------------------------------ files


def test_hashes_are_of_the_files_which_are_small(folder, ev):
    files = {'wiring': 'wiring', 'clip-score': 'clip', 'mhsc': 'mhsc', 'aesthetics': 'aesthetics', 'reader': 'reader'}
    assert {k: e.hash for k, e in ev.items()} == {k: sha256(folder / D.FILES[f]) for k, f in files.items()} and len(
        {e.hash for e in ev.values()}
    ) == 5
    assert not [
        f
        for f in D.FILES.values()
        if not {t.dtype for t in load_file(folder / f).values()} <= {torch.float32, torch.int64}
    ]
    assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) < 6e6 and {
        p.suffix for p in folder.rglob('*') if p.is_file()
    } <= {'.safetensors', '.json', '.txt'}
    tensors = {
        k: {t.numpy().tobytes() for t in load_file(folder / D.FILES[k]).values() if t.numel() > 100}
        for k in ('wiring', 'clip', 'mhsc')
    }
    assert not tensors['wiring'] & (tensors['clip'] | tensors['mhsc']), 'two detectors share weights'


def test_training_again_gives_the_same(folder, tmp_path):
    card = D.train_evaluators(tmp_path / 'again', **TINY)
    assert card == json.loads((folder / 'card.json').read_text()) and (
        card['pictures'],
        card['version'],
        card['drawings'],
    ) == (60, D.VERSION, len(D.Drawings(D.drawn(60))))
    assert {k: sha256(tmp_path / 'again' / f) for k, f in D.FILES.items()} == card['hashes']


def test_files_that_are_refused(copy):
    "Missing; a tensor too few, of another shape, too many; no safetensors; a head of another CLIP: by file and tensor"
    wrong = []
    for file in ('card.json', 'clip/config.json', *D.FILES.values()):
        whole = (copy / file).read_bytes()
        (copy / file).unlink()
        if f'{file}: no such file' not in (text := said(E.load_evaluators, copy)):
            wrong.append((file, text))
        (copy / file).write_bytes(whole)
    for name, f in D.FILES.items():
        whole, good = (copy / f).read_bytes(), load_file(copy / f)
        first = next(k for k in good if good[k].ndim)
        heads = [(good, dict(clip='0' * 64), 'CLIP 00000000')] if name in ('mhsc', 'aesthetics') else []
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
    torch.save(dict(a=torch.zeros(1)), copy / 'wiring.safetensors')
    assert 'wiring.safetensors: not a whole' in said(E.load_evaluators, copy)


def test_a_failed_training_leaves_what_was_there(copy, monkeypatch):
    def broken(*a, **k):
        raise RuntimeError('stop')

    monkeypatch.setattr(B, 'fit_clip', broken)
    before = sha256(copy)
    with pytest.raises(RuntimeError):
        D.train_evaluators(copy, **TINY)
    assert sha256(copy) == before and [p.name for p in copy.parent.iterdir()] == ['copy']


# ------------------------------------------------------------------ data and figures


def test_twins_differ_in_wiring_only(drawings):
    "And no training picture is held out"
    robots = [i for i, s in enumerate(drawings.scenes) if s.thing == 'robot']
    for i in robots:
        j = int(drawings.twin[i])
        a, b = drawings.scenes[i], drawings.scenes[j]
        assert (
            int(drawings.twin[j]) == i
            and a.wired != b.wired
            and (a.colour, a.place, a.style, a.seed) == (b.colour, b.place, b.style, b.seed)
        )
    assert not [i for i in set(range(len(drawings))) - set(robots) if int(drawings.twin[i]) != i]
    assert [float(w) for w in drawings.wired] == [float(s.wired) for s in drawings.scenes] and drawings.captions == [
        s.caption for s in drawings.scenes
    ]
    assert len(D.drawn(300)) == 300 and not {(s.seed, s.thing, s.colour, s.place) for s in D.drawn(300)} & {
        (s.seed, s.thing, s.colour, s.place) for s in D.drawn(300, 'heldout')
    }


def test_blended_pictures_are_wired_above_a_quarter(drawings):
    "A share of the robots lies between the twins; what is less than a quarter wired can't be seen"
    i = torch.tensor([k for k, s in enumerate(drawings.scenes) if s.thing == 'robot'])
    x, y = D.blended(drawings, i, generator(0), share=0.0)
    assert torch.equal(x, drawings.x[i]) and torch.equal(y, drawings.wired[i])
    g, d = generator(0), drawings
    x, y = D.blended(d, i, g, share=1.0)
    a = 1 - (
        (x - d.x[i]).flatten(1).abs().max(1).values / (d.x[d.twin[i]] - d.x[i]).flatten(1).abs().max(1).values
    )  # what is left of the picture itself
    wired = a * d.wired[i] + (1 - a) * d.wired[d.twin[i]]
    assert (
        D.SEEN == 0.25
        and torch.equal(y, (wired > 0.25).float())
        and 0 < ((wired > 0.05) & (wired < 0.25)).sum()
        and y.min() == 0
    )


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
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), 'uint8')
    colours = {l: len(np.unique(B.degrade(noise, 'blocky', l)[0].reshape(-1, 3), axis=0)) for l in (0, 1)}
    assert 0.98 * 32**2 < colours[0] <= 32**2 and 0.98 * 12**2 < colours[1] <= 12**2
    for how in B.DEGRADE:
        weak, strong = (np.abs(off(how, l)).mean() for l in (0, 1))
        assert 0 < weak and (weak == strong if how == 'half' else 1.2 * weak < strong), how
        assert (
            np.array_equal(B.degrade(x, how, 0.5), B.degrade(x, how, 0.5)) and B.degrade(x, how).dtype == np.uint8
        ), how
    many = np.concatenate([drawings.images] * 3)
    out, points = B.spoiled(many, 3)
    rng = np.random.default_rng([3, 5])
    how, level = rng.integers(7, size=len(many)), rng.integers(5, size=len(many)) / 4
    assert list(points) == [5.0 if h == 0 else 6 - 4 * l for h, l in zip(how, level)] and set(points) == {2, 3, 4, 5, 6}
    k = int(np.flatnonzero(how == B.DEGRADE.index('washed'))[0])
    assert np.array_equal(out[k], B.degrade(many[k : k + 1], 'washed', level[k])[0])


def test_detector_card():
    "Above the threshold, not at it; calibration is the mean distance of score and truth over bins"
    c = B.detector_card([0.95, 0.75, 0.35, 0.05, 0.5], [1, 0, 1, 0, 1])
    assert (c['recall'], c['fpr'], c['accuracy'], c['threshold'], c['wired']) == (0.3333, 0.5, 0.4, 0.5, 3)
    assert c['ece'] == pytest.approx((0.05 + 0.75 + 0.65 + 0.05 + 0.5) / 5, abs=1e-4) and [
        (b['score'], b['wired'], b['n']) for b in c['bins']
    ] == [(0.05, 0, 1), (0.35, 1, 1), (0.5, 1, 1), (0.75, 0, 1), (0.95, 1, 1)]


def test_retrieval_is_the_share_of_captions_found():
    "Among captions that all differ, a few at a time"
    eye = np.eye(4)
    clip = SimpleNamespace(
        embed=lambda images, prompts: (eye[[int(i) for i in images]], eye[[0, 1, 3, 2]][[int(p) for p in prompts]])
    )
    d = SimpleNamespace(captions=['0', '1', '2', '3', '0'], images=np.arange(5))
    assert B.retrieval(clip, d, size=4) == 0.5 and B.retrieval(clip, d, size=2) == 0.5
