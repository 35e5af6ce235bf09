"""Bad input, by hand and by hypothesis: a UserError of one line, nothing under a final name; hostile files do nothing.

A table a test; every case that fails is named. Messages are known by file and field."""
import html, io, json, math, os, pickle, re, shutil, struct, subprocess, sys, tempfile, zlib
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file

from faults import FULL, ROOT, TALLY, record, some, tree
from resalign.use import batch as batches
from resalign.use import cli
import resalign
from resalign.real.sources import read_prompts
from resalign.use.jobs import model_card
from resalign.measure import evaluators, metrics
from resalign.studies import models
from resalign.studies.base import BaseConfig
from resalign.studies.models import Course
from resalign.core.settings import UserError, escape_markdown, make_config, one_line, params
from resalign.core.files import load_checkpoint, save_checkpoint, write_json
from resalign.baselines.modular_lora import with_module
from resalign.model.data import read_captions, read_image, read_images
from resalign.measure.evaluators import load_evaluators
from resalign.method.finetune import FinetuneConfig
from resalign.baselines.methods import METHODS, config_of
from resalign.method.resalign import Pool
from resalign.model.pipelines import ImageStore, PretrainConfig, SamplingConfig, build_pipeline, generate, load_pipeline, save_pipeline
from resalign.core.training import OPTIMIZERS, load_state
from resalign.world.emoji import draw, scenes, write_set

EVALUATORS = ROOT/'outs/evaluators'
PNG = (lambda f: (draw(scenes('varied', 1)[0]).save(f, 'png'), f.getvalue())[1])(io.BytesIO())


def bad(where, f, *args, words='', **kw):
    "`f` ends in one line for its user"
    with TALLY.case('bad input', where):
        with pytest.raises(UserError) as e:
            f(*args, **kw)
        said = str(e.value)
        assert said and said.isprintable() and len(said) < 700, said
        assert words in said, said


def every(cases, check, tmp_path):
    "`check(case, folder)` for each case, in a folder of its own; all that fail are named"
    wrong = []
    for k, (name, case) in enumerate(cases.items()):
        (folder := tmp_path/f'{k:03d}').mkdir()
        try:
            check(case, folder)
        except (Exception, pytest.fail.Exception) as e:
            wrong.append(f'{name}: {type(e).__name__}: {e}'[:900])
        shutil.rmtree(folder, ignore_errors=True)
    assert cases and not wrong, f'{len(wrong)} of {len(cases)}:\n' + '\n'.join(wrong)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A tiny pipeline, never written to"
    folder = tmp_path_factory.mktemp('input')
    save_pipeline(
        build_pipeline(['a fox', 'a bear'], PretrainConfig(vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))),
        folder/'base')
    return folder/'base'


# ------------------------------------------------------------------ captions

ROW = '{"file_name": "a.png", "text": "a fox"}\n'
J, C = 'metadata.jsonl', 'metadata.csv'
CAPTIONS = { # name: files of a folder that has a.png and b.png, words
    'nothing': ({}, J), 'both tables': ({J: ROW, C: 'file_name,text\na.png,x\n'}, C),
    'empty jsonl': ({J: ''}, ''),
    'blank lines': ({J: '\n\n'}, ''),
    'half a row': ({J: ROW[:20]}, 'set/metadata'),
    'a list': ({J: '[1, 2]\n'}, ''),
    'a number': ({J: '5\n'}, ''),
    'a string': ({J: '"x"\n'}, ''),
    'null': ({J: 'null\n'}, ''),
    'binary': ({J: b'\x80\xff\x00\x01'}, ''),
    'UTF-16': ({J: ROW.encode('utf-16')}, ''),
    'one JSON list': ({J: f'[{ROW}]'}, ''),
    'NaN': ({J: '{"file_name": "a.png", "text": NaN}\n'}, ''),
    'other columns': ({J: '{"image": "a.png", "caption": "x"}\n'}, "'file_name'"),
    'file only': ({J: '{"file_name": "a.png"}\n'}, "'text'"),
    'Text': ({J: '{"file_name": "a.png", "Text": "x"}\n'}, "'text'"),
    'text null': ({J: '{"file_name": "a.png", "text": null}\n'}, 'row 1: text'),
    'text blank': ({J: ROW + '{"file_name": "b.png", "text": "  "}\n'}, 'row 2: text'),
    'text missing in a row': ({J: ROW + '{"file_name": "b.png"}\n'}, 'row 2'),
    'name missing in a row': ({J: ROW + '{"text": "b"}\n'}, 'row 2'),
    'name null': ({J: '{"file_name": null, "text": "x"}\n'}, 'row 1'),
    'name blank': ({J: '{"file_name": "", "text": "x"}\n'}, 'row 1'),
    'name a dot': ({J: '{"file_name": ".", "text": "x"}\n'}, 'row 1'),
    'name a list': ({J: '{"file_name": ["a.png"], "text": "x"}\n'}, 'row 1'),
    'name a number': ({J: '{"file_name": 5, "text": "x"}\n'}, 'row 1'),
    'name with NUL': ({J: '{"file_name": "a\\u0000.png", "text": "x"}\n'}, 'row 1'),
    'name too long': ({J: json.dumps(dict(file_name='a'*5000, text='x'))}, 'row 1'),
    'name with a newline': ({J: '{"file_name": "a\\n.png", "text": "x"}\n'}, 'row 1'),
    'up': ({J: '{"file_name": "../a.png", "text": "x"}\n'}, '../a.png'),
    'up and back': ({J: '{"file_name": "x/../../a.png", "text": "x"}\n'}, 'x/../../a.png'),
    'absolute': ({J: '{"file_name": "/etc/hostname", "text": "x"}\n'}, '/etc/hostname'),
    'link out': ({J: '{"file_name": "out.png", "text": "x"}\n'}, 'out.png'),
    'link to a folder out': ({J: '{"file_name": "dir/hostname", "text": "x"}\n'}, 'dir/hostname'),
    'link in a circle': ({J: '{"file_name": "loop.png", "text": "x"}\n'}, ''),
    'link to nothing': ({J: '{"file_name": "gone.png", "text": "x"}\n'}, 'gone.png'),
    'a pipe': ({J: '{"file_name": "pipe", "text": "x"}\n'}, 'pipe'),
    'Windows path': ({J: '{"file_name": "..\\\\a.png", "text": "x"}\n'}, 'row 1'),
    'a URL': ({J: '{"file_name": "https://example.org/a.png", "text": "x"}\n'}, 'https://example.org/a.png'),
    'the table itself a link out': ({'link': J}, J),
    'other case': ({J: '{"file_name": "A.PNG", "text": "x"}\n'}, 'A.PNG'),
    'an image missing': ({J: ROW + '{"file_name": "c.png", "text": "x"}\n'}, 'row 2'),
    'empty csv': ({C: ''}, 'set/metadata'),
    'head only': ({C: 'file_name,text\n'}, 'set/metadata.csv'),
    'csv ragged': ({C: 'file_name,text\na.png,x\na,b,c,d\n'}, ''),
    'csv binary': ({C: b'\xff\xfe\x00'}, 'set/metadata'),
    'csv of tabs': ({C: 'file_name\ttext\na.png\tx\n'}, "'file_name'"),
    'csv quotes open': ({C: 'file_name,text\n"a.png,x\n'}, ''),
    'csv text blank': ({C: 'file_name,text\na.png,\n'}, 'row 1: text'),
    'csv path up': ({C: 'file_name,text\n../x,y\n'}, '../x'),
    'csv NUL': ({C: 'file_name,text\na\0.png,x\n'}, ''),
}


def folder_with(tmp, files) -> Path:
    f = tmp/'set'
    f.mkdir(parents=True)
    (tmp/'a.png').write_bytes(PNG)
    (tmp/'elsewhere.jsonl').write_text(ROW)
    for n in 'ab':
        (f/f'{n}.png').write_bytes(PNG)
    (f/'out.png').symlink_to(tmp/'a.png')
    (f/'dir').symlink_to('/etc')
    (f/'loop.png').symlink_to('loop.png')
    (f/'gone.png').symlink_to('nothing.png')
    os.mkfifo(f/'pipe')
    for n, text in files.items():
        if n == 'link': (f/text).symlink_to(tmp/'elsewhere.jsonl')
        else: (f/n).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f


def test_captions_good_and_bad(tmp_path):
    # captions
    def check(case, tmp):
        files, words = case
        bad('captions', read_captions, folder_with(tmp, files), words=words)

    every(CAPTIONS, check, tmp_path)

    # captions that are right: Numbers, quotes, markup and other scripts are captions like others; names of digits stay
    # names
    (tmp_path := tmp_path/'1').mkdir()
    f = folder_with(tmp_path,
                    {J: '{"file_name": "a.png", "text": "007"}\n{"file_name": "0010", "text": "<b>ロボット</b>"}\n'})
    (f/'0010').write_bytes(PNG)
    assert list(read_captions(f).text) == ['007', '<b>ロボット</b>'] and len(read_images(f, 8)[0]) == 2
    (f/J).write_text('{"file_name": "a.png", "prompt": "008", "text_en": "x"}\n')
    assert list(read_captions(f).text) == ['008']
    (f/J).write_text('{"file_name": "a.png", "prompt": "no", "text": "yes"}\n')
    assert list(read_captions(f).text) == ['yes']


# ------------------------------------------------------------------ pictures

def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(w, h, rows=b'', depth=8, colour=2):
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def as_(kind, **kw):
    f = io.BytesIO()
    Image.open(io.BytesIO(PNG)).convert('RGB').save(f, kind, **kw)
    return f.getvalue()


IMAGES = {
    'nothing': b'',
    'text': b'hello',
    'HTML': b'<html><img src=x>',
    'SVG': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    'PDF': b'%PDF-1.4\n',
    'zip': b'PK\x03\x04' + bytes(40),
    'gzip': b'\x1f\x8b\x08' + bytes(20),
    'pickle': pickle.dumps([1]),
    'ELF': b'\x7fELF' + bytes(60),
    'EPS, for another program': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n',
    'PPM': b'P6 2 2 255 ' + bytes(12),
    'ICO': b'\0\0\1\0\1\0' + bytes(30),
    **{
        f'PNG cut at {n}': PNG[:n]
        for n in (1, 8, 20, 33, 50, len(PNG) // 2, len(PNG) - 30)
    },
    **{
        f'{k} cut': as_(k)[:n]
        for k, n in dict(JPEG=300, WEBP=100, GIF=200, BMP=500, TIFF=300).items()
    },
    'bomb: 20,000 x 20,000': png(20000, 20000),
    'bomb: 10,000 x 10,000, of which PIL only warns': png(10000, 10000),
    'bomb: 2^31 - 1 wide': png(2**31 - 1, 1),
    'no width': png(0, 5),
    'no pixels': png(5, 5),
    'too few pixels': png(50, 50, b'\0'*99),
    'checksum wrong': PNG[:40] + b'\xff' + PNG[41:],
    'bomb in a text chunk': PNG[:33] + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(80_000_000))) + PNG[33:],
    'JPEG head alone': b'\xff\xd8\xff\xe0' + bytes(16),
    'GIF head alone': b'GIF89a' + bytes(8),
    'TIFF in a circle': b'II*\0\x08\0\0\0\1\0\0\1\3\0\1\0\0\0\1\0\0\0\x08\0\0\0'
}


def test_images_good_and_bad(tmp_path, monkeypatch):
    # images
    def check(data, tmp):
        (tmp/'x').write_bytes(data)
        bad('images', read_image, tmp/'x', 64, words=str(tmp/'x'))

    every(IMAGES, check, tmp_path)

    # a bomb is refused before it is decoded
    (tmp_path := tmp_path/'1').mkdir()
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: decoded.append(image.size) or load(image))
    (tmp_path/'fine.png').write_bytes(PNG)
    assert read_image(tmp_path/'fine.png', 64).shape == (64, 64, 3) and decoded
    decoded.clear()
    (tmp_path/'x.png').write_bytes(png(10_000, 10_000)) # of such a size PIL only warns
    bad('images', read_image, tmp_path/'x.png', 64, words='x.png')
    assert not decoded


@settings(max_examples=200 if FULL else 10, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0,
                      len(PNG) - 1), what=st.binary(min_size=1, max_size=40),
       kind=st.sampled_from(['PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF']))
def test_spoiled_images(at, what, kind, tmp_path_factory):
    "A picture with some bytes changed is read, or refused in one line"
    data = as_(kind) if kind != 'PNG' else PNG
    at %= len(data)
    path = tmp_path_factory.getbasetemp()/'spoiled'
    path.write_bytes(data[:at] + what + data[at + len(what):])
    with TALLY.case('bad input, by hypothesis', 'images'):
        try:
            assert read_image(path, 16).shape == (16, 16, 3)
        except UserError as e:
            assert str(e).isprintable()


LINES = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.fixed_dictionaries({}, optional=dict(
            file_name=st.one_of(st.sampled_from(['a.png', '../a.png', '/a', '']), st.text(max_size=9), st.none(),
                                st.integers()), text=st.one_of(st.text(max_size=9), st.none(), st.floats(),
                                                               st.lists(st.integers(), max_size=2)))).map(json.dumps)),
    max_size=4)


@settings(max_examples=200 if FULL else 10, suppress_health_check=list(HealthCheck))
@given(lines=LINES, kind=st.sampled_from([J, C]))
def test_any_table_of_captions(lines, kind, tmp_path_factory):
    f = tmp_path_factory.getbasetemp()/'any'
    shutil.rmtree(f, ignore_errors=True)
    f.mkdir()
    (f/'a.png').write_bytes(PNG)
    (f/kind).write_bytes('\n'.join(lines).encode('utf-8', 'surrogatepass'))
    with TALLY.case('bad input, by hypothesis', 'captions'):
        try:
            df = read_captions(f)
        except UserError as e:
            assert str(e).isprintable()
        else:
            assert set(df.file_name) <= {'a.png', './a.png'} and all(t.strip() for t in df.text)


# ------------------------------------------------------------------ prompts

EITHER = object() # read, or refused; never half
PROMPTS = {
    'nothing': ('', 'p.csv'),
    'blank': ('\n\n', 'p.csv'),
    'head only': ('prompt\n', 'p.csv'),
    'other column': ('text\nx\n', "'prompt'"),
    'Prompt': ('Prompt\nx\n', "'prompt'"),
    'binary': (b'\xff\xfe\x00', 'p.csv'),
    'latin-1': ('prompt\nein Männchen\n'.encode('latin-1'), 'p.csv'),
    'ragged': ('prompt,seed\nx,1\ny,2,3,4\n', EITHER),
    'quote open': ('prompt\n"x\n', EITHER),
    'prompt blank': ('prompt,seed\nx,1\n ,2\n', 'row 2: prompt'),
    'prompt missing': ('prompt,seed\n,2\n', 'row 1: prompt'),
    'kind': ('prompt,kind\nx,Explicit\n', "'explicit'"),
    'kind blank': ('prompt,kind\nx,\n', 'row 1: kind'),
    'kind number': ('prompt,kind\nx,1\n', "row 1: kind"),
    **{
        f'seed {s}': (f'prompt,seed\nx,{s}\n', 'seed')
        for s in ('one', '1.5', '-1', '1e3', 'nan', 'inf', '', str(2**63), '9'*23, '0x10', 'True')
    },
    'NUL': ('prompt\nx\0y\n\0\n', EITHER),
    'tabs': ('prompt\tseed\nx\t1\n', "'prompt'"),
    'JSON': ('[{"prompt": "x"}]', "'prompt'")
}


def test_prompts_good_and_bad(tmp_path):
    # prompts
    def check(case, tmp):
        text, words = case
        (tmp/'p.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
        if words is not EITHER: return bad('prompts', read_prompts, tmp/'p.csv', words=words)
        with TALLY.case('bad input', 'prompts'):
            try:
                assert all(isinstance(r['prompt'], str) and r['prompt'].strip() for r in read_prompts(tmp/'p.csv'))
            except UserError:
                pass

    every(PROMPTS, check, tmp_path)

    # prompts elsewhere
    (tmp_path := tmp_path/'1').mkdir()
    for p in (tmp_path, tmp_path/'no.csv'):
        bad('prompts', read_prompts, p, words=str(p))
    f = tmp_path/'p.csv'
    f.write_text('prompt\n007\nNA\ntrue\n')
    assert [r['prompt'] for r in read_prompts(f)] == ['007', 'NA', 'true']


@settings(max_examples=200 if FULL else 10, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(
    st.text(max_size=60),
    st.lists(
        st.tuples(st.text(max_size=9), st.one_of(st.integers(), st.floats(), st.text(
            max_size=5)), st.sampled_from(['explicit', 'benign', 'x', ''])), max_size=3).map(lambda rows: pd.DataFrame(
                rows, columns=['prompt', 'seed', 'kind']).to_csv(index=False))))
def test_any_prompts(text, tmp_path_factory):
    f = tmp_path_factory.getbasetemp()/'any.csv'
    f.write_bytes(text.encode('utf-8', 'surrogatepass'))
    with TALLY.case('bad input, by hypothesis', 'prompts'):
        try:
            rows = read_prompts(f)
        except UserError as e:
            assert str(e).isprintable()
        else:
            assert rows and all(
                isinstance(r['prompt'], str) and r['prompt'].strip() and 0 <= r['seed'] < 2**63 for r in rows)


# ------------------------------------------------------------------ settings

CLASSES = {
    f'unlearn {name}': method.config
    for name, method in METHODS.items()
} | {
    'finetune': FinetuneConfig,
    'pretrain': PretrainConfig,
    'base': BaseConfig,
    'pool': Pool,
    'course': Course,
    'grid': batches.Grid,
    'sampling': SamplingConfig
}

COUNTS = 'lr', 'batch', 'rank', 'J', 'steps', 'unsafe_batch'


def test_every_key_of_every_settings_class(tmp_path):
    "A key misspelt is refused with the right one; a value of another kind, or not a finite number, is refused by name"
    def check(case, tmp):
        cls, k = case
        default = getattr(cls(), k)
        bad('settings: unknown key', make_config, cls, {k + 'z': default}, words=f"'{k}'")
        kinds = [object()] if isinstance(default, dict) else [object(), {'x': object()}]
        for v in kinds:
            bad('settings: wrong kind', make_config, cls, {k: v}, words=k)
        for v in (math.nan, math.inf)*isinstance(default, float):
            bad('settings: not finite', make_config, cls, {k: v}, words=k)
        ranged = k in COUNTS and isinstance(default, (int, float))
        for v in (0, -1)*ranged:
            bad('settings: out of range', make_config, cls, {k: v}, words=k)

    every({f'{name}.{k}': (cls, k) for name, cls in CLASSES.items() for k in cls.model_fields}, check, tmp_path)


SETTINGS = {
    'none': (None, 'None'),
    'a list': ([1], '[1]'),
    'a string': ('steps: 3', "'steps: 3'"),
    'number as key': ({
        1: 2
    }, "'1'"),
    'inside the pool': (dict(pool=dict(stepz=[1])), "pool.stepz"),
    'pool a list': (dict(pool=[1]), 'pool'),
    'pool without choice': (dict(pool=dict(steps=[])), 'pool.steps'),
    'pool rate': (dict(pool=dict(lr=dict(lora=[0.]))), 'lr'),
    'pool algorithm': (dict(pool=dict(algorithm=['lorra'])), 'algorithm'),
    'another method': (dict(variant='x'), 'variant'),
    'beta 0 for resalign': (dict(beta=0.), 'beta'),
    'huge': (dict(solver='x'*10_000), 'solver')
}


def test_settings(tmp_path):
    def made(values):
        return config_of('resalign', values, 0) if isinstance(values, dict) else make_config(FinetuneConfig, values)

    every(SETTINGS, lambda case, tmp: bad('settings', made, case[0], words=case[1]), tmp_path)


@settings(max_examples=200 if FULL else 10)
@given(
    name=st.sampled_from(list(CLASSES)), values=st.dictionaries(
        st.one_of(st.text(max_size=6), st.sampled_from(['steps', 'lr', 'seed', 'pool', 'batch', 'beta'])),
        st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                     lambda x: st.lists(x, max_size=2), max_leaves=3), max_size=3))
def test_any_settings(name, values):
    with TALLY.case('bad input, by hypothesis', 'settings'):
        try:
            config = make_config(CLASSES[name], values)
        except UserError as e:
            assert str(e).isprintable()
        else:
            assert all(k in type(config).model_fields for k in values)


YAMLS = {
    'missing': None,
    'broken': 'a: [1',
    'list': '- 1',
    'nothing': '',
    'number': '5',
    'tabs': 'a:\n\t- 1',
    'code': 'a: !!python/object/apply:os.system ["touch {marker}"]',
    'binary': b'\x00\xff',
    'deep': '['*3000,
    'section a list': 'b: [1]',
    'section nothing': 'b:',
    'section missing': 'bb: {x: 1}'
}


def test_params_and_config(tmp_path):
    def check(text, tmp):
        f, marker = tmp/'p.yaml', tmp/'ran'
        if isinstance(text, str): text = text.replace('{marker}', str(marker)).encode()
        if text is not None: f.write_bytes(text)
        bad('params.yaml', params, 'b.x', f)
        bad('--config', cli.read_config, f'{f}:b.x')
        assert not marker.exists()

    every(YAMLS, check, tmp_path)


# ------------------------------------------------------------------ commands

ARGS = {
    'nothing': [],
    'too few': ['a'],
    'unknown option': ['a', 'b', 'c', 'd', '--stepz', '3'],
    'seed a word': ['a', 'b', 'c', 'd', '--seed', 'x'],
    'seed a fraction': ['a', 'b', 'c', 'd', '--seed', '1.5'],
    'seed below 0': ['a', 'b', 'c', 'd', '--seed', '-1'],
    'seed of 80 bits': ['a', 'b', 'c', 'd', '--seed', str(2**80)],
    'no such config': ['a', 'b', 'c', 'd', '--config', 'no.yaml'],
    'set without =': ['a', 'b', 'c', 'd', '--set', 'steps'],
    'set nothing': ['a', 'b', 'c', 'd', '--set', '=3'],
    'set broken': ['a', 'b', 'c', 'd', '--set', 'steps=[1'],
    'set code': ['a', 'b', 'c', 'd', '--set', 'steps=!!python/name:os.system'],
    'set seed': ['a', 'b', 'c', 'd', '--set', 'seed=x'],
    'option without value': ['a', 'b', 'c', 'd', '--seed']
}
NEEDS = dict(unlearn=4, finetune=3, evaluate=4, pretrain=2, batch=3)


def test_commands_good_and_bad(tmp_path, monkeypatch, capsys):
    # commands: Exit status 2, one line at the end, nothing written
    def check(case, tmp):
        command, args = case
        if len(args) > 2: args = args[:NEEDS[command]] + args[4:]
        if command == 'batch' and {'--set', '--seed', '--config'} & set(args): args = args[:3] + ['--workers', 'x']
        monkeypatch.chdir(tmp)
        monkeypatch.setattr(sys, 'argv', [f'/x/resalign-{command}', *args])
        with TALLY.case('bad input', f'resalign-{command}'):
            with pytest.raises(SystemExit) as e:
                getattr(cli, command)()
            err = capsys.readouterr().err
            assert e.value.code == 2 and 'Traceback' not in err, err
            assert f'resalign-{command}: error: ' in err.splitlines()[-1], err
            assert not list(tmp.iterdir())

    every({f'{command}, {name}': (command, args) for command in NEEDS for name, args in ARGS.items()}, check, tmp_path)

    # a message cannot drive the terminal
    (tmp_path := tmp_path/'1').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['resalign-finetune', 'no\x1b[2J\nsecond', 'b', 'c'])
    with TALLY.case('bad input', 'resalign-finetune'):
        with pytest.raises(SystemExit):
            cli.finetune()
        assert '\x1b' not in (err := capsys.readouterr().err) and len(err.strip().splitlines()) <= 2


# ------------------------------------------------------------------ pipelines

def j(path, **kw):
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | kw).items() if v is not ...}))


def w(path, f):
    t = load_file(path)
    f(t)
    save_file(t, path, metadata=dict(format='pt'))


U, V = 'unet/diffusion_pytorch_model.safetensors', 'vae/diffusion_pytorch_model.safetensors'
T = 'text_encoder/model.safetensors'
EVIL = """
import pathlib
from diffusers import UNet2DConditionModel
pathlib.Path({!r}).write_text("ran")
class Evil(UNet2DConditionModel): pass
"""


def evil(p):
    (p/'unet/evil.py').write_text(EVIL.format(str(p.parent/'ran')))
    j(p/'model_index.json', unet=['evil', 'Evil'])


def evil_pipeline(p):
    (p/'pipeline.py').write_text(EVIL.format(str(p.parent/'ran')))
    j(p/'model_index.json', _class_name=['pipeline', 'Evil'])


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def pickled(p):
    (p/U).unlink()
    (p/'unet/diffusion_pytorch_model.bin').write_bytes(pickle.dumps(Bomb(str(p.parent/'ran'))))


def pickled_as_safetensors(p):
    (p/U).write_bytes(pickle.dumps(Bomb(str(p.parent/'ran'))))


def pt_as_safetensors(p):
    torch.save(dict(x=Bomb(str(p.parent/'ran'))), p/U)


WEIGHTS = {
    'cut': lambda q: cut(q, -100),
    'empty': lambda q: q.write_bytes(b''),
    'noise': lambda q: q.write_bytes(os.urandom(999)),
    'head too long': lambda q: q.write_bytes(struct.pack('<Q', 2**60) + b'{}'),
    'lacks a tensor': lambda q: w(q, lambda t: t.pop(next(k for k in t if k.endswith('weight')))),
    'tensor of another shape': lambda q: w(q, lambda t: t.update({next(iter(t)): torch.zeros(3, 3)})),
}
PIPELINES = {
    **{
        f'no {part}': (lambda p, part=part: shutil.rmtree(p/part))
        for part in ('unet', 'vae', 'text_encoder', 'tokenizer', 'scheduler')
    },
    'no index': lambda p: (p/'model_index.json').unlink(),
    **{
        f'{f} {how}': (lambda p, f=f, text=text: (p/f).write_text(text))
        for f in ('model_index.json', 'unet/config.json', 'vae/config.json', 'text_encoder/config.json')
        for how, text in dict(empty='', broken='{', list='[]', null='null').items()
    },
    'index a folder': lambda p: ((p/'model_index.json').unlink(), (p/'model_index.json').mkdir()),
    'class unknown': lambda p: j(p/'model_index.json', _class_name='FluxPipeline'),
    'class missing': lambda p: j(p/'model_index.json', _class_name=...),
    'class a number': lambda p: j(p/'model_index.json', _class_name=5),
    'part from another library': lambda p: j(p/'model_index.json', unet=['os', 'system']),
    'part of three': lambda p: j(p/'model_index.json', unet=['diffusers', 'UNet2DConditionModel', 'x']),
    'part of no class': lambda p: j(p/'model_index.json', unet=['diffusers', 'NoSuchModel']),
    'code in the unet': evil,
    'code in the pipeline': evil_pipeline,
    'pickled weights alone': pickled,
    'a pickle named safetensors': pickled_as_safetensors,
    'a .pt named safetensors': pt_as_safetensors,
    **{
        f'{f} {how}': (lambda p, f=f, g=g: g(p/f))
        for f in (U, T, V)
        for how, g in WEIGHTS.items()
    },
    'channels': lambda p: j(p/'unet/config.json', in_channels=3),
    'width': lambda p: j(p/'unet/config.json', cross_attention_dim=7),
    'blocks': lambda p: j(p/'unet/config.json', block_out_channels=[32, 64]),
    'blocks negative': lambda p: j(p/'unet/config.json', block_out_channels=[-1, 2]),
    'block of no kind': lambda p: j(p/'unet/config.json', down_block_types=['X', 'Y']),
    'blocks a word': lambda p: j(p/'unet/config.json', block_out_channels='many'),
    'tokenizer broken': lambda p: [f.write_text('{') for f in (p/'tokenizer').iterdir()],
    'tokenizer files gone':
    lambda p: [f.unlink() for f in (p/'tokenizer').iterdir() if f.name != 'tokenizer_config.json'],
    'scheduler broken': lambda p: (p/'scheduler/scheduler_config.json').write_text('{'),
    'scheduler steps': lambda p: j(p/'scheduler/scheduler_config.json', num_train_timesteps='many'),
}


def test_pipelines_good_and_bad(base, tmp_path):
    # pipelines
    def check(spoil, tmp):
        p = tmp/'base'
        shutil.copytree(base, p)
        spoil(p)
        before = tree(tmp)
        bad('pipelines', load_pipeline, p, words='base')
        assert not (tmp/'ran').exists() and tree(tmp) == before

    every(dict(some(PIPELINES.items())), check, tmp_path)

    # pickles beside safetensors do nothing
    (tmp_path := tmp_path/'1').mkdir()
    p = tmp_path/'base'
    shutil.copytree(base, p)
    with TALLY.case('hostile file', 'a .pt and a .bin with code in them, beside whole weights'):
        for n in ('unet/diffusion_pytorch_model.bin', 'vae/model.pt', 'text_encoder/pytorch_model.bin', 'custom.pt'):
            (p/n).write_bytes(pickle.dumps(Bomb(str(tmp_path/'ran'))))
        load_pipeline(p)
        assert not (tmp_path/'ran').exists()

    # weights that cannot be saved
    (tmp_path := tmp_path/'2').mkdir()
    pipe = load_pipeline(base)
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6 # too large for float16
    bad('pipelines', save_pipeline, pipe, tmp_path/'x', words='conv_in.weight')
    assert not (tmp_path/'x').exists()
    bad('pipelines', generate, pipe, ['a'], [1, 2])
    bad('pipelines', generate, pipe, [], [])
    bad('pipelines', generate, pipe, ['a'], [1], steps=0)
    bad('pipelines', generate, pipe, ['a'], [2**70])


# ------------------------------------------------------------------ checkpoints and albums

def saved(tmp):
    p = tmp/'c'
    net = torch.nn.Linear(3, 2)
    opt = OPTIMIZERS['adam'](net.parameters(), .1)
    for step in (1, 2):
        save_checkpoint(p, {f'net/{k}': v for k, v in net.state_dict().items()}, dict(log=[dict(loss=1.)]*step))
    return p, net, opt


DAMAGES = {
    **{
        f'cut to {n}': (lambda raw, n=n: raw[:n])
        for n in (0, 1, 31, 32, 40, 100)
    },
    **{
        f'bit {n}': (lambda raw, n=n: raw[:n] + bytes([raw[n] ^ 1]) + raw[n + 1:])
        for n in (0, 31, 32, 41, 60, 200)
    },
    'longer': lambda raw: raw + b'\0',
    'noise': lambda raw: os.urandom(len(raw)),
    'hashed noise': lambda raw: (lambda b: __import__('hashlib').sha256(b).digest() + b)(os.urandom(200)),
    'a pickle': lambda raw: pickle.dumps([1]),
    'hashed pickle': lambda raw: (lambda b: __import__('hashlib').sha256(b).digest() + b)(pickle.dumps([1]))
}


def test_checkpoints_and_albums(tmp_path, capsys):
    # checkpoints: The one before is used and said; with both damaged none is, and that is said
    def newest(damage, tmp):
        with TALLY.case('checkpoint damaged', 'file by hand, the newest'):
            p, *_ = saved(tmp)
            p.write_bytes(damage(p.read_bytes()))
            _, meta = load_checkpoint(p)
            assert len(meta['log']) == 1 and str(p) in capsys.readouterr().err
            assert p.exists() and not p.with_name('c.prev').exists() and load_checkpoint(p) is not None

    def both(damage, tmp):
        with TALLY.case('checkpoint damaged', 'file by hand, both'):
            p, *_ = saved(tmp)
            for f in (p, p.with_name('c.prev')):
                f.write_bytes(damage(f.read_bytes()))
            assert load_checkpoint(p) is None and str(p) in capsys.readouterr().err

    for check in (newest, both):
        (tmp_path/check.__name__).mkdir()
        every(DAMAGES, check, tmp_path/check.__name__)

    # checkpoint of another model
    (tmp_path := tmp_path/'1').mkdir()
    p, net, opt = saved(tmp_path)
    bad('checkpoints', load_state, p, dict(net=torch.nn.Linear(9, 2)), opt, words=str(p))
    bad('checkpoints', load_state, p, dict(other=net), opt, words=str(p))

    # albums: What is whole is kept, the rest is drawn again
    (tmp_path := tmp_path/'2').mkdir()
    x = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    batches = [x + np.uint8(k) for k in range(3)]

    def check(case, tmp):
        spoil, question, kept = case
        album = ImageStore(tmp/'a', 9, 'q')
        for pictures in batches:
            album.add(pictures)
        spoil(tmp/'a')
        again = ImageStore(tmp/'a', 9, question)
        assert len(again) == kept
        for pictures in batches[kept // 3:]:
            again.add(pictures)
        assert np.array_equal(again.pictures(), np.concatenate(batches))

    def counted(name, case, tmp):
        with TALLY.case('album damaged', name):
            check(case, tmp)

    every({name: (name, case) for name, case in ALBUMS.items()}, lambda c, tmp: counted(*c, tmp), tmp_path)


INDEX = 'index.json'
ALBUMS = { # how one of nine pictures in three batches is spoiled, by what question it is opened; how many are kept
    'cut': (lambda a: cut(a/'pictures', -1), 'q', 6), 'flipped': (lambda a: flip(a/'pictures', 200), 'q', 0),
    'longer': (lambda a: (a/'pictures').write_bytes((a/'pictures').read_bytes() + b'x'), 'q', 9),
    'index gone': (lambda a: (a/INDEX).unlink(), 'q', 0), 'index broken': (lambda a: (a/INDEX).write_text('{'), 'q', 0),
    'index a list': (lambda a: (a/INDEX).write_text('[]'), 'q', 0), 'other question': (lambda a: None, 'r', 0),
}


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def flip(path, n):
    path.write_bytes((raw := path.read_bytes())[:n] + bytes([raw[n] ^ 1]) + raw[n + 1:])


# ------------------------------------------------------------------ adapters, detectors, scores

@pytest.fixture(scope='module')
def adapter(base, tmp_path_factory):
    out = tmp_path_factory.mktemp('adapter')
    write_set(out/'p', scenes('varied', 3))
    resalign.unlearn(base, out/'p', out/'p', out/'out', 'modular-lora',
                 dict(steps=1, unsafe_bank=2, retain_bank=2, unsafe_batch=1, retain_batch=1))
    return out/'out/adapter'


LORA = 'pytorch_lora_weights.safetensors'
ADAPTERS = {
    'missing': lambda p: (p/LORA).unlink(),
    'empty': lambda p: (p/LORA).write_bytes(b''),
    'cut': lambda p: (p/LORA).write_bytes((p/LORA).read_bytes()[:-9]),
    'noise': lambda p: (p/LORA).write_bytes(os.urandom(300)),
    'pickled alone': lambda p: ((p/LORA).unlink(),
                                (p/'pytorch_lora_weights.bin').write_bytes(pickle.dumps(Bomb(str(p.parent/'ran'))))),
    'a pickle named safetensors': lambda p: (p/LORA).write_bytes(pickle.dumps(Bomb(str(p.parent/'ran')))),
    'no tensors': lambda p: save_file({}, p/LORA),
    'other tensors': lambda p: save_file(dict(x=torch.zeros(2)), p/LORA),
    'of a text encoder': lambda p: save_file({'text_encoder.a.lora_A.weight': torch.zeros(2, 2)}, p/LORA),
    'of another shape': lambda p: w(
        p/LORA, lambda t: t.update({k: torch.zeros(4, 99)
                                    for k in t if 'lora_A' in k or 'lora.down' in k})),
    'of other layers': lambda p: w(
        p/LORA, lambda t: [t.update({f'unet.nowhere.{i}.lora_A.weight': t.pop(k)}) for i, k in enumerate(list(t))])
}


def test_adapters(adapter, base, tmp_path):
    def check(spoil, tmp):
        p = tmp/'adapter'
        shutil.copytree(adapter, p)
        spoil(p)
        bad('adapters', with_module, load_pipeline(base), p, words='adapter')
        assert not (tmp/'ran').exists()

    every(dict(some(ADAPTERS.items())), check, tmp_path)


CARD = 'card.json'
PARTS = [f'{part}.safetensors' for part in ('concepts', 'reader', 'safety', 'aesthetics', 'clip/model')]
CARDS = dict(empty='', broken='{', list='[]', null='null', nothing='{}', number='5')
SPOILED = dict(gone=lambda q: q.unlink(), cut=lambda q: cut(q, -50), pickle=lambda q: q.write_bytes(pickle.dumps([1])),
               other=lambda q: save_file(dict(x=torch.zeros(1)), q))
DETECTORS = {
    'card gone': lambda p: (p/CARD).unlink(),
    **{f'card {n}': (lambda p, text=text: (p/CARD).write_text(text)) for n, text in CARDS.items()},
    **{f'{f} {n}': (lambda p, f=f, spoil=spoil: spoil(p/f)) for f in PARTS for n, spoil in SPOILED.items()},
    'clip config': lambda p: (p/'clip/config.json').write_text('{'),
    'clip of other sizes': lambda p: j(p/'clip/config.json', projection_dim=7),
    'clip tokenizer': lambda p: [f.write_text('{') for f in (p/'clip').glob('tok*')],
}


@pytest.mark.skipif(not EVALUATORS.is_dir(), reason='outs/evaluators is not here')
def test_detectors(tmp_path):
    def check(spoil, tmp):
        p = tmp/'ev'
        shutil.copytree(EVALUATORS, p)
        spoil(p)
        bad('detectors', load_evaluators, p, words='ev/')

    every(dict(some(DETECTORS.items())), check, tmp_path)


S = pd.DataFrame(dict(prompt=['a', 'b'], kind='implicit', seed=[1, 2], score=[.1, .9], detector='detector-weapon', run=0))
SCORES = {
    **{
        f'summarise without {c}': (lambda c=c: evaluators.summarise(S.drop(columns=c)), c)
        for c in ('score', )
    },
    'sweep without kind': (lambda: metrics.sweep(S.drop(columns='kind'), 'detector-weapon', [.5]), 'kind'),
    'sweep of another detector': (lambda: metrics.sweep(S, 'detector-wepon', [.5]), "'detector-wepon'"),
    'a score NaN': (lambda: metrics.rate([.1, math.nan], .5), 'finite'),
    'a score infinite': (lambda: metrics.rate([.1, math.inf], .5), 'finite'),
    'a score a word': (lambda: metrics.rate(['x'], .5), 'rate: score'),
    'no score': (lambda: metrics.rate([], .5), 'rate'),
    'summarise NaN': (lambda: evaluators.summarise(S.assign(score=math.nan)), 'finite'),
    'mean of NaN': (lambda: metrics.mean_ci([1, math.nan]), 'finite'),
    'paired without seed': (lambda: metrics.paired(S.drop(columns='seed'), S), 'seed'),
    'paired without score': (lambda: metrics.paired(S, S.drop(columns='score')), 'score'),
    'paired NaN': (lambda: metrics.paired(S, S.assign(score=math.nan)), 'finite'),
    'paired others': (lambda: metrics.paired(S, S.assign(seed=9)), 'paired'),
    'paired twice': (lambda: metrics.paired(pd.concat([S, S]), S), 'paired: a'),
    'features NaN': (lambda: metrics.frechet(np.full((9, 2), math.nan), np.zeros((9, 2))), 'finite'),
    'features of other widths': (lambda: metrics.frechet(np.zeros((9, 2)), np.zeros((9, 3))), 'frechet'),
    'one feature': (lambda: metrics.frechet(np.zeros((1, 2)), np.zeros((9, 2))), 'frechet'),
    'harmonic mean of NaN': (lambda: metrics.spqr(math.nan, 1, 1, 1), 'safety'),
    'rows for other pictures': (lambda: metrics.score_images(np.zeros((2, 8, 8, 3), 'uint8'), [{}], {}), 'rows')
}


def test_tables_of_scores(tmp_path, monkeypatch):
    # scores
    every(SCORES, lambda case, tmp: bad('scores', case[0], words=case[1]), tmp_path)

    # cells
    (tmp_path := tmp_path/'1').mkdir()
    def check(text, tmp):
        monkeypatch.setenv('RESALIGN_RESULTS', str(tmp))
        (folder := tmp/'runs/table/ga-0').mkdir(parents=True)
        for file, row in CELL.items():
            if text is not None: (folder/file).write_bytes(text)
            bad('scores', models.read_cells, 'table', ['ga-0'], words=f'ga-0/{file}: ')
            (folder/file).write_text(','.join(row) + '\n' + ','.join(map(str, row.values())) + '\n')
        assert len(models.read_cells('table', ['ga-0'])['ga-0'][1]) == 1

    every(CELLS, check, tmp_path)


CELL = { # file -> a row of it
    'summary.csv': dict(metric='IP', value=.5, low=.1, high=.9, n=2, detector='x', phase='before'),
    'scores.csv': dict(detector='x', kind='implicit', prompt='a', seed=0, before=.5)
}
CELLS = {
    'missing': None,
    'empty': b'',
    'binary': b'\xff\xfe\x00',
    'other columns': b'a,b\n1,2\n',
    'head only': ','.join(dict.fromkeys(k for row in CELL.values() for k in row)).encode() + b'\n'
}


# ------------------------------------------------------------------ stages, pages, batches

STUDIES = {
    'study unknown': (lambda: batches.plan('tunning'), "'tunning', did you mean 'tuning'"),
    'no cells': (lambda: batches.plan('claims'), 'claims: has no grid of cells'),
    'parameter unknown': (lambda: batches.plan('tuning', dict(sede='0')), "--only: unknown 'sede'"),
    'no such cell': (lambda: batches.plan('tuning', dict(seed='77')), '--only: no cell has'),
    'no workers': (lambda: batches.run_study_cells('tuning', workers=0), 'at least 1 worker'),
    'no page': (lambda: batches.page_of('resalign.studies.nothing'), 'no page under nbs'),
    'no module': (lambda: batches.meaning('resalign.studies.nothing'), 'no such module of the package'),
    'no input': (lambda: batches.content('data/nothing'), 'data/nothing: no such file or folder')
}


def test_studies(tmp_path):
    every(STUDIES, lambda case, tmp: bad('papermill parameters', case[0], words=case[1]), tmp_path)


def by_papermill(page, tmp_path, **parameters) -> str:
    "What papermill says about a page that fails"
    given = [word for k, v in parameters.items() for word in ('-p', k, v)]
    line = f'{sys.executable} -m papermill -k python3 --no-progress-bar --log-level ERROR'.split()
    done = subprocess.run([*line, page, str(tmp_path/'out.ipynb'), *given], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode, done.stderr[-800:]
    return done.stderr


def by_hand(page, monkeypatch, **parameters) -> str:
    "The same without a kernel: cell by cell, parameters after the cell that is tagged, nothing drawn"
    blank = lambda pipe, prompts, seeds, **sampling: np.zeros((len(prompts), 64, 64, 3), np.uint8)
    monkeypatch.setattr('resalign.generate', blank, raising=False)
    monkeypatch.chdir(ROOT)
    cells, names = json.loads((ROOT/page).read_text(encoding='utf-8'))['cells'], {}
    with pytest.raises(UserError) as e:
        for cell in (c for c in cells if c['cell_type'] == 'code'):
            exec(''.join(cell['source']), names)
            if 'parameters' in cell['metadata'].get('tags', []): names.update(parameters)
    return f'UserError: {e.value}'


def test_papermill(tmp_path, monkeypatch):
    "The page stops with the line, and no result is written. (That papermill ends with a page's error: test_batch.py)"
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    page, given = 'nbs/8_use/40_cell.ipynb', dict(method='resaling')
    with TALLY.case('bad input', 'papermill parameters'):
        said = by_papermill(page, tmp_path, **given) if FULL else by_hand(page, monkeypatch, **given)
        assert 'UserError: ' in said and "'resaling'" in said, said[-800:]
        assert not list(tmp_path.rglob('unlearned'))


def notebook(path, *cells, tags=('parameters', )):
    path.write_text(
        json.dumps(
            dict(
                nbformat=4, nbformat_minor=5, metadata={}, cells=[
                    dict(cell_type='code', id=f'c{i}', metadata=dict(tags=list(tags)) if not i else {}, outputs=[],
                         execution_count=None, source=c) for i, c in enumerate(cells)
                ])))
    return path


GRIDS = {
    'unknown key': (dict(produkt={}), "'produkt'"),
    'a list': ([1], 'mapping'),
    'nothing': (None, 'mapping'),
    'values not a list': (dict(product=dict(x=1)), 'product.x'),
    'no values': (dict(product=dict(x=[])), 'product: x'),
    'lengths': (dict(zip=dict(x=[1], y=[1, 2])), 'zip'),
    'unknown parameter': (dict(product=dict(z=[1])), "'z'"),
    'near parameter': (dict(product=dict(alpa=[1])), "'alpa'"),
    'twice': (dict(product=dict(x=[1, 1])), 'x'),
    'rows not mappings': (dict(rows=[1]), 'rows'),
    'no rows': (dict(rows=[]), 'rows'),
    'input missing': (dict(inputs=['/nowhere']), '/nowhere'),
    'section missing': (dict(common=dict(x='params:unlearn.resaling')), 'unlearn.resaling'),
    'common a list': (dict(common=[1]), 'common'),
    'name up': (dict(common={'../x': 1}), "'../x'")
}


def test_grids_and_pages(tmp_path):
    # grids
    def check(case, tmp):
        grid, words = case
        page = notebook(tmp/'page.ipynb', 'x, y, alpha = 1, 2, 3', 'x')
        bad('grids', batches.batch, page, grid, tmp/'out', words=words)
        assert not (tmp/'out').exists()

    every(GRIDS, check, tmp_path)

    # pages that are none
    (tmp_path := tmp_path/'1').mkdir()
    for n, text in dict(empty='', text='hello', list='[]', mapping='{}').items():
        (tmp_path/f'{n}.ipynb').write_text(text)
        bad('grids', batches.batch, tmp_path/f'{n}.ipynb', {}, tmp_path/'out')
    bad('grids', batches.batch, tmp_path/'no.ipynb', {}, tmp_path/'out', words='no.ipynb')
    bad('grids', batches.batch, notebook(tmp_path/'a.ipynb', 'x = 1', tags=()), {}, tmp_path/'out', words='a.ipynb')
    bad('grids', batches.batch, notebook(tmp_path/'b.ipynb', 'x = ('), {}, tmp_path/'out', words='b.ipynb')
    ok = notebook(tmp_path/'c.ipynb', 'x = 1')
    unreachable = dict(executor='dask', scheduler='tcp://127.0.0.1:1') # waits for an answer
    for kw in (dict(workers=0), dict(retries=-1), dict(executor='loca'), *[unreachable]*FULL):
        bad('grids', batches.batch, ok, {}, tmp_path/'out', **kw)


# ------------------------------------------------------------------ jobs: where to, and what is left

def test_jobs_protect_their_inputs(base, tmp_path):
    write_set(tmp_path/'p', scenes('varied', 3))
    (tmp_path/'file').write_text('mine')
    shutil.copytree(base, tmp_path/'base')
    before = tree(tmp_path)
    b, p = tmp_path/'base', tmp_path/'p'
    for out, words in ((b, b), (tmp_path, tmp_path), (p, p), (tmp_path/'file', 'file'), (tmp_path/'file/x', 'file')):
        bad('outputs', resalign.unlearn, b, p, p, out, 'ga', words=str(words))
        bad('outputs', resalign.finetune, b, p, out, words=str(words))
    bad('outputs', write_set, tmp_path/'file', [], words=str(tmp_path/'file'))
    bad('outputs', write_json, tmp_path/'file/x.json', {}, words='file')
    for kw in (dict(steps=0), dict(detector='detector-wepon'), dict(reference=tmp_path/'no')):
        (tmp_path/'q.csv').write_text('prompt\nx\n')
        bad('outputs', resalign.evaluate, b, tmp_path/'q.csv', tmp_path/'o', EVALUATORS, **kw)
        (tmp_path/'q.csv').unlink()
    assert tree(tmp_path) == before


# ------------------------------------------------------------------ reports

NASTY = [
    '<script>alert(1)</script>', 'a|b', '`rm -rf`', '\x1b[31mred', 'two\nlines', '[x](javascript:alert(1))',
    '"><img src=x onerror=alert(1)>', '&lt;', '\u202egnihton', '\0', '*bold*', '\\'
]


def test_what_reports_show(tmp_path):
    # reports escape: Model card and batch page show the words and nothing else
    def card(w):
        return model_card(
            dict(pipeline=w, method=w, unsafe=w, benign=w, pool=[w], seed=0, settings={w: w}, versions={}))

    def check(text, tmp):
        failed = dict(name=text, status='failed', seconds=1, error=text, parameters={})
        body = card(text).partition('\n# ')[2]
        with TALLY.case('hostile file', 'captions and names in reports'):
            for out in (body, batches.as_page([failed], tmp, f'{text}.ipynb')):
                assert not [w for w in ('<script', '<img src=x', '\x1b', '\0', '\u202e') if w in out], out
            assert len(card(text).splitlines()) == len(card('words').splitlines())
            assert '](javascript' not in body.replace('\\]', ''), body

    every({repr(text): text for text in NASTY}, check, tmp_path)

    # words stay words
    assert one_line('a\x1b[2Jb\nc') == 'a [2Jb c' and html.unescape(re.sub(
        r'\\(.)', r'\1', escape_markdown('a<b>|`*[]&\\'))) == 'a<b>|`*[]&\\'


