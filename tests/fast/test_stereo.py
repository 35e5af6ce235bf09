"STEREO: the search written out, the compositional target, what is trained last."
import copy
import math

import pytest
import torch

from resalign.baselines.parts import layers
from resalign.baselines.stereo import StereoConfig, stereo
from resalign.core.settings import UserError
from adam import adam
from tests.fast.test_advunlearn import told
from tests.fast.toys import (CHANNELS, SAFE, SIDE, T, UNSAFE, WIDTH, agree, check_settings, close, draw_sample,
                             esd_distance, esd_target, given, gradients, ledger, noises, noisy, run, said, sampled,
                             square, stream)
from each import each


def test_settings():
    check_settings(StereoConfig, dict(variant='u', rounds=2, erase_steps=2, erase_lr=1e-3, eta=0., invert_steps=2,
                                      invert_lr=5e-3, steps=2, lr=1e-3, anchor_scale=1., concept_scale=3., prompts=4,
                                      sampling_steps=4, guidance=3., batch=8, seed=0),
                   [('rounds', -1, 0), ('erase_steps', 0, 1), ('invert_steps', 0, 1), ('steps', 0, 1),
                    ('anchor_scale', -1e-9, 0.), ('concept_scale', -1e-9, 0.), ('prompts', 0, 1),
                    ('sampling_steps', 0, 1)])


def adamw(params, gradient, steps, lr):
    "AdamW, written out: changes the tensors of a dict in place"
    m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for k in range(steps):
        for n, g in gradient(k).items():
            m[n], v[n], direction = adam(m[n], v[n], g, k + 1)
            with torch.no_grad(): params[n].mul_(1 - .01*lr).sub_(lr*direction)


def path(net, kind, texts, empty, config, *names):
    "Guided samples for each text: [(z, t, text number, ε(c), ε(∅)) ...], all texts at the first time, then the next"
    start = torch.randn(len(texts), CHANNELS, SIDE, SIDE, generator=stream(config.seed, *names))
    rows, _ = sampled(net, kind, start, texts, empty, config.sampling_steps, config.guidance)
    return [(z[j], t, j, yes[j], no[j]) for z, t, yes, no in rows for j in range(len(texts))]


def searched(pipe, kind, data, config, chosen):
    "The words that each round finds"
    net, encoder = copy.deepcopy(pipe.unet).double(), copy.deepcopy(pipe.text_encoder).double()
    names, table = list(layers(net, dict(x='cross', u='not-cross')[config.variant])), encoder.embeddings['token'].weight
    empty, found = said(pipe, ''), []
    for k in range(config.rounds):
        texts = [told(encoder, pipe, SAFE[i], found[-1]).detach() if found else said(pipe, UNSAFE[i]) for i in chosen]
        bank = [(z, t, texts[j], esd_target(yes, no, config.eta))
                for z, t, j, yes, no in path(net, kind, texts, empty, config, 'esd bank')]
        def erasing(step):
            i = torch.randint(len(bank), (config.batch,), generator=stream(config.seed, 'esd', step))
            return gradients(esd_distance(net, kind, [bank[j] for j in i]), net, names)
        for p in net.parameters(): p.requires_grad_(True)
        adamw(dict(net.named_parameters()), erasing, config.erase_steps, config.erase_lr)
        v = (table.std()*torch.randn(WIDTH, generator=stream(config.seed, 'stereo word', k))).detach()
        def inverting(step):
            s = draw_sample(data.unsafe, config.batch, stream(config.seed, 'stereo invert', k, step), T)
            u = v.clone().requires_grad_(True)
            texts = [told(encoder, pipe, SAFE[i], u) for i in s.index]
            loss = square(noises(net, kind, noisy(s), s.t, texts) - s.noise.double())
            return dict(v=torch.autograd.grad(loss, u)[0])
        adamw(dict(v=v), inverting, config.invert_steps, config.invert_lr)
        found.append(v)
    return found, encoder


LEDGER = ['eta', 'rounds', 'concept_scale', 'anchor_scale', 'variant', 'batch', 'sampling_steps']


@ledger(*(f'stereo/{switch}' for switch in LEDGER))
@each('kind, changes', [
    ('epsilon', {}), ('v_prediction', dict(variant='x', eta=1., anchor_scale=.5, concept_scale=2.)),
    ('epsilon', dict(rounds=0, sampling_steps=5)), ('epsilon', dict(rounds=3, batch=2, anchor_scale=0.))])
def test_all_that_the_search_finds_is_erased_at_once_from_the_original(kind, changes):
    pipe, data = given(kind)
    config = StereoConfig(**dict(rounds=2, erase_steps=2, erase_lr=.05, invert_steps=3, invert_lr=.05, steps=3, lr=.04,
                                 prompts=3, sampling_steps=4, guidance=2., batch=3, seed=6) | changes)
    chosen = torch.randint(4, (3,), generator=stream(6, 'stereo captions')).tolist()
    found, encoder = searched(pipe, kind, data, config, chosen)
    texts = [[said(pipe, UNSAFE[i]) for i in chosen]]
    texts += [[told(encoder, pipe, SAFE[i], v).detach() for i in chosen] for v in found]
    original, empty, bank = copy.deepcopy(pipe.unet).double(), said(pipe, ''), []
    for k, rows in enumerate(texts):
        for z, t, j, _, no in path(original, kind, rows, empty, config, 'stereo bank', k):
            with torch.no_grad():
                ask = lambda text: noises(original, kind, [z], [t], [text])[0]
                away = sum(ask(other[j]) for other in texts)/len(texts) - no
                goal = no + config.anchor_scale*(ask(said(pipe, SAFE[chosen[j]])) - no) - config.concept_scale*away
            bank.append((z, t, rows[j], goal))
    trained = set(layers(pipe.unet, dict(x='cross', u='not-cross')[config.variant]))
    steps, inner, out = run(stereo, pipe, data, config)
    assert [(s.kind, s.lr, s.decay) for s in inner] == (
        [('AdamW', .05, .01)]*(config.erase_steps + config.invert_steps)*config.rounds)
    assert len(steps) == 3 and len(out['search']) == config.rounds and out['solves'] == out['skipped'] == []
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        i = torch.randint(len(bank), (config.batch,), generator=stream(6, 'stereo', k))
        agree(step, row, lambda net: esd_distance(net, kind, [bank[j] for j in i]))
        assert (step.kind, step.lr, step.decay, set(step.grads)) == ('AdamW', .04, .01, trained)
    for n, p in original.named_parameters(): close(steps[0].values.get(n, p), p, n) # the search has left it alone


def test_words_named_and_pictures_left_out():
    pipe, data = given()
    data.unsafe_captions[0] = 'a red car'
    with pytest.warns(UserWarning, match='stereo: 1 of 4'): out = stereo(pipe, data)
    assert out['skipped'] == [dict(captions=1, of=4)]
    assert all(math.isfinite(row[k]) for row in out['search'] for k in ('erased', 'inverted'))
    assert [row['step'] for row in out['search']] == [0, 1]
    pipe.text_encoder_2 = None
    pipe.tokenizer_2 = None
    with pytest.raises((UserError, AttributeError), match='stereo: .*one text encoder|encode_prompt'): stereo(pipe, data)
