"The Hessian of the harmful loss: its sign, and the names of its ends, on a quadratic."
from types import SimpleNamespace

import pytest, torch

from resalign.measure import curvature as C


def test_ends_of_the_spectrum_have_their_names(monkeypatch):
    "Eigenvalues 5, 2, 1, -3 of wᵀAw/2: trace 5, exact from random signs, for A is diagonal"
    unet = torch.nn.Linear(4, 1, bias=False).double()
    values = torch.tensor([5., 2., 1., -3.], dtype=torch.float64)
    monkeypatch.setattr(C, 'harmful_loss', lambda pipe, pairs, unsafe: lambda: (values*unet.weight**2).sum()/2)
    found = C.curvature(SimpleNamespace(unet=unet), pairs=1, probes=3, unsafe=None, k=2, tol=1e-9)
    assert [found[name] for name in ('top_1', 'top_2', 'bottom', 'trace')] == pytest.approx([5, 2, -3, 5])
    assert found['trace_error'] == pytest.approx(0) and found['bottom_residual'] < 1e-6


def test_harm_is_less_loss(monkeypatch):
    monkeypatch.setattr(C, 'Denoiser', lambda pipe: SimpleNamespace(loss=lambda sample: torch.tensor(3.), timesteps=9))
    for name in ('encode', 'read_images', 'draw_sample', 'latent_shape'):
        monkeypatch.setattr(C, name, lambda *args: (0, 0))
    assert C.harmful_loss(SimpleNamespace(vae_scale_factor=8), 2, 'unsafe')().item() == -3
