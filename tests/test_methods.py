"Methods on real layouts: what moves, on SD v1.4's and SDXL's, what an interrupted run does, and the module put back."
import copy
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import CLIPTextModel

import resalign
from resalign.world.emoji import scenes, words_of, write_set
from resalign.baselines import advunlearn, uce
from resalign.baselines.parts import changed_params
from resalign.method.demo import demo, demo_data
from resalign.core.runs import Stopped
from resalign.core.settings import UserError
from resalign.model.data import embed
from resalign.model.losses import Denoiser
from resalign.baselines.methods import METHODS, run_method
from resalign.model.pipelines import load_pipeline, save_pipeline
from tests.compvis import eightfold_vae, narrow_xl, two_layers
from each import each
from made import CONCEPT, write_sets

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def world_of_demo(): return demo()


@pytest.fixture
def given(world_of_demo):
    pipe, data = world_of_demo
    return copy.deepcopy(pipe), data


@pytest.fixture(scope='module')
def sd14_shaped(world_of_demo):
    "SD v1.4's layout at reduced width: four levels, 1x1 projections, 77 tokens, PNDM; and data encoded by it"
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(world_of_demo[0].tokenizer)
    tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(sample_size=8, layers_per_block=1, cross_attention_dim=64,
                                block_out_channels=(32, 32, 64, 64))
    scheduler = PNDMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012,
                              skip_prk_steps=True, steps_offset=1)
    text_encoder = CLIPTextModel(two_layers(tokenizer, 64))
    pipe = StableDiffusionPipeline(eightfold_vae(force_upcast=False), text_encoder, tokenizer,
                                   unet, scheduler, None, None, requires_safety_checker=False)
    for m in (pipe.unet, pipe.vae, pipe.text_encoder): m.requires_grad_(False).eval()
    return pipe, demo_data(pipe, 4)


@pytest.fixture(scope='module')
def sdxl_shaped(world_of_demo, tmp_path_factory):
    "SDXL's layout at reduced width, from disk; and data encoded by it"
    folder = tmp_path_factory.mktemp('sdxl')/'base'
    save_pipeline(narrow_xl(world_of_demo[0].tokenizer), folder)
    pipe = load_pipeline(folder)
    return pipe, demo_data(pipe, 4)


CLASSES = { # which of the UNet's parameters move, and by which methods; `words`: the text encoder's
    'cross': (r'\.attn2\.', ['esd-x']),
    'not-cross': (r'^(?!.*attn2)(?!time_embedding|conv_out|conv_norm_out)', ['esd-u', 'stereo']),
    'kv': (r'attn2\.to_[kv]\.weight$', ['ca', 'rece', 'speed']),
    'self': (r'\.attn1\.', ['safegen']),
    'all': ('', ['lcfdsd-ng', 'salun', 'meta-unlearning-sdd']),
    'linear': (r'attn[12]\.to_(q|k|v|out\.0)\.weight$',
               ['pgu', 'modular-lora', 'resalign', 'resalign-esd', 'ca-retain', 'eraseflow']),
    'words': (r'^$', ['advunlearn'])}
WORDS = r'(^|\.)(encoder|final_layer_norm)\.'


def names(module, pattern): return {n for n, _ in module.named_parameters() if re.search(pattern, n)}


def check_what_moves(shaped, what, method):
    base, data = shaped
    pipe, out = copy.deepcopy(base), {}
    small = dict(batch=2) if 'batch' in METHODS[method].config.model_fields else {}
    if method == 'speed': small = dict(fixed='start') # the empty prompt has more tokens than this layout is wide
    changed = changed_params(pipe.unet, lambda: out.update(run_method(pipe, data, method, small, 0)))
    expected = names(pipe.unet, CLASSES[what][0])
    # how the one pixel of the middle attends to itself has no gradient but rounding, of which some processors have none
    still = names(pipe.unet, r'mid_block.*attn1\.to_[qk]')
    # the mask may leave out a small one
    if method == 'salun': assert changed <= expected and len(changed) > .5*len(expected), method
    else: assert changed - still == expected - still, (method, changed ^ expected)
    if hasattr(pipe, 'text_encoder_2'): return pipe
    words = {n for (n, p), q in zip(pipe.text_encoder.named_parameters(), base.text_encoder.parameters())
             if not torch.equal(p, q)}
    assert words == (names(pipe.text_encoder, WORDS) if method == 'advunlearn' else set()), method
    assert not any(p.requires_grad for p in pipe.unet.parameters()), method
    assert all(p.isfinite().all() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()), method
    assert len(out['solves']) == (2 if method.startswith('resalign') else 0), method
    return pipe


@each('what', CLASSES)
def test_exactly_the_said_parameters_move_on_the_layout_of_sd14(sd14_shaped, what):
    for method in CLASSES[what][1]: check_what_moves(sd14_shaped, what, method)


def test_and_on_sdxls_which_is_saved_and_draws(sdxl_shaped, tmp_path):
    for what, method in dict(cross='esd-x', kv='uce', self='safegen', all='salun', linear='resalign').items():
        pipe = check_what_moves(sdxl_shaped, what, method)
    save_pipeline(pipe, tmp_path)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert again('a fox', num_inference_steps=2, output_type='np').images.shape == (1, 64, 64, 3)
    for a, b in zip(pipe.unet.parameters(), again.unet.parameters()):
        torch.testing.assert_close(a.half().float(), b.float())


def test_sdxl_is_told_what_the_pipeline_tells_it(sdxl_shaped):
    pipe, _ = sdxl_shaped
    seen, captions = [], ['a fox with a dagger', 'a bear']
    hook = pipe.unet.register_forward_hook(lambda m, args, kw, out: seen.append((args[0], args[1], kw, out[0])),
                                           with_kwargs=True)
    pipe(captions, num_inference_steps=1, guidance_scale=5., output_type='latent')
    hook.remove()
    z, t, kw, out = seen[0]
    empty, said = embed(pipe, ['']*2), embed(pipe, captions)
    assert (empty == 0).all() # as SDXL's own pipeline has it
    torch.testing.assert_close(Denoiser(pipe)(z, t, torch.cat([empty, said])), out)


@each('tokens', ['last', 'rest'])
def test_uce_reads_a_real_encoders_embeddings_at_the_right_places(given, tokens):
    pipe, _ = given
    cuts = [('a fox', ' with a dagger', '')]*2 + [('a fox', ' with a dagger', ' in a meadow')]
    found = uce.edit_embeddings(pipe, cuts, ['a bear']*2, tokens)
    whole, short, none, bear = (embed(pipe, [t])[0].double()
                               for t in ('a fox with a dagger', 'a fox', '', 'a bear'))
    n, m, k = (len(pipe.tokenizer(t).input_ids)
               for t in ('a fox with a dagger', 'a fox', 'a bear'))
    last = whole[n-2:n-1], short[m-2:m-1], none[n-2:n-1], bear[k-2:k-1]
    rest = whole[m-1:], short[m-1:], none[m-1:], bear[m-1:]
    for a, b in zip(found, last if tokens == 'last' else rest): torch.testing.assert_close(a, b)


def test_a_prefix_leaves_the_end_token_where_it_can_be_read(given):
    pipe, _ = given
    for caption in 'a fox', 'a fox with a dagger '*9:
        plain, room = (advunlearn.token_ids(pipe, [caption], p)[0] for p in (False, True))
        assert len(plain) == len(room) and room[0] == plain[0] and room[2] == plain[1]
        assert (room == pipe.tokenizer.eos_token_id).any()


RESUMED = { # what a run has beside weights and moments
    'esd-x': dict(z_t='trained'),   # the frozen model
    'salun': {},                    # the mask
    'lcfdsd-ng': {},                # centres and a schedule
    'meta-unlearning-sdd': {},      # a moving average
    'advunlearn': dict(warm_up=1),  # the text encoder
    'stereo': dict(variant='x', rounds=1), # words, searched again
    'eraseflow': dict(flow_lr=2e-3)} # an adapter and log Z


@each('method', RESUMED)
def test_an_interrupted_run_goes_on_with_the_same_bits(world_of_demo, method, tmp_path):
    base, data = world_of_demo
    settings = dict(steps=4, lr=2e-3) | RESUMED[method]
    weights = lambda p: torch.cat([q.detach().flatten() for m in (p.unet, p.text_encoder) for q in m.parameters()])
    whole, cut, again = (copy.deepcopy(base) for _ in range(3))
    made = []
    def note(optimizer, args, kw):
        group = optimizer.param_groups[0]
        if group.get('initial_lr', group['lr']) != 2e-3: return # an inner one
        made.append(0)
        if len(made) == 2: os.kill(os.getpid(), signal.SIGTERM)
    run_method(whole, data, method, settings, 0)
    hook = register_optimizer_step_pre_hook(note)
    try:
        with pytest.raises(Stopped): run_method(cut, data, method, settings, 0, checkpoint=tmp_path/'c')
        out = run_method(again, data, method, settings, 0, checkpoint=tmp_path/'c')
    finally: hook.remove()
    assert len(made) == 4 and [r['step'] for r in out['log']] == [0, 1, 2, 3] and torch.equal(weights(whole),
            weights(again))
    assert not torch.equal(weights(whole), weights(cut)) and not torch.equal(weights(base), weights(whole))


def test_a_module_is_merged_into_what_was_fine_tuned(given, tmp_path):
    pipe, data = given
    save_pipeline(pipe, tmp_path/'base')
    start = load_pipeline(tmp_path/'base')
    modular = copy.deepcopy(start)
    run_method(modular, data, 'modular-lora', {}, 0, save_adapter=tmp_path/'adapter')
    write_set(tmp_path/'images', scenes('varied', 4))
    for name, module in ('plain', None), ('merged', tmp_path/'adapter'):
        resalign.finetune(tmp_path/'base', tmp_path/'images', tmp_path/name, dict(steps=2), module=module)
    plain, merged = (load_pipeline(tmp_path/n).unet for n in ('plain', 'merged'))
    name = next(n for n, _ in plain.named_parameters() if n.endswith('attn2.to_k.weight'))
    w0, safe, ft, both = (u.get_parameter(name).double() for u in (start.unet, modular.unet, plain, merged))
    assert (safe - w0).abs().max() > 1e-6
    torch.testing.assert_close(both, ft + safe - w0, rtol=0, atol=2e-3*float(w0.abs().max())) # float16 on disk


def test_seeds_and_prior_pictures_reach_a_training(given, tmp_path):
    "The trained model is the replicate: another seed is another model, the same seed the same one"
    save_pipeline(given[0], tmp_path/'base')
    write_sets(tmp_path, unsafe=3, retain=3, varied=3, subjects=3)
    def weights(name):
        unet = load_pipeline(tmp_path/name).unet
        return torch.cat([p.flatten() for n, p in unet.named_parameters() if '.to_q.' in n])
    def trained(job, folders, cases, **common): # the weights of each case
        given, outs = [tmp_path/name for name in ('base', *folders)], []
        for k, case in enumerate(cases):
            outs.append(f'{job.__name__}-{len(case)}-{k}-{next(iter(case))}')
            job(*given, tmp_path/outs[-1], **common, **case)
        return [weights(out) for out in outs]
    seeds = [dict(seed=s) for s in (0, 1, 1)]
    zero, one, again = trained(resalign.unlearn, ['unsafe', 'retain'], seeds, method='ga', settings=dict(steps=1))
    assert torch.equal(one, again) and not torch.equal(zero, one)
    full = dict(steps=2, lr=1e-2, algorithm='full')
    zero, one, again = trained(resalign.finetune, ['varied'], seeds, settings=full)
    assert torch.equal(one, again) and not torch.equal(zero, one)
    priors = [dict(prior=tmp_path/name) for name in ('retain', 'subjects', 'varied')]
    a, b, c = trained(resalign.finetune, ['varied'], priors, settings=full | dict(prior_weight=1.))
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_the_estimate_of_a_dry_run(given, tmp_path, monkeypatch):
    "Each picture of each folder is encoded once; the seconds are those of a picture"
    from resalign.use import jobs
    assert jobs.estimate(dict(load=1, encode=2, pictures=10, before=3, step=4, steps=5)) == 44
    save_pipeline(given[0], tmp_path/'base')
    write_sets(tmp_path, unsafe=5, retain=4)
    clock = iter([0., 10., 34.]) # loading takes 10, two pictures of each of three folders 24
    monkeypatch.setattr(jobs.time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(jobs, 'timed_step', lambda *args: dict(before=1., step=2.))
    found = jobs.dry_run(tmp_path/'base', tmp_path/'unsafe', tmp_path/'retain', 'ga', dict(steps=6))
    assert (found['load'], found['encode'], found['pictures'], found['steps']) == (10, 4, 13, 6)
    assert found['whole'] == 10 + 4*13 + 1 + 2*6


def test_a_detector_and_validation_prompts_reach_the_methods_that_look(given, tmp_path):
    pipe, _ = given
    save_pipeline(pipe, tmp_path/'base')
    write_sets(tmp_path, unsafe=3, retain=3)
    seen = []
    class Detector:
        threshold = .7
        def __call__(self, pictures):
            seen.append(pictures.shape)
            return np.arange(1, len(pictures) + 1)/len(pictures) # the last of any is unsafe
        def __repr__(self): return 'demo detector'
    asked = dict(detector=Detector(), validation=[('a fox', 1), ('a bear', 2), ('a lion', 3)],
                 erase=words_of(CONCEPT))
    resalign.unlearn(tmp_path/'base', tmp_path/'unsafe', tmp_path/'retain', tmp_path/'out', 'rece',
                     dict(sampling_steps=2), **asked)
    log = pd.read_csv(tmp_path/'out/log.csv')
    assert log.unsafe.tolist() == pytest.approx([1/3]*2) and log.kept.tolist() == [True, False]
    assert seen == [(3, 64, 64, 3)]*2
    record = json.loads((tmp_path/'out/record.json').read_text())
    assert record['detector'] == 'demo detector' and record['validation'][0] == ['a fox', 1]
    with pytest.raises(UserError, match='safegen: unsafe picture 2 '):
        resalign.unlearn(tmp_path/'base', tmp_path/'unsafe', tmp_path/'retain', tmp_path/'no', 'safegen', **asked)


def test_writing_a_method_takes_less_than_forty_lines():
    nb = json.loads((ROOT/'nbs/5_baselines/97_methods.ipynb').read_text(encoding='utf-8'))
    cell, = (''.join(c['source']) for c in nb['cells'] if 'class NoisyConceptConfig' in ''.join(c['source'])
             and c['cell_type'] == 'code')
    assert len(cell.strip().splitlines()) < 40
