"ESD: target, samples of the frozen and of the trained model, trained layers."
import copy

import pytest
import torch

from resalign.baselines.esd import ESDConfig, choose_captions, esd, partial_samples, trajectory_bank
from resalign.baselines.parts import layers
from resalign.core.runs import generator
from resalign.model.losses import Denoiser
from tests.fast.toys import (CHANNELS, SIDE, T, agree, check_settings, close, esd_bank, esd_distance,
                             esd_prompts, esd_target, given,
                             ledger, noises, run, said, sampled, stream)
from each import each

SMALL = dict(steps=3, batch=3, prompts=2, sampling_steps=4, guidance=2.5, lr=.05, seed=1)


def test_settings():
    check_settings(ESDConfig, dict(variant='x', eta=1., steps=2, lr=1e-3, batch=8, prompts=4, sampling_steps=4,
                                   z_t='frozen', guidance=3., seed=0),
                   [('steps', 0, 1)])
    assert ESDConfig(z_t='trained').z_t == 'trained' and ESDConfig(variant='u').variant == 'u'


@ledger('esd-x/eta', 'esd-u/eta', 'esd-x/batch', 'esd-u/batch', 'esd-x/sampling_steps', 'esd-u/sampling_steps')
@each('kind, variant, changes', [
    ('epsilon', 'x', {}), ('epsilon', 'u', dict(eta=3.)), ('v_prediction', 'x', dict(eta=3., batch=2)),
    ('epsilon', 'x', dict(sampling_steps=5, guidance=1.))])
def test_the_answer_goes_where_the_frozen_models_guidance_turned_round_points(kind, variant, changes):
    pipe, data = given(kind)
    config = ESDConfig(**SMALL | dict(variant=variant) | changes)
    bank = esd_bank(pipe, kind, config)
    assert len(bank) == config.prompts*config.sampling_steps
    trained = set(layers(pipe.unet, dict(x='cross', u='not-cross')[variant]))
    steps, _, out = run(esd, pipe, data, config)
    assert len(steps) == 3 and out['solves'] == []
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        i = torch.randint(len(bank), (config.batch,), generator=stream(1, 'esd', k))
        agree(step, row, lambda net: esd_distance(net, kind, [bank[j] for j in i]))
        assert (step.kind, step.lr, set(step.grads)) == ('Adam', .05, trained)


def test_the_esd_bank():
    pipe, data = given()
    pipe.unet.requires_grad_(True)
    config = ESDConfig(**SMALL)
    assert choose_captions(data, config) == esd_prompts(config)
    found = trajectory_bank(Denoiser(pipe), torch.stack([said(pipe, c) for c in esd_prompts(config)]),
                            said(pipe, '')[None], config)
    for k, row in enumerate(esd_bank(pipe, 'epsilon', config)):
        for what, v in zip(('z_t', 't', 'text', 'target'), row): close(found[what][k], v, what, 1e-3)
    assert not any(v.requires_grad for v in found.values())


def half_way(trained, frozen, pipe, config, gen, kind='epsilon', offset=0):
    "The same rows from samples of `trained`, given up at a random step"
    captions, stride = esd_prompts(config), T//config.sampling_steps
    chosen = [said(pipe, captions[j]) for j in torch.randint(len(captions), (config.batch,), generator=gen)]
    reached = int(torch.randint(config.sampling_steps, (), generator=gen))
    start = torch.randn(config.batch, CHANNELS, SIDE, SIDE, generator=gen)
    later, empty = int(torch.randint(stride, (), generator=gen)), said(pipe, '')
    z, t, *_ = sampled(trained, kind, start, chosen, empty, config.sampling_steps, config.guidance, offset)[0][reached]
    t = [min(t + later, torch.tensor(T - 1))]*config.batch
    with torch.no_grad():
        goals = esd_target(noises(frozen, kind, z, t, chosen), noises(frozen, kind, z, t, [empty]*config.batch),
                           config.eta)
    return list(zip(z, t, chosen, goals))


def last_moment(seed): # is it given up at the first step, at its very end?
    gen = generator(seed)
    torch.randint(2, (3,), generator=gen)
    first = int(torch.randint(4, (), generator=gen)) == 0
    torch.randn(3, CHANNELS, SIDE, SIDE, generator=gen)
    return first and int(torch.randint(5, (), generator=gen)) == 4


def test_samples_of_another_model_are_given_up_within_a_step():
    pipe, other = given(steps_offset=1)[0], given(seed=3, steps_offset=1)[0]
    for p in other.unet, pipe.unet: p.requires_grad_(True)
    config, times = ESDConfig(**SMALL | dict(eta=2.)), []
    text, empty = torch.stack([said(pipe, c) for c in esd_prompts(config)]), said(pipe, '')[None]
    nets = [copy.deepcopy(p.unet).double() for p in (other, pipe)]
    for seed in 0, 1, 2, 3, next(k for k in range(999) if last_moment(k)):
        found = partial_samples(Denoiser(other), Denoiser(pipe), text, empty, config, generator(seed))
        for k, row in enumerate(half_way(*nets, pipe, config, generator(seed), offset=1)):
            for what, v in zip(('z_t', 't', 'text', 'target'), row): close(found[what][k], v, what, 1e-3)
        times += found['t'].tolist()
        assert not any(v.requires_grad for v in found.values())
    # the last time is the schedule's last, offset or not
    assert max(times) == times[-1] == T - 1 and len(set(times)) > 3


@ledger('esd-x/z_t', 'esd-u/z_t')
@each('kind, variant', [('epsilon', 'x'), ('v_prediction', 'u')])
def test_samples_of_the_trained_model_with_the_frozen_models_target(kind, variant):
    pipe, data = given(kind)
    frozen, config = copy.deepcopy(pipe.unet).double(), ESDConfig(**SMALL | dict(z_t='trained', eta=2.,
            variant=variant))
    steps, _, out = run(esd, pipe, data, config)
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        made = half_way(step.module, frozen, pipe, config, stream(1, 'esd', k), kind)
        agree(step, row, lambda net: esd_distance(net, kind, made))
    first, last = (half_way(s.module, frozen, pipe, config, stream(1, 'esd', 2), kind) for s in (steps[0], steps[-1]))
    # another model draws otherwise
    assert float((first[0][0] - last[0][0]).abs().max()) > 1e-3 or int(first[0][1]) >= T - T//4
