"Every method trains what it says it trains, by the term it is named for; the ledger and the settings name real things."
import copy, csv, json
from pathlib import Path
import pytest, torch, yaml
from resalign.baselines import advunlearn
from resalign.baselines.parts import demo, demo_data, layers, moved
from resalign.core import UserError
from resalign.meta import ResAlignConfig
from resalign.methods import FIXED, METHODS, config_of, unlearn

ROOT = Path(__file__).resolve().parent.parent
PARAMS = yaml.safe_load((ROOT/'params.yaml').read_text())
BASELINES = [m for m in METHODS if m not in ('original', 'ga', 'resalign', 'resalign-first-order')]

@pytest.fixture(scope='module')
def world_of_demo(): return demo()

@pytest.fixture
def given(world_of_demo):
    pipe, data = world_of_demo
    return copy.deepcopy(pipe), data

def linear(names): return {n for n in names if n.endswith('.weight') and '.to_' in n}

WHAT_MOVES = { # of the UNet
    'esd-x': lambda u: set(layers(u, 'cross')), 'esd-u': lambda u: set(layers(u, 'not-cross')), 'ca': lambda u: set(layers(u, 'kv')), 'safegen': lambda u: set(layers(u, 'self')),
    'advunlearn': lambda u: set(), 'lcfdsd-ng': lambda u: set(layers(u, 'all')), 'lcfdsd-lt': lambda u: set(layers(u, 'all')), 'uce': lambda u: set(layers(u, 'kv')),
    'rece': lambda u: set(layers(u, 'kv')), 'salun': lambda u: set(layers(u, 'all')), 'meta-unlearning-esd': lambda u: set(layers(u, 'all')),
    'meta-unlearning-sdd': lambda u: set(layers(u, 'all')), 'modular-lora': lambda u: linear(layers(u, 'attention')), 'pgu': lambda u: linear(layers(u, 'attention'))}
SETTINGS = {'rece': dict(rounds=1)}

@pytest.mark.parametrize('method', BASELINES)
def test_exactly_the_said_parameters_move(given, method):
    pipe, data = given
    words = {n: p.clone() for n, p in pipe.text_encoder.named_parameters()}
    changed = moved(pipe.unet, lambda: unlearn(pipe, data, method, SETTINGS.get(method, {}), 0))
    expected = WHAT_MOVES[method](pipe.unet)
    if method == 'salun': assert changed <= expected and len(changed) > .5*len(expected) # the mask may leave out a whole small one
    else: assert changed == expected
    now = {n for n, p in pipe.text_encoder.named_parameters() if not torch.equal(p, words[n])}
    assert now == (set(advunlearn.trained_params(pipe.text_encoder)) if method == 'advunlearn' else set())
    assert not any(p.requires_grad for p in pipe.unet.parameters())

# The term that a method is named for: with it and without it, weights must differ
TERMS = {'safegen': dict(mosaic_weight=0.), 'lcfdsd-ng': dict(contrast=0.), 'lcfdsd-lt': dict(contrast=0.), 'meta-unlearning-esd': dict(gamma_21=0., gamma_22=0., gamma_23=0.),
         'meta-unlearning-sdd': dict(gamma_21=0., gamma_22=0., gamma_23=0.), 'advunlearn': dict(attack_steps=0), 'esd-x': dict(eta=0.), 'salun': dict(share=1.), 'rece': dict(rounds=0),
         'pgu': dict(energy=1e-6), 'ca': dict(prior_weight=0.), 'uce': dict(erase_scale=1e-9)}

@pytest.mark.parametrize('method', TERMS)
def test_the_named_term_changes_the_result(world_of_demo, method):
    base, data = world_of_demo
    ends = []
    for changes in {}, TERMS[method]:
        pipe = copy.deepcopy(base); unlearn(pipe, data, method, SETTINGS.get(method, {}) | changes, 0)
        ends.append(torch.cat([p.detach().flatten() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()]))
    assert not torch.equal(*ends)

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
    where = (lambda u: linear(layers(u, 'attention'))) if METHODS[method][1] is ResAlignConfig else WHAT_MOVES[method]
    changed = moved(pipe.unet, lambda: unlearn(pipe, data, method, SETTINGS.get(method, {}) | small, 0))
    words = {n for (n, p), q in zip(pipe.text_encoder.named_parameters(), base.text_encoder.parameters()) if not torch.equal(p, q)}
    assert changed <= where(pipe.unet) and (changed or method == 'advunlearn')
    assert words == (set(advunlearn.trained_params(pipe.text_encoder)) if method == 'advunlearn' else set())
    assert all(p.isfinite().all() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters())

def test_every_method_has_settings_that_hold():
    for method in METHODS: config_of(method, PARAMS['unlearn'][method])
    for method, fixed in FIXED.items():
        for k, v in fixed.items():
            other = {'variant': 'u' if v == 'x' else 'x', 'beta': .5, 'rounds': 2, 'base': 'nothing'}[k]
            with pytest.raises(UserError, match=k): config_of(method, {k: other})

def test_the_ledger_names_methods_and_switches():
    with open(ROOT/'nbs/70_baselines/deviations.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert {r['method'] for r in rows} >= set(BASELINES)
    for r in rows:
        assert r['what'] and r['here'] and r['method'] in METHODS, r
        assert not r['switch'] or r['switch'] in METHODS[r['method']][1].model_fields, r

def test_writing_a_method_takes_less_than_forty_lines():
    nb = json.loads((ROOT/'nbs/70_baselines/99_write_your_own.ipynb').read_text(encoding='utf-8'))
    cell, = (''.join(c['source']) for c in nb['cells'] if 'METHODS[' in ''.join(c['source']) and c['cell_type'] == 'code')
    assert len(cell.strip().splitlines()) < 40
