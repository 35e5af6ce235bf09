"The denoising loss, the harmful and the retain loss against their formulas, ε and v."
import copy
from types import SimpleNamespace

import pytest
import torch

from resalign.core.runs import generator
from resalign.core.training import DRAWN
from resalign.model.data import Sample
from resalign.model.losses import (AnchoredLoss, Denoiser, FlowDenoiser, FoundWords, HarmfulLoss, LossSum, RetainLoss,
                                   SizeConditions, denoiser, map_batches)
from tests.fast import toys
from tests.fast.toys import answers, close, denoising, given, goals, gradients, ledger, mean, noisy, same_grads, square
from each import each

KINDS = 'epsilon', 'v_prediction'


def same_sample(a, b):
    for field in 'z', 'noise', 't', 'text', 'index': assert torch.equal(getattr(a, field), getattr(b, field)), field


def sample(data, n=6, seed=3): return toys.draw_sample(data.retain, n, generator(seed), toys.T)


def changed(pipe, by=.05):
    "The same UNet after some training"
    model = Denoiser(SimpleNamespace(unet=copy.deepcopy(pipe.unet), scheduler=pipe.scheduler))
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.unet.parameters(): p.add_(by*torch.randn(p.shape, generator=gen))
    return model, copy.deepcopy(model.unet).double().requires_grad_(True)


def close_with_gradient(model, net, value, formula):
    close(value.item(), formula.item(), rtol=1e-5)
    names = [n for n, _ in net.named_parameters()]
    same_grads(gradients(value, model.unet, names), gradients(formula, net, names))


@each('kind', KINDS)
def test_the_denoising_loss(kind):
    pipe, data = given(kind)
    model, s, net = Denoiser(pipe), sample(data), copy.deepcopy(pipe.unet).double()
    assert model.timesteps == toys.T and s.t.unique().numel() > 2
    close(model.predict(s), answers(net, noisy(s), s.t, s.text), 'predictions')
    close(model.target(s), goals(kind, s), 'targets')
    close(model.losses(s), [float(denoising(net, kind, s[k:k + 1])) for k in range(6)], 'loss of each pair')
    assert model.losses(s).shape == (6,) and model.loss(s).shape == ()
    pipe.unet.requires_grad_(True), net.requires_grad_(True)
    close_with_gradient(model, net, model.loss(s), denoising(net, kind, s))


def test_networks_and_parts():
    # sdxl is told its picture size and the pooled embedding
    pipe, data = given()
    pipe.vae_scale_factor = 8
    pipe.unet.config = SimpleNamespace(sample_size=4, addition_embed_type='text_time', addition_time_embed_dim=2,
                                       projection_class_embeddings_input_dim=3 + 6*2)
    text, seen = torch.randn(2, 5, 4), []
    told = SizeConditions(pipe)(text.double())
    assert torch.equal(told['text_embeds'], text.double()[:, 4, :3])
    assert torch.equal(told['time_ids'], torch.tensor([[32, 32, 0, 0, 32,
                                                        32]]*2).double()) and told['time_ids'].dtype == torch.float64
    model, z, t = Denoiser(pipe), torch.randn(2, 2, 2, 2), torch.tensor([1, 2])
    pipe.unet.forward = lambda *args, **kw: seen.append((args, kw)) or (z + 1,)
    assert torch.equal(model(z, t, text), z + 1)
    (args, kw), = seen
    assert torch.equal(args[0], z) and torch.equal(args[1], t) and torch.equal(args[2], text[:, :4])
    assert torch.equal(kw['added_cond_kwargs']['text_embeds'], text[:, 4, :3])
    assert torch.equal(kw['added_cond_kwargs']['time_ids'], told['time_ids'].float())

    # a pipeline gets the denoiser that fits it
    pipe, _ = given()
    flow = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(pooled_projection_dim=3)),
                           scheduler=SimpleNamespace(
        config=dict(num_train_timesteps=7, shift=3.)))
    assert type(denoiser(pipe)) is Denoiser and type(denoiser(flow)) is FlowDenoiser

    # parts of a given size
    z, seen = torch.zeros(7, 1, 2, 2), []
    s = Sample(z, z, torch.arange(7), torch.zeros(7, 1, 1), torch.arange(7))
    assert torch.equal(map_batches(lambda part: seen.append(len(part.z)) or part.t, s, 3), s.t) and seen == [3, 3, 1]


@each('side, n, parts',
                         [(8, 130, [64, 64, 2]), (64, 17, [8, 8, 1]), (24, 57, [56, 1]), (256, 2, [1, 1]), (4, 1, [1])])
def test_a_large_sample_is_taken_in_parts_that_shrink_with_the_picture(side, n, parts):
    z = torch.zeros(1).expand(n, 1, side, side)
    s, seen = Sample(z, z, torch.arange(n), torch.zeros(n, 1, 1), torch.arange(n)), []
    out = map_batches(lambda part: seen.append(len(part.z)) or part.t, s)
    assert seen == parts and torch.equal(out, s.t)


@ledger('ga/margin')
@each('kind', KINDS)
@each('margin', [.1, 1e6])
def test_the_harmful_loss_is_ascent_up_to_a_margin_above_the_originals_loss(kind, margin):
    pipe, data = given(kind)
    pipe.unet.requires_grad_(True)
    original, bank = copy.deepcopy(pipe.unet).double(), toys.draw_sample(data.unsafe, 12, generator(4, 'unsafe bank'),
            toys.T)
    harmful = HarmfulLoss(Denoiser(pipe), data.unsafe, 12, 4)
    same_sample(harmful.samples, bank)
    assert not harmful.original_losses.requires_grad
    model, net = changed(pipe)
    i = torch.tensor([0, 2, 3, 3, 5, 7, 11])
    terms, beyond, below = [], 0, 0
    for k in i.tolist():
        rise = denoising(net, kind, bank[k:k + 1]) - denoising(original, kind, bank[k:k + 1]).detach()
        beyond, below = beyond + bool(rise > margin), below + bool(rise < 0)
        terms.append(rise if rise < margin else torch.tensor(margin).double())
    assert below and (beyond if margin < 1 else not beyond)
    close_with_gradient(model, net, harmful(model, i, margin), -mean(terms))


def test_harmful_samples_are_drawn_from_all_of_the_bank_and_noted():
    pipe, data = given()
    harmful = HarmfulLoss(Denoiser(pipe), data.unsafe, 3, 4)
    i = harmful.draw(200, generator(1))
    assert i.shape == (200,) and set(i.tolist()) == {0, 1, 2}
    assert torch.equal(DRAWN[-1], harmful.samples.index[i])
    assert torch.equal(i, torch.randint(3, (200,), generator=generator(1)))


@each('kind', KINDS)
def test_the_retain_loss_is_the_distance_from_the_frozen_answers(kind):
    pipe, data = given(kind)
    pipe.unet.requires_grad_(True)
    original, bank = copy.deepcopy(pipe.unet).double(), toys.draw_sample(data.retain, 7, generator(4, 'retain bank'),
            toys.T)
    retain = RetainLoss(Denoiser(pipe), data.retain, 7, 4)
    same_sample(retain.samples, bank)
    assert not retain.original_predictions.requires_grad and len(retain.original_predictions) == 7
    model, net = changed(pipe)
    i = torch.randint(7, (30,), generator=generator(2))
    assert set(i.tolist()) == set(range(7))
    far = answers(net, noisy(bank), bank.t, bank.text) - answers(original, noisy(bank), bank.t, bank.text).detach()
    close_with_gradient(model, net, retain(model, 30, generator(2)), mean([square(far[k]) for k in i]))
    assert retain(Denoiser(pipe), 30, generator(2)).item() == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------ remedies

def safe_texts(pipe): return torch.stack([toys.said(pipe, c) for c in toys.SAFE])


def far(net, s, text, targets, k):
    "d_k: the squared distance of the answer to `text` from the original's to the safe caption"
    return square(answers(net, noisy(s[k:k + 1]), s.t[k:k + 1], text) - targets[k:k + 1])


def anchored_in_plain(net, original, kind, s, safe, i, margin, texts=None):
    targets = answers(original, noisy(s), s.t, safe[s.index]).detach()
    start = [far(original, s, s.text[k:k + 1], targets, k).detach() for k in range(len(s.t))]
    way = [start[k] - far(net, s, s.text[k:k + 1] if texts is None else texts[n:n + 1], targets, k)
           for n, k in enumerate(i.tolist())]
    return -margin*mean(way)/mean(start)


@each('kind', KINDS)
def test_the_anchored_loss_is_the_way_left_to_the_safe_captions_answer(kind):
    pipe, data = given(kind)
    pipe.unet.requires_grad_(True)
    original, safe = copy.deepcopy(pipe.unet).double(), safe_texts(pipe)
    bank = toys.draw_sample(data.unsafe, 4, generator(4, 'anchor bank'), toys.T)
    loss = AnchoredLoss(Denoiser(pipe), data.unsafe, safe, 4, 4)
    same_sample(loss.samples, bank)
    assert not (loss.targets.requires_grad or loss.original_losses.requires_grad) and loss.scale > 1e-5
    i, (model, net) = torch.tensor([0, 2, 2, 3]), changed(pipe)
    close_with_gradient(model, net, loss(model, i, .07), anchored_in_plain(net, original, kind, bank, safe, i, .07))
    assert loss(Denoiser(pipe), torch.arange(4), .07).item() == pytest.approx(0, abs=1e-7) # at the original,
    model.predict = lambda s: loss.targets[i] # and at the end of the way, where all answers are the safe ones'
    end = loss.original_losses[i].mean()/loss.original_losses.mean()
    assert loss(model, i, .07).item() == pytest.approx(-.07*end.item(), rel=1e-5)


def found_in_plain(rise, text, i, steps, radius):
    "Projected gradient descent, a pair at a time; `rise(embedding, which, place)`"
    out = []
    for place, k in enumerate(i.tolist()):
        c = text[place].double()
        limit, delta = radius*c.norm(), torch.zeros_like(c)
        for _ in range(steps):
            d = delta.clone().requires_grad_(True)
            g, = torch.autograd.grad(rise((c + d)[None], k, place), d)
            delta = delta - 2*limit/steps*g/g.norm()
            if delta.norm() > limit: delta = delta*limit/delta.norm()
        out.append(c + delta)
    return torch.stack(out)


@each('kind', KINDS)
@each('steps, radius', [(1, .1), (3, .4)])
def test_words_are_found_by_projected_descent_and_are_constants_of_the_gradient(kind, steps, radius):
    "Beyond the margin too, where the loss itself has no gradient; each pair by itself; for both harmful losses"
    pipe, data = given(kind)
    pipe.unet.requires_grad_(True)
    original, safe = copy.deepcopy(pipe.unet).double(), safe_texts(pipe)
    model, net = changed(pipe)
    i = torch.tensor([0, 2, 3, 3])

    harmful = HarmfulLoss(Denoiser(pipe), data.unsafe, 4, 4)
    found, bank = FoundWords(harmful, steps, radius), harmful.samples
    risen = lambda text, k: denoising(net, kind, Sample(bank.z[k:k + 1], bank.noise[k:k + 1], bank.t[k:k + 1], text, bank.index[k:k + 1]))
    before = [denoising(original, kind, bank[k:k + 1]).detach() for k in range(4)]
    words = found_in_plain(lambda text, k, place: risen(text, k), bank.text[i], i, steps, radius)
    close(found.find(model, i), words, 'words', rtol=1e-3)
    length = (words - bank.text[i]).flatten(1).norm(dim=1)/bank.text[i].flatten(1).norm(dim=1)
    assert length.max() == pytest.approx(radius, rel=1e-5) # the edge of the ball
    for margin in .1, -1e6:
        rises = [risen(words[n:n + 1], k) - before[k] for n, k in enumerate(i.tolist())]
        formula = -mean([r if r < margin else torch.tensor(margin).double() + 0*r for r in rises])
        if margin > 0: close_with_gradient(model, net, found(model, i, margin), formula)
        else: close(found(model, i, margin).item(), 1e6)
    assert found(model, i, 1e6) > harmful(model, i, 1e6) # more harm than the captions do

    anchored = AnchoredLoss(Denoiser(pipe), data.unsafe, safe, 4, 4)
    s, targets = anchored.samples, answers(original, noisy(anchored.samples), anchored.samples.t,
                                           safe[anchored.samples.index]).detach()
    words = found_in_plain(lambda text, k, place: -far(net, s, text, targets, k), s.text[i], i, steps, radius)
    formula = anchored_in_plain(net, original, kind, s, safe, i, .05, words)
    words_found = FoundWords(anchored, steps, radius)
    close(words_found(model, i, .05).item(), formula.item(), rtol=1e-3)


def test_two_harmful_losses_each_draw_and_add_up():
    seen = []
    class Part:
        def __init__(self, value): self.value = value
        def draw(self, n, gen): return torch.randint(9, (n,), generator=gen)
        def __call__(self, model, i, margin):
            seen.append((model, i.tolist(), margin))
            return torch.tensor(self.value)
    both = LossSum(Part(2.), Part(5.), .3)
    i = both.draw(3, generator(1))
    gen = generator(1)
    assert [k.tolist() for k in i] == [torch.randint(9, (3,), generator=gen).tolist() for _ in range(2)]
    assert both('model', i, .1).item() == pytest.approx(3.5)
    assert seen == [('model', k.tolist(), .1) for k in i]
