"EraseFlow: both densities of a step, paths of the anchor, trajectory balance and its gradients."
import copy
import math

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from torch.distributions import Normal

from resalign.baselines import eraseflow as page
from resalign.baselines.eraseflow import EraseFlowConfig, Paths, balance, draw_path, eraseflow, used_steps
from resalign.core.runs import generator
from resalign.model.losses import Denoiser
from tests.fast.toys import (CHANNELS, SAFE, SIDE, T, UNSAFE, ToyUNet, alpha_bar, answers, check_settings, clipped, close,
                             given, gradients, ledger, run, said, same_grads, stream)
from each import each


class LoraToy(ToyUNet, PeftAdapterMixin):
    "The toy, which takes adapters"


def lora_given(kind='epsilon'):
    pipe, data = given(kind)
    pipe.unet.__class__ = LoraToy
    return pipe, data


def test_settings():
    check_settings(EraseFlowConfig, dict(rank=4, steps=2, lr=1e-3, flow_lr=3e-4, log_z=-.1953, log_beta=2.5,
                                         sampling_steps=4, early=2, late=1, guidance=5., max_norm=1., batch=2, seed=0),
                   [('rank', 0, 1), ('steps', 0, 1), ('sampling_steps', 1, 2), ('early', -1, 0), ('late', 0, 1),
                    ('max_norm', 0., 1e-6), ('batch', 0, 1)])


def step_times(config):
    "(t, s) of every step but the last, to the picture"
    stride = T//config.sampling_steps
    return [(k*stride, (k - 1)*stride) for k in reversed(range(1, config.sampling_steps))]


def step_mean(net, kind, z, t, s, text, empty, config):
    "The mean of p_θ(z_s | z_t, c), and σ"
    yes, no = (answers(net, z, [torch.tensor(t)]*len(z), rows) for rows in (text, [empty]*len(z)))
    out, a, b = no + config.guidance*(yes - no), alpha_bar(t), alpha_bar(s)
    if kind == 'epsilon': noise, clean = out, (z - math.sqrt(1 - a)*out)/math.sqrt(a)
    else: noise, clean = math.sqrt(a)*out + math.sqrt(1 - a)*z, math.sqrt(a)*z - math.sqrt(1 - a)*out
    sigma = math.sqrt((1 - b)/(1 - a)*(1 - a/b))
    return math.sqrt(b)*clean + math.sqrt(1 - b - sigma**2)*noise, sigma


def drawn(net, kind, text, empty, config, gen):
    "A path for each text, from noise to the last time"
    z = [torch.randn(len(text), CHANNELS, SIDE, SIDE, generator=gen).double()]
    for t, s in step_times(config):
        noise = torch.randn(z[-1].shape, generator=gen).double()
        with torch.no_grad(): mean, sigma = step_mean(net, kind, z[-1], t, s, text, empty, config)
        z.append(mean + sigma*noise)
    return z


def ratio(net, kind, z, k, text, empty, config):
    "log p − log q of step k, the mean over a latent's numbers"
    t, s = step_times(config)[k]
    mean, sigma = step_mean(net, kind, z[k], t, s, text, empty, config)
    left = alpha_bar(t)/alpha_bar(s)
    forwards = Normal(mean, sigma).log_prob(z[k + 1])
    backwards = Normal(math.sqrt(left)*z[k + 1], math.sqrt(1 - left)).log_prob(z[k])
    return (forwards - backwards).flatten(1).mean(1)


@each('kind', ['epsilon', 'v_prediction'])
def test_paths_and_densities_of_their_steps(kind):
    pipe, _ = given(kind)
    config = EraseFlowConfig(sampling_steps=5, guidance=1.5)
    paths, net = Paths(Denoiser(pipe), config), copy.deepcopy(pipe.unet).double()
    assert [(int(t), int(s)) for t, s in paths.times] == step_times(config) and len(paths.times) == 4
    text, empty = torch.stack([said(pipe, c) for c in SAFE[:2]]), said(pipe, '')
    found = draw_path(paths, text, empty[None], generator(3))
    wanted = drawn(net, kind, list(text), empty, config, generator(3))
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)): close(a, b, f'z {k}', 1e-3)
    other = torch.stack([said(pipe, c) for c in UNSAFE[:2]])
    for k in range(4):
        got = balance(paths, found, k, other, empty[None])
        close(got, ratio(net, kind, [z.double() for z in found], k, list(other), empty, config), f'step {k}', 1e-3)


@ledger('eraseflow/early')
def test_some_early_steps_and_all_late_ones_are_used():
    for early, late, many in (3, 2, 9), (20, 2, 9), (0, 4, 9), (3, 20, 9):
        found = used_steps(EraseFlowConfig(early=early, late=late), many, generator(1))
        first = max(many - late, 0)
        assert found == torch.randperm(first, generator=generator(1))[:early].tolist() + list(range(first, many))
        assert len(set(found)) == len(found) == min(early, first) + min(late, many)


@ledger('eraseflow/batch', 'eraseflow/sampling_steps')
@each('kind, changes', [('epsilon', {}), ('v_prediction', dict(batch=3, log_beta=-1., max_norm=.01)),
                        ('epsilon', dict(early=0, sampling_steps=4, late=2, guidance=1.))])
def test_the_anchors_paths_are_balanced_under_the_concepts_caption(kind, changes, monkeypatch):
    pipe, data = lora_given(kind)
    config = EraseFlowConfig(**dict(steps=3, lr=.05, flow_lr=.1, log_z=.5, rank=2, sampling_steps=5, early=2, late=1,
                                    guidance=1.5, batch=2, max_norm=1., seed=4) | changes)
    before = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    saved = []
    monkeypatch.setattr(page, 'save_lora', lambda pipe, folder, name: saved.append((folder, name)))
    steps, _, out = run(lambda *args: eraseflow(*args, save_adapter='there'), pipe, data, config)
    assert len(steps) == 3 and out['solves'] == out['skipped'] == [] and saved == [('there', 'eraseflow')]
    empty = said(pipe, '')
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        net, gen = step.module, stream(4, 'eraseflow', k)
        names = [n for n in step.grads if isinstance(n, str)]
        last, = [n for n in step.grads if not isinstance(n, str)]
        assert all('lora_' in n for n in names) and len(names) == 2*8
        i = torch.randint(4, (config.batch,), generator=gen).tolist()
        z = drawn(net, kind, [said(pipe, SAFE[j]) for j in i], empty, config, gen)
        first = config.sampling_steps - 1 - config.late
        used = torch.randperm(first, generator=gen)[:config.early].tolist() + list(range(first, first + config.late))
        for n, p in net.named_parameters(): p.requires_grad_(n in names)
        total = sum(ratio(net, kind, z, j, [said(pipe, UNSAFE[m]) for m in i], empty, config) for j in used)
        off = step.values[last].double() + total - config.log_beta
        close(row['loss'], off.square().mean().item(), 'loss', 1e-3)
        same_grads({n: step.grads[n] for n in names},
                   clipped(gradients(off.square().mean(), net, names), config.max_norm))
        slope = float(2*off.mean())
        close(step.grads[last], math.copysign(min(abs(slope), config.max_norm), slope), 'log Z', 1e-3)
        assert (step.kind, step.lr, step.decay) == ('AdamW', .05, .01)
        assert [g['lr'] for g in step.optimizer.param_groups] == [.05, .1]
    after = dict(pipe.unet.named_parameters())
    assert set(after) == set(before)   # merged
    changed = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if '.attn' in n and n.endswith('weight')}


def test_captions_without_the_words_are_left_out():
    pipe, data = lora_given()
    data.unsafe_captions[0] = 'a red car'
    with pytest.warns(UserWarning, match='eraseflow: 1 of 4'): out = eraseflow(pipe, data)
    assert out['skipped'] == [dict(captions=1, of=4)]
