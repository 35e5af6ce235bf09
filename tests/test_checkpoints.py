"""Published weights in the formats in which they are published: bit by bit the same, or one line that says what is
missing."""

import copy, json, os, shutil
from pathlib import Path
import pytest, torch
from diffusers import UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from resalign.model.checkpoints import (LDM, check_config, check_coverage, coverage, coverage_by_part, flatten_tensors,
                                        from_compvis, infer_part, is_compvis, load_single_file, module_key,
                                        open_pipeline, put_weights, read_names, read_weights)
from resalign.model.data import Sample, embed
from resalign.model.losses import Denoiser
from resalign.model.pipelines import generate, load_pipeline
from resalign.real.profiles import Profile
from resalign.real.sources import open_base
from tests.compvis import single_file, small, unet_name, write_single_file
from refusals import said
from each import each

pytestmark = pytest.mark.usefixtures('offline')

KINDS = 'v1 v2 xl'.split()
COMMIT = '0123456789abcdef0123456789abcdef01234567'
CONV = 'mid_block.resnets.0.conv1.weight'
TO_K = 'transformer_blocks.0.attn2.to_k.weight'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Of each kind: a pipeline, its diffusers folder, its configuration without weights, its single-file
    checkpoint; never written to"""
    out = {}
    for kind in KINDS:
        tmp = tmp_path_factory.mktemp(kind)
        pipe = small(kind, tmp)
        pipe.save_pretrained(tmp / 'folder')
        shutil.copytree(tmp / 'folder', tmp / 'config', ignore=shutil.ignore_patterns('*.safetensors'))
        out[kind] = pipe, tmp / 'folder', tmp / 'config', write_single_file(pipe, kind, tmp / 'one.safetensors')
    return out


@pytest.fixture
def v1(made):
    return copy.deepcopy(made['v1'][0])


def parts(pipe):
    return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def count(module):
    return sum(v.numel() for v in module.state_dict().values())


def same(a, b):
    "The same parts, bit by bit"
    assert parts(a).keys() == parts(b).keys()
    for n, m in parts(a).items():
        mine, theirs = m.state_dict(), parts(b)[n].state_dict()
        assert mine.keys() == theirs.keys(), n
        assert not [f'{n}: {k}' for k in mine if not torch.equal(mine[k], theirs[k])]
    assert a.scheduler.config.prediction_type == b.scheduler.config.prediction_type and type(a.scheduler) is type(
        b.scheduler
    )


def holds(module, weights):
    "Exactly these, as far as they are named"
    own = module.state_dict()
    assert not [k for k, v in weights.items() if not torch.equal(own[k], v)]


def question(pipe):
    gen = torch.Generator().manual_seed(0)
    z, noise, t = torch.randn(2, 4, 8, 8, generator=gen), torch.randn(2, 4, 8, 8, generator=gen), torch.tensor([3, 700])
    return Sample(z, noise, t, embed(pipe, ['a fox', 'a bear']), torch.arange(2))


def moved(module):
    "The same module with other weights"
    m = copy.deepcopy(module)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1.1).add_(0.01)
    return m


def refused(words, f, *args, **kw):
    text = said(f, *args, **kw)
    assert text and all(w in text for w in ([words] if isinstance(words, str) else words)), (words, text)


# ------------------------------------------------------------------ names


def test_names():
    # published names: As they stand in v1-5-pruned-emaonly.safetensors
    with torch.device('meta'):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    published = {
        'conv_in.weight': 'input_blocks.0.0.weight',
        'time_embedding.linear_2.bias': 'time_embed.2.bias',
        'down_blocks.0.resnets.1.conv1.weight': 'input_blocks.2.0.in_layers.2.weight',
        f'down_blocks.0.attentions.1.{TO_K}': f'input_blocks.2.1.{TO_K}',
        'down_blocks.0.downsamplers.0.conv.weight': 'input_blocks.3.0.op.weight',
        'down_blocks.1.resnets.0.conv_shortcut.weight': 'input_blocks.4.0.skip_connection.weight',
        'down_blocks.3.resnets.1.time_emb_proj.bias': 'input_blocks.11.0.emb_layers.1.bias',
        'mid_block.resnets.0.norm2.weight': 'middle_block.0.out_layers.0.weight',
        'mid_block.attentions.0.proj_in.weight': 'middle_block.1.proj_in.weight',
        'mid_block.resnets.1.conv2.bias': 'middle_block.2.out_layers.3.bias',
        **{
            f'up_blocks.{b}.upsamplers.0.conv.{k}': f'output_blocks.{at}.conv.{k}'
            for b, at in enumerate(('2.1', '5.2'))
            for k in ('weight', 'bias')
        },
        'up_blocks.3.attentions.2.norm.weight': 'output_blocks.11.1.norm.weight',
        'conv_norm_out.bias': 'out.0.bias',
        'conv_out.weight': 'out.2.weight',
    }
    own = unet.state_dict()
    found, unknown = from_compvis({LDM + theirs: own[k] for k, theirs in published.items()}, unet)
    assert found.keys() == published.keys() and not unknown and all(found[k] is own[k] for k in published)
    assert {k: unet_name(k, unet) for k in published} == published

    # the names of the real sizes: Published numbers of weights and parameters, each weight under its own name, on
    # tensors without data; with the prefix, without it, and below a trainer's
    for kind, (settings, keys, parameters) in REAL.items():
        with torch.device('meta'):
            unet = UNet2DConditionModel(sample_size=64, layers_per_block=2, **settings)
        own = unet.state_dict()
        for prefix in (LDM, '', f'module.{LDM}') if kind == 'v1' else (LDM,):
            theirs = {prefix + unet_name(k, unet): v for k, v in own.items()}
            report, found = coverage(theirs, unet, 'unet', 'real')
            assert (
                is_compvis(theirs)
                and len(theirs) == len(own) == report.keys == keys
                and report.parameters == report.total == parameters
            ), kind
            assert (
                not (report.missing or report.unexpected or report.wrong or report.other)
                and report.layout == 'CompVis'
                and report.share == 1
            )
            assert not [k for k in own if found[k] is not own[k]]

    # whose weight a key is
    own = {'text_model.a', 'b'}
    names = {
        'text_encoder': dict.fromkeys(
            [
                'a',
                'text_model.a',
                'text_encoder.text_model.a',
                'module.text_encoder.a',
                'cond_stage_model.transformer.text_model.a',
                'conditioner.embedders.0.transformer.text_model.a',
            ],
            'text_model.a',
        )
        | {'c': None, 'unet.b': None},
        'unet': {'b': 'b', 'unet.b': 'b', 'model.unet.b': 'b', '_orig_mod.b': 'b', 'vae.b': None, 'b.': None},
    }
    assert {part: {k: module_key(k, own, part) for k in keys} for part, keys in names.items()} == names
    of = dict(unet=['down_blocks.0.a'], text_encoder=['text_model.a'], text_encoder_2=['text_encoder_2.text_model.a'])
    assert (
        {part: infer_part(keys) for part, keys in of.items()} == {k: k for k in of}
        and infer_part(['text_model.a', 'mid_block.attentions.0.a']) == 'unet'
        and infer_part(['x']) == 'unet'
    )
    a, b = torch.zeros(1), torch.ones(2)
    got = flatten_tensors(dict(state_dict=dict(x=a, opt=dict(y=b)), step=3, note='x'))
    assert list(got) == ['x', 'opt.y'] and got['x'] is a and got['opt.y'] is b


XL = dict(
    cross_attention_dim=2048,
    use_linear_projection=True,
    block_out_channels=(320, 640, 1280),
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
    transformer_layers_per_block=(1, 2, 10),
    addition_embed_type='text_time',
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
REAL = {
    'v1': (dict(cross_attention_dim=768), 686, 859_520_964),
    'v2': (dict(cross_attention_dim=1024, use_linear_projection=True), 686, 865_910_724),
    'xl': (XL, 1680, 2_567_463_684),
}


# ------------------------------------------------------------------ whole pipelines


@each('kind', KINDS)
def test_folder_and_single_file_hold_the_same(made, kind):
    """The same bits; the same answers but for rounding, for weights lie differently in memory; the target that the
    configuration names"""
    pipe, folder, config, file = made[kind]
    from_folder, none = open_pipeline(folder)
    from_file, reports = open_pipeline(file, config=config)
    same(from_folder, pipe)
    same(from_file, pipe)
    s, v = question(pipe), kind == 'v2'
    with torch.no_grad():
        torch.testing.assert_close(
            Denoiser(from_file).predict(question(from_file)), Denoiser(pipe).predict(s), rtol=1e-4, atol=1e-5
        )
    a = pipe.scheduler.alphas_cumprod[s.t].view(-1, 1, 1, 1)
    torch.testing.assert_close(
        Denoiser(from_file).target(s), a.sqrt() * s.noise - (1 - a).sqrt() * s.z if v else s.noise
    )
    one, two = (generate(p, ['a fox'], [0], steps=2).astype(int) for p in (pipe, from_file))
    assert abs(one - two).max() <= 1
    assert not none and {r.part: (r.parameters, r.total, r.dtype) for r in reports} == {
        n: (count(m), count(m), 'float32') for n, m in parts(pipe).items()
    }
    assert ('v_prediction' if v else 'epsilon') in reports[0].note and (
        reports[0].missing,
        reports[0].unexpected,
        reports[0].wrong,
    ) == ([], [], [])
    assert not [
        n
        for n, m in parts(from_file).items()
        if m.training or any(p.requires_grad or p.dtype != torch.float32 for p in m.parameters())
    ]


def test_what_is_read_of_a_file(made, tmp_path):
    # half precision becomes float32
    pipe, _, config, file = made['v1']
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, tmp_path / 'half.safetensors'
    )
    got, reports = load_single_file(tmp_path / 'half.safetensors', config)
    for n, m in parts(got).items():
        holds(m, {k: v.half().float() if v.is_floating_point() else v for k, v in parts(pipe)[n].state_dict().items()})
        assert {p.dtype for p in m.parameters()} == {torch.float32}
    assert [r.dtype for r in reports] == ['float16'] * 3

    # what is left out is counted: An average of the weights, the last layer of OpenCLIP, which SD v2 doesn't read, and
    # what others have put into the file
    (tmp_path := tmp_path/'1').mkdir()
    pipe, _, config, file = made['v2']
    more = {f'model_ema.diffusion_model{k}': torch.zeros(1) for k in range(120)} | {
        'embedding_manager.a': torch.zeros(2)
    }
    save_file(load_file(file) | more, tmp_path / 'more.safetensors')
    got, reports = load_single_file(tmp_path / 'more.safetensors', config)
    same(got, pipe)
    assert reports[0].other == dict(
        model_ema=120, embedding_manager=1, buffers=1, schedule=2, cond_stage_model=13
    ) and '120 of model_ema' in str(reports[0])


def test_hub_ids(made, tmp_path, monkeypatch):
    "At a revision; without the safety checker, as the doctor's command fetches it; gated or absent"
    hub = tmp_path / 'hub/models--somebody--small'
    index = hub / 'snapshots' / COMMIT / 'model_index.json'
    shutil.copytree(made['v1'][1], hub / 'snapshots' / COMMIT)
    (hub / 'refs').mkdir()
    (hub / 'refs/main').write_text(COMMIT)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    same(open_pipeline('somebody/small', revision=COMMIT)[0], made['v1'][0])
    index.write_text(
        json.dumps(
            json.loads(index.read_text())
            | dict(safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'], requires_safety_checker=True)
        )
    )
    got = load_pipeline('somebody/small')
    assert got.safety_checker is None
    same(got, made['v1'][0])
    refused('revision 00000000', open_pipeline, 'somebody/small', revision='0' * 40)
    refused(
        (
            'https://huggingface.co/somebody/gated',
            'hf auth login',
            'hf download somebody/gated --revision abc',
            'about 4.3 GB',
            str(tmp_path / 'hub'),
        ),
        open_pipeline,
        'somebody/gated',
        revision='abc',
        size_gb=4.3,
    )


OWNERS = dict(unet=LDM, vae='first_stage_model.', text_encoder='cond_stage_model.')
OWNERS_XL = OWNERS | dict(text_encoder='conditioner.embedders.0.', text_encoder_2='conditioner.embedders.1.')
NOBODY = ('position_ids', 'logit_scale', 'resblocks.23')


def test_what_is_not_in_a_single_file(made, tmp_path):
    "Any part; of each part its last weight by name, and one more than it has"
    wrong = []
    for kind, owners in dict(
        v1=OWNERS, v2={'text_encoder': OWNERS['text_encoder']}, xl={k: v for k, v in OWNERS_XL.items() if k != 'vae'}
    ).items():
        _, folder, config, file = made[kind]
        names, (cls, index) = read_names(file), check_config(config)
        look = lambda some: said(coverage_by_part, some, cls, index, str(config), 'torn')
        for part, prefix in owners.items():
            keys = sorted(
                k
                for k in names
                if k.startswith(prefix)
                and not any(x in k for x in NOBODY)
                and not (kind == 'v2' and k.endswith('text_projection'))
            )
            asked = {f'no {part} ': {k: v for k, v in names.items() if not k.startswith(prefix)}} | {
                f'missing {keys[-1]}': {k: v for k, v in names.items() if k != keys[-1]}
            }
            asked['one more'] = names | {
                prefix + ('input_blocks.1.0.more' if part == 'unet' else 'more'): torch.empty(3, device='meta')
            }
            for how, some in asked.items():
                text = look(some)
                if not text.startswith('torn: ') or part not in text or (how.startswith('no ') and how not in text):
                    wrong.append((kind, part, how, text))
    assert not wrong
    save_file(
        {k: v for k, v in load_file(made['v1'][3]).items() if not k.startswith('first_stage_model.')},
        tmp_path / 'less.safetensors',
    )
    refused(
        'less.safetensors: no vae ', load_single_file, tmp_path / 'less.safetensors', made['v1'][1]
    )  # even where the folder has weights that diffusers would take


def test_files_that_do_not_fit(made, tmp_path):
    # configurations that do not fit
    config, file = made['v1'][2:]
    shutil.copytree(config, tmp_path / 'config')
    shutil.rmtree(tmp_path / 'config/tokenizer')
    save_file(load_file(made['xl'][3]) | dict(v_pred=torch.zeros(0)), tmp_path / 'v.safetensors')
    refused(('another shape', 'proj_in.weight is 32x32x1x1, expected 32x32'), load_single_file, file, made['v2'][2])
    refused('no text_encoder', load_single_file, file, made['xl'][2])
    refused('nowhere: no such folder', load_single_file, file, tmp_path / 'nowhere')
    refused('`config`', open_pipeline, file)
    refused('tokenizer/tokenizer_config.json', load_single_file, file, tmp_path / 'config')
    refused(
        ('v_pred', 'scheduler_config.json says epsilon'), load_single_file, tmp_path / 'v.safetensors', made['xl'][2]
    )

    # a torn or foreign single file
    (tmp_path := tmp_path/'1').mkdir()
    config, file = made['v1'][2:]
    (tmp_path / 'cut.safetensors').write_bytes(file.read_bytes()[:5000])
    torch.save(dict(a=torch.zeros(1)), tmp_path / 'a.ckpt')
    save_file({CONV: torch.zeros(2)}, tmp_path / 'unet.safetensors')
    for name, words in dict(
        cut='cut.safetensors: not a whole', gone='gone.safetensors: no such file', unet='put_weights'
    ).items():
        refused(words, load_single_file, tmp_path / f'{name}.safetensors', config)
    refused("unknown '.ckpt'", load_single_file, tmp_path / 'a.ckpt', config)


# ------------------------------------------------------------------ weights of a part


def test_esd_holds_the_trained_modules_alone(v1, tmp_path):
    "Refused without partial=True; with it exactly these, and the figures of the report"
    unet, before = moved(v1.unet), copy.deepcopy(v1.unet.state_dict())
    trained = {
        n: {k: v.bfloat16() for k, v in m.state_dict().items()}
        for n, m in unet.named_modules()
        if isinstance(m, torch.nn.Linear) and 'attn2' in n
    }
    named = {f'{m}.{k}': v for m, part in trained.items() for k, v in part.items()}
    expected = {k: named[k].float() if k in named else v for k, v in before.items()}
    for way in (named, {f'unet.{m}': part for m, part in trained.items()}):
        v1.unet.load_state_dict(before)
        torch.save(way, tmp_path / 'esd.pt')
        refused(('604 of 684 weights of the unet', 'partial=True'), put_weights, v1, tmp_path / 'esd.pt')
        holds(v1.unet, before)
        report = put_weights(v1, tmp_path / 'esd.pt', partial=True)
        holds(v1.unet, expected)
        assert (report.keys, report.parameters, report.total) == (
            80,
            sum(v.numel() for v in named.values()),
            count(unet),
        ) and report.share == report.parameters / report.total
        assert (set(report.missing), report.unexpected, report.wrong, report.dtype, report.part, report.layout) == (
            set(before) - set(named),
            [],
            [],
            'bfloat16',
            'unet',
            'diffusers',
        ) and 'missing: 604' in str(report)


def test_text_encoders(v1, tmp_path, made):
    # advunlearn holds a text encoder: Under any of the names in use; the UNet stays as it was
    text, unet = moved(v1.text_encoder), copy.deepcopy(v1.unet.state_dict())
    for prefix in (
        'text_encoder.text_model.',
        'text_model.',
        'module.text_encoder.',
        'cond_stage_model.transformer.text_model.',
        '',
    ):
        pipe = copy.copy(v1)
        pipe.text_encoder = copy.deepcopy(v1.text_encoder)
        torch.save(
            {prefix + k.removeprefix('text_model.'): v for k, v in text.state_dict().items()}
            | {prefix + 'embeddings.position_ids': torch.arange(77)[None]},
            tmp_path / 'TextEncoder.pt',
        )
        report = put_weights(pipe, tmp_path / 'TextEncoder.pt')
        holds(pipe.text_encoder, text.state_dict())
        assert (report.part, report.share, report.other) == ('text_encoder', 1.0, dict(buffers=1)), prefix
    holds(v1.unet, unet)

    # the second text encoder of sdxl
    (tmp_path := tmp_path/'1').mkdir()
    pipe = copy.deepcopy(made['xl'][0])
    text = moved(pipe.text_encoder_2)
    save_file(
        {f"text_encoder_2.{k.removeprefix('text_model.')}": v for k, v in text.state_dict().items()},
        tmp_path / 'two.safetensors',
    )
    assert put_weights(pipe, tmp_path / 'two.safetensors').part == 'text_encoder_2'
    holds(pipe.text_encoder_2, text.state_dict())
    holds(pipe.text_encoder, made['xl'][0].text_encoder.state_dict())
    refused(('two.safetensors', "unknown 'text_encoder_2'"), put_weights, made['v1'][0], tmp_path / 'two.safetensors')


def test_what_does_not_fit_changes_nothing(v1, tmp_path):
    "One too few, one too many, another shape, one twice, none; and nothing is put in"
    before = copy.deepcopy(v1.unet.state_dict())
    weights = {k: v.clone() for k, v in moved(v1.unet).state_dict().items()}
    spoiled = {
        ('1 of 684 weights of the unet', CONV): {n: v for n, v in weights.items() if n != CONV},
        ('1 keys', 'mid_block.resnets.0.conv9.weight'): weights | {'mid_block.resnets.0.conv9.weight': weights[CONV]},
        ('1 weights', f'{CONV} is 5x64x3x3, expected 64x64x3x3'): weights | {CONV: weights[CONV][:5]},
        (f'unet.{CONV}', 'a second time'): weights | {f'unet.{CONV}': weights[CONV]},
        ('1 keys', 'lora_A'): weights | {'mid_block.attentions.0.lora_A.weight': torch.zeros(4, 64)},
        ('no weight of the unet', 'resnet.conv_in.weight'): {f'resnet.{n}': v for n, v in weights.items()},
    }

    def check(weights, partial):
        check_coverage(coverage(weights, v1.unet, 'unet', 'w.pt')[0], partial)

    wrong = [
        (words, partial, text)
        for words, bad in spoiled.items()
        for partial in (False, True, None)
        for text in [said(check, bad, partial)]
        if not (text.startswith('w.pt: ') and all(w in text for w in words)) and not (partial and '684' in words[0])
    ]
    assert not wrong and not said(check, weights, False) and not said(check, {CONV: weights[CONV]}, True)
    assert 'partial=True' in said(check, {CONV: weights[CONV]}, False) and 'partial' not in said(
        check, {CONV: weights[CONV]}, None
    )
    bad = lambda value: weights | {CONV: torch.where(torch.arange(9).view(3, 3) == 4, value, weights[CONV])}
    for words, some in [
        ('not finite: ' + CONV, bad(torch.nan)),
        ('not finite: ' + CONV, bad(torch.inf)),
        *((words[1], s) for words, s in list(spoiled.items())[:2]),
        ('no tensors', dict(step=3)),
    ]:
        torch.save(some, tmp_path / 'w.pt')
        refused(words, put_weights, v1, tmp_path / 'w.pt')
        holds(v1.unet, before)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_does_nothing(v1, tmp_path):
    trap = str(tmp_path / 'it ran')
    for name, what in dict(code=dict(a=Trap(trap)), model=v1.text_encoder).items():
        torch.save(what, tmp_path / f'{name}.pt')
        refused('more than tensors', put_weights, v1, tmp_path / f'{name}.pt')
    assert not Path(trap).exists()
    for name, words in {
        'junk.pt': 'cannot be read as tensors',
        'junk.safetensors': 'cannot be read as tensors',
        'a.zip': "unknown '.zip'",
    }.items():
        (tmp_path / name).write_bytes(b'no weights at all')
        refused((name, words), read_weights, tmp_path / name)
    refused('no such file', read_weights, tmp_path / 'none.pt')


def test_weights_on_top_of_a_single_file(made, tmp_path):
    "Asked for directly, and by a profile"
    pipe, _, config, file = made['v1']
    unet = moved(pipe.unet)
    torch.save(unet.state_dict(), tmp_path / 'final_model.pt')
    profile = Profile(
        base=dict(path=str(file)), config=str(config), weights=dict(path=str(tmp_path / 'final_model.pt'))
    )
    for got, reports in (open_pipeline(file, config=config, weights=tmp_path / 'final_model.pt'), open_base(profile)):
        holds(got.unet, unet.state_dict())
        holds(got.vae, pipe.vae.state_dict())
        assert [r.part for r in reports] == ['unet', 'vae', 'text_encoder', 'unet'] and json.dumps(
            [r.asdict() for r in reports]
        )
    assert single_file(pipe, 'v1').keys() >= {f'{LDM}out.2.weight', 'betas'}


def test_a_part_is_the_one_that_was_asked_for(made, tmp_path):
    "Some weights of the VAE, by names that say nothing, as a profile asks for them"
    pipe, folder = made['v1'][:2]
    some = {k: v for k, v in moved(pipe.vae).state_dict().items() if k.startswith('quant_conv')}
    save_file(some, tmp_path / 'quant.safetensors')
    at = lambda path: dict(path=str(path))
    got, (report,) = open_base(
        Profile(base=at(folder), weights=at(tmp_path / 'quant.safetensors'), part='vae', partial=True)
    )
    holds(got.vae, some)
    holds(got.unet, pipe.unet.state_dict())
    assert (report.part, report.keys) == ('vae', 2)
