"""A rectified-flow transformer (SD3) in the place of a UNet: hypergradients, Algorithm 2, from folder to folder."""
import copy
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import resalign
from resalign.use.jobs import load_bank
from made import write_sets
from resalign.method.demo import demo_captions, demo_data
from resalign.model.compute import Compute, finish, prepare
from resalign.core.settings import UserError
from resalign.core.runs import generator
from resalign.model.data import Bank, draw_sample, embed, moments
from resalign.method.finetune import FinetuneConfig, FinetuneLoss, add_lora, finetune
from resalign.model.losses import FlowDenoiser
from resalign.model.pipelines import build_sd3
from resalign.method.hypergrad import MoreauOperator, flat, hypergradient, lora_pairs, unflat
from resalign.model.losses import HarmfulLoss, denoiser
from resalign.method.resalign import UnlearnData
from resalign.baselines.methods import run_method
from resalign.model.pipelines import check_pipeline, generate, load_pipeline, save_pipeline
from tests.far import Far, FarTensor
from each import each


# without the empty rows of the T5 that isn't there
def short(bank): return Bank(bank.mean, bank.std, bank.text[:, [*range(24), -1]])


@pytest.fixture(scope='module')
def given():
    pipe = build_sd3(demo_captions())
    data = demo_data(pipe, 4)
    return pipe, UnlearnData(short(data.unsafe), short(data.retain), dict(retain=short(data.retain)),
                             data.unsafe_captions, data.retain_captions)


@pytest.fixture(scope='module')
def folder(given, tmp_path_factory):
    tmp = tmp_path_factory.mktemp('sd3')
    save_pipeline(given[0], tmp/'base')
    write_sets(tmp, unsafe=4, retain=4)
    return tmp


def test_latents_and_captions_are_what_the_pipeline_says(given):
    pipe = given[0]
    images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator(0)).numpy()
    plain = pipe.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2)/127.5 - 1).latent_dist.mean
    torch.testing.assert_close(moments(pipe.vae, images)[0],
                               (plain - pipe.vae.config.shift_factor)*pipe.vae.config.scaling_factor)
    rows, _, pooled, _ = pipe.encode_prompt(['a fox', ''], None, None, do_classifier_free_guidance=False)
    out = embed(pipe, ['a fox', ''])
    assert torch.equal(out[:, :-1], rows) and torch.equal(out[:, -1, :48], pooled) and not out[:, -1, 48:].any()


@each('product, far', [('exact', 1e-7), ('lora-bilinear', None)])
def test_hypergradients_against_the_dense_inverse(given, product, far):
    pipe = build_sd3(['a fox'], layers=1)
    pipe.transformer.double()
    model = denoiser(pipe)
    double = lambda b: Bank(b.mean.double(), b.std.double(), b.text.double())
    add_lora(pipe.transformer, 'theta', 1, 0, .5, .5)
    pipe.transformer.requires_grad_(False)
    params = [p.requires_grad_(True) for n, p in pipe.transformer.named_parameters() if 'lora_' in n and 'to_v' in n]
    loss = FinetuneLoss(model, double(given[1].retain), FinetuneConfig(batch=2))
    harmful = HarmfulLoss(model, double(given[1].unsafe), 2, 0)
    harm, gamma, n = lambda: harmful(model, torch.arange(2), 1e9), .5, sum(p.numel() for p in params)
    own = dict(lora=[p for p in lora_pairs(pipe.transformer)
                     if any(p.A is q for q in params)]) if product == 'lora-bilinear' else {}
    with MoreauOperator(loss.frozen(0), params, gamma, 'exact') as A:
        dense = torch.stack([flat(A(unflat(e, params))) for e in torch.eye(n, dtype=torch.float64)])
    g = flat(torch.autograd.grad(harm(), params))
    x, report, _ = hypergradient(harm, loss.frozen(0), params, gamma, 'minres', product=product, max_products=30,
                                 tol=1e-10, clamp=None, **own)
    exact = torch.linalg.solve(dense, g)
    error = lambda v: ((v - exact).norm()/exact.norm()).item()
    assert not report.fallback
    if product == 'lora-bilinear': assert error(flat(x)) < error(g) # its H has the cross block alone
    else: assert error(flat(x)) < far < .01 < error(g)


@each('method, compute',
                         [('resalign', None), ('ga', dict(device='cpu', dtype='bfloat16',
                                                          gradient_checkpointing=True))])
def test_from_folder_to_folder(folder, tmp_path, method, compute):
    record = resalign.unlearn(folder/'base', folder/'unsafe', folder/'retain', tmp_path/'new', method,
                          dict(steps=2, up_std=.1), compute=compute)
    assert record['cost']['steps'] == 2 and len(record['base']['sha256']) == 64
    merged, base = (StableDiffusion3Pipeline.from_pretrained(p, text_encoder_3=None, tokenizer_3=None,
                                                             dtype=torch.float32) for p in (tmp_path/'new',
                                                                     folder/'base'))
    changed = {n for (n, p), q in zip(merged.transformer.named_parameters(), base.transformer.parameters())
               if not torch.equal(p, q)}
    assert changed and all('.attn.' in n for n in changed) and any('add_v_proj' in n for n in changed)
    s = draw_sample(load_bank(base, folder/'unsafe'), 4, generator(0))
    answer = lambda p: FlowDenoiser(p).predict(s).detach()
    new, old = answer(merged), answer(base)
    base.load_lora_weights(tmp_path/'new/adapter')
    assert 0 < (answer(base) - new).norm() < .02*(new - old).norm() # float16 on disk
    assert generate(load_pipeline(tmp_path/'new'), ['a fox'], [0], steps=2).shape == (1, 64, 64, 3)
    resalign.finetune(tmp_path/'new', folder/'retain', tmp_path/'tuned', dict(steps=2))
    assert (tmp_path/'tuned/transformer').is_dir()


def test_a_folder_that_is_not_whole(folder, tmp_path):
    shutil.copytree(folder/'base', tmp_path/'base')
    (tmp_path/'base/transformer/config.json').unlink()
    with pytest.raises(UserError, match="component 'transformer' is missing"): check_pipeline(tmp_path/'base')


def test_fine_tunings_for_unets_say_so(given):
    for algorithm in 'svdiff', 'custom-diffusion', 'textual-inversion':
        with pytest.raises(UserError, match=f'algorithm: {algorithm} needs a pipeline with a UNet'):
            finetune(given[0], given[1].retain, FinetuneConfig(algorithm=algorithm))
    with pytest.raises(UserError, match='train_text_encoder: expected a pipeline with one text encoder'):
        both = FinetuneConfig(algorithm='full', train_text_encoder=True)
        finetune(copy.deepcopy(given[0]), given[1].retain, both, captions=['a']*len(given[1].retain))


def test_on_another_device(given):
    far, near = copy.deepcopy(given[0]), copy.deepcopy(given[0])
    with Far():
        prepare(far, Compute(device='fpga'))
        assert all(isinstance(p, FarTensor) for p in far.transformer.parameters())
        run_method(far, given[1], 'ga', {})
        finish(far)
    run_method(near, given[1], 'ga', {})
    for p, q in zip(far.transformer.parameters(), near.transformer.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
