"Published weights in the formats in which they are published: bit by bit the same, or one line that says what is missing."
import copy, json, os, shutil
from pathlib import Path
import pytest, torch
from diffusers import UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from resalign.checkpoints import LDM, coverage, from_compvis, load_single_file, open_pipeline, put_weights, read_weights
from resalign.core import UserError
from resalign.data import Sample, embed
from resalign.losses import Denoiser
from resalign.pipelines import generate, load_pipeline
from resalign.profiles import how_to_get
from tests.compvis import single_file, small, unet_name, write_single_file

KINDS = 'v1 v2 xl'.split()
COMMIT = '0123456789abcdef0123456789abcdef01234567'

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Of each kind: a pipeline, its diffusers folder, its configuration without weights, its single-file checkpoint; never written to"
    out = {}
    for kind in KINDS:
        tmp = tmp_path_factory.mktemp(kind)
        pipe = small(kind, tmp)
        pipe.save_pretrained(tmp/'folder')
        shutil.copytree(tmp/'folder', tmp/'config', ignore=shutil.ignore_patterns('*.safetensors'))
        out[kind] = pipe, tmp/'folder', tmp/'config', write_single_file(pipe, kind, tmp/'one.safetensors')
    return out

@pytest.fixture
def v1(made): return copy.deepcopy(made['v1'][0])

def parts(pipe): return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}

def same(a, b):
    "The same parts, bit by bit"
    assert parts(a).keys() == parts(b).keys()
    for n, m in parts(a).items():
        mine, theirs = m.state_dict(), parts(b)[n].state_dict()
        assert mine.keys() == theirs.keys(), n
        for k in mine: assert torch.equal(mine[k], theirs[k]), f'{n}: {k}'
    assert a.scheduler.config.prediction_type == b.scheduler.config.prediction_type and type(a.scheduler) is type(b.scheduler)

def answers(pipe): # what the UNet says, what it should say, and a picture
    model, captions = Denoiser(pipe), ['a red robot', 'a blue car']
    gen = torch.Generator().manual_seed(0)
    z, noise, t = torch.randn(2, 4, 8, 8, generator=gen), torch.randn(2, 4, 8, 8, generator=gen), torch.tensor([3, 700])
    s = Sample(z, noise, t, embed(pipe, captions), torch.arange(2))
    with torch.no_grad(): return model.predict(s), model.target(s), torch.from_numpy(generate(pipe, captions, [0, 1], steps=2))

def holds(module, weights):
    "Exactly these, as far as they are named"
    own = module.state_dict()
    for k, v in weights.items(): assert torch.equal(own[k], v), k

def agree(a, b): # weights are the same bits; products of them are not always, for they lie differently in memory
    for (x, y) in zip(answers(a), answers(b)): torch.testing.assert_close(x.float(), y.float(), rtol=1e-4, atol=1. if x.dtype == torch.uint8 else 1e-5)

def moved(module, scale=1.1):
    "The same module with other weights"
    m = copy.deepcopy(module)
    with torch.no_grad():
        for p in m.parameters(): p.mul_(scale).add_(.01)
    return m

def refused(match, f, *args, **kw):
    with pytest.raises(UserError, match=match) as e: f(*args, **kw)
    assert '\n' not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


# ------------------------------------------------------------------ whole pipelines

@pytest.mark.parametrize('kind', KINDS)
def test_folder_and_single_file_hold_the_same(made, kind):
    pipe, folder, config, file = made[kind]
    from_folder, none = open_pipeline(folder)
    from_file, reports = open_pipeline(file, config=config)
    same(from_folder, pipe); same(from_file, pipe)
    agree(pipe, from_folder); agree(pipe, from_file)
    assert not none and {r.part for r in reports} == set(parts(pipe)) and all(r.share == 1. for r in reports)
    assert ('v_prediction' if kind == 'v2' else 'epsilon') in str(reports[0])
    for m in parts(from_file).values(): assert not m.training and not any(p.requires_grad for p in m.parameters())

def test_velocity_is_the_target_of_v2(made):
    pipe, *_ = made['v2']
    _, target, _ = answers(load_single_file(made['v2'][3], made['v2'][2])[0])
    _, noise, _ = answers(made['v1'][0])
    assert not torch.allclose(target, noise)

def test_nothing_asks_the_network(made, monkeypatch):
    import socket
    def no(*a, **kw): raise AssertionError('asked the network')
    monkeypatch.setattr(socket.socket, 'connect', no); monkeypatch.setattr(socket, 'getaddrinfo', no)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    same(open_pipeline(made['v1'][3], config=made['v1'][2])[0], made['v1'][0]); same(open_pipeline(made['xl'][3], config=made['xl'][2])[0], made['xl'][0])

def test_half_precision_becomes_float32(made, tmp_path):
    pipe, _, config, file = made['v1']
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, tmp_path/'half.safetensors')
    got, reports = load_single_file(tmp_path/'half.safetensors', config)
    holds(got.unet, {k: v.half().float() for k, v in pipe.unet.state_dict().items()})
    assert reports[0].dtype == 'float16'

@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    "A hub cache with one repository at one commit, as huggingface_hub keeps it"
    repo = tmp_path/'hub/models--somebody--small'
    shutil.copytree(made['v1'][1], repo/'snapshots'/COMMIT)
    (repo/'refs').mkdir(); (repo/'refs/main').write_text(COMMIT)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return tmp_path/'hub'

def test_hub_id_at_a_revision(hub, made):
    same(open_pipeline('somebody/small', revision=COMMIT)[0], made['v1'][0])
    same(load_pipeline('somebody/small'), made['v1'][0])
    refused('revision 00000000', open_pipeline, 'somebody/small', revision='0'*40)

def test_a_hub_repository_without_its_safety_checker(hub, made):
    "As the doctor's command fetches it: listed in model_index.json, not downloaded"
    index = hub/'models--somebody--small/snapshots'/COMMIT/'model_index.json'
    index.write_text(json.dumps(json.loads(index.read_text()) | dict(safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'], requires_safety_checker=True)))
    got, _ = open_pipeline('somebody/small', revision=COMMIT)
    assert got.safety_checker is None; same(got, made['v1'][0])

def test_gated_or_absent_says_what_to_do(hub):
    text = refused('not here', open_pipeline, 'somebody/gated', revision='abc', size_gb=4.3)
    for words in ('https://huggingface.co/somebody/gated', 'hf auth login', 'hf download somebody/gated --revision abc', 'about 4.3 GB', str(constants.HF_HUB_CACHE)): assert words in text
    assert 'datasets/AIML-TUDA/i2p' in how_to_get('AIML-TUDA/i2p', kind='dataset') and '--type dataset' in how_to_get('AIML-TUDA/i2p', kind='dataset')

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('part, prefix', [('unet', LDM), ('vae', 'first_stage_model.'), ('text_encoder', 'cond'), ('text_encoder_2', 'conditioner.embedders.1')])
def test_a_part_that_is_not_there(made, kind, part, prefix, tmp_path):
    "Even where the configuration folder has weights that diffusers would take instead"
    if part == 'text_encoder_2' and kind != 'xl': return
    if part == 'text_encoder' and kind == 'xl': prefix = 'conditioner.embedders.0'
    pipe, folder, _, file = made[kind]
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(prefix)}, tmp_path/'less.safetensors')
    refused(f'less.safetensors: no {part} ', load_single_file, tmp_path/'less.safetensors', folder)

@pytest.mark.parametrize('kind', KINDS)
def test_a_weight_that_is_not_there(made, kind, tmp_path):
    "Of each part, the first weight by name and the last"
    pipe, _, config, file = made[kind]
    whole = load_file(file)
    owners = {'unet': LDM, 'vae': 'first_stage_model.', **({'text_encoder': 'conditioner.embedders.0.', 'text_encoder_2': 'conditioner.embedders.1.'} if kind == 'xl' else {'text_encoder': 'cond_stage_model.'})}
    for part, prefix in owners.items():
        keys = sorted(k for k in whole if k.startswith(prefix) and not any(x in k for x in ('position_ids', 'logit_scale', 'resblocks.23'))  and not (kind == 'v2' and k.endswith('text_projection')))
        for lost in keys[0], keys[-1]:
            save_file({k: v for k, v in whole.items() if k != lost}, tmp_path/'torn.safetensors')
            refused(f'torn.safetensors: .*{part}.*(missing)', load_single_file, tmp_path/'torn.safetensors', config)

def test_what_the_configuration_does_not_fit(made, tmp_path):
    refused('has no|no text_encoder |no unet|another shape|does not have|are missing', load_single_file, made['v1'][3], made['v2'][2])
    refused('no text_encoder|no text_encoder_2|another', load_single_file, made['v1'][3], made['xl'][2])
    refused('no such folder; a single-file checkpoint needs', load_single_file, made['v1'][3], tmp_path/'nowhere')
    refused('needs `config`', open_pipeline, made['v1'][3])
    shutil.copytree(made['v1'][2], tmp_path/'config'); shutil.rmtree(tmp_path/'config/tokenizer')
    refused('tokenizer/tokenizer_config.json is missing', load_single_file, made['v1'][3], tmp_path/'config')

def test_a_checkpoint_that_says_it_predicts_the_velocity(made, tmp_path):
    _, _, config, file = made['xl']
    save_file(load_file(file) | dict(v_pred=torch.zeros(0)), tmp_path/'v.safetensors')
    refused('predicts the velocity', load_single_file, tmp_path/'v.safetensors', config)

def test_what_is_left_out_is_named(made, tmp_path):
    "An average of the weights, the last layer of OpenCLIP, which SD v2 doesn't read, and what others have put into the file"
    pipe, _, config, file = made['v2']
    more = {f'model_ema.diffusion_model{k}': torch.zeros(1) for k in range(120)} | {'embedding_manager.a': torch.zeros(2)}
    save_file(load_file(file) | more, tmp_path/'more.safetensors')
    got, reports = load_single_file(tmp_path/'more.safetensors', config)
    same(got, pipe)
    left = reports[0].other
    assert left['model_ema'] == 120 and left['embedding_manager'] == 1 and left['buffers'] == 1 and left['schedule'] == 2 and left['cond_stage_model'] == 13 and '120 of model_ema' in str(reports[0])

def test_a_torn_or_foreign_single_file(made, tmp_path):
    config, file = made['v1'][2:]
    (tmp_path/'cut.safetensors').write_bytes(file.read_bytes()[:5000])
    refused('cut.safetensors: not a whole', load_single_file, tmp_path/'cut.safetensors', config)
    refused('gone.safetensors: no such file', load_single_file, tmp_path/'gone.safetensors', config)
    torch.save(dict(a=torch.zeros(1)), tmp_path/'a.ckpt')
    refused("kind of file: unknown '.ckpt'", load_single_file, tmp_path/'a.ckpt', config)
    save_file(copy.deepcopy(made['v1'][0].unet.state_dict()), tmp_path/'unet.safetensors')
    refused('put_weights', load_single_file, tmp_path/'unet.safetensors', config)


# ------------------------------------------------------------------ weights of a part

WAYS = {'plain': lambda k: k, 'unet.': lambda k: f'unet.{k}', 'module.': lambda k: f'module.{k}', 'model.': lambda k: f'model.{k}', 'module.unet.': lambda k: f'module.unet.{k}', 'compiled': lambda k: f'_orig_mod.{k}'}

@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
@pytest.mark.parametrize('way', WAYS)
def test_unet_weights_under_other_names(v1, way, suffix, tmp_path):
    unet = moved(v1.unet); weights = {WAYS[way](k): v.clone() for k, v in unet.state_dict().items()}
    (torch.save if suffix == '.pt' else save_file)(weights, tmp_path/f'w{suffix}')
    words = copy.deepcopy(v1.text_encoder.state_dict())
    report = put_weights(v1, tmp_path/f'w{suffix}')
    holds(v1.unet, unet.state_dict())
    holds(v1.text_encoder, words)
    assert (report.keys, report.parameters, report.share) == (len(weights), sum(p.numel() for p in unet.parameters()), 1.) and not (report.missing or report.unexpected or report.wrong or report.other)

@pytest.mark.parametrize('kind', KINDS)
def test_unet_weights_under_compvis_names(made, kind, tmp_path):
    "A whole checkpoint in which only the UNet was trained, as some are published; and the UNet by itself, without the prefix"
    pipe = copy.deepcopy(made[kind][0]); base = copy.deepcopy(pipe); trained = copy.deepcopy(pipe); trained.unet = moved(pipe.unet)
    weights = {k: v.clone().contiguous() for k, v in single_file(trained, kind).items()}
    torch.save(dict(state_dict=weights, global_step=5), tmp_path/'compvis.pt')
    report = put_weights(pipe, tmp_path/'compvis.pt', 'unet')
    holds(pipe.unet, trained.unet.state_dict())
    assert report.layout == 'CompVis' and report.share == 1. and report.other['first_stage_model'] == len(pipe.vae.state_dict())
    save_file({k.removeprefix(LDM): v for k, v in weights.items() if k.startswith(LDM)}, tmp_path/'raw.safetensors')
    assert put_weights(base, tmp_path/'raw.safetensors').share == 1.
    holds(base.unet, trained.unet.state_dict())

@pytest.mark.parametrize('kind', KINDS)
def test_some_modules_under_compvis_names(made, kind):
    unet = made[kind][0].unet
    weights = {k: v for k, v in single_file(made[kind][0], kind).items() if k.startswith(LDM)}
    for pattern in ('attn2', 'output_blocks.4.', 'label_emb', 'middle_block.1'):
        some = {k: v for k, v in weights.items() if pattern in k}
        found, lost = from_compvis(some, unet)
        assert len(found) == len(some) and not lost and set(found) <= set(unet.state_dict())
        holds(unet, found)

REAL = { # UNet2DConditionModel's settings, number of weights, of parameters, and a name that diffusers knows this kind of checkpoint by
    'v1': (dict(cross_attention_dim=768), 686, 859_520_964, 'output_blocks.11.0.skip_connection.weight'),
    'v2': (dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True), 686, 865_910_724, 'input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight'),
    'xl': (dict(cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True, block_out_channels=(320, 640, 1280), down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
                up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'), transformer_layers_per_block=(1, 2, 10), addition_embed_type='text_time', addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816), 1680, 2_567_463_684, 'input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight')}

@pytest.mark.parametrize('kind', KINDS)
def test_the_names_of_the_real_sizes(kind):
    "Published numbers of weights and parameters, on tensors without data"
    settings, keys, parameters, known = REAL[kind]
    with torch.device('meta'): unet = UNet2DConditionModel(sample_size=64, layers_per_block=2, **settings)
    own = unet.state_dict()
    theirs = {LDM + unet_name(k, unet): v for k, v in own.items()}
    assert len(theirs) == len(own) == keys and sum(v.numel() for v in own.values()) == parameters and LDM + known in theirs
    report, found = coverage(theirs, unet, 'unet', 'real')
    assert report.share == 1. and not (report.missing or report.unexpected or report.wrong) and all(found[k] is theirs[LDM + unet_name(k, unet)] for k in own)

ESD = {'flat': lambda d: {f'{m}.{k}': v for m, part in d.items() for k, v in part.items()}, 'a dict per module': lambda d: {f'unet.{m}': part for m, part in d.items()}}

@pytest.mark.parametrize('way', ESD)
def test_esd_holds_the_trained_modules_alone(v1, way, tmp_path):
    unet, before = moved(v1.unet), copy.deepcopy(v1.unet.state_dict())
    trained = {n: {k: v.bfloat16() for k, v in m.state_dict().items()} for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and 'attn2' in n}
    torch.save(ESD[way](trained), tmp_path/'esd.pt')
    refused(r'604 of 684 weights of the unet are missing.*partial=True', put_weights, v1, tmp_path/'esd.pt')
    holds(v1.unet, before)
    report = put_weights(v1, tmp_path/'esd.pt', partial=True)
    names = set(ESD['flat'](trained))
    holds(v1.unet, {k: v.bfloat16().float() if k in names else before[k] for k, v in unet.state_dict().items()})
    assert set(report.missing) == set(before) - names and report.keys == len(names) and 'missing: 604' in str(report) and report.dtype == 'bfloat16'

ADVUNLEARN = {'wrapped': lambda k: f'text_encoder.text_model.{k}', 'old names': lambda k: f'text_model.{k}', 'module': lambda k: f'module.text_encoder.{k}', 'compvis': lambda k: f'cond_stage_model.transformer.text_model.{k}', 'plain': lambda k: k}

@pytest.mark.parametrize('way', ADVUNLEARN)
def test_advunlearn_holds_a_text_encoder(v1, way, tmp_path):
    text, unet = moved(v1.text_encoder), copy.deepcopy(v1.unet.state_dict())
    weights = {ADVUNLEARN[way](k): v for k, v in text.state_dict().items()} | {ADVUNLEARN[way]('embeddings.position_ids'): torch.arange(77)[None]}
    torch.save(weights, tmp_path/'TextEncoder.pt')
    report = put_weights(v1, tmp_path/'TextEncoder.pt')
    holds(v1.text_encoder, text.state_dict())
    holds(v1.unet, unet)
    assert report.part == 'text_encoder' and report.share == 1. and report.other == dict(buffers=1)

def test_the_second_text_encoder_of_sdxl(made, tmp_path):
    pipe = copy.deepcopy(made['xl'][0]); text = moved(pipe.text_encoder_2)
    save_file({f"text_encoder_2.{k.removeprefix('text_model.')}": v for k, v in text.state_dict().items()}, tmp_path/'two.safetensors')
    assert put_weights(pipe, tmp_path/'two.safetensors').part == 'text_encoder_2'
    holds(pipe.text_encoder_2, text.state_dict())
    refused('part of the pipeline', put_weights, copy.deepcopy(made['v1'][0]), tmp_path/'two.safetensors')

def spoiled(weights, how):
    k = 'mid_block.resnets.0.conv1.weight'
    return {'missing': {n: v for n, v in weights.items() if n != k}, 'unexpected': weights | {'mid_block.resnets.0.conv9.weight': weights[k].clone()}, 'wrong': weights | {k: weights[k][:5].clone()},
            'twice': weights | {f'unet.{k}': weights[k].clone()}, 'nan': weights | {k: weights[k]*torch.nan}, 'lora': weights | {'mid_block.attentions.0.lora_A.weight': torch.zeros(4, 64)},
            'none': {f'resnet.{n}': v for n, v in weights.items()}, 'empty': dict(step=3)}[how]

@pytest.mark.parametrize('partial', [False, True])
@pytest.mark.parametrize('how, match', {'missing': '1 of 684 weights of the unet are missing: mid_block.resnets.0.conv1.weight', 'unexpected': 'does not have: mid_block.resnets.0.conv9.weight',
    'wrong': 'mid_block.resnets.0.conv1.weight is 5x64x3x3, expected 64x64x3x3', 'twice': 'a second time', 'nan': 'not finite: mid_block.resnets.0.conv1.weight', 'lora': 'does not have: mid_block.attentions.0.lora_A.weight',
    'none': 'no weight of the unet', 'empty': 'holds no tensors'}.items())
def test_what_does_not_fit_changes_nothing(v1, how, match, partial, tmp_path):
    if how == 'missing' and partial: return
    before = copy.deepcopy(v1.unet.state_dict())
    torch.save(spoiled({k: v.clone() for k, v in moved(v1.unet).state_dict().items()}, how), tmp_path/'w.pt')
    refused(match, put_weights, v1, tmp_path/'w.pt', partial=partial)
    holds(v1.unet, before)

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_code_in_a_file_does_nothing(v1, tmp_path):
    trap = str(tmp_path/'it ran')
    for name, what in dict(code=dict(a=Trap(trap)), model=v1.unet).items():
        torch.save(what, tmp_path/f'{name}.pt')
        refused('holds more than tensors', put_weights, v1, tmp_path/f'{name}.pt')
    assert not Path(trap).exists()
    (tmp_path/'junk.pt').write_bytes(b'no weights at all'); refused('cannot be read as tensors', read_weights, tmp_path/'junk.pt')
    (tmp_path/'junk.safetensors').write_bytes(b'no weights at all'); refused('cannot be read as tensors', read_weights, tmp_path/'junk.safetensors')
    (tmp_path/'a.zip').write_bytes(b''); refused("kind of file: unknown '.zip'", read_weights, tmp_path/'a.zip')
    refused('no such file', read_weights, tmp_path/'none.pt')

def test_weights_on_top_of_a_single_file(made, tmp_path):
    pipe, _, config, file = made['xl']; unet = moved(pipe.unet)
    torch.save(unet.state_dict(), tmp_path/'final_model.pt')
    got, reports = open_pipeline(file, config=config, weights=tmp_path/'final_model.pt')
    expected = copy.deepcopy(pipe); expected.unet = unet
    agree(expected, got)
    assert [r.part for r in reports][-1] == 'unet' and json.dumps([r.asdict() for r in reports])
