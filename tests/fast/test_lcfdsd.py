"LCFDSD: contrast, running centres, the clean term, as described and as released, NG and LT."
import math

import pytest
import torch

from resalign.baselines.lcfdsd import LCFDSDConfig, contrastive_loss, lcfdsd, predict_x0, transform
from resalign.core.runs import generator
from resalign.model.losses import Denoiser
from tests.fast.toys import (T, agree, alpha_bar, check_settings, close, draw_sample, given, ledger, noised, noises,
                             rows, run, square,
                             stream)
from each import each


def test_settings():
    check_settings(LCFDSDConfig, dict(variant='ng', contrast=.005, distance=1., contrast_gradient=True, momentum=.9,
                                      steps=2, lr=1e-3, batch=8, seed=0),
                   [('contrast', -1e-9, 0.), ('momentum', 1., .999), ('momentum', -1e-9, 0.), ('steps', 0, 1)])
    assert LCFDSDConfig(variant='lt').variant == 'lt'


def guess(net, kind, s, shift):
    "x̂₀, ε and the noise that was added, of each row"
    z_t = [noised(z, e + shift, t) for z, e, t, *_ in rows(s)]
    said = noises(net, kind, z_t, s.t, s.text)
    x = [(z - math.sqrt(1 - alpha_bar(t))*e)/math.sqrt(alpha_bar(t)) for z, e, t in zip(z_t, said, s.t)]
    return torch.stack(x), said, s.noise.double() + shift


@each('kind', ['epsilon', 'v_prediction'])
@each('shift', [1., -1., 0.])
def test_guesses_of_shifted_noise(kind, shift):
    pipe, data = given(kind)
    s = draw_sample(data.unsafe, 3, generator(1), T)
    for found, expected in zip(predict_x0(Denoiser(pipe), s, shift), guess(pipe.unet.double(), kind, s, shift)):
        close(found, expected)


def test_guesses_and_repulsion():
    # lt moves guesses and ng leaves them
    x = torch.randn(3, 4)
    assert torch.equal(transform(x, True, 'lt'), -x - 100) and torch.equal(transform(x, False, 'lt'), x + 100)
    assert transform(x, True, 'ng') is x and transform(x, False, 'ng') is x

    # the other centre repels only beyond the distance
    x, own, other = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([0., 1.]), torch.tensor([2., 6.])
    near, far = (1 + 1 + 9 + 9)/4, (1 + 16 + 1 + 4)/4
    for l in 0., 1., 5.4: assert contrastive_loss(x, own, other, l).item() == pytest.approx(near - (far - l))
    for l in 5.5, 5.6, 100.: assert contrastive_loss(x, own, other, l).item() == pytest.approx(near)


@ledger('lcfdsd-ng/contrast_gradient', 'lcfdsd-lt/contrast_gradient', 'lcfdsd-ng/contrast', 'lcfdsd-lt/contrast',
        'lcfdsd-ng/momentum',
        'lcfdsd-lt/momentum', 'lcfdsd-ng/steps', 'lcfdsd-lt/steps')
@each('kind, variant, changes', [
    ('epsilon', 'ng', {}), ('epsilon', 'lt', {}), ('v_prediction', 'ng', dict(momentum=.5, contrast=.8, steps=4)),
    ('epsilon', 'ng', dict(distance=1e6)), ('epsilon', 'ng', dict(contrast_gradient=False)),
    ('epsilon', 'lt', dict(contrast_gradient=False, momentum=0.))])
def test_own_centre_draws_the_other_repels_and_clean_pictures_are_learned(kind, variant, changes):
    pipe, data = given(kind)
    config = LCFDSDConfig(**dict(variant=variant, contrast=.3 if variant == 'ng' else 1e-3, distance=.5, steps=3,
                                 lr=.02, batch=3, seed=6) | changes)
    moved = (lambda x, clean: x) if variant == 'ng' else (lambda x, clean: -x - 100 if clean else x + 100)
    centre = dict(clean=moved(data.retain.mean.double().mean(0), True),
                  unsafe=moved(data.unsafe.mean.double().mean(0), False))
    steps, _, out = run(lcfdsd, pipe, data, config)
    assert len(steps) == config.steps and out['solves'] == []

    def formula(net, k):
        total = 0.
        for own, other, bank, shift in ('clean', 'unsafe', data.retain, 1.), ('unsafe', 'clean', data.unsafe, -1.):
            x, said, noise = guess(net, kind, draw_sample(bank, 3, stream(6, 'lcfdsd', own, k), T),
                                   shift if variant == 'ng' else 0.)
            x = moved(x, own == 'clean')
            centre[own] = config.momentum*centre[own] + (1 - config.momentum)*x.detach().mean(0)
            if not config.contrast_gradient: x = x.detach()
            near, far = square(x - centre[own]), square(x - centre[other])
            total = total + config.contrast*(near - (far - config.distance if far > config.distance else 0.))
            if own == 'clean': total = total + square(said - noise)
        return total

    for k, (step, row) in enumerate(zip(steps, out['log'])):
        agree(step, row, lambda net: formula(net, k))
        assert (step.kind, step.decay, len(step.grads)) == ('AdamW', .01, len(list(pipe.unet.parameters())))
        assert step.lr == pytest.approx(.02*(1 + math.cos(math.pi*k/config.steps))/2)
