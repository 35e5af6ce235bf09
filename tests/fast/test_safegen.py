"SafeGen: both terms, the empty caption, mosaics."
import pytest
import torch

from resalign.baselines.parts import layers
from resalign.baselines.safegen import SafeGenConfig, mosaics, safegen
from tests.fast.toys import (CHANNELS, SIDE, T, agree, check_settings, close, draw_sample, given, ledger, noises,
                             noisy, rows, run,
                             said, square, stream)
from each import each


def test_settings():
    check_settings(SafeGenConfig, dict(mosaic_weight=.1, benign_weight=.9, block=8, steps=2, lr=1e-3, batch=8, seed=0),
                   [('mosaic_weight', -1e-9, 0.), ('benign_weight', -1e-9, 0.), ('block', 1, 2), ('steps', 0, 1)])


def coarse(vae, z, block):
    "One latent's picture, every block of pixels as its mean, encoded again"
    x = vae.decode(z[None].double()/.5).sample[0]
    out = torch.zeros_like(x)
    for c in range(3):
        for i in range(0, 8, block):
            for j in range(0, 8, block): out[c, i:i+block, j:j+block] = x[c, i:i+block, j:j+block].mean()
    return vae.encode(out[None]).latent_dist.mean[0]*.5


@ledger('safegen/block')
@each('block', [2, 4, 8])
def test_mosaics_are_means_of_blocks(block):
    pipe, data = given()
    found = mosaics(pipe.vae, data.retain.mean, block)
    for k, z in enumerate(data.retain.mean): close(found[k], coarse(pipe.vae, z, block))
    assert not mosaics(pipe.vae, data.retain.mean.requires_grad_(True), block).requires_grad


def test_mosaics_are_made_32_at_a_time():
    pipe, _ = given()
    z = torch.randn(33, CHANNELS, SIDE, SIDE)
    found = mosaics(pipe.vae, z, 4)
    assert pipe.vae.decoded == [32, 1]
    close(found[32], coarse(pipe.vae, z[32], 4))


def formula(net, kind, pipe, unsafe, benign, block, w_m, w_p, original):
    empty = said(pipe, '')
    details = [z.double() - coarse(pipe.vae, original[i], block) + e.double() for z, e, _, _, i in rows(unsafe)]
    far = noises(net, kind, noisy(unsafe), unsafe.t, [empty]*len(unsafe.t)) - torch.stack(details)
    kept = noises(net, kind, noisy(benign), benign.t, [empty]*len(benign.t)) - benign.noise.double()
    return w_m*square(far) + w_p*square(kept)


@ledger('safegen/mosaic_weight', 'safegen/batch')
@each('kind, w_m, w_p, block, batch', [
    ('epsilon', .1, .9, 4, 3), ('v_prediction', .5, .5, 2, 3), ('epsilon', 1., 0., 8, 2), ('epsilon', 0., 1., 8, 2)])
def test_details_are_noise_and_no_caption_is_read(kind, w_m, w_p, block, batch):
    pipe, data = given(kind)
    config = SafeGenConfig(mosaic_weight=w_m, benign_weight=w_p, block=block, steps=3, lr=.05, batch=batch, seed=3)
    trained = set(layers(pipe.unet, 'self'))
    steps, _, out = run(safegen, pipe, data, config)
    assert len(steps) == 3 and out['solves'] == []
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        unsafe, benign = (draw_sample(b, batch, stream(3, 'safegen', what, k), T) for what,
                          b in (('unsafe', data.unsafe), ('benign', data.retain)))
        agree(step, row, lambda net: formula(net, kind, pipe, unsafe, benign, block, w_m, w_p, data.unsafe.mean))
        assert (step.kind, step.lr, step.decay, set(step.grads)) == ('AdamW', .05, .01, trained)
