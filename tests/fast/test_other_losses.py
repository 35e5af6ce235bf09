"ESD's and Concept Ablation's losses in the place of ascent, and what Algorithm 2 is handed."
import copy

import pytest
import torch

from resalign.baselines import other_losses
from resalign.baselines.other_losses import (AnchorLoss, ResAlignCAConfig, ResAlignESDConfig, TargetLoss, resalign_ca,
                                             resalign_esd)
from resalign.core.runs import generator
from resalign.model.losses import Denoiser
from resalign.method.resalign import ResAlignConfig
from tests.fast.toys import (T, UNSAFE, check_settings, close, draw_sample, drawn_pictures, esd_bank,
                             esd_distance, given, gradients, noises, noisy,
                             said, same_grads, square, stream)
from each import each


def test_settings():
    own = {k: v for k, v in ResAlignConfig().model_dump().items() if k != 'pool'}
    check_settings(ResAlignESDConfig, own | dict(eta=1., prompts=4, sampling_steps=4, guidance=3.), [])
    check_settings(ResAlignCAConfig, own | dict(pictures=8, sampling_steps=4, guidance=5.), [])


def test_rows_are_drawn_from_all_of_the_bank():
    i = TargetLoss(dict(t=torch.arange(3))).draw(100, generator(1))
    assert torch.equal(i, torch.randint(3, (100,), generator=generator(1))) and set(i.tolist()) == {0, 1, 2}


def handed(monkeypatch, method, pipe, data, config):
    "The harmful loss, and what else is handed on"
    seen = []
    monkeypatch.setattr(other_losses, 'resalign', lambda *args: seen.append(args) or dict(log='log'))
    assert method(pipe, data, config, 'checkpoint', 'adapter')['log'] == 'log'
    (*rest, harmful), = seen
    assert rest == [pipe, data, config, 'checkpoint', 'adapter']
    return harmful


def trained(pipe):
    "The UNet after some training, in both precisions"
    model = Denoiser(pipe)
    model.unet = copy.deepcopy(given(seed=3)[0].unet).requires_grad_(True)
    return model, copy.deepcopy(model.unet).double()


def compare(value, formula, model, net):
    names = [n for n, _ in net.named_parameters()]
    close(value.item(), formula.item())
    same_grads(gradients(value, model.unet, names), gradients(formula, net, names))


@each('kind', ['epsilon', 'v_prediction'])
def test_esd_on_algorithm_2(monkeypatch, kind):
    pipe, data = given(kind)
    pipe.unet.requires_grad_(True)
    config = ResAlignESDConfig(eta=2., prompts=3, sampling_steps=4, guidance=2., seed=5)
    harmful = handed(monkeypatch, resalign_esd, pipe, data, config)
    bank, (model, net), i = esd_bank(pipe, kind, config), trained(pipe), torch.tensor([0, 5, 5, 11])
    assert len(harmful.bank['t']) == len(bank) == 12
    for margin in (), (.1,): compare(harmful(model, i, *margin), esd_distance(net, kind, [bank[k] for k in i]), model, net)


@each('kind', ['epsilon', 'v_prediction'])
def test_concept_ablation_on_algorithm_2(monkeypatch, kind):
    pipe, data = given(kind)
    config = ResAlignCAConfig(pictures=5, sampling_steps=3, guidance=2., unsafe_bank=7, seed=5)
    pictures, which = drawn_pictures(pipe, kind, 5, ['ca anchors'], config)
    gen = stream(5, 'ca anchors')
    torch.randint(len(UNSAFE), (5,), generator=gen)   # which anchors are drawn
    s = draw_sample(pictures, 7, gen, T)
    harmful = handed(monkeypatch, resalign_ca, pipe, data, config)
    (model, net), i = trained(pipe), torch.tensor([0, 3, 3, 6])
    part = s[i]
    unsafe = [said(pipe, UNSAFE[which[j]]) for j in part.index]
    assert isinstance(harmful, AnchorLoss) and len(harmful.bank['t']) == 7
    wanted = noises(net, kind, noisy(part), part.t, part.text).detach()
    compare(harmful(model, i, .1), square(noises(net, kind, noisy(part), part.t, unsafe) - wanted), model, net)
