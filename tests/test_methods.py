"Every method trains what it says it trains, by the term it is named for; the ledger and the settings name real things."
import copy, csv, json, re
from pathlib import Path
import pytest, torch, yaml
from resalign import jobs, world
from resalign.baselines import advunlearn, esd, lcfdsd, meta_unlearning, safegen, uce
from resalign.baselines.parts import anchored, demo, demo_data, moved
from resalign.core import UserError, generator
from resalign.data import draw_sample, embed
from resalign.finetune import FinetuneConfig, FinetuneLoss
from resalign.losses import Denoiser
from resalign.methods import FIXED, METHODS, config_of, unlearn
from resalign.pipelines import load_pipeline, save_pipeline

ROOT = Path(__file__).resolve().parent.parent
PARAMS = yaml.safe_load((ROOT/'params.yaml').read_text())
OURS = ('ga', 'resalign', 'resalign-first-order', 'esd-retain', 'resalign-esd', 'ca-retain', 'resalign-ca')
BASELINES = [m for m in METHODS if m not in ('original', *OURS)]

@pytest.fixture(scope='module')
def world_of_demo(): return demo()

@pytest.fixture
def given(world_of_demo):
    pipe, data = world_of_demo
    return copy.deepcopy(pipe), data

@pytest.fixture(scope='module')
def loud(world_of_demo):
    "The same, with a UNet that listens to captions (an untrained one hardly does)"
    pipe, data = world_of_demo; pipe = copy.deepcopy(pipe)
    with torch.no_grad():
        for n, p in pipe.unet.named_parameters():
            if 'attn2' in n and n.endswith('weight'): p.mul_(4.)
    return pipe, data

LINEAR = r'attn[12]\.to_(q|k|v|out\.0)\.weight$'
WHAT_MOVES = { # names of the UNet's parameters
    'esd-x': r'\.attn2\.', 'esd-u': r'^(?!.*attn2)(?!time_embedding|conv_out|conv_norm_out)', 'ca': r'attn2\.to_[kv]\.weight$', 'uce': r'attn2\.to_[kv]\.weight$', 'rece': r'attn2\.to_[kv]\.weight$',
    'safegen': r'\.attn1\.', 'advunlearn': r'$^', 'lcfdsd-ng': '', 'lcfdsd-lt': '', 'salun': '', 'meta-unlearning-esd': '', 'meta-unlearning-sdd': '',
    'modular-lora': LINEAR, 'pgu': LINEAR, **dict.fromkeys(OURS, LINEAR)}
WORDS = r'(^|\.)(encoder|final_layer_norm)\.' # of the text encoder, by AdvUnlearn

def names(module, pattern): return {n for n, _ in module.named_parameters() if re.search(pattern, n)}

@pytest.mark.parametrize('method', BASELINES)
def test_exactly_the_said_parameters_move(given, method):
    pipe, data = given
    words = {n: p.clone() for n, p in pipe.text_encoder.named_parameters()}
    changed = moved(pipe.unet, lambda: unlearn(pipe, data, method, {}, 0))
    expected = names(pipe.unet, WHAT_MOVES[method])
    if method == 'salun': assert changed <= expected and len(changed) > .5*len(expected) # the mask may leave out a whole small one
    else: assert changed == expected
    now = {n for n, p in pipe.text_encoder.named_parameters() if not torch.equal(p, words[n])}
    assert now == (names(pipe.text_encoder, WORDS) if method == 'advunlearn' else set())
    assert not any(p.requires_grad for p in pipe.unet.parameters())

# What each method is named for, measured by the formula of its page: trained by that term alone, it must go down
def noised(model, bank): # one sample of all pictures
    s = draw_sample(bank, len(bank), generator(99, 'measure'), model.timesteps)
    return s, model.noiser.add_noise(s.z, s.noise, s.t)

def towards_esd(pipe, base, data):
    model, original, empty = Denoiser(pipe), Denoiser(base), embed(base, [''])
    bank = esd.trajectory_bank(original, embed(base, sorted(set(data.unsafe_captions))), empty, esd.ESDConfig(seed=3))
    said, unsaid = original(bank['z_t'], bank['t'], bank['text']), original(bank['z_t'], bank['t'], empty.expand_as(bank['text']))
    return (model(bank['z_t'], bank['t'], bank['text']) - (unsaid - 5*(said - unsaid))).square().mean()

def towards_anchor(pipe, base, data): # minus the part of the way that answers have gone
    model, original, safe = Denoiser(pipe), Denoiser(base), [c.replace(w, '') for c in data.unsafe_captions for w in data.erase if w in c]
    s, x_t = noised(model, data.unsafe)
    said, then, goal = model(x_t, s.t, s.text), original(x_t, s.t, s.text), original(x_t, s.t, embed(base, safe)[s.index])
    return -((said - then)*(goal - then)).mean()

def towards_mosaic(pipe, base, data): # minus the part of the way that answers have gone
    s, x_t = noised(Denoiser(pipe), data.unsafe)
    details = s.z - safegen.mosaics(base.vae, data.unsafe.mean, 8)[s.index]
    now, then = (Denoiser(p)(x_t, s.t, embed(p, ['']).expand_as(s.text)) for p in (pipe, base))
    return -((now - then)*details).mean()

def apart(pipe, base, data):
    model, total = Denoiser(pipe), 0.
    centres = dict(clean=data.retain.mean.mean(0), unsafe=data.unsafe.mean.mean(0))
    for bank, own, other in (data.retain, 'clean', 'unsafe'), (data.unsafe, 'unsafe', 'clean'):
        s, x_t = noised(model, bank)
        a = model.noiser.alphas_cumprod[s.t].view(-1, 1, 1, 1)
        guess = (x_t - (1-a).sqrt()*model(x_t, s.t, s.text))/a.sqrt()
        total = total + ((guess - centres[own]).square() - (guess - centres[other]).square()).mean()
    return total

def unsafe_answers(pipe, base, data): # minus the loss on unsafe pictures
    model = Denoiser(pipe)
    return -model.loss(noised(model, data.unsafe)[0])

def edited_keys(pipe, base, data): # distance of the concept's keys and values from those of its guide, at the last word
    said, total = data.unsafe_captions, 0.
    guide = [c[:c.index(w)] for c in said for w in data.erase if w in c]
    last = lambda texts: torch.stack([embed(base, [t])[0, min(len(base.tokenizer(t).input_ids), 24) - 2] for t in texts])
    for (n, now), then in zip(pipe.unet.named_parameters(), base.unet.parameters()):
        if re.search(WHAT_MOVES['uce'], n): total = total + (last(said) @ now.T - last(guide) @ then.T).square().mean()
    return total

ALONE = {'esd-x': (towards_esd, dict(eta=5., seed=3, prompts=16)), 'esd-u': (towards_esd, dict(eta=5., seed=3, prompts=16)), 'ca': (towards_anchor, dict(prior_weight=0., lr=1e-5)),
         'salun': (towards_anchor, dict(benign_weight=0., lr=1e-5)), 'safegen': (towards_mosaic, dict(benign_weight=0., mosaic_weight=1., steps=40)), 'lcfdsd-ng': (apart, dict(contrast=1.)),
         'pgu': (unsafe_answers, dict(lr=1., energy=.5, margin=10.)), 'modular-lora': (unsafe_answers, dict(alpha=0., margin=10., up_std=.02, down_std=.08)),
         'uce': (edited_keys, dict(preserve_scale=0.))}

@pytest.mark.parametrize('method', ALONE)
def test_the_named_term_does_what_it_is_named_for(loud, method):
    base, data = loud
    measure, changes = ALONE[method]
    pipe = copy.deepcopy(base)
    steps = dict(steps=20, lr=3e-4) if 'lr' in METHODS[method][1].model_fields else {}
    unlearn(pipe, data, method, steps | changes, 3)
    with torch.no_grad(): before, after = (float(measure(p, base, data)) for p in (base, pipe))
    assert after < before, (before, after)

@pytest.mark.parametrize('variant', ['ng', 'lt'])
def test_lcfdsd_tells_clean_and_unsafe_apart(loud, variant):
    base, data = loud
    model, shift = Denoiser(base), dict(ng=1., lt=0.)[variant]
    s, _ = noised(model, data.unsafe)
    for sign in 1., -1.: torch.testing.assert_close(lcfdsd.guesses(model, s, sign*shift)[2], s.noise + sign*shift)
    x = torch.randn(3, 4)
    for clean, moved_to in (True, -x - 100), (False, x + 100): torch.testing.assert_close(lcfdsd.transformed(x, clean, variant), moved_to if variant == 'lt' else x)

@pytest.mark.parametrize('base', ['esd', 'sdd'])
def test_meta_unlearning_subtracts_the_gradients_one_harmful_fine_tuning_ahead(given, base, monkeypatch):
    pipe, data = given
    caught = {}
    monkeypatch.setattr(meta_unlearning, 'fit', lambda name, state, params, loss, *a, change, **kw: caught.update(params=params, loss=loss, change=change))
    config = meta_unlearning.MetaUnlearningConfig(base=base, gamma_21=.3, gamma_22=.2, gamma_23=.1, margin=1e6, batch=4)
    meta_unlearning.meta_unlearning(pipe, data, config)
    params, theta = caught['params'], [p.detach().clone() for p in caught['params']]
    for p in params: p.requires_grad_(True)
    caught['loss'](0).backward()
    here = [p.grad.clone() for p in params]
    caught['change'](params, 0)
    found = [p.grad.clone() for p in params]
    model = Denoiser(pipe)
    banks = dict(hrm=data.unsafe, tgt=meta_unlearning.related(pipe, data, config), irt=data.retain) # drawn again from θ
    enemy = FinetuneConfig(algorithm='full', optimizer='adamw', lr=config.inner_lr, batch=4, steps=2) # an epoch of 8 pictures
    steps, opt = FinetuneLoss(model, data.unsafe, enemy, ('meta', 0)), torch.optim.AdamW(params, config.inner_lr, weight_decay=.01)
    for k in range(2): opt.zero_grad(); steps.frozen(k)().backward(); opt.step()
    opt.zero_grad()
    draw = lambda what: draw_sample(banks[what], 4, generator(0, 'meta', what, 0), model.timesteps)
    (.3*model.loss(draw('hrm')) + .2*model.loss(draw('tgt')) + .1*model.loss(draw('irt'))).backward()
    for f, h, p in zip(found, here, params): torch.testing.assert_close(f, h - p.grad, rtol=1e-3, atol=1e-6)
    assert all(not torch.equal(p, t) for p, t in zip(params, theta))

def test_advunlearn_erases_and_its_attack_undoes_it(loud):
    base, data = loud
    pipe = copy.deepcopy(base)
    def towards_goal(p): # minus the part of the way that the words' answers have gone
        model = Denoiser(p); s, x_t = noised(model, data.unsafe)
        then, empty = model(x_t, s.t, s.text), model(x_t, s.t, embed(base, [''])[:1].expand_as(s.text))
        now = model(x_t, s.t, embed(p, data.unsafe_captions)[s.index])
        return -((now - then)*(empty - 3*(then - empty) - then)).mean()
    unlearn(pipe, data, 'advunlearn', dict(steps=20, lr=1e-4, eta=3., warm_up=20, retain_weight=0.), 0)
    with torch.no_grad(): assert towards_goal(pipe) < towards_goal(base)
    model, ids = Denoiser(pipe), advunlearn.tokens(pipe, data.unsafe_captions, True)
    s, x_t = noised(model, data.unsafe)
    wanted = model(x_t, s.t, s.text).detach()
    def gap(steps):
        delta = advunlearn.attack(model, pipe.text_encoder, ids[s.index], lambda _: (x_t, s.t, wanted), advunlearn.AdvUnlearnConfig(attack_steps=steps, attack_lr=.05), generator(1, 'attack'))
        with torch.no_grad(), advunlearn.prefixed(pipe.text_encoder, delta): return float((model(x_t, s.t, pipe.text_encoder(ids[s.index])[0]) - wanted).square().mean())
    assert gap(30) < gap(0)

def test_a_prefix_leaves_the_end_token_where_it_can_be_read(given):
    pipe, _ = given
    full = 'a red robot with exposed wiring ' * 9
    for caption in 'a red robot', full:
        plain, room = (advunlearn.tokens(pipe, [caption], p)[0] for p in (False, True))
        assert len(plain) == len(room) and room[0] == plain[0] and room[2] == plain[1]
        assert (room == pipe.tokenizer.eos_token_id).any()

@pytest.mark.parametrize('method', ['esd-retain', 'ca-retain', 'resalign-esd', 'resalign-ca'])
def test_other_losses_take_the_place_of_ascent(loud, method):
    base, data = loud
    pipe, measure = copy.deepcopy(base), towards_esd if 'esd' in method else towards_anchor
    own = dict(eta=5., prompts=16, lr=3e-3) if 'esd' in method else dict(pictures=16, lr=3e-4)
    out = unlearn(pipe, data, method, dict(steps=20, alpha=0., beta=.5, unsafe_bank=64) | own | (dict(beta=0.) if 'retain' in method else {}), 3)
    with torch.no_grad(): assert float(measure(pipe, base, data)) < float(measure(base, base, data))
    assert len(out['solves']) == (0 if 'retain' in method else 20)

def test_rece_leaves_less_to_be_found_than_uce(loud):
    base, data = loud
    then = [p.double() for n, p in base.unet.named_parameters() if re.search(WHAT_MOVES['uce'], n)]
    erase, *_ = uce.rows(base, anchored(data.unsafe_captions, data.erase, 'test'), data.retain_captions, 'rest')
    def left(method, **settings):
        pipe = copy.deepcopy(base); unlearn(pipe, data, method, dict(tokens='rest', preserve_scale=.01) | settings, 0)
        now = [p.double() for n, p in pipe.unet.named_parameters() if re.search(WHAT_MOVES['uce'], n)]
        return uce.distance(now, then, uce.still_there(now, then, erase, .1), erase)
    assert left('uce') < left('rece', rounds=1) < left('rece', rounds=3)

@pytest.mark.parametrize('tokens', ['last', 'rest'])
def test_uce_reads_guide_empty_prompt_and_benign_captions_at_the_right_places(given, tokens):
    pipe, _ = given
    cuts, benign = [('a red robot', ' with exposed wiring', '')]*2 + [('a red robot', ' with exposed wiring', ' in a garden')], ['a blue car', 'a blue car']
    erase, guide, empty, keep = uce.rows(pipe, cuts, benign, tokens)
    whole, short, none, car = (embed(pipe, [t])[0].double() for t in ('a red robot with exposed wiring', 'a red robot', '', 'a blue car'))
    n, m = (len(pipe.tokenizer(t).input_ids) for t in ('a red robot with exposed wiring', 'a red robot'))
    wanted = dict(last=(whole[n-2:n-1], short[m-2:m-1], none[n-2:n-1], car[len(pipe.tokenizer('a blue car').input_ids)-2:][:1]), rest=(whole[m-1:], short[m-1:], none[m-1:], car[m-1:]))[tokens]
    for found, want in zip((erase, guide, empty, keep), wanted): torch.testing.assert_close(found, want)

@pytest.mark.parametrize('method', ['ca', 'salun', 'lcfdsd-ng', 'lcfdsd-lt', 'meta-unlearning-esd', 'meta-unlearning-sdd', 'advunlearn', 'pgu', 'safegen', 'esd-x', 'esd-u'])
def test_a_killed_run_goes_on_with_the_same_bits(world_of_demo, method, tmp_path, monkeypatch):
    import resalign.baselines.parts as parts, resalign.training as training
    base, data = world_of_demo
    weights = lambda p: torch.cat([q.detach().flatten() for m in (p.unet, p.text_encoder) for q in m.parameters()])
    whole, cut, again = (copy.deepcopy(base) for _ in range(3))
    unlearn(whole, data, method, dict(steps=4), 0)
    often = lambda *a, **kw: training.optimise(*a, **dict(kw, every=1))
    def dies(name, gradients, *a, **kw):
        def until(step):
            if step == 2: raise KeyboardInterrupt
            return gradients(step)
        return often(name, until, *a, **kw)
    monkeypatch.setattr(parts, 'optimise', dies)
    with pytest.raises(KeyboardInterrupt): unlearn(cut, data, method, dict(steps=4), 0, checkpoint=tmp_path/'c')
    made = []
    def counts(name, gradients, *a, **kw): return often(name, lambda step: made.append(step) or gradients(step), *a, **kw)
    monkeypatch.setattr(parts, 'optimise', counts)
    out = unlearn(again, data, method, dict(steps=4), 0, checkpoint=tmp_path/'c')
    assert made == [2, 3] and len(out['log']) == 4 and torch.equal(weights(whole), weights(again))

@pytest.mark.parametrize('method', ['ca', 'salun', 'uce', 'meta-unlearning-esd'])
def test_anchors_need_words(given, method):
    pipe, data = given; data = copy.copy(data); data.erase = ()
    with pytest.raises(UserError, match='expected `erase`'): unlearn(pipe, data, method, {}, 0)

@pytest.fixture(scope='module')
def sd14_shaped(world_of_demo):
    "SD v1.4's layout at reduced width: four levels, 1x1 projections, 77 tokens, eightfold VAE, PNDM; and data encoded by it"
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(world_of_demo[0].tokenizer); tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=64, block_out_channels=(32, 32, 64, 64), layers_per_block=1)
    vae = AutoencoderKL(block_out_channels=(32,)*4, down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4, latent_channels=4, sample_size=64)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, projection_dim=64,
                                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=PNDMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, skip_prk_steps=True, steps_offset=1),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for m in (unet, vae, text): m.requires_grad_(False).eval()
    return pipe, demo_data(pipe, 4)

@pytest.mark.parametrize('method', [m for m in METHODS if m != 'original'])
def test_the_layout_of_sd14(sd14_shaped, method):
    base, data = sd14_shaped
    pipe = copy.deepcopy(base); small = dict(batch=2) if 'batch' in METHODS[method][1].model_fields else {}
    changed = moved(pipe.unet, lambda: unlearn(pipe, data, method, small, 0))
    words = {n for (n, p), q in zip(pipe.text_encoder.named_parameters(), base.text_encoder.parameters()) if not torch.equal(p, q)}
    assert changed <= names(pipe.unet, WHAT_MOVES[method]) and (changed or method == 'advunlearn')
    assert words == (names(pipe.text_encoder, WORDS) if method == 'advunlearn' else set())
    assert all(p.isfinite().all() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters())

@pytest.fixture(scope='module')
def sdxl_shaped(world_of_demo, tmp_path_factory):
    "SDXL's layout at reduced width: two text encoders, pooled embeddings, time ids, several transformer blocks a level, linear projections; read from disk"
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(world_of_demo[0].tokenizer); tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=96, block_out_channels=(32, 64), layers_per_block=1, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
                                transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=8, projection_class_embeddings_input_dim=64 + 6*8)
    vae = AutoencoderKL(block_out_channels=(32,)*4, down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4, latent_channels=4, sample_size=64, force_upcast=False)
    words = lambda width: CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, projection_dim=64, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    pipe = StableDiffusionXLPipeline(vae, CLIPTextModel(words(32)), CLIPTextModelWithProjection(words(64)), tokenizer, copy.deepcopy(tokenizer), unet, EulerDiscreteScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012))
    folder = tmp_path_factory.mktemp('sdxl')/'base'
    save_pipeline(pipe, folder)
    pipe = load_pipeline(folder)
    return pipe, demo_data(pipe, 4)

@pytest.mark.parametrize('method', [m for m in METHODS if m not in ('original', 'advunlearn')])
def test_sdxl(sdxl_shaped, method, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    base, data = sdxl_shaped
    pipe = copy.deepcopy(base); small = dict(batch=2) if 'batch' in METHODS[method][1].model_fields else {}
    changed = moved(pipe.unet, lambda: unlearn(pipe, data, method, small, 0))
    assert changed and changed <= names(pipe.unet, WHAT_MOVES[method])
    save_pipeline(pipe, tmp_path)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert again('a red robot', num_inference_steps=2, output_type='np').images.shape == (1, 64, 64, 3)
    for a, b in zip(pipe.unet.parameters(), again.unet.parameters()): torch.testing.assert_close(a.half().float(), b.float())

def test_sdxl_is_told_what_the_pipeline_tells_it(sdxl_shaped):
    pipe, _ = sdxl_shaped
    seen, captions = [], ['a red robot with exposed wiring', 'a blue car']
    hook = pipe.unet.register_forward_hook(lambda m, args, kw, out: seen.append((args[0], args[1], kw, out[0])), with_kwargs=True)
    pipe(captions, num_inference_steps=1, guidance_scale=5., output_type='latent'); hook.remove()
    z, t, kw, out = seen[0]
    empty, said = embed(pipe, ['']*2), embed(pipe, captions)
    assert (empty == 0).all() # as SDXL's own pipeline has it
    torch.testing.assert_close(Denoiser(pipe)(z, t, torch.cat([empty, said])), out)

def test_a_method_that_is_not_defined_for_sdxl_says_so(sdxl_shaped):
    pipe, data = sdxl_shaped
    with pytest.raises(UserError, match='advunlearn: expected a pipeline with one text encoder'): unlearn(copy.deepcopy(pipe), data, 'advunlearn', {}, 0)

@pytest.mark.parametrize('method', ['ca', 'salun', 'safegen', 'lcfdsd-ng', 'esd-x', 'ga', 'meta-unlearning-sdd', 'pgu'])
def test_a_model_that_predicts_the_velocity(given, method):
    pipe, data = given
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type='v_prediction')
    changed = moved(pipe.unet, lambda: unlearn(pipe, data, method, {}, 0))
    assert changed and all(p.isfinite().all() for p in pipe.unet.parameters())

def test_every_method_has_settings_that_hold():
    for method in METHODS: config_of(method, PARAMS['unlearn'][method])
    for method, fixed in FIXED.items():
        for k, v in fixed.items():
            other = {'variant': 'u' if v == 'x' else 'x', 'beta': .5, 'base': 'nothing', 'solver': 'cg'}[k]
            with pytest.raises(UserError, match=k): config_of(method, {k: other})
    assert config_of('resalign-first-order', {}).solver == 'identity' and config_of('rece', {}).rounds > 0
    for method, wrong in ('resalign', dict(beta=0.)), ('resalign-first-order', dict(beta=0.)), ('rece', dict(rounds=0)):
        with pytest.raises(UserError, match=next(iter(wrong))): config_of(method, wrong)

with open(ROOT/'nbs/70_baselines/deviations.csv', newline='', encoding='utf-8') as f: LEDGER = list(csv.DictReader(f))

def test_the_ledger_names_methods_and_switches():
    assert {r['method'] for r in LEDGER} >= set(BASELINES)
    for r in LEDGER:
        assert r['what'] and r['here'] and r['method'] in METHODS, r
        assert not r['switch'] or r['switch'] in METHODS[r['method']][1].model_fields, r

OTHERWISE = dict(margin=1e-9, z_t='trained', eta=3., sampling_steps=6, batch=4, params='cross', prior_weight=0., mosaic_weight=.5, block=4, retain_weight=1., mode='iter', accumulate=True, attack_steps=4,
                 contrast_gradient=False, contrast=.5, momentum=.1, steps=3, tokens='rest', rounds=2, share=.2, saliency_batches=1, inner_steps=3, pictures=4, teacher_decay=0., energy=.5)

@pytest.mark.parametrize('method,switch', sorted({(r['method'], r['switch']) for r in LEDGER if r['switch']}))
def test_every_switch_of_the_ledger_changes_the_result(loud, method, switch):
    base, data = loud
    common = dict(steps=4) if 'steps' in METHODS[method][1].model_fields else {}
    ends = []
    for changes in {}, {switch: OTHERWISE[switch]}:
        pipe = copy.deepcopy(base); unlearn(pipe, data, method, common | changes, 0)
        ends.append(torch.cat([p.detach().flatten() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()]))
    assert not torch.equal(*ends)

def test_a_module_is_merged_into_what_was_fine_tuned(given, tmp_path):
    pipe, data = given
    save_pipeline(pipe, tmp_path/'base')
    start = load_pipeline(tmp_path/'base')
    modular = copy.deepcopy(start); unlearn(modular, data, 'modular-lora', {}, 0, save_adapter=tmp_path/'adapter')
    world.write_set(tmp_path/'images', world.scenes('varied', 4))
    for name, module in ('plain', None), ('merged', tmp_path/'adapter'):
        jobs.finetune(tmp_path/'base', tmp_path/'images', tmp_path/name, dict(steps=2), module=module)
    plain, merged = (load_pipeline(tmp_path/n).unet for n in ('plain', 'merged'))
    name = next(n for n, _ in plain.named_parameters() if n.endswith('attn2.to_k.weight'))
    w0, safe, ft, both = (u.get_parameter(name).double() for u in (start.unet, modular.unet, plain, merged))
    assert (safe - w0).abs().max() > 1e-6
    torch.testing.assert_close(both, ft + safe - w0, rtol=0, atol=2e-3*float(w0.abs().max())) # float16 on disk

def test_writing_a_method_takes_less_than_forty_lines():
    nb = json.loads((ROOT/'nbs/70_baselines/99_write_your_own.ipynb').read_text(encoding='utf-8'))
    cell, = (''.join(c['source']) for c in nb['cells'] if 'METHODS[' in ''.join(c['source']) and c['cell_type'] == 'code')
    assert len(cell.strip().splitlines()) < 40
