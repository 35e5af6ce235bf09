"""FLUX and SD3 from folder to folder: the layout on disk, the round trip through diffusers, the LoRA loaders, and two
steps of every method, or the one line that says why there are none."""
import copy, json

import pytest, torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

import resalign
from resalign.baselines import methods
from resalign.baselines.methods import METHODS, run_method
from resalign.method.demo import demo_captions, demo_data
from resalign.core.runs import generator
from resalign.core.settings import UserError
from resalign.method.finetune import FinetuneConfig, finetune
from resalign.model.data import draw_sample, embed
from resalign.model.flow import HEARS, build_flux, flow_belongs, flow_layers, published, training_gb
from resalign.model.losses import FlowDenoiser, FluxDenoiser, denoiser
from resalign.model.pipelines import build_sd3, check_pipeline, generate, load_pipeline, save_pipeline
from resalign.real import doctor
from resalign.real.profiles import profile_of
from resalign.use.jobs import load_bank
from each import each
from made import write_sets

CAPTIONS = demo_captions()
BUILD = dict(sd3=lambda: build_sd3(CAPTIONS), flux=lambda: build_flux(CAPTIONS), schnell=lambda: build_flux(CAPTIONS, False))


@pytest.fixture(scope='module')
def given():
    "name -> pipeline, data"
    out = {}
    for name in ('sd3', 'flux'):
        pipe = BUILD[name]()
        out[name] = pipe, demo_data(pipe, 4)
    return out


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('flux')
    for name in BUILD: save_pipeline(BUILD[name](), tmp/name)
    write_sets(tmp, unsafe=4, retain=4)
    return tmp


def test_the_layout_on_disk_is_the_published_one(folder):
    "Classes, folders and files of black-forest-labs/FLUX.1-dev; nothing of ours in the configurations"
    index = json.loads((folder/'flux/model_index.json').read_text())
    assert {k: v for k, v in index.items() if isinstance(v, list)} == dict(
        scheduler=['diffusers', 'FlowMatchEulerDiscreteScheduler'], text_encoder=['transformers', 'CLIPTextModel'],
        text_encoder_2=['transformers', 'T5EncoderModel'], tokenizer=['transformers', 'CLIPTokenizer'],
        tokenizer_2=['transformers', index['tokenizer_2'][1]], transformer=['diffusers', 'FluxTransformer2DModel'],
        vae=['diffusers', 'AutoencoderKL'], image_encoder=[None, None], feature_extractor=[None, None])
    assert index['_class_name'] == 'FluxPipeline' and index['tokenizer_2'][1].startswith('T5Tokenizer')
    net = json.loads((folder/'flux/transformer/config.json').read_text())
    assert 'sample_size' not in net and net['guidance_embeds'] and net['in_channels'] == 16
    assert not json.loads((folder/'schnell/transformer/config.json').read_text())['guidance_embeds']
    files = {p.relative_to(folder/'flux').as_posix() for p in (folder/'flux').rglob('*') if p.is_file()}
    assert {'transformer/diffusion_pytorch_model.safetensors', 'vae/diffusion_pytorch_model.safetensors',
            'text_encoder/model.safetensors', 'text_encoder_2/model.safetensors', 'scheduler/scheduler_config.json',
            'tokenizer_2/tokenizer.json'} <= files


@each('name, cls', [('sd3', FlowDenoiser), ('flux', FluxDenoiser), ('schnell', FluxDenoiser)])
def test_a_folder_is_read_as_plain_diffusers_reads_it(folder, name, cls):
    ours = load_pipeline(folder/name)
    absent = dict(text_encoder_3=None, tokenizer_3=None) if name == 'sd3' else {}
    plain = {'sd3': StableDiffusion3Pipeline}.get(name, FluxPipeline).from_pretrained(folder/name, dtype=torch.float32, **absent)
    assert type(ours) is type(plain) and type(denoiser(ours)) is cls
    for part in ('transformer', 'vae', 'text_encoder', 'text_encoder_2'):
        for p, q in zip(getattr(ours, part).parameters(), getattr(plain, part).parameters(), strict=True): assert torch.equal(p, q)
    z, text, t = torch.randn(2, 4, 8, 8, generator=generator(0)), embed(ours, ['a fox', 'a bear']), torch.tensor([100, 900])
    assert torch.equal(denoiser(ours)(z, t, text), denoiser(plain)(z, t, text))
    images = generate(ours, ['a fox'], [0], steps=2, guidance=3.)
    assert images.shape == (1, 64, 64, 3)


def test_guidance_is_heard_where_it_was_learned(folder):
    for name, heard in dict(flux=True, schnell=False).items():
        model = denoiser(load_pipeline(folder/name))
        z, text, t = torch.randn(1, 4, 8, 8, generator=generator(0)), embed(load_pipeline(folder/name), ['a fox']), torch.tensor([500])
        was = model(z, t, text)
        model.guidance = 1.
        assert torch.equal(was, model(z, t, text)) != heard


def test_pictures_of_another_size_shift_the_path():
    "μ is linear between 256 and 4,096 tokens; the small one has 16"
    model = denoiser(BUILD['flux']())
    mu = .5 + (1.15 - .5)*(16 - 256)/(4096 - 256)
    u = torch.tensor([1, 500, 1000])/1000
    s = torch.tensor(mu).exp()
    torch.testing.assert_close(model.sigmas[[0, 499, 999]], s*u/(1 + (s - 1)*u))


CHANGES = { # which parameters two steps move; adapters are merged into attention
    'original': lambda n: False, 'uce': lambda n: n == 'context_embedder.weight', 'rece': lambda n: n == 'context_embedder.weight',
    'esd-x': lambda n: flow_belongs(n, 'cross'), 'esd-u': lambda n: flow_belongs(n, 'not-cross'),
    'ca': lambda n: flow_belongs(n, 'kv')}
CHANGES |= dict.fromkeys(['salun', 'meta-unlearning-esd', 'meta-unlearning-sdd', 'meta-unlearning-released', 'pgu'], lambda n: True)
ADAPTED = ('ga', 'resalign', 'resalign-first-order', 'modular-lora', 'esd-retain', 'resalign-esd', 'ca-retain', 'resalign-ca')
CHANGES |= dict.fromkeys(ADAPTED, lambda n: '.attn.' in n)


@each('name, method', [(name, m) for name in ('sd3', 'flux') for m in METHODS])
def test_two_steps_of_every_method_or_why_not(given, name, method):
    pipe, data = given[name]
    before = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters()}
    quick = dict(steps=2, batch=2, unsafe_bank=4, retain_bank=4, unsafe_batch=2, retain_batch=2, prompts=2, sampling_steps=2,
                 pictures=2, samples=4, saliency_batches=1)
    settings = {k: v for k, v in quick.items() if k in METHODS[method].config.model_fields}
    if method == 'resalign': settings['samples'] = 1
    try: run_method(pipe, data, method, settings)
    except UserError as e:
        assert method not in CHANGES and '\n' not in str(e)
        assert str(e).startswith(f'{method}: not defined on a rectified-flow transformer (SD3, FLUX): it')
        return
    changed = {n for n, p in pipe.transformer.named_parameters() if not torch.equal(p, before[n])}
    try:
        wrong = {n for n in changed if not CHANGES[method](n)}
        assert not wrong and bool(changed) == (method != 'original')
        assert all(p.isfinite().all() for p in pipe.transformer.parameters())
        if method in ADAPTED: assert any(h in n for n in changed for h in HEARS)
    finally:
        with torch.no_grad():
            for n, p in pipe.transformer.named_parameters(): p.copy_(before[n])


@each('name', ['sd3', 'flux'])
def test_uce_sends_the_concept_where_its_guide_goes(given, name):
    """With nothing to preserve, the map makes of the last erased word what it made of the last word before it; its
    bias stays. Positions are T5's on FLUX, CLIP's on SD3"""
    pipe, data = given[name]
    map, tokenizer = pipe.transformer.context_embedder, pipe.tokenizer_2 if name == 'flux' else pipe.tokenizer
    W0, b0 = map.weight.detach().clone(), map.bias.detach().clone()
    run_method(pipe, data, 'uce', dict(ridge=1e-6, preserve_scale=0.))
    W = map.weight.detach().clone()
    with torch.no_grad(): map.weight.copy_(W0)
    last = lambda text: embed(pipe, [text])[0, len(tokenizer(text).input_ids) - 2]
    for caption in data.unsafe_captions:
        words = next(w for w in data.erase if w in caption)
        before = caption.partition(words)[0].rstrip()
        c, g = last(f'{before} {words}'), last(before)
        assert (W @ c - W0 @ g).norm() < .02*(W0 @ c - W0 @ g).norm(), caption
    assert torch.equal(map.bias, b0)


def test_from_folder_to_folder(folder, tmp_path):
    "ResAlign on FLUX: saved, loaded by plain diffusers, its adapter by the LoRA loader; then fine-tuned"
    record = resalign.unlearn(folder/'flux', folder/'unsafe', folder/'retain', tmp_path/'new', 'resalign', dict(steps=2, up_std=.1))
    assert record['cost']['steps'] == 2
    check_pipeline(tmp_path/'new')
    merged, base = (FluxPipeline.from_pretrained(p, dtype=torch.float32) for p in (tmp_path/'new', folder/'flux'))
    changed = {n for (n, p), q in zip(merged.transformer.named_parameters(), base.transformer.parameters()) if not torch.equal(p, q)}
    assert changed and all('.attn.' in n for n in changed) and any(n.startswith('single_') for n in changed)
    s = draw_sample(load_bank(base, folder/'unsafe'), 4, generator(0))
    answer = lambda p: denoiser(p).predict(s).detach()
    new, old = answer(merged), answer(base)
    base.load_lora_weights(tmp_path/'new/adapter')
    assert 0 < (answer(base) - new).norm() < .02*(new - old).norm() # float16 on disk
    resalign.finetune(tmp_path/'new', folder/'retain', tmp_path/'tuned', dict(steps=2))
    assert generate(load_pipeline(tmp_path/'tuned'), ['a fox'], [0], steps=2).shape == (1, 64, 64, 3)


def test_an_adapter_of_esd_goes_through_the_loaders_too(given, tmp_path):
    "What is trained through the view is written as a transformer's LoRA"
    for name in ('sd3', 'flux'):
        pipe, data = given[name]
        before = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters()}
        run_method(pipe, data, 'esd-retain', dict(steps=2, up_std=.1), save_adapter=tmp_path/name)
        s = draw_sample(data.unsafe, 4, generator(0))
        new = denoiser(pipe).predict(s).detach()
        with torch.no_grad():
            for n, p in pipe.transformer.named_parameters(): p.copy_(before[n])
        old = denoiser(pipe).predict(s).detach()
        pipe.load_lora_weights(tmp_path/name)
        assert 0 < (denoiser(pipe).predict(s).detach() - new).norm() < .02*(new - old).norm()
        pipe.unload_lora_weights()


def test_the_profiles_name_the_counted_memory():
    "Published sizes in 16 and 32 bits, four pictures at a time, and ESD-x's weights with gradient and moments"
    for name, words, billions in ('sd3', 77, 2.03), ('flux', 512, 11.90):
        parts, profile = published(name), profile_of(name)
        numbers = {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()}
        assert round(numbers['transformer']/1e9, 2) == billions
        need = training_gb(parts, 64*64 + words, 4)
        rest = sum(numbers.values()) - numbers['transformer']
        assert need['weights'] == pytest.approx((2*numbers['transformer'] + 4*rest)/1e9)
        trained = sum(p.numel() for p in flow_layers(parts['transformer'], 'cross').values())
        total = sum(need.values()) + (16 - 2)*trained/1e9
        assert total <= profile.memory_gb <= 1.2*total, (name, total)
        assert doctor.weights_gb(profile, full=False) == pytest.approx(need['weights'], rel=.02)
        assert doctor.activations_gb(profile, 4, full=False) == pytest.approx(need['activations'], rel=.03)
        assert set(profile.unlearn) <= {m for m in METHODS if m not in methods.NO_FLOW} and profile.size == 1024


def test_what_does_not_fit_is_named(folder, tmp_path, given):
    import shutil
    shutil.copytree(folder/'flux', tmp_path/'flux')
    config = tmp_path/'flux/transformer/config.json'
    config.write_text(config.read_text().replace('"in_channels": 16', '"in_channels": 64'))
    with pytest.raises(UserError, match="transformer/config.json: in_channels is 64"): check_pipeline(tmp_path/'flux')
    for algorithm in ('svdiff', 'textual-inversion', 'custom-diffusion'):
        with pytest.raises(UserError, match=f'algorithm: {algorithm} needs a pipeline with a UNet'):
            finetune(given['flux'][0], given['flux'][1].retain, FinetuneConfig(algorithm=algorithm))
    assert set(methods.NO_FLOW) <= set(METHODS)


def test_a_negative_prompt_is_drawn_by_sd3_and_refused_for_flux(given):
    pipes = {name: pipe for name, (pipe, _) in given.items()}
    with pytest.raises(UserError, match='negative: FLUX is distilled'):
        generate(pipes['flux'], ['a'], [1], 1, 3., negative=['b'])
    plain = {name: generate(pipe, ['a'], [1], 1, 3.) for name, pipe in pipes.items()}
    assert (generate(pipes['flux'], ['a'], [1], 1, 3., negative=['']) == plain['flux']).all()
    assert (generate(pipes['sd3'], ['a'], [1], 1, 3., negative=['b']) != plain['sd3']).any()


def test_a_transformer_with_a_weight_that_is_not_finite_is_not_saved(given, tmp_path):
    for name, (pipe, _) in given.items():
        bad = copy.deepcopy(pipe)
        next(bad.transformer.parameters()).data.flatten()[0] = float('nan')
        with pytest.raises(UserError, match='transformer.*finite'): save_pipeline(bad, tmp_path/name)
        assert not (tmp_path/name).exists()
