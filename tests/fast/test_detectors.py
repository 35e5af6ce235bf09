"""What evaluators are trained on and judged by: labels that belong to their pictures, and a card's figures by hand."""
import json
from types import SimpleNamespace

import numpy as np, pytest, torch

from resalign.measure import building_blocks as B
from resalign.measure import detectors as D
from resalign.world.sprites import CONCEPTS, THINGS


@pytest.fixture(scope='module')
def drawings(): return D.Drawings(40)

def test_every_label_is_that_of_the_picture(drawings):
    s = drawings.scenes
    for field, names in D.CLASSES.items():
        assert [names[i] for i in drawings.labels[field]] == [getattr(x, field) for x in s], field
    held = [[x.object in objects for objects in CONCEPTS.values()] for x in s]
    assert drawings.concept.tolist() == held and set(map(tuple, held)) == {(0, 0), (1, 0), (0, 1)}
    assert [D.concept_of(o) for o in ('axe', 'beer', 'cup of coffee', '')] == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert drawings.captions == [x.caption for x in s] and torch.equal(
        drawings.x, torch.tensor(drawings.images).permute(0, 3, 1, 2) / 255
    )


def test_a_twin_differs_in_what_it_holds_alone(drawings):
    s, twin = drawings.scenes, drawings.twin.tolist()
    for i, j in enumerate(twin):
        a, b = s[i], s[j]
        assert twin[j] == i != j and (a.subject, a.place, a.style, a.seed) == (b.subject, b.place, b.style, b.seed)
        assert (drawings.images[i] == drawings.images[j]).all() == (a.object == b.object)
        assert b.object or a.subject in THINGS or j < len(twin)//2 # whoever can hold something does in the twin
    again = {(x.seed, x.subject) for x in D.Drawings(40, 1000).scenes}
    assert not again & {(x.seed, x.subject) for x in D.Drawings(40, 2000).scenes} # what is held out isn't trained on

def test_a_blend_shows_what_more_than_a_quarter_of_can_be_seen(drawings):
    d, i = drawings, torch.arange(len(drawings))
    x, y = D.blended(d, i, torch.Generator().manual_seed(3), share=0.)
    assert torch.equal(x, d.x) and torch.equal(y, d.concept)
    x, y = D.blended(d, i, torch.Generator().manual_seed(0), share=1.)
    apart, own = d.x[i] - d.x[d.twin], x - d.x[d.twin]
    a = (own*apart).sum((1, 2, 3))/apart.square().sum((1, 2, 3)) # what is left of the picture itself
    shown = torch.maximum(d.concept*(a > .25)[:, None], d.concept[d.twin]*(1 - a > .25)[:, None])
    sure = ((a - .25).abs() > .01) & ((a - .75).abs() > .01) & ~a.isnan()
    assert sure.sum() > 40 and torch.equal(y[sure], shown[sure])
    hidden = (d.concept*((a > .02) & (a < .24))[:, None]).sum()
    assert hidden > 0 and D.SEEN == .25 # some are there and can't be seen

def test_broken_pictures_are_of_five_kinds_and_none_stays_as_it_was(drawings):
    bad = D.broken(drawings.x[:20], torch.Generator().manual_seed(0))
    assert bad.shape == (20, 3, 64, 64) and len(D.BREAKS) == 5 and 0 <= bad.min() and bad.max() <= 1
    changed = [(bad[k] - drawings.x[k]).abs().mean() > .01 for k in range(20)]
    assert all(changed[4:]) and any(changed[:4]) # a blend may be of a picture with itself

def test_what_a_spoiled_picture_is_worth():
    "Five points at half the size; else 6 for the least and 2 for the most of five levels"
    images = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3)).astype('uint8')
    rng = np.random.default_rng([4, 5])
    how, level = rng.integers(len(B.DEGRADE), size=60), rng.integers(5, size=60)
    bad, points = B.spoiled(images, 4)
    assert points.tolist() == [5 if B.DEGRADE[h] == 'half' else 6 - l for h, l in zip(how, level)] and set(points) == {
        2,
        3,
        4,
        5,
        6,
    }
    for h, l in {(h, l) for h, l in zip(how, level)}:
        i = (how == h) & (level == l)
        assert (bad[i] == B.degrade(images[i], B.DEGRADE[h], l/4, 4)).all(), B.DEGRADE[h]

def test_the_reader_says_the_words_of_its_own_lists():
    class Net(torch.nn.Module):
        "Picture k is the k-th of each list"
        def read(self, x):
            k = (255*x[:, 0, 0, 0]).round().long()
            return {n: torch.nn.functional.one_hot(k, len(names)).float() for n, names in D.CLASSES.items()}

        def embed(self, x): return x[:, :, 0, 0]
    n = min(map(len, D.CLASSES.values()))
    images = np.zeros((n, 64, 64, 3), 'uint8') + np.arange(n, dtype='uint8')[:, None, None, None]
    reader = B.Reader(Net(), D.CLASSES, '1', 'none')
    assert reader.read(images) == {k: list(names)[:n] for k, names in D.CLASSES.items()}
    np.testing.assert_allclose(reader.features(images)[:, 0], np.arange(n)/255, rtol=1e-6)
    np.testing.assert_allclose(reader(images), np.e/(np.e + len(D.WHO) - 1), rtol=1e-6)

def test_each_picture_is_scored_with_its_own_prompt_whatever_the_batch():
    e = B.Evaluator(
        'length',
        lambda x, p: x[:, 0, 0, 0] * 255 + 100 * torch.tensor([len(q) for q in p]),
        '1',
        'none',
        needs_prompts=True,
    )
    images = np.zeros((5, 64, 64, 3), 'uint8') + np.arange(5, dtype='uint8')[:, None, None, None]
    for batch in (1, 2, 5, 9):
        np.testing.assert_allclose(
            e(images, ['a' * k for k in range(5)], batch), [101.0 * k for k in range(5)], rtol=1e-6
        )


def test_a_detector_s_card_by_hand():
    score, shown = [.05, .15, .5, .55, .65, .95, 1.], [0, 0, 1, 0, 1, 1, 1]
    card = B.detector_card(score, shown)
    assert (card['accuracy'], card['recall'], card['fpr'], card['threshold'], card['shown']) == (
        round(5 / 7, 4),
        0.75,
        round(1 / 3, 4),
        0.5,
        4,
    )  # .5 isn't above .5
    assert card['bins'] == [
        dict(score=0.05, shown=0, n=1),
        dict(score=0.15, shown=0, n=1),
        dict(score=0.525, shown=0.5, n=2),
        dict(score=0.65, shown=1, n=1),
        dict(score=0.975, shown=1, n=2),
    ]
    assert B.detector_card(score, shown, .6)['fpr'] == 0 and B.detector_card(score, shown, .1)['recall'] == 1
    assert card['ece'] == pytest.approx((.05 + .15 + 2*.025 + .35 + 2*.025)/7, abs=1e-3)

def test_earlier_cards_are_read_with_today_s_names(tmp_path):
    detector = dict(wired=4, bins=[dict(score=.1, wired=.5, n=2)])
    (tmp_path/'card.json').write_text(json.dumps(dict(version='3', evaluators={'detector-vice': detector})))
    found = B.read_card(tmp_path)['evaluators']['detector-vice']
    assert found == dict(shown=4, bins=[dict(score=.1, shown=.5, n=2)])

def test_retrieval_is_among_captions_that_differ():
    class Clip:
        "Of three captions, c is taken for a; the second picture of a is left out"
        def embed(self, images, captions):
            assert captions == ['a', 'b', 'c']
            return np.eye(3)[[0, 1, 0]], np.eye(3)
    class Drawn:
        captions, images = ['a', 'b', 'a', 'c'], np.zeros(4)
    assert B.retrieval(Clip(), Drawn()) == pytest.approx(2/3)
    eye = np.eye(4) # 2 and 3 are taken for one another: in fours, and in twos
    swapped = SimpleNamespace(embed=lambda images, captions: (eye[images], eye[[0, 1, 3, 2]][list(map(int, captions))]))
    drawn = SimpleNamespace(captions=['0', '1', '2', '3', '0'], images=np.arange(5))
    assert B.retrieval(swapped, drawn, size=4) == B.retrieval(swapped, drawn, size=2) == .5


def test_a_trained_card_by_hand():
    "A detector that fires on near misses alone; a reader that sees a subject in two of five broken pictures"
    class Set:
        scenes = [D.Scene(object=o) for near in list(D.NEAR_MISSES)[:2] for o in (near, '')]
        images = np.array([1, 0, 1, 0], np.uint8)[:, None, None, None]*np.ones((4, 64, 64, 3), np.uint8)
        concept = torch.tensor([[0., 0.]]*4)
    bad = np.zeros((5, 64, 64, 3), np.uint8)
    fires = lambda images, prompts=None: images[:, 0, 0, 0].astype(float)
    card = D._concept_card({'detector-vice': fires}, 'detector-vice', 0, Set, bad)
    assert (card['near'], card['broken']) == (1, 0)
    bad[:2] = 1
    assert D._concept_card({'detector-vice': fires}, 'detector-vice', 0, Set, bad)['broken'] == .4


def test_the_reader_s_part_of_a_trained_card(monkeypatch):
    drawings, bad = D.Drawings(4), torch.zeros(5, 3, 2, 2)
    read = lambda images: {k: [D.NOTHING, 'fox', D.NOTHING, 'bear', D.NOTHING][:len(images)] for k in D.CLASSES}
    reader, aesthetics = SimpleNamespace(read=read), lambda images: images.reshape(len(images), -1).mean(1)
    ev = {'reader': reader, 'aesthetics': aesthetics, 'clip-score': None}
    for name, stub in dict(_benign=lambda d: None, _some_broken=lambda *args: bad, _concept_card=lambda *args: {},
                           retrieval=lambda *args: .5, spoiled=lambda images, seed: (images//2, None)).items():
        monkeypatch.setattr(D, name, stub)
    card = D.write_trained_card(ev, drawings)
    mean, half = drawings.images.mean(), (drawings.images//2).mean()
    assert card['reader']['broken_recognised'] == .4
    assert card['aesthetics'] == pytest.approx(dict(clean=mean, spoiled=half), abs=.01)


def test_evaluators_are_measured_on_scenes_that_they_have_not_seen(monkeypatch, tmp_path):
    seeds, scenes_of = [], lambda seed, drawn=D.Drawings: set(map(str, drawn(20, seed).scenes))
    monkeypatch.setattr(D, 'Drawings', lambda n, seed: seeds.append((n, seed)) or seeds[-1])
    monkeypatch.setattr(D, '_train_all', lambda tmp, drawings, epochs, seed: None)
    monkeypatch.setattr(D, 'load_trained', lambda folder: {})
    monkeypatch.setattr(D, 'write_trained_card', lambda ev, drawings, seed: dict(on=drawings))
    card = D.train_evaluators(tmp_path/'e', seed=3, pictures=7, heldout=5)
    (n, trained), (m, held) = seeds
    assert (n, m) == (7, 5) and trained != held and card['evaluators'] == dict(on=(5, held))
    assert scenes_of(trained).isdisjoint(scenes_of(held))


# ------------------------------------------------------------------ what is learned

class Few:
    "Eight grey pictures that can be told by their brightness, with labels"
    def __init__(self):
        self.concept = torch.tensor([[0., 0.], [1., 0.], [0., 1.], [0., 0.]]*2)
        self.x = (torch.arange(8.)/20).view(8, 1, 1, 1).expand(8, 3, 64, 64)
        self.captions = [f'fox {k}' for k in range(8)]
        self.labels = {name: torch.arange(8) % 3 for name in D.CLASSES}

    def __len__(self): return 8


class Linear(torch.nn.Module):
    "Logits that depend on the brightness alone; whatever the arguments"
    def __init__(self, *args):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x): return logits(x.mean((1, 2, 3)), 2)
    def read(self, x): return {name: logits(x.mean((1, 2, 3)), len(c)) for name, c in D.CLASSES.items()}

def logits(grey, n): return grey[:, None]*torch.arange(1., n + 1) - .3

def cross_entropy(z, y): return float(np.mean([np.log(np.exp(row).sum()) - row[k] for row, k in zip(z.numpy(), y)]))

def binary(z, y): # mean of -log p of what is there
    p = 1/(1 + np.exp(-z.numpy().astype(float)))
    return -np.log(np.where(y > .5, p, 1 - p)).mean()


def test_what_detectors_learn(monkeypatch):
    "A fifth of each batch is broken, made of benign pictures, and shows neither concept nor subject"
    d, sources = Few(), []
    def broken(x, g):
        sources.extend((20*x[:, 0, 0, 0]).round().int().tolist())
        return x + .5
    stubs = dict(fit=lambda model, n, loss, *args, **kw: (n, loss), broken=broken, soften=lambda x, g: x,
                 blended=lambda d, i, g: (d.x[i], d.concept[i]), ConceptNet=Linear, ReaderNet=Linear, SafetyHead=Linear,
                 patch_tokens=lambda clip, x: x)
    for name, stub in stubs.items(): monkeypatch.setattr(D, name, stub)
    grey, g, all_ = torch.arange(8.)/20, torch.Generator().manual_seed(0), torch.arange(8)

    def seen(part): # brightness of what the loss sees: a part of the drawings, and what is broken of them
        more = torch.tensor(sources[-part:])/20 + .5
        return torch.cat([grey, more]), len(more)

    n, loss = D.fit_concepts(d)
    got = loss(all_, g).item()
    x, many = seen(2)
    assert n == 8 and len(sources) == 2 and got == pytest.approx(
        binary(logits(x, 2), np.r_[d.concept.numpy(), np.zeros((many, 2))]), rel=1e-5)

    n, loss = D.fit_reader(d)
    got = loss(all_, g).item()
    x, many = seen(1)
    own = [k % 3 for k in range(8)]
    who = cross_entropy(logits(x, len(D.WHO)), own + [D.WHO.index(D.NOTHING)]*many)
    rest = [cross_entropy(logits(grey, len(D.CLASSES[name])), own) for name in ('object', 'style', 'place')]
    assert n == 8 and len(sources) == 3 and got == pytest.approx(who + sum(rest), rel=1e-5)

    n, loss = D.fit_safety_head(d, 'clip')
    got = loss(torch.arange(n), g).item()
    x, many = seen(4)
    want = [binary(logits(x[:8], 2), d.concept.numpy()), binary(logits(x[8:], 2), np.zeros((4, 2)))]
    assert n == 8 + 4 + 3*8 and got == pytest.approx((4*8*want[0] + 4*want[1])/n, rel=2e-3) # of half precision
    assert set(sources) <= {0, 3, 4, 7}


def test_clip_and_aesthetics_learn_what_is_spoiled(monkeypatch):
    "Its caption says so where it has at most five points; a clean picture has eight"
    d, points, asked = Few(), np.array([2., 5., 6., 3., 4., 5., 6., 2.]), []
    images = np.arange(101, 109, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 64, 64, 3), np.uint8)
    def tokenizer(captions, **kw):
        asked.extend(captions)
        ids = torch.arange(len(captions))[:, None]
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
    pairs = []
    def model(input_ids, attention_mask, pixel_values, return_loss):
        grey = (pixel_values[:, 0, 0, 0] + 1)/2
        pairs.extend((asked[i], float(x)) for i, x in zip(input_ids[:, 0], grey))
        return SimpleNamespace(loss=0)
    monkeypatch.setattr(B, 'make_clip', lambda tok: model)
    monkeypatch.setattr(B, 'soften', lambda x, g: x)
    monkeypatch.setattr(B, 'fit', lambda model, n, loss, *args, **kw: loss)
    loss, g = B.fit_clip(d, tokenizer, (images, points)), torch.Generator().manual_seed(0)
    for _ in range(40): loss(torch.arange(8), g)
    clean = {(f'fox {k}', round(k/20, 4)) for k in range(8)}
    poor = {((B.POOR if p <= 5 else '') + f'fox {k}', round((101 + k)/255, 4)) for k, p in enumerate(points)}
    found = [(words, round(x, 4)) for words, x in pairs]
    assert set(found) == clean | poor and .15 < np.mean([pair in poor for pair in found]) < .35

    class Colours: # CLIP's features: the colours
        def get_image_features(self, pixel_values):
            return SimpleNamespace(pooler_output=(pixel_values.mean((2, 3)) + 1)/2)
    pure = np.zeros((3, 64, 64, 3), np.uint8)
    for k in range(3): pure[k, ..., k] = 255
    class Red:
        x = B.as_tensor(pure[[0]]).expand(3, -1, -1, -1)
        def __len__(self): return 3
    head = B.fit_aesthetics(Red(), Colours(), (pure[[1, 1, 2]], np.array([2., 2., 6.])))
    assert head(torch.eye(3))[:, 0].tolist() == pytest.approx([B.CLEAN, 2, 6], abs=.1)


def test_a_training_goes_through_all_samples_before_it_starts_again():
    "In as many steps as it takes, rounded up; no batch is of one sample"
    def batches(n, epochs):
        seen, model = [], torch.nn.Linear(1, 1)
        def loss(i, g):
            seen.append(i.tolist())
            return model(torch.ones(1, 1)).sum()
        B.fit(model, n, loss, epochs, batch=4)
        return seen
    seen = batches(10, 1.5)
    assert len(seen) == 4 and sorted(sum(seen[:3], [])) == list(range(10))
    assert [len(i) for i in batches(9, 1)] == [4]*3 and len(batches(10, .1)) == 2
