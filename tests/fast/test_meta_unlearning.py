"Meta-Unlearning: the unlearning losses, five weighted gradients at two points, the teacher, the margin."
import copy
import math

import pytest
import torch

from resalign.baselines.meta_unlearning import (MetaUnlearningConfig, ReleasedConfig, meta_unlearning, related_bank,
                                                unlearning_loss)
from resalign.core.runs import generator
from resalign.model.data import Sample
from resalign.model.losses import Denoiser
from adam import adam
from tests.fast.toys import (T, check_settings, clipped, close, denoising, draw_sample, drawn_pictures, given,
                             gradients,
                             ledger, noises, noisy, run, said, same_grads, square, stream)
from each import each


def test_settings():
    check_settings(MetaUnlearningConfig, dict(
        base='esd', eta=1., teacher_decay=.99, gamma_11=.1, gamma_12=.1, gamma_21=.05, gamma_22=.05, gamma_23=.05,
        inner_steps=None,
        inner_lr=1e-3, margin=1., terms='batch', times=(), pictures=8, sampling_steps=4, guidance=5., steps=2, lr=1e-3, weight_decay=1e-4,
        batch=8, seed=0),
        [('teacher_decay', -1e-9, 0.), ('teacher_decay', 1., .999), ('inner_steps', 0, 1), ('margin', 0., 1e-6),
         ('weight_decay', -1e-9, 0.), ('steps', 0, 1),
         *((f'gamma_{k}', -1e-9, 0.) for k in (11, 12, 21, 22, 23))])
    released = dict(eta=3., gamma_11=.1, gamma_12=.01, gamma_21=.01, gamma_22=1., gamma_23=1., margin=None,
                    terms='sum', times=(1, 2, 5, 10))
    assert ReleasedConfig().model_dump() == MetaUnlearningConfig().model_dump() | released
    assert MetaUnlearningConfig(**released).model_dump() == ReleasedConfig().model_dump()


def unlearned(net, teacher, s, empty, config, kind):
    z_t = noisy(s)
    with torch.no_grad():
        yes, no = (noises(teacher, kind, z_t, s.t, text) for text in (s.text, [empty]*len(s.t)))
        target = no - config.eta*(yes - no) if config.base == 'esd' else no
    return square(noises(net, kind, z_t, s.t, s.text) - target)


@each('kind', ['epsilon', 'v_prediction'])
@each('base', ['esd', 'sdd'])
def test_the_unlearning_loss(kind, base):
    pipe, data = given(kind)
    teacher, config = given(kind, seed=3)[0], MetaUnlearningConfig(base=base, eta=2.)
    for p in pipe, teacher: p.unet.requires_grad_(True)
    s = draw_sample(data.unsafe, 3, generator(1), T)
    value = unlearning_loss(Denoiser(pipe), Denoiser(teacher), s, said(pipe, '')[None], config)
    nets = [copy.deepcopy(p.unet).double() for p in (pipe, teacher)]
    expected, names = unlearned(*nets, s, said(pipe, ''), config, kind), [n for n, _ in pipe.unet.named_parameters()]
    close(value.item(), expected.item())
    same_grads(gradients(value, pipe.unet, names), gradients(expected, nets[0], names))
    assert not any(g.any() for g in gradients(unlearning_loss(Denoiser(pipe), Denoiser(teacher), s,
                                                              said(pipe, '')[None], config), teacher.unet,
                                                              names).values())


def weakened(net, kind, data, config, k):
    "θ′: AdamW, written out, on harmful pictures"
    net, names = copy.deepcopy(net), [n for n, _ in net.named_parameters()]
    m, v = ({n: torch.zeros_like(net.get_parameter(n)) for n in names} for _ in range(2))
    for i in range(config.inner_steps or math.ceil(len(data.unsafe)/config.batch)):
        s = draw_sample(data.unsafe, config.batch, stream(config.seed, 'meta', k, 'finetune', i), T)
        for n, g in gradients(denoising(net, kind, s), net, names).items():
            m[n], v[n], direction = adam(m[n], v[n], g, i + 1)
            with torch.no_grad():
                p = net.get_parameter(n)
                p.mul_(1 - config.inner_lr*.01)
                p.sub_(config.inner_lr*direction)
    return net


GAMMAS = dict(gamma_11=.7, gamma_12=.5, gamma_21=.4, gamma_22=.3, gamma_23=.2)
OFF = dict.fromkeys(GAMMAS, 0.)


@ledger('meta-unlearning-esd/margin', 'meta-unlearning-sdd/margin', 'meta-unlearning-esd/inner_steps',
        'meta-unlearning-sdd/inner_steps',
        'meta-unlearning-esd/pictures', 'meta-unlearning-sdd/pictures', 'meta-unlearning-sdd/teacher_decay')
@each('kind, base, changes', [
    ('epsilon', 'esd', {}), ('v_prediction', 'sdd', dict(inner_steps=3)), ('epsilon', 'sdd', dict(teacher_decay=0.)),
    ('epsilon', 'sdd', dict(teacher_decay=.6, pictures=4)),
    ('epsilon', 'esd', dict(margin=.9, inner_steps=1)), ('epsilon', 'esd', OFF | dict(gamma_11=1.)),
    ('epsilon', 'sdd', OFF | dict(gamma_12=1.)),
    ('epsilon', 'esd', OFF | dict(gamma_21=1.)), ('epsilon', 'sdd', OFF | dict(gamma_22=1.)),
    ('epsilon', 'esd', OFF | dict(gamma_23=1.))])
def test_gradients_at_both_points_are_weighted_and_those_ahead_subtracted(kind, base, changes):
    pipe, data = given(kind)
    config = MetaUnlearningConfig(**dict(base=base, eta=1.5, margin=50., inner_lr=.02, pictures=5, sampling_steps=3,
                                         guidance=2., steps=3, lr=.05,
                                         weight_decay=.003, batch=3, seed=7) | GAMMAS | changes)
    anchors, _ = drawn_pictures(pipe, kind, 7, ['meta anchors'], config)
    banks = dict(hrm=data.unsafe, irt=data.retain, tgt=anchors)
    close(related_bank(pipe, data, config).mean, anchors.mean, rtol=1e-3)
    teacher, empty = copy.deepcopy(pipe.unet).double(), said(pipe, '')
    steps, inner, out = run(meta_unlearning, pipe, data, config)
    many = config.inner_steps or 2 # an epoch of four pictures, three at once
    assert len(steps) == 3 and len(inner) == 3*many and {(s.kind, s.lr, s.decay)
                                                         for s in inner} == {('AdamW', .02, .01)}
    held, lengths = 0, []
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        net = step.module.requires_grad_(True)
        names = [n for n, _ in net.named_parameters()]
        if base == 'sdd':
            with torch.no_grad():
                for p, q in zip(teacher.parameters(), net.parameters()):
                    p.copy_(config.teacher_decay*p + (1 - config.teacher_decay)*q)
        loss = lambda net, what: denoising(net, kind, draw_sample(banks[what], 3, stream(7, 'meta', what, k), T))
        here = unlearned(net, teacher, draw_sample(data.unsafe, 3, stream(7, 'meta', 'hrm', k), T), empty, config,
                         kind)
        here = here + config.gamma_11*loss(net, 'irt') + config.gamma_12*loss(net, 'tgt')
        close(row['loss'], here.item(), 'loss')
        ahead, there = weakened(net, kind, data, config, k), 0.
        for weight, what in (config.gamma_21, 'hrm'), (config.gamma_22, 'tgt'), (config.gamma_23, 'irt'):
            value = loss(ahead, what)
            held += bool(value > config.margin)
            there = there + weight*(value if value <= config.margin else value.detach()*0 + config.margin)
        a = gradients(here, net, names)
        b = gradients(there, ahead, names) if there.requires_grad else dict.fromkeys(names, 0.)
        same_grads(step.grads, clipped({n: a[n] - b[n] for n in names}, 1.))
        assert (step.kind, step.lr, step.decay) == ('AdamW', .05, .003)
        lengths.append(row['grad_norm'])
    assert 0 < held < 9 if config.margin < 1 else not held
    if config.gamma_12 == 1: assert min(lengths) > 1 # longer ones are clipped


def everything(bank, config, kind, where, k):
    "Every picture of a bank at every time, in order: [(z, ε, t, caption), ...] a batch"
    gen, n = stream(config.seed, 'meta', where, kind, k), len(bank)
    for first in range(0, n, config.batch):
        i = list(range(first, min(n, first + config.batch)))
        for t in config.times or (None,):
            z = bank.mean[i] + bank.std[i]*torch.randn(bank.mean[i].shape, generator=gen)
            noise = torch.randn(z.shape, generator=gen)
            at = torch.randint(T, (len(i),), generator=gen) if t is None else torch.tensor([t]*len(i))
            yield Sample(z, noise, at, bank.text[i], torch.tensor(i))


RELEASED = [f'meta-unlearning-{kind}/{switch}' for kind in ('esd', 'sdd') for switch in ('terms', 'times', 'gamma_22')]


@ledger(*RELEASED, 'meta-unlearning-esd/eta', 'meta-unlearning-released/margin', 'meta-unlearning-released/inner_steps')
@each('kind, changes', [('epsilon', {}), ('v_prediction', dict(times=(), margin=.9)), ('epsilon', dict(base='sdd'))])
def test_as_released_gradients_are_summed_over_all_batches_and_times(kind, changes):
    pipe, data = given(kind)
    config = ReleasedConfig(**dict(inner_lr=.02, pictures=5, sampling_steps=3, guidance=2., steps=2, lr=.05, batch=3,
                                   seed=7, times=(1, 4)) | changes)
    anchors, _ = drawn_pictures(pipe, kind, 7, ['meta anchors'], config)
    banks = dict(hrm=data.unsafe, irt=data.retain, tgt=anchors)
    teacher, empty = copy.deepcopy(pipe.unet).double(), said(pipe, '')
    steps, _, out = run(meta_unlearning, pipe, data, config)
    held = 0
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        net = step.module.requires_grad_(True)
        names = [n for n, _ in net.named_parameters()]
        if config.base == 'sdd':
            for p, q in zip(teacher.parameters(), net.parameters()): p.data = .99*p.data + .01*q.data
        here = unlearned(net, teacher, draw_sample(data.unsafe, 3, stream(7, 'meta', 'hrm', k), T), empty, config, kind)
        close(row['loss'], here.item(), 'loss')
        total = gradients(here, net, names)
        ahead = weakened(net, kind, data, config, k)
        for where, at, sign, weights in (('here', net, 1, dict(irt=.1, tgt=.01)),
                                         ('ahead', ahead, -1, dict(hrm=.01, tgt=1., irt=1.))):
            for what, weight in weights.items():
                for s in everything(banks[what], config, what, where, k):
                    value = denoising(at, kind, s)
                    if config.margin and value > config.margin: held += 1
                    else: total = {n: total[n] + sign*weight*g for n, g in gradients(value, at, names).items()}
        same_grads(step.grads, clipped(total, 1.))
    assert bool(held) == bool(config.margin)
