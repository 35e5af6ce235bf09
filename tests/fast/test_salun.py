"SalUn: both terms, the mask, masked gradients."
import copy

import pytest
import torch

from resalign.baselines.parts import layers
from resalign.baselines.salun import SalUnConfig, saliency_masks, salun
from resalign.model.losses import Denoiser
from tests.fast.toys import (SAFE, T, answers, check_settings, close, denoising, draw_sample, given, gradients, ledger,
                             noisy, run,
                             said, same_grads, square, stream)
from each import each


def test_settings():
    check_settings(SalUnConfig, dict(params='all', share=.5, saliency_batches=2, benign_weight=.1, steps=2, lr=1e-3,
                                     batch=8, seed=0),
                   [('share', 0., 1e-6), ('share', 1.001, 1.), ('saliency_batches', 0, 1),
                    ('benign_weight', -1e-9, 0.), ('steps', 0, 1)])


def masks(unet, kind, data, names, config):
    "The share of weights with the largest sum of gradients, sorted one by one"
    net = copy.deepcopy(unet).double().requires_grad_(True)
    total = {n: torch.zeros(net.get_parameter(n).shape).double() for n in names}
    for k in range(config.saliency_batches):
        s = draw_sample(data.unsafe, config.batch, stream(config.seed, 'saliency', k), T)
        for n, g in gradients(denoising(net, kind, s), net, names).items(): total[n] += g
    ranked = sorted(((abs(float(v)), n, i) for n, g in total.items() for i, v in enumerate(g.flatten())), reverse=True)
    out = {n: torch.zeros(g.shape, dtype=torch.bool) for n, g in total.items()}
    for _, n, i in ranked[:round(config.share*len(ranked))]: out[n].view(-1)[i] = True
    return out


@ledger('salun/share', 'salun/saliency_batches')
@each('kind, share, batches', [('epsilon', .5, 1), ('v_prediction', .2, 3), ('epsilon', 1., 1)])
def test_the_mask_is_the_share_of_weights_with_the_largest_summed_gradient(kind, share, batches):
    pipe, data = given(kind)
    config, named = SalUnConfig(share=share, saliency_batches=batches, batch=3, seed=4), layers(pipe.unet, 'cross')
    unheard = torch.nn.Parameter(torch.zeros(1)) # a weight that the loss doesn't know
    *found, last = saliency_masks(Denoiser(pipe), data.unsafe, [*named.values(), unheard],
                            SalUnConfig(**dict(config) | dict(share=share*.98)))
    n = sum(p.numel() for p in named.values())
    kept = round(share*.98*(n + 1))
    wanted = masks(pipe.unet, kind, data, list(named), SalUnConfig(**dict(config) | dict(share=kept/n)))
    for m, (name, w) in zip(found, wanted.items()): assert m.dtype == torch.bool and torch.equal(m, w), name
    assert sum(int(m.sum()) for m in found) == kept and not last.any()


def formula(net, kind, s, benign, safe, weight):
    wanted = answers(net, noisy(s), s.t, safe).detach()
    return square(answers(net, noisy(s), s.t, s.text) - wanted) + weight*denoising(net, kind, benign)


@ledger('salun/params')
@each('kind, params, weight',
                         [('epsilon', 'all', .1), ('v_prediction', 'cross', 1.), ('epsilon', 'cross', 0.)])
def test_the_concept_is_relabelled_and_only_masked_weights_get_a_gradient(kind, params, weight):
    pipe, data = given(kind)
    names = list(layers(pipe.unet, params))
    config = SalUnConfig(params=params, benign_weight=weight, share=.4, saliency_batches=2, steps=3, lr=.05, batch=3,
                         seed=4)
    mask = masks(pipe.unet, kind, data, names, config)
    steps, _, out = run(salun, pipe, data, config)
    assert len(steps) == 3 and out['solves'] == []
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        s = draw_sample(data.unsafe, 3, stream(4, 'salun', k), T)
        benign = draw_sample(data.retain, 3, stream(4, 'salun benign', k), T)
        value = formula(step.module.requires_grad_(True), kind, s, benign, [said(pipe, SAFE[j]) for j in s.index],
                        weight)
        close(row['loss'], value.item(), 'loss')
        same_grads(step.grads, {n: g*mask[n] for n, g in gradients(value, step.module, names).items()})
        assert (step.kind, step.lr) == ('Adam', .05)
    for n, p in pipe.unet.named_parameters():
        if n in mask: assert torch.equal(p[~mask[n]], steps[0].values[n][~mask[n]]), n
