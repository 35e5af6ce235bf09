"SalUn: both terms, the mask, masked gradients."
import copy

import pytest
import torch

from resalign.baselines.parts import layers, part_of
from resalign.baselines.salun import SalUnConfig, largest, saliency, salun
from resalign.model.losses import Denoiser
from tests.fast.toys import (SAFE, T, check_settings, close, denoising, draw_sample, given, gradients, ledger,
                             noises, noisy, run,
                             said, same_grads, square, stream)
from each import each


def test_settings():
    check_settings(SalUnConfig, dict(params='all', share=.5, saliency_batches=2, saliency_guidance=0., benign_weight=.1, steps=2, lr=1e-3,
                                     batch=8, seed=0),
                   [('share', 0., 1e-6), ('share', 1.001, 1.), ('saliency_batches', 0, 1), ('saliency_guidance', -1e-9, 0.),
                    ('benign_weight', -1e-9, 0.), ('steps', 0, 1)])


def masks(unet, kind, data, names, config, empty):
    "The share of weights with the largest sum of gradients, sorted one by one"
    net = copy.deepcopy(unet).double().requires_grad_(True)
    total = {n: torch.zeros(net.get_parameter(n).shape).double() for n in names}
    for k in range(config.saliency_batches):
        s = draw_sample(data.unsafe, config.batch, stream(config.seed, 'saliency', k), T)
        loss, w = denoising(net, kind, s), config.saliency_guidance
        if w:
            yes, no = (noises(net, kind, noisy(s), s.t, text) for text in (s.text, [empty]*len(s.t)))
            loss = square((1 + w)*yes - w*no - s.noise.double())
        for n, g in gradients(loss, net, names).items(): total[n] += g
    ranked = sorted(((abs(float(v)), n, i) for n, g in total.items() for i, v in enumerate(g.flatten())), reverse=True)
    out = {n: torch.zeros(g.shape, dtype=torch.bool) for n, g in total.items()}
    for _, n, i in ranked[:round(config.share*len(ranked))]: out[n].view(-1)[i] = True
    return out


@ledger('salun/share', 'salun/saliency_batches', 'salun/saliency_guidance')
@each('kind, share, batches, guidance', [
    ('epsilon', .5, 1, 0.), ('v_prediction', .2, 3, 0.), ('epsilon', 1., 1, 0.), ('epsilon', .3, 2, 7.5),
    ('v_prediction', .3, 1, 2.)])
def test_the_mask_is_the_share_of_weights_with_the_largest_summed_gradient(kind, share, batches, guidance):
    pipe, data = given(kind)
    config = SalUnConfig(share=share, saliency_batches=batches, saliency_guidance=guidance, batch=3, seed=4)
    named, empty = layers(pipe.unet, 'cross'), said(pipe, '')
    unheard = torch.nn.Parameter(torch.zeros(1)) # a weight that the loss doesn't know
    params = [*named.values(), unheard]
    *found, last = largest(saliency(Denoiser(pipe), data.unsafe, params, empty[None], config), share*.98)
    n = sum(p.numel() for p in named.values())
    kept = round(share*.98*(n + 1))
    wanted = masks(pipe.unet, kind, data, list(named), SalUnConfig(**dict(config) | dict(share=kept/n)), empty)
    for m, (name, w) in zip(found, wanted.items()): assert m.dtype == torch.bool and torch.equal(m, w), name
    assert sum(int(m.sum()) for m in found) == kept and not last.any()


def formula(net, kind, s, benign, safe, weight):
    wanted = noises(net, kind, noisy(s), s.t, safe).detach()
    return square(noises(net, kind, noisy(s), s.t, s.text) - wanted) + weight*denoising(net, kind, benign)


@ledger('salun/params')
@each('kind, params, weight',
                         [('epsilon', 'all', .1), ('v_prediction', 'cross', 1.), ('epsilon', 'cross', 0.)])
def test_the_concept_is_relabelled_and_only_masked_weights_get_a_gradient(kind, params, weight):
    pipe, data = given(kind)
    names = list(layers(pipe.unet, params))
    config = SalUnConfig(params=params, benign_weight=weight, share=.4, saliency_batches=2, steps=3, lr=.05, batch=3,
                         seed=4)
    mask = masks(pipe.unet, kind, data, names, config, said(pipe, ''))
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


def test_pictures_whose_captions_lack_the_words_are_left_out():
    pipe, data = given()
    data.unsafe_captions[2] = 'green car'
    config = SalUnConfig(share=1., steps=1, batch=3, seed=4)
    with pytest.warns(UserWarning, match='salun: 1 of 4'): steps, _, out = run(salun, pipe, data, config)
    assert out['skipped'] == [dict(captions=1, of=4)]
    kept = part_of(data.unsafe, [0, 1, 3])
    s, benign = draw_sample(kept, 3, stream(4, 'salun', 0), T), draw_sample(data.retain, 3, stream(4, 'salun benign', 0), T)
    safe = [said(pipe, [SAFE[0], SAFE[1], SAFE[3]][j]) for j in s.index]
    close(out['log'][0]['loss'], formula(steps[0].module, 'epsilon', s, benign, safe, .1).item())
