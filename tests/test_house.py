"""How the house is built: pages in reading order, plain code, stages that depend on what code means."""
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'


def source(cell): return ''.join(cell['source'])
def cells(page): return [source(c) for c in json.loads(page.read_text())['cells'] if c['cell_type'] == 'code']
def hidden(p): return any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts)
def name(p): return p.relative_to(ROOT).as_posix()
def agree(wrong, advice): assert not wrong, '\n'.join([advice, *map(str, wrong)])
def without_magics(code): return '\n'.join(l for l in code.splitlines() if not l.lstrip().startswith(('%', '!')))

PAGES = sorted((p for p in NBS.rglob('*.ipynb') if not hidden(p)), key=lambda p: p.relative_to(NBS).as_posix())


def module_of(page):
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(cells(page)), re.M)
    return f'resalign.{found[1]}' if found else None

MODULES = {module: k for k, page in enumerate(PAGES) if (module := module_of(page))}
STUDIES = sorted(m.rpartition('.')[2] for m in MODULES if m.startswith('resalign.studies.'))


# ------------------------------------------------------------------ pages

def test_pages_and_their_modules():
    # not too many pages
    assert 40 < len(PAGES) <= 79

    # modules stand where their pages do: nbs/4_method/30_resalign.ipynb makes resalign/method/resalign.py
    wrong = []
    for module, k in MODULES.items():
        folder, stem = PAGES[k].parent.name, PAGES[k].stem
        expected = f"resalign.{folder.partition('_')[2]}.{stem.partition('_')[2]}"
        if module != expected: wrong.append(f'{name(PAGES[k])}: exports {module}, expected {expected}')
    agree(wrong, 'default_exp:')


def imported(code): # (line, module) of each import of this package
    for n in ast.walk(ast.parse(without_magics(code))):
        if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('resalign'):
            for a in n.names:
                inner = f'{n.module}.{a.name}'
                yield n.lineno, inner if inner in MODULES else n.module
        if isinstance(n, ast.Import):
            for a in n.names:
                if a.name.startswith('resalign'): yield n.lineno, a.name


def out_of_order(k, page, known=MODULES, packages=('resalign',)):
    "Imports of a later page, or of none"
    for code in cells(page):
        for line, module in imported(code):
            if module in packages or any(m.startswith(f'{module}.') for m in known): continue
            if module not in known: yield f'{name(page)}: imports {module}, which no page makes'
            elif known[module] > k: yield f'{name(page)}: imports {module}, of the later page {PAGES[known[module]].stem}'


def test_a_page_needs_only_earlier_ones():
    # the index and the story show what comes later
    agree([w for k, p in enumerate(PAGES) if p.parent != NBS for w in out_of_order(k, p)], 'reading order:')


def test_packages_are_layers_without_circles():
    done = subprocess.run([Path(sys.executable).with_name('lint-imports'), '--no-cache'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------ plain code

def test_plain_code():
    # ruff: Width, one statement a line, unused and undefined names: pyproject.toml has the rules
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format', 'concise', '--no-cache'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

    # modules: no name that is undefined, or hidden by a star import
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--isolated', '--no-cache', '--output-format', 'concise',
                           '--select', 'F403,F405,F821,F822', 'resalign'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

    # cells are short and plain: Exported cells: 25 lines at most, 10 in the mean; nowhere a conditional expression
    # inside another
    wrong, length = [], []
    for page in PAGES:
        for cell in exported(page):
            length.append(lines(cell))
            if length[-1] > 25: wrong.append(f'{name(page)}: a cell of {length[-1]} lines: {cell.splitlines()[1][:60]}')
        wrong += [f'{name(page)}: {what}' for cell in cells(page) for what in nested_conditionals(cell)]
    agree(wrong, 'split:')
    assert sum(length)/len(length) <= 10


def nested_conditionals(code):
    for n in ast.walk(ast.parse(without_magics(code))):
        if not isinstance(n, ast.IfExp): continue
        if any(isinstance(m, ast.IfExp) for m in ast.walk(n) if m is not n): yield ast.unparse(n)[:90]


def exported(page): return [c for c in cells(page) if re.match(r'#\|\s*export\b', c)]
def lines(cell): return sum(bool(l.strip()) for l in cell.splitlines()[1:])


# ------------------------------------------------------------------ stages

DVC = yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']


def test_stages():
    # a reader can hold the stages in mind
    assert len(DVC) <= 40 and len((ROOT/'dvc.yaml').read_text().splitlines()) <= 250
    assert (ROOT/'dvc.lock').stat().st_size <= 100_000

    # every study is a stage
    assert set(DVC) - {'code'} == set(STUDIES) - NO_STAGE
    agree([s for s in DVC if s != 'code' and f'outs/code/{s}.json' not in DVC[s]['deps']], 'depends not on its code:')
    agree([f'{s}: {DVC[s]["cmd"]}' for s in DVC if s != 'code' and DVC[s]['cmd'] != f'${{run}} {s}'], 'command:')


NO_STAGE = {'models', 'pretraining', 'sd14'} # pages that other studies or other commands use


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "Pages and package by themselves"
    there = tmp_path_factory.mktemp('clone')
    for folder in ('nbs', 'resalign'):
        shutil.copytree(ROOT/folder, there/folder, ignore=shutil.ignore_patterns('.*', '__pycache__'))
    for file in ('settings.ini', 'params.yaml'): shutil.copy(ROOT/file, there)
    return there


# one process for all questions; each page is read once an answer, and what reads the same is parsed once
WRITE = """
import functools, sys
from resalign.use import meaning
for name in ('code_cells', 'tree_of', 'parsed'): setattr(meaning, name, functools.cache(getattr(meaning, name)))
for line in sys.stdin:
    for name in ('code_cells', 'definitions', 'leads_to', 'reached', 'statement_digests'):
        getattr(meaning, name).cache_clear()
    meaning.write_meanings()
    print('written', flush=True)
"""


@pytest.fixture
def meanings(clone):
    "A function: study -> what its code means now"
    env = os.environ | dict(PYTHONPATH=str(clone))
    with subprocess.Popen([sys.executable, '-c', WRITE], cwd=clone, env=env, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        def ask():
            print('what now?', file=process.stdin, flush=True)
            assert process.stdout.readline() == 'written\n'
            return {p.stem: p.read_text() for p in (clone/'outs/code').glob('*.json')}
        yield ask
        process.stdin.close()
    assert process.returncode == 0


def edited(path, old, new):
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, 1))


CONSTANTS = [ # file, a line and another one, studies that must be stale, studies that must not
    ('use/evaluate.py', 'WORLD_SIZE = 64', 'WORLD_SIZE = 65', {'table', 'courses'}, {'base', 'evaluators', 'summary'}),
    ('method/hypergrad.py', 'MARGIN = 0.01', 'MARGIN = 0.02', {'table', 'courses', 'attack'}, {'base', 'evaluators'}),
    ('world/emoji.py', 'RARE = .02', 'RARE = .03', {'base', 'evaluators', 'tuning', 'table'}, {'summary'}),
    ('use/batch.py', 'LONGEST = 100', 'LONGEST = 99', set(), set(STUDIES))]


def test_what_makes_a_study_stale(clone, meanings):
    "Not a comment, a docstring, a page's prose or its name; a constant what uses it, a figure's code its study"
    before = meanings()
    assert set(before) == set(STUDIES)
    def changed(): return {s for s, text in meanings().items() if text != before[s]}
    edited(clone/'resalign/method/finetune.py', 'import', '# a comment\nimport')
    docstring = "The start of the SHA-256 of a picture's pixels"
    edited(clone/'resalign/measure/metrics.py', docstring, 'A picture by its pixels')
    page = next((clone/'nbs/9_studies').glob('*_courses.ipynb'))
    nb = json.loads(page.read_text())
    nb['cells'][1]['source'] = ['# Courses\n', '\n', '> Other words.']
    (page.parent/'99_other_name.ipynb').write_text(json.dumps(nb))
    page.unlink()
    assert changed() == set()
    wrong = []
    for file, old, new, stale, fresh in CONSTANTS:
        edited(clone/'resalign'/file, old, new)
        got = changed()
        edited(clone/'resalign'/file, new, old)
        if not stale <= got or fresh & got: wrong.append((file, got))
    agree(wrong, 'stale:')
    edited(next((clone/'nbs/9_studies').glob('*_attack.ipynb')), 'figsize=(7, 2.6)', 'figsize=(9, 3)')
    assert changed() == {'attack'}


# ------------------------------------------------------------------ methods

SHRINK = [
    '#| default_exp baselines.shrink',
    '''#| export
import torch
from resalign.core.settings import Config
from resalign.method.resalign import Method, UnlearnData

class ShrinkConfig(Config):
    "Settings of a method that scales all weights"
    factor:float = .5

def shrink(pipe, data:UnlearnData, config:ShrinkConfig=ShrinkConfig(), checkpoint=None, save_adapter=None) -> dict:
    "Every weight of the UNet, times `factor`"
    with torch.no_grad():
        for p in pipe.unet.parameters(): p.mul_(config.factor)
    return {}

METHODS = {'shrink': Method(shrink, ShrinkConfig, 'Shrink')}''']
ASKED = '''
import sys, types, torch
from nbdev.export import nb_export
nb_export('nbs/5_baselines/96_shrink.ipynb', lib_path='resalign')
from resalign import METHODS
from resalign.baselines.methods import run_method
from resalign.studies.models import all_methods, settings_of
from resalign.studies import table, tuning
from resalign.use.cli import with_methods
pipe = types.SimpleNamespace(unet=torch.nn.Linear(2, 2, bias=False))
torch.nn.init.ones_(pipe.unet.weight)
run_method(pipe, None, 'shrink', settings_of('shrink'))
trials = [name for name in tuning.cells() if name.startswith('shrink')]
rows = table.models([m for m in all_methods() if m == 'shrink']) # the others wait for their tuning
print(pipe.unet.weight.unique().item(), METHODS['shrink'].label, len(trials), list(rows) == ['shrink-0', 'shrink-1', 'shrink-2'], 'shrink' in with_methods('METHOD_NAMES'))
'''


def test_a_method_is_a_page_and_a_section(clone):
    "It is tuned, stands in the main table and in the command's help, and runs with what was chosen"
    raw = dict(execution_count=None, outputs=[], metadata={})
    code = [raw | dict(cell_type='code', id=f'shrink{k}', source=s.splitlines(True)) for k, s in enumerate(SHRINK)]
    page = clone/'nbs/5_baselines/96_shrink.ipynb'
    page.write_text(json.dumps(dict(cells=code, metadata={}, nbformat=4, nbformat_minor=5)))
    first = '\n  original: {start: {}, trials: [{}]}\n'
    edited(clone/'params.yaml', first, first + '  shrink: {start: {factor: 0.5}, trials: [{}, {factor: 0.1}], chosen: {factor: 0.25}}\n')
    done = subprocess.run([sys.executable, '-c', ASKED], cwd=clone, env=os.environ | dict(PYTHONPATH=str(clone)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['0.25', 'Shrink', '2', 'True', 'True']
