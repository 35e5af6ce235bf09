"AdvUnlearn: the erasing and the retaining term, both modes, the attack and its prefix."
import contextlib
import copy
import math

import pytest
import torch

from resalign.baselines.advunlearn import (AdvUnlearnConfig, advunlearn, attack, attacked_embeddings, prefixed,
                                           token_ids, trained_params)
from resalign.core.settings import UserError
from resalign.core.runs import generator
from resalign.model.losses import Denoiser
from adam import adam
from tests.fast.toys import (BENIGN, T, TOKENS, UNSAFE, WIDTH, agree, answers, check_settings, close, draw_sample,
                             given, ledger, noises, noisy, run, said, square, stream)
from each import each


def test_settings():
    check_settings(AdvUnlearnConfig, dict(eta=1., mode='reg', retain_weight=.3, attack_steps=2, attack_lr=1e-3,
                                          accumulate=False, warm_up=1,
                                          steps=2, lr=1e-3, batch=8, seed=0),
                   [('retain_weight', -1e-9, 0.), ('attack_steps', -1, 0), ('warm_up', -1, 0), ('steps', 0, 1)])
    assert AdvUnlearnConfig(mode='iter').mode == 'iter'


def test_prefixes():
    # a prefix takes the place after the start and the end can still be read
    pipe, _ = given()
    words = [pipe.tokenizer.ids[w] for w in UNSAFE[0].split()]
    plain, room = (token_ids(pipe, [UNSAFE[0], 'old'], p) for p in (False, True))
    assert plain[0].tolist() == [0, *words, 1, 2, 2] and room[0].tolist() == [0, words[0], *words, 1, 2]
    long = ' '.join(['old']*20)
    assert token_ids(pipe, [long], True)[0].tolist() == [0] + [pipe.tokenizer.ids['old']]*(TOKENS - 2) + [1]
    assert token_ids(pipe, [long], False).shape == token_ids(pipe, [long], True).shape == (1, TOKENS)
    pipe.text_encoder_2 = None
    with pytest.raises(UserError, match='advunlearn: .*one text encoder'): token_ids(pipe, ['old'], False)

    # inside prefixed the second embedding is delta and outside it is not
    pipe, _ = given()
    encoder, delta = pipe.text_encoder, torch.randn(2, WIDTH, dtype=torch.float64)
    ids = token_ids(pipe, UNSAFE[:2], True)
    with contextlib.suppress(KeyError), prefixed(encoder, delta):
        found = encoder(ids)[0]
        raise KeyError
    for k in range(2): close(found[k], told(encoder, pipe, UNSAFE[k], delta[k].float()))
    close(encoder(token_ids(pipe, UNSAFE[:1], False))[0][0], told(encoder, pipe, UNSAFE[0]))

    # layers and final norm are trained and no embeddings
    encoder = given()[0].text_encoder
    assert set(trained_params(encoder)) == {'encoder.weight', 'encoder.bias', 'final_layer_norm.weight',
                                            'final_layer_norm.bias'}
    assert all(p is encoder.get_parameter(n) for n, p in trained_params(encoder).items())


def told(encoder, pipe, caption, delta=None):
    "A caption's embedding; with a prefix, the words stand one place further on"
    ids = pipe.tokenizer([caption], 'max_length', TOKENS if delta is None else TOKENS - 1, True, 'pt').input_ids[0]
    rows = [encoder.embeddings['token'].weight[i] for i in ids]
    if delta is not None: rows.insert(1, delta)
    h = torch.stack([r + p for r, p in zip(rows, encoder.embeddings['position'].weight)])
    so_far = torch.stack([h[:k + 1].sum(0)/math.sqrt(k + 1) for k in range(TOKENS)])
    return encoder.final_layer_norm(encoder.encoder(so_far.tanh()))


def searched(net, encoder, pipe, captions, view, config, gen, kind='epsilon'):
    "δ by Adam, written out"
    table = encoder.embeddings['token'].weight
    delta = (table.std()*torch.randn(len(captions), WIDTH, generator=gen)).detach()
    m, v, total = (torch.zeros_like(delta) for _ in range(3))
    for k in range(config.attack_steps):
        z_t, t, wanted = view(k)
        d = delta.clone().requires_grad_(True)
        text = [told(encoder, pipe, c, row) for c, row in zip(captions, d)]
        g, = torch.autograd.grad(square(noises(net, kind, z_t, t, text) - wanted), d)
        total = total + g
        g = total if config.accumulate else g
        m, v, direction = adam(m, v, g, k + 1)
        delta = delta - config.attack_lr*direction
    return delta


@ledger('advunlearn/accumulate', 'advunlearn/attack_steps')
@each('steps, accumulate', [(0, False), (1, False), (4, False), (4, True)])
def test_the_attack_descends_towards_the_wanted_prediction_over_changing_views(steps, accumulate):
    pipe, data = given()
    encoder, captions = pipe.text_encoder, UNSAFE[:3]
    config = AdvUnlearnConfig(attack_steps=steps, attack_lr=.05, accumulate=accumulate)
    views = [draw_sample(data.unsafe, 3, generator(k), T) for k in range(4)]
    views = [(torch.stack(noisy(s)), s.t, torch.randn(s.z.shape, dtype=torch.float64,
                                                      generator=generator(k, 'wanted'))) for k, s in enumerate(views)]
    single = [(z.float(), t, w.float()) for z, t, w in views]
    encoder.requires_grad_(True)
    found = attack(Denoiser(pipe), encoder, token_ids(pipe, captions, True), lambda k: single[k], config, generator(5))
    assert not found.requires_grad
    close(found, searched(pipe.unet.double(), encoder.double(), pipe, captions, lambda k: views[k], config,
                          generator(5)), rtol=1e-3)
    assert all(p.grad is None for p in encoder.parameters())


@ledger('advunlearn/retain_weight', 'advunlearn/mode')
@each('kind, changes',
                         [('epsilon', {}), ('v_prediction', dict(retain_weight=1., eta=3., warm_up=0)),
                          ('epsilon', dict(mode='iter', retain_weight=7.)),
                                           ('epsilon', dict(warm_up=99, retain_weight=0.))])
def test_attacked_prompts_are_erased_and_benign_ones_kept(kind, changes):
    pipe, data = given(kind)
    config = AdvUnlearnConfig(**dict(eta=1.5, retain_weight=.3, attack_steps=2, attack_lr=.05, warm_up=2, steps=4,
                                     lr=.02, batch=3, seed=9) | changes)
    net, frozen = copy.deepcopy(pipe.unet).double(), copy.deepcopy(pipe.text_encoder).double()
    pipe.unet.requires_grad_(True)
    before = copy.deepcopy(pipe.unet)
    steps, attacks, out = run(advunlearn, pipe, data, config, pipe.text_encoder)
    assert len(steps) == 4 and out['solves'] == []
    attacked_steps = [k for k in range(config.warm_up, 4) if config.mode == 'reg' or k % 2 == 0]
    assert [(s.kind, s.lr) for s in attacks] == [('Adam', .05)]*2*len(attacked_steps)

    def erase(encoder, k):
        s = draw_sample(data.unsafe, 3, stream(9, 'advunlearn', 'unsafe', k), T)
        captions, z_t = [UNSAFE[j] for j in s.index], noisy(s)
        with torch.no_grad():
            yes = noises(net, kind, z_t, s.t, [told(frozen, pipe, c) for c in captions])
            no = noises(net, kind, z_t, s.t, [told(frozen, pipe, '')]*3)
        if k < config.warm_up: text = [told(encoder, pipe, c) for c in captions]
        else:
            delta = searched(net, encoder, pipe, captions, lambda _: (z_t, s.t, yes), config, stream(9, 'attack', k),
                             kind)
            text = [told(encoder, pipe, c, d) for c, d in zip(captions, delta)]
        return square(noises(net, kind, z_t, s.t, text) - (no - config.eta*(yes - no)))

    def keep(encoder, k):
        s = draw_sample(data.retain, 3, stream(9, 'advunlearn', 'retain', k), T)
        captions, z_t = [BENIGN[j] for j in s.index], noisy(s)
        with torch.no_grad(): answer = noises(net, kind, z_t, s.t, [told(frozen, pipe, c) for c in captions])
        return square(noises(net, kind, z_t, s.t, [told(encoder, pipe, c) for c in captions]) - answer)

    for k, (step, row) in enumerate(zip(steps, out['log'])):
        if config.mode == 'reg':
            agree(step, row, lambda encoder: erase(encoder, k) + config.retain_weight*keep(encoder, k))
        else: agree(step, row, lambda encoder: erase(encoder, k) if k in (0, 2) else keep(encoder, k))
        assert (step.kind, step.lr, set(step.grads)) == ('Adam', .02, set(trained_params(pipe.text_encoder)))
    assert all(torch.equal(p, q) and not p.requires_grad for p, q in zip(pipe.unet.parameters(), before.parameters()))


def test_attacks_on_captions(monkeypatch):
    # prefixes against a pipeline bring back the originals answers
    (original, data), (pipe, _) = given(), given(seed=3)
    config, captions = AdvUnlearnConfig(attack_steps=3, attack_lr=.1, seed=2), [UNSAFE[k % 4] for k in range(5)]
    for p in original, pipe: p.unet.requires_grad_(True), p.text_encoder.requires_grad_(True)
    found = attacked_embeddings(pipe, original, captions, data.unsafe, config, 2)
    assert found.shape == (5, TOKENS, WIDTH) and not found.requires_grad
    assert not any(p.requires_grad for m in (pipe.unet, pipe.text_encoder) for p in m.parameters())
    nets, encoder = [copy.deepcopy(p.unet).double()
                     for p in (pipe, original)], copy.deepcopy(pipe.text_encoder).double()
    for k in 0, 2, 4:
        now = captions[k:k + 2]
        def view(step):
            s = draw_sample(data.unsafe, len(now), stream(2, 'view', k, step), T)
            with torch.no_grad():
                return noisy(s), s.t, answers(nets[1], noisy(s), s.t, [said(original, c) for c in now])
        delta = searched(nets[0], encoder, pipe, now, view, config, stream(2, 'prefix', k))
        for j, c in enumerate(now): close(found[k + j], told(encoder, pipe, c, delta[j]), rtol=1e-3)

    # captions are attacked 24 at a time
    (original, data), (pipe, _) = given(), given(seed=3)
    many = []
    encoder = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda ids: many.append(len(ids)) or encoder(ids)
    attacked_embeddings(pipe, original, UNSAFE[:1]*25, data.unsafe, AdvUnlearnConfig(attack_steps=0))
    assert many == [24, 1]


