"Modular LoRA: what is trained, which files are taken, and that the module is added to whatever was fine-tuned."
import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from resalign.baselines import modular_lora as page
from resalign.baselines.modular_lora import check_adapter, modular_lora, with_module
from resalign.core.settings import UserError
from resalign.method.finetune import add_lora
from resalign.method.resalign import ResAlignConfig
from each import each


def test_it_is_ga_and_retain_with_its_adapter_kept(monkeypatch):
    seen = []
    monkeypatch.setattr(page, 'resalign', lambda *args: seen.append(args) or 'log')
    config = ResAlignConfig(beta=0., steps=3)
    assert modular_lora('pipe', 'data', config, 'checkpoint',
                        'adapter') == 'log' and seen == [('pipe', 'data', config, 'checkpoint', 'adapter')]
    assert modular_lora('pipe', 'data') == 'log' and seen[1] == ('pipe', 'data', ResAlignConfig(beta=0.), None, None)
    with pytest.raises(UserError, match='modular-lora: beta'): modular_lora('pipe', 'data', ResAlignConfig(beta=.1))


FILE = 'pytorch_lora_weights.safetensors'


def test_only_a_unets_lora_is_taken(tmp_path):
    with pytest.raises(UserError, match=f'{FILE}: no such file'): check_adapter(tmp_path)
    good = {'unet.a.lora_A.weight': torch.zeros(1)}
    for extra, named in ({}, None), ({'text_encoder.a.lora_A.weight': torch.zeros(1)},
                                     'got text_encoder'), ({'unet.conv_in.weight': torch.zeros(1)}, 'got unet.conv_in'):
        save_file(good | extra, tmp_path/FILE)
        if named is None: check_adapter(tmp_path)
        else:
            with pytest.raises(UserError, match=f'{FILE}: .*{named}'): check_adapter(tmp_path)
    save_file(good | {'z.lora': torch.zeros(1), 'a.lora': torch.zeros(1)}, tmp_path/FILE)
    with pytest.raises(UserError, match='got a.lora'): check_adapter(tmp_path)
    save_file({}, tmp_path/FILE)
    with pytest.raises(UserError, match=f'{FILE}: .*got nothing'): check_adapter(tmp_path)
    (tmp_path/FILE).write_bytes(b'pickle')
    with pytest.raises(UserError, match=f'{FILE}: not a whole safetensors file'): check_adapter(tmp_path)


def small():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                                cross_attention_dim=8, attention_head_dim=4,
                                down_block_types=('CrossAttnDownBlock2D',), up_block_types=('UpBlock2D',),
                                mid_block_type=None)
    return StableDiffusionPipeline(None, None, None, unet.requires_grad_(False), None, None, None,
                                   requires_safety_checker=False)


def adapter_of(unet, folder, name, by):
    "A trained module, saved as the package saves it; its BA by layer"
    params = add_lora(unet, name, 2, 0, by, by)
    StableDiffusionPipeline.save_lora_weights(folder,
                                              unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=name))
    return params


def products(folder):
    from safetensors.torch import load_file
    found = load_file(folder/FILE)
    down = {k.removeprefix('unet.').removesuffix('.lora_A.weight'): v.double() for k,
            v in found.items() if 'lora_A' in k}
    return {k: found[f'unet.{k}.lora_B.weight'].double() @ A for k, A in down.items()}


@each('still_training', [False, True])
def test_both_differences_are_added_to_the_original(tmp_path, still_training):
    base = small()
    adapter_of(copy.deepcopy(base.unet), tmp_path/'safe', 'unlearn', .3)
    tuned = copy.deepcopy(base)
    expected = {n: p.double() for n, p in base.unet.named_parameters()}
    if still_training:
        adapter_of(tuned.unet, tmp_path/'ft', 'finetune', .2)
        for n, BA in products(tmp_path/'ft').items(): expected[f'{n}.weight'] = expected[f'{n}.weight'] + BA
    else:
        with torch.no_grad():
            for p in tuned.unet.parameters(): p.add_(.1)
        expected = {n: p + .1 for n, p in expected.items()}
    before = {n: p.clone() for n, p in tuned.unet.named_parameters()}
    merged = with_module(tuned, tmp_path/'safe')
    safe = products(tmp_path/'safe')
    assert len(safe) == 8 and min(float(v.abs().max()) for v in safe.values()) > .01
    for n, BA in safe.items(): expected[f'{n}.weight'] = expected[f'{n}.weight'] + BA
    found = dict(merged.unet.named_parameters())
    assert set(found) == set(expected)
    for n, p in expected.items(): torch.testing.assert_close(found[n].double(), p, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, before[n]) for n, p in tuned.unet.named_parameters()) # it was a copy


def test_a_module_of_another_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=f'{FILE}: no such file'): with_module(small(), tmp_path)
    (tmp_path/'safe').mkdir()
    save_file({'unet.nothing.to_q.lora_A.weight': torch.zeros(2, 8),
               'unet.nothing.to_q.lora_B.weight': torch.zeros(8, 2)}, tmp_path/'safe'/FILE)
    with pytest.raises(UserError, match='safe: does not fit the pipeline') as e: with_module(small(), tmp_path/'safe')
    assert '\n' not in str(e.value)
