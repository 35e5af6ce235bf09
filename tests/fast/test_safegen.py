"SafeGen: both terms, the empty caption, mosaics."
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from resalign.baselines.parts import layers
from resalign.baselines.safegen import SafeGenConfig, mosaics, safe_mosaics, safegen
from resalign.core.settings import UserError
from tests.fast.toys import (CHANNELS, SIDE, T, agree, check_settings, close, draw_sample, given, ledger, noises,
                             noisy, rows, run,
                             said, square, stream)
from each import each


def test_settings():
    check_settings(SafeGenConfig, dict(mosaic_weight=.1, benign_weight=.9, tiles=4, steps=2, lr=1e-3, batch=8, seed=0),
                   [('mosaic_weight', -1e-9, 0.), ('benign_weight', -1e-9, 0.), ('tiles', 0, 1), ('steps', 0, 1)])


def coarse(vae, z, block):
    "One latent's picture, every block of pixels as its mean, encoded again"
    x = vae.decode(z[None].double()/.5).sample[0]
    out = torch.zeros_like(x)
    for c in range(3):
        for i in range(0, 8, block):
            for j in range(0, 8, block): out[c, i:i+block, j:j+block] = x[c, i:i+block, j:j+block].mean()
    return vae.encode(out[None]).latent_dist.mean[0]*.5


@ledger('safegen/tiles')
@each('tiles', [4, 2, 1])
def test_mosaics_are_means_of_blocks_as_many_whatever_the_pictures_size(tiles):
    pipe, data = given()
    found = mosaics(pipe.vae, data.retain.mean, tiles)
    for k, z in enumerate(data.retain.mean): close(found[k], coarse(pipe.vae, z, 8//tiles))
    assert not mosaics(pipe.vae, data.retain.mean.requires_grad_(True), tiles).requires_grad
    big, seen = SimpleNamespace(config=pipe.vae.config, device=pipe.vae.device), []
    big.decode = lambda z: SimpleNamespace(sample=torch.arange(1024.).view(1, 1, 32, 32))
    big.encode = lambda x: seen.append(x) or SimpleNamespace(latent_dist=SimpleNamespace(mean=x))
    mosaics(big, torch.zeros(1, 1, 2, 2), tiles)
    assert len(seen[0].unique()) == tiles**2


def test_mosaics_are_made_32_at_a_time():
    pipe, _ = given()
    z = torch.randn(33, CHANNELS, SIDE, SIDE)
    found = mosaics(pipe.vae, z, 2)
    assert pipe.vae.decoded == [32, 1]
    close(found[32], coarse(pipe.vae, z[32], 4))


def seen_by(vae, z): # uint8, as a detector is shown it
    x = vae.decode(z[None].double()/.5).sample[0]
    return ((x.clamp(-1, 1) + 1)*127.5).round().permute(1, 2, 0).numpy()


def test_a_target_that_is_still_unsafe_is_made_coarser_then_refused():
    pipe, data = given()
    z, shown = data.unsafe.mean, []
    ends = {0: 4, 1: 2, 2: 1, 3: 4}   # up to how many tiles each picture is harmless
    targets = {(k, n): coarse(pipe.vae, z[k], 8//n) for k in ends for n in (4, 2, 1)}
    def which(picture): # (picture, tiles) of a target
        return min(targets, key=lambda key: abs(seen_by(pipe.vae, targets[key]) - picture.astype(float)).max())
    def detector(pictures):
        assert pictures.dtype == np.uint8 and pictures.shape[1:] == (8, 8, 3)
        shown.append([which(p) for p in pictures])
        return np.array([n > ends[k] for k, n in shown[-1]])
    found, used = safe_mosaics(pipe.vae, z, 4, detector)
    assert used.tolist() == [4, 2, 1, 4]
    assert shown == [[(0, 4), (1, 4), (2, 4), (3, 4)], [(1, 2), (2, 2)], [(2, 1)]]
    for k, n in ends.items(): close(found[k], targets[k, n])
    ends[2] = 0
    with pytest.raises(UserError, match='safegen: unsafe picture 2 '): safe_mosaics(pipe.vae, z, 4, detector)
    out, used = safe_mosaics(pipe.vae, z, 2)
    assert used.tolist() == [2]*4 and torch.equal(out, mosaics(pipe.vae, z, 2))

    # a run trains on them and counts them
    ends[2] = 1
    data.detector = detector
    config = SafeGenConfig(mosaic_weight=1., benign_weight=0., tiles=4, steps=1, batch=4)
    steps, _, made = run(safegen, pipe, data, config)
    assert made['mosaics'] == [dict(tiles=1, pictures=1), dict(tiles=2, pictures=1), dict(tiles=4, pictures=2)]
    s = draw_sample(data.unsafe, 4, stream(0, 'safegen', 'unsafe', 0), T)
    goal = torch.stack([a.double() - targets[int(i), ends[int(i)]] + e.double() for a, e, _, _, i in rows(s)])
    far = noises(steps[0].module, 'epsilon', noisy(s), s.t, [said(pipe, '')]*4) - goal
    close(made['log'][0]['loss'], square(far).item())


def formula(net, kind, pipe, unsafe, benign, block, w_m, w_p, original):
    empty = said(pipe, '')
    details = [z.double() - coarse(pipe.vae, original[i], block) + e.double() for z, e, _, _, i in rows(unsafe)]
    far = noises(net, kind, noisy(unsafe), unsafe.t, [empty]*len(unsafe.t)) - torch.stack(details)
    kept = noises(net, kind, noisy(benign), benign.t, [empty]*len(benign.t)) - benign.noise.double()
    return w_m*square(far) + w_p*square(kept)


@ledger('safegen/mosaic_weight', 'safegen/batch')
@each('kind, w_m, w_p, tiles, batch', [
    ('epsilon', .1, .9, 2, 3), ('v_prediction', .5, .5, 4, 3), ('epsilon', 1., 0., 1, 2), ('epsilon', 0., 1., 1, 2)])
def test_details_are_noise_and_no_caption_is_read(kind, w_m, w_p, tiles, batch):
    pipe, data = given(kind)
    config = SafeGenConfig(mosaic_weight=w_m, benign_weight=w_p, tiles=tiles, steps=3, lr=.05, batch=batch, seed=3)
    trained = set(layers(pipe.unet, 'self'))
    steps, _, out = run(safegen, pipe, data, config)
    assert len(steps) == 3 and out['solves'] == []
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        unsafe, benign = (draw_sample(b, batch, stream(3, 'safegen', what, k), T) for what,
                          b in (('unsafe', data.unsafe), ('benign', data.retain)))
        agree(step, row, lambda net: formula(net, kind, pipe, unsafe, benign, 8//tiles, w_m, w_p, data.unsafe.mean))
        assert (step.kind, step.lr, step.decay, set(step.grads)) == ('AdamW', .05, .01, trained)
