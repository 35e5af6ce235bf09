"PGU: inputs' covariances, their main directions, projected and clipped ascent."
import copy

import numpy as np
import pytest
import torch

from resalign.baselines.pgu import PGUConfig, covariances, main_directions, pgu
from resalign.core.runs import generator
from resalign.model.losses import Denoiser
from tests.fast.toys import (T, answers, check_settings, clipped, close, denoising, draw_sample, given, gradients,
                             ledger, mean, noisy,
                             run, same_grads, stream)
from each import each


def test_settings():
    check_settings(PGUConfig, dict(params='attention', energy=.95, samples=8, margin=.1, unsafe_bank=16, steps=2,
                                   lr=1e-3, max_norm=1., batch=8, seed=0),
                   [('energy', 0., 1e-6), ('energy', 1., .999), ('samples', 0, 1), ('margin', 0., 1e-6),
                    ('steps', 0, 1), ('max_norm', 0., 1e-6)])


@each('energy, many', [(.3, 1), (.49, 1), (.51, 2), (.74, 2), (.76, 3), (.93, 3), (.999, 4)])
def test_as_few_directions_as_carry_the_energy(energy, many):
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    sizes = np.array([1., 0., 8., 4., 3.])  # of 16
    found = main_directions(torch.tensor(turn*sizes @ turn.T), energy).numpy()
    assert found.shape == (5, many)
    wanted = turn[:, np.argsort(-sizes)[:many]]
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-12)


def test_edges_of_energy():
    # just enough energy is enough
    assert main_directions(torch.diag(torch.tensor([4., 8., 4.])), .5).shape == (3, 1)

    # rounding below zero carries no energy
    assert main_directions(torch.diag(torch.tensor([-5., .6, .4])), .55).shape == (3, 1)
    assert main_directions(torch.diag(torch.tensor([-5., .6, .4])), .65).shape == (3, 2)


def inputs(unet, s, names):
    "Σ xxᵀ of each layer's inputs, one by one"
    net, total = copy.deepcopy(unet).double(), {n: 0. for n in names}
    for n in names:
        def watch(module, args, n=n):
            for x in args[0].flatten(0, -2): total[n] = total[n] + torch.outer(x, x)
        net.get_submodule(n).register_forward_pre_hook(watch)
    with torch.no_grad(): answers(net, noisy(s), s.t, s.text)
    return total


LINEAR = [f'block.attn{k}.{n}' for k in (1, 2) for n in ('to_q', 'to_k', 'to_v', 'to_out.0')]


def test_covariances_of_inputs_and_no_hook_is_left():
    pipe, data = given()
    s, model = draw_sample(data.retain, 4, generator(1), T), Denoiser(pipe)
    found = covariances(model, s, {n: pipe.unet.get_submodule(n) for n in LINEAR})
    for n, C in inputs(pipe.unet, s, LINEAR).items():
        close(found[n], C, n)
        assert found[n].dtype == torch.float64, n
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())
    pipe.unet.requires_grad_(True)
    assert not any(C.requires_grad for C in covariances(model, s,
                                                        {n: pipe.unet.get_submodule(n) for n in LINEAR}).values())
    def fails(*args): raise RuntimeError
    pipe.unet.block.register_forward_hook(fails)
    with pytest.raises(RuntimeError): covariances(model, s, {n: pipe.unet.get_submodule(n) for n in LINEAR})
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


@ledger('pgu/margin', 'pgu/energy')
@each('kind, changes',
                         [('epsilon', {}), ('v_prediction', dict(energy=.9, params='cross')),
                          ('epsilon', dict(margin=.02, lr=.5, max_norm=1e6)),
                                           ('epsilon', dict(max_norm=1e6, params='all'))])
def test_ascent_up_to_the_margin_without_the_benign_directions(kind, changes):
    pipe, data = given(kind)
    config = PGUConfig(**dict(energy=.7, samples=4, margin=10., unsafe_bank=6, steps=3, lr=.05, max_norm=1e-2, batch=5,
                              seed=8) | changes)
    # neither norms nor other matrices
    chosen = LINEAR + ['conv_in', 'time_embedding', 'conv_out']*(config.params == 'all')
    trained = [f'{n}.weight' for n in chosen if config.params != 'cross' or 'attn2' in n]
    C = inputs(pipe.unet, draw_sample(data.retain, 4, stream(8, 'pgu inputs'), T),
               [n.removesuffix('.weight') for n in trained])
    bank, keep = draw_sample(data.unsafe, 6, stream(8, 'unsafe bank'), T), {}
    for n in trained:
        values, vectors = np.linalg.eigh(C[n.removesuffix('.weight')].numpy())
        U, got = np.zeros((len(values), 0)), 0.
        for value, v in sorted(zip(values, vectors.T), key=lambda pair: -pair[0]):
            if got >= config.energy*values.sum(): break
            U, got = np.hstack([U, v[:, None]]), got + value
        keep[n] = torch.tensor(np.eye(len(values)) - U @ U.T)
    before = [denoising(copy.deepcopy(pipe.unet).double(), kind, bank[k:k + 1]).item() for k in range(6)]
    steps, _, out = run(pgu, pipe, data, config)
    assert len(steps) == 3 and out['solves'] == []
    held = 0
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        net, terms = step.module.requires_grad_(True), []
        for i in torch.randint(6, (5,), generator=stream(8, 'pgu', k)).tolist():
            rise = denoising(net, kind, bank[i:i + 1]) - before[i]
            held += bool(rise > config.margin)
            terms.append(rise if rise <= config.margin else rise*0 + config.margin)
        value = -mean(terms)
        assert abs(row['loss'] - value.item()) < 1e-5
        same_grads(step.grads, clipped({n: g @ keep[n] for n, g in gradients(value, net, trained).items()},
                                       config.max_norm))
        assert (step.kind, step.lr, set(step.grads)) == ('SGD', config.lr, set(trained))
    assert held if config.margin < 1 else not held
