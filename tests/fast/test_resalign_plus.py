"ResAlign+: the four terms of the text encoder's loss, the searched prefix, and two parts that don't see one another."
import copy

import pytest
import torch

from resalign.baselines import resalign_plus as module
from resalign.baselines.advunlearn import random_prefix
from resalign.baselines.resalign_plus import (Captions, EncoderConfig, ResAlignPlusConfig, align_encoder, encoder_loss,
                                              found_prefix, resalign_plus)
from resalign.core.runs import generator
from resalign.core.settings import UserError
from tests.fast.test_advunlearn import told
from tests.fast.toys import BENIGN, SAFE, UNSAFE, WIDTH, check_settings, given
from each import each


def test_settings():
    check_settings(EncoderConfig, dict(steps=2, lr=1e-3, batch=8, found_steps=1, found_lr=.03, seed=0),
                   [('steps', 0, 1), ('lr', 0., 1e-9), ('batch', 0, 1), ('found_steps', -1, 0), ('found_lr', 0., 1e-9)])
    assert ResAlignPlusConfig().encoder == EncoderConfig() and ResAlignPlusConfig(encoder=None).encoder is None
    assert ResAlignPlusConfig(encoder=dict(steps=5)).encoder.steps == 5 and ResAlignPlusConfig().solver == 'identity'


def moved(pipe):
    "A pipeline whose encoder has begun to move, and what the original's was"
    old = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        for n, p in pipe.text_encoder.named_parameters():
            if 'embeddings' not in n: p += .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    return old


def all_told(encoder, pipe, captions, prefixes=None):
    return torch.stack([told(encoder, pipe, c, None if prefixes is None else prefixes[k]) for k, c in enumerate(captions)])


def searched(x, old, pipe, captions, config, delta):
    "δ, written out: steps of one length, as a share of the prefix's, towards what the captions meant"
    goal = all_told(old, pipe, captions)
    for _ in range(config.found_steps):
        d = delta.clone().requires_grad_(True)
        g, = torch.autograd.grad(sum((a - b).square().mean() for a, b in zip(all_told(x.encoder, pipe, captions, d), goal)), d)
        rows = [row - config.found_lr*row.norm()*h/h.norm() for row, h in zip(delta, g)]
        delta = torch.stack(rows).detach()
    return delta


def begun(found_steps=0, batch=3):
    pipe, data = given()
    config = EncoderConfig(batch=batch, found_steps=found_steps, found_lr=.2, seed=4)
    x = Captions(pipe, data, 'text-encoder')
    old = moved(pipe)
    return pipe, config, x, old


@each('found_steps', [0, 1, 3])
def test_the_loss_is_the_formula(found_steps):
    pipe, config, x, old = begun(found_steps)
    gen = generator(4, 'text encoder', 7)
    i = torch.randint(len(UNSAFE), (3,), generator=gen).tolist()
    j = torch.randint(len(BENIGN), (3,), generator=gen).tolist()
    c, safe, p = [UNSAFE[k] for k in i], [SAFE[k] for k in i], [BENIGN[k] for k in j]
    def off(now, meant, prefix=None):
        return (all_told(pipe.text_encoder, pipe, now, prefix) - all_told(old, pipe, meant, prefix)).square().mean()
    expected = off(c, safe) + off(p, p)
    if found_steps:
        std = pipe.text_encoder.get_input_embeddings().weight.std()
        delta = searched(x, old, pipe, c, config, (std*torch.randn(3, WIDTH, generator=gen)).detach())
        eta = (std*torch.randn(3, WIDTH, generator=gen)).detach()
        expected = expected + off(c, safe, delta) + off(p, p, eta)
    got = encoder_loss(x, config, 7)
    torch.testing.assert_close(got, expected.to(got), rtol=1e-5, atol=1e-7)
    assert encoder_loss(x, config, 8) != got # other captions


def test_a_longer_search_comes_nearer():
    pipe, config, x, old = begun()
    i = torch.arange(len(UNSAFE))
    goal = all_told(old, pipe, UNSAFE)
    def off(n):
        delta = found_prefix(x, i, config.model_copy(update=dict(found_steps=n)), generator(0))
        return (x.embedded(x.encoder, 'unsafe', i, delta) - goal).square().mean().item()
    assert off(10) < off(3) < off(0)
    start = random_prefix(x.encoder, len(i), generator(0))
    assert torch.equal(found_prefix(x, i, config, generator(0)), start) and start.shape == (len(UNSAFE), WIDTH)


def weights(module): return {n: p.detach().clone() for n, p in module.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_algorithm_2_sees_the_originals_embeddings(monkeypatch):
    "Then the encoder is aligned, as it is alone; an adapter is saved only where it is the whole change"
    seen = []
    def algorithm(pipe, data, config, checkpoint=None, save_adapter=None):
        seen.append((weights(pipe.text_encoder), checkpoint, save_adapter))
        return dict(log=['a row'], solves=[])
    monkeypatch.setattr(module, 'resalign', algorithm)
    pipe, data = given()
    start, encoder = weights(pipe.text_encoder), EncoderConfig(steps=3, batch=2)
    out = resalign_plus(pipe, data, ResAlignPlusConfig(encoder=encoder), 'checkpoint', 'adapter')
    alone, _ = given()
    aligned = align_encoder(alone, data, encoder)
    assert same(seen[0][0], start) and seen[0][1:] == ('checkpoint', None)
    assert out['log'] == ['a row'] and out['encoder'] == aligned['log'] and len(aligned['log']) == 3
    assert same(weights(pipe.text_encoder), weights(alone.text_encoder))
    assert not same(start, weights(alone.text_encoder))
    other, _ = given() # another seed of the run is another one of the encoder
    later = resalign_plus(other, data, ResAlignPlusConfig(encoder=encoder, seed=5))['encoder']
    third, _ = given()
    assert later == align_encoder(third, data, EncoderConfig(steps=3, batch=2, seed=5))['log'] != out['encoder']
    resalign_plus(pipe, data, ResAlignPlusConfig(encoder=None), 'checkpoint', 'adapter')
    assert seen[-1][1:] == ('checkpoint', 'adapter')


def test_mistakes_cost_nothing():
    "Before the first step of Algorithm 2"
    def refused(words, pipe, data):
        start = weights(pipe.unet)
        with pytest.raises(UserError, match=words): resalign_plus(pipe, data, ResAlignPlusConfig())
        assert same(start, weights(pipe.unet))
    pipe, data = given()
    data.erase = ()
    refused('safe_captions: expected the column `safe`', pipe, data)
    pipe, data = given()
    data.retain_captions = []
    refused('resalign-plus: expected captions of the benign pictures', pipe, data)
    pipe, data = given()
    pipe.text_encoder_2 = None
    refused('resalign-plus: .*one text encoder', pipe, data)
