"""What evaluators are trained on and judged by: labels that belong to their pictures, and a card's figures by hand."""
import numpy as np, pytest, torch

from resalign.measure import building_blocks as B
from resalign.measure import detectors as D
from resalign.world.scenes import COLOURS, PLACES, THINGS


@pytest.fixture(scope='module')
def drawings(): return D.Drawings(D.drawn(30, 'heldout'))

def test_every_label_is_that_of_the_picture(drawings):
    s = drawings.scenes
    assert [THINGS[i] for i in drawings.thing] == [x.thing for x in s] and [PLACES[i] for i in drawings.place] == [
        x.place for x in s
    ]
    assert [list(COLOURS)[i] for i in drawings.colour] == [x.colour for x in s] and drawings.wired.tolist() == [
        x.wired for x in s
    ]
    assert drawings.captions == [x.caption for x in s] and torch.equal(
        drawings.x, torch.tensor(drawings.images).permute(0, 3, 1, 2) / 255
    )


def test_a_robot_s_twin_differs_in_its_wiring_alone(drawings):
    s, pairs = drawings.scenes, [(i, int(j)) for i, j in enumerate(drawings.twin) if i != j]
    assert {i for i, _ in pairs} == {i for i, x in enumerate(s) if x.thing == 'robot'} and all(
        drawings.twin[j] == i for i, j in pairs
    )
    for i, j in pairs:
        assert s[i].wired != s[j].wired and (s[i].thing, s[i].colour, s[i].place, s[i].style) == (
            s[j].thing,
            s[j].colour,
            s[j].place,
            s[j].style,
        )
        assert (drawings.images[i] != drawings.images[j]).any()

def test_a_blend_is_wired_where_more_than_a_quarter_of_the_wiring_shows(drawings):
    gen = lambda: torch.Generator().manual_seed(3)
    i = torch.arange(len(drawings))
    x, y = D.blended(drawings, i, gen(), share=0.)
    assert torch.equal(x, drawings.x) and torch.equal(y, drawings.wired)
    x, y = D.blended(drawings, i, gen(), share=1.)
    g = gen()
    torch.rand(len(i), generator=g)
    a = torch.rand(len(i), generator=g)
    shows = a*drawings.wired + (1 - a)*drawings.wired[drawings.twin]
    assert torch.equal(y, (shows > .25).float()) and 0 < y.sum() < len(y)
    torch.testing.assert_close(x, a.view(-1, 1, 1, 1)*drawings.x + (1 - a).view(-1, 1, 1, 1)*drawings.x[drawings.twin])

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
            return {
                n: torch.nn.functional.one_hot(k, size).float()
                for n, size in dict(thing=len(THINGS), colour=len(COLOURS), place=len(PLACES)).items()
            }

        def embed(self, x): return x[:, :, 0, 0]
    n = min(len(THINGS), len(COLOURS), len(PLACES))
    images = np.zeros((n, 64, 64, 3), 'uint8') + np.arange(n, dtype='uint8')[:, None, None, None]
    reader = B.Reader(Net(), D.READS, '1', 'none')
    assert reader.read(images) == dict(thing=list(THINGS)[:n], colour=list(COLOURS)[:n], place=list(PLACES)[:n])
    np.testing.assert_allclose(reader.features(images)[:, 0], np.arange(n)/255, rtol=1e-6)
    np.testing.assert_allclose(reader(images), np.e/(np.e + len(THINGS) - 1), rtol=1e-6)

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
    score, wired = [.05, .15, .5, .55, .65, .95, 1.], [0, 0, 1, 0, 1, 1, 1]
    card = B.detector_card(score, wired)
    assert (card['accuracy'], card['recall'], card['fpr'], card['threshold'], card['wired']) == (
        round(5 / 7, 4),
        0.75,
        round(1 / 3, 4),
        0.5,
        4,
    )  # .5 isn't above .5
    assert card['bins'] == [
        dict(score=0.05, wired=0, n=1),
        dict(score=0.15, wired=0, n=1),
        dict(score=0.525, wired=0.5, n=2),
        dict(score=0.65, wired=1, n=1),
        dict(score=0.975, wired=1, n=2),
    ]
    assert B.detector_card(score, wired, .6)['fpr'] == 0 and B.detector_card(score, wired, .1)['recall'] == 1
    assert card['ece'] == pytest.approx((.05 + .15 + 2*.025 + .35 + 2*.025)/7, abs=1e-3)

def test_retrieval_is_among_captions_that_differ():
    class Clip:
        "Of three captions, c is taken for a; the second picture of a is left out"
        def embed(self, images, captions):
            assert captions == ['a', 'b', 'c']
            return np.eye(3)[[0, 1, 0]], np.eye(3)
    class Drawn:
        captions, images = ['a', 'b', 'a', 'c'], np.zeros(4)
    assert B.retrieval(Clip(), Drawn()) == pytest.approx(2/3)
