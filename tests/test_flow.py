"""A rectified-flow transformer (SD3) in the place of a UNet: losses, hypergradients, Algorithm 2, from folder to folder."""
import copy, json

import pytest, torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from resalign import jobs, world
from resalign.baselines.parts import demo_data
from resalign.compute import Compute, finish, prepare
from resalign.core import UserError, generator
from resalign.data import Sample, draw_sample, embed
from resalign.finetune import FinetuneConfig, FinetuneLoss, add_lora, finetune
from resalign.flow import FlowDenoiser, build_sd3, shifted
from resalign.hypergrad import MoreauOperator, flat, hypergradient, unflat
from resalign.losses import Harmful, denoiser
from resalign.meta import Pool, ResAlignConfig, UnlearnData
from resalign.methods import METHODS, unlearn
from resalign.pipelines import check_pipeline, generate, load_pipeline, save_pipeline
from tests.far import Far, FarTensor

def short(bank): return type(bank)(bank.mean, bank.std, bank.text[:, [*range(24), -1]]) # without the empty rows of the T5 that isn't there

@pytest.fixture(scope='module')
def given():
    pipe = build_sd3([s.caption for name in ('unsafe', 'retain') for s in world.scenes(name, 64)]); data = demo_data(pipe, 4)
    return pipe, UnlearnData(short(data.unsafe), short(data.retain), dict(retain=short(data.retain)), data.unsafe_captions, data.retain_captions)

@pytest.fixture(scope='module')
def folder(given, tmp_path_factory):
    tmp = tmp_path_factory.mktemp('sd3')
    save_pipeline(given[0], tmp/'base')
    for name, n in dict(unsafe=4, retain=4).items(): world.write_set(tmp/name, world.scenes(name, n))
    return tmp


@pytest.mark.parametrize('shift', [1., 3., 7.])
def test_the_path_is_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(shifted(scheduler), scheduler.sigmas.flip(0))

def test_a_shift_that_depends_on_the_picture():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15)
    scheduler.set_timesteps(sigmas=[1., .75, .5, .25], mu=1.15)
    torch.testing.assert_close(shifted(scheduler)[[999, 749, 499, 249]], scheduler.sigmas[:4])

def test_the_target_is_the_direction_of_the_path(given):
    model = FlowDenoiser(given[0]); s = draw_sample(given[1].retain, 4, generator(0))
    z = lambda sigma: (1 - sigma)*s.z.double() + sigma*s.noise.double()
    torch.testing.assert_close(((z(.5 + 1e-6) - z(.5 - 1e-6))/2e-6).float(), model.target(s), rtol=1e-4, atol=1e-4)
    seen = []
    model.unet = torch.nn.Linear(1, 1); model.unet.forward = lambda z, **kw: seen.append((z, kw)) or (z,)
    model.predict(s)
    sigma = shifted(given[0].scheduler)[s.t]
    torch.testing.assert_close(seen[0][0], (1 - sigma.view(-1, 1, 1, 1))*s.z + sigma.view(-1, 1, 1, 1)*s.noise)
    torch.testing.assert_close(seen[0][1]['timestep'], 1000*sigma)
    assert seen[0][1]['pooled_projections'].shape == (4, 48) and seen[0][1]['encoder_hidden_states'].shape[1] == 24

def test_latents_are_shifted_as_the_pipeline_shifts_them(given):
    pipe = given[0]
    images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator(0)).numpy()
    from resalign.data import moments
    plain = pipe.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2)/127.5 - 1).latent_dist.mean
    torch.testing.assert_close(moments(pipe.vae, images)[0], (plain - pipe.vae.config.shift_factor)*pipe.vae.config.scaling_factor)

def test_captions_are_what_the_pipeline_says(given):
    rows, _, pooled, _ = given[0].encode_prompt(['a robot', ''], None, None, do_classifier_free_guidance=False)
    out = embed(given[0], ['a robot', ''])
    assert torch.equal(out[:, :-1], rows) and torch.equal(out[:, -1, :48], pooled) and not out[:, -1, 48:].any()


@pytest.mark.parametrize('product, far', [('exact', 1e-7), ('fd-central', 1e-4), ('gauss-newton', None), ('lora-bilinear', None)])
def test_hypergradients_against_the_dense_inverse(given, product, far):
    pipe = build_sd3(['a robot'], layers=1); pipe.transformer.double(); model = denoiser(pipe)
    double = lambda b: type(b)(b.mean.double(), b.std.double(), b.text.double())
    add_lora(pipe.transformer, 'theta', 1, 0, .5, .5); pipe.transformer.requires_grad_(False)
    params = [p.requires_grad_(True) for n, p in pipe.transformer.named_parameters() if 'lora_' in n and 'to_v' in n]
    loss = FinetuneLoss(model, double(given[1].retain), FinetuneConfig(batch=2)); harmful = Harmful(model, double(given[1].unsafe), 2, 0)
    harm, gamma, n = lambda: harmful(model, torch.arange(2), 1e9), .5, sum(p.numel() for p in params)
    from resalign.hypergrad import lora_pairs
    own = dict(residuals=loss.residuals(0)) if product == 'gauss-newton' else dict(lora=[p for p in lora_pairs(pipe.transformer) if any(p.A is q for q in params)]) if product == 'lora-bilinear' else {}
    with MoreauOperator(loss.frozen(0), params, gamma, 'gauss-newton' if product == 'gauss-newton' else 'exact', residuals=own.get('residuals')) as A:
        dense = torch.stack([flat(A(unflat(e, params))) for e in torch.eye(n, dtype=torch.float64)])
    g = flat(torch.autograd.grad(harm(), params)); x, report, _ = hypergradient(harm, loss.frozen(0), params, gamma, 'minres', product=product, max_products=30, tol=1e-10, clamp=None, **own)
    exact, error = torch.linalg.solve(dense, g), lambda v: ((v - torch.linalg.solve(dense, g)).norm()/torch.linalg.solve(dense, g).norm()).item()
    assert not report.fallback
    if product == 'lora-bilinear': assert error(flat(x)) < error(g) # its H has the cross block alone
    else: assert error(flat(x)) < (far or 1e-7) < .01 < error(g)

def test_the_harmful_loss_rises_where_it_should(given):
    pipe = copy.deepcopy(given[0])
    out = unlearn(pipe, given[1], 'resalign', dict(steps=25, lr=1e-2, alpha=10., beta=.5, rank=8, unsafe_batch=16, retain_batch=16, retain_bank=64, unsafe_bank=64,
                                                   pool=dict(algorithm=['lora', 'full'], optimizer=['sgd'], lr=dict(lora=[1e-2], full=[1e-3]))))
    last = out['log'][-5:]
    assert sum(r['depth'] for r in last)/5 > .05 and max(r['retain'] for r in last) < .03 and len(out['solves']) == 25 and not any(s['fallback'] for s in out['solves'])
    changed = {k for k, v in pipe.transformer.state_dict().items() if not torch.equal(v, given[0].transformer.state_dict()[k])}
    assert changed and all('.attn.' in k for k in changed) and any('add_v_proj' in k for k in changed)


@pytest.mark.parametrize('method, compute', [('resalign', None), ('ga', dict(device='cpu', dtype='bfloat16', gradient_checkpointing=True))])
def test_from_folder_to_folder(folder, tmp_path, method, compute):
    record = jobs.unlearn(folder/'base', folder/'unsafe', folder/'retain', tmp_path/'new', method, dict(steps=2, up_std=.1), compute=compute)
    assert record['cost']['steps'] == 2 and len(record['base']['sha256']) == 64
    merged, base = (StableDiffusion3Pipeline.from_pretrained(p, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32) for p in (tmp_path/'new', folder/'base'))
    s = draw_sample(jobs.load_bank(base, folder/'unsafe'), 4, generator(0))
    answer = lambda p: FlowDenoiser(p).predict(s).detach()
    new, old = answer(merged), answer(base)
    base.load_lora_weights(tmp_path/'new/adapter')
    assert 0 < (answer(base) - new).norm() < .02*(new - old).norm() # float16 on disk
    images = generate(load_pipeline(tmp_path/'new'), ['a red robot'], [0], steps=2)
    assert images.shape == (1, 64, 64, 3)
    jobs.finetune(tmp_path/'new', folder/'retain', tmp_path/'tuned', dict(steps=2))
    assert (tmp_path/'tuned/transformer').is_dir()

def test_a_folder_that_is_not_whole(folder, tmp_path):
    import shutil
    shutil.copytree(folder/'base', tmp_path/'base'); (tmp_path/'base/transformer/config.json').rename(tmp_path/'away')
    with pytest.raises(UserError, match="component 'transformer' is missing"): check_pipeline(tmp_path/'base')

@pytest.mark.parametrize('method', [m for m in METHODS if METHODS[m][0].__name__ not in ('resalign', 'original')])
def test_methods_for_unets_say_so(given, method):
    with pytest.raises(UserError, match=f'{method}: expected a pipeline with a UNet'): unlearn(given[0], given[1], method, {})

@pytest.mark.parametrize('algorithm', ['svdiff', 'custom-diffusion', 'textual-inversion'])
def test_fine_tunings_for_unets_say_so(given, algorithm):
    with pytest.raises(UserError, match=f'algorithm: {algorithm} needs a pipeline with a UNet'): finetune(given[0], given[1].retain, FinetuneConfig(algorithm=algorithm))

def test_on_another_device(given):
    far, near = copy.deepcopy(given[0]), copy.deepcopy(given[0])
    with Far():
        prepare(far, Compute(device='fpga')); assert all(isinstance(p, FarTensor) for p in far.transformer.parameters())
        unlearn(far, given[1], 'ga', {}); finish(far)
    unlearn(near, given[1], 'ga', {})
    for p, q in zip(far.transformer.parameters(), near.transformer.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
