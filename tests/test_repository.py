"""Rules of the house that no notebook can say."""
import ast, csv, hashlib, json, os, re, shlex, shutil, statistics, subprocess, sys
from pathlib import Path

import pytest, yaml

from tools import readme

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB, DVC_YAML = ROOT/'nbs', ROOT/'resalign', ROOT/'dvc.yaml'
MB = 1e6


def name(p): return p.relative_to(ROOT).as_posix()
def tree(folder, glob): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(glob))}
def cells(page, kind='code'): return [c for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])

PAGES = sorted(p for p in NBS.rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts))
EXPERIMENTS = [p for p in PAGES if p.parent == NBS/'experiments']
CODE = sorted([*LIB.rglob('*.py'), *(ROOT/'tools').glob('*.py')])
RESULTS = sorted((ROOT/'results').rglob('*.csv'))
every_page = pytest.mark.parametrize('page', PAGES, ids=name)
every_experiment = pytest.mark.parametrize('page', EXPERIMENTS, ids=name)


def git(*args): return subprocess.run(['git', *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout

def tracked():
    "Files that git has or would take; nothing that is ignored"
    return set(git('ls-files', '-z', '--cached', '--others', '--exclude-standard').split('\0')) - {''}

def run(code, cwd): return subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize('path', '''README.md LICENSE CITATION.cff DEVELOPERS.md Makefile settings.ini params.yaml dvc.yaml dvc.lock
    data.dvc nbs/index.ipynb requirements.lock .ci/run'''.split())
def test_stands(path):
    assert (ROOT/path).is_file(), f'{path} is missing'


# ------------------------------------------------------------------ pages and modules

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The pages and settings.ini by themselves"
    there = tmp_path_factory.mktemp('copy')
    shutil.copytree(NBS, there/'nbs', ignore=shutil.ignore_patterns('.*', '_*'))
    shutil.copy(ROOT/'settings.ini', there)
    return there

def test_pages_are_clean(copy):
    done = run('from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()', copy)
    assert done.returncode == 0 and 'Failed' not in done.stderr, done.stderr
    unclean = [name(p) for p in PAGES if (copy/p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    assert not unclean, f'run nbdev_clean: {unclean}'

def test_modules_are_the_pages(copy):
    done = run('from nbdev.export import *; from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', copy)
    assert done.returncode == 0, done.stderr
    made, ours = tree(copy/'resalign', '*.py'), tree(LIB, '*.py')
    drift = sorted(f for f in made.keys() | ours.keys() if made.get(f) != ours.get(f))
    assert not drift, f'run nbdev_export, and never edit resalign/ by hand: {drift}'

def test_one_page_a_module():
    to = [m for p in PAGES for c in cells(p) for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)]
    assert to and len(to) == len(set(to)), f'two pages export one module: {sorted(to)}'

@every_page
def test_page_is_small(page):
    assert page.stat().st_size <= 500_000, f'{page.stat().st_size/1e3:.0f} kB: fewer or smaller pictures'

@every_page
def test_page_reads_well(page):
    nb = json.loads(page.read_text(encoding='utf-8'))
    first = source(next(c for c in nb['cells'] if not source(c).startswith('#| default_exp')))
    assert re.match(r'# \S.*\n\s*\n> \S', first), 'begins with an H1 and, in the same cell, a one-line quote'
    assert nb['metadata'].get('kernelspec', {}).get('name', 'python3') == 'python3'
    lines = [len(source(c).strip().splitlines()) for c in cells(page) if source(c).strip()]
    assert max(lines) <= 40, f'a code cell of {max(lines)} lines: one idea a cell'
    assert statistics.median(lines) <= 12, f'half of the code cells have {statistics.median(lines):.0f} lines or more'

@every_page
def test_page_ended_well(page):
    "No errors, warnings or progress bars among the outputs that are kept"
    for c in cells(page):
        for o in c['outputs']:
            assert o['output_type'] != 'error' or 'raises-exception' in c['metadata'].get('tags', []), f'an error stands in the outputs: {source(c)[:80]}'
            text = ''.join(o.get('text', []))
            assert not re.search(r'\bit/s\b|\d+%\|', text), f'a progress bar stands in the outputs: {source(c)[:80]}'
            assert 'Warning:' not in text, f'a warning stands in the outputs: {text[:200]}'


# ------------------------------------------------------------------ papermill

def commands():
    "(stage, page pattern, names passed, words) of each papermill command in dvc.yaml"
    file = yaml.safe_load(DVC_YAML.read_text())
    named = {k: v for group in file.get('vars') or [] for k, v in group.items()}
    for stage, body in (file.get('stages') or {}).items():
        cmds = body.get('do', body)['cmd']
        for line in cmds if isinstance(cmds, list) else [cmds]:
            for k, v in named.items(): line = line.replace(f'${{{k}}}', v)
            line = re.sub(r'\$\{[^}]*\}', 'FILLED-IN', line)
            for part in re.split(r'&&|\|\||;|\n', line):
                words = shlex.split(part)
                if 'papermill' not in part: continue
                page = next((w for w in words if w.endswith('.ipynb')), None)
                passed = [b for a, b in zip(words, words[1:]) if a in ('-p', '--parameters', '-r', '--parameters_raw')]
                yield stage, page, passed, words

def parameters(page): return [c for c in cells(page) if 'parameters' in c['metadata'].get('tags', [])]

def assigned(cell):
    "Names that a cell sets at its top level"
    targets = [t for n in ast.parse(source(cell)).body for t in (n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else [])]
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}

@every_experiment
def test_one_parameters_cell(page):
    "Without the tag, papermill would run the defaults and say nothing"
    assert len(parameters(page)) == 1, f'{len(parameters(page))} cells are tagged `parameters`'
    assert not any(re.match(r'#\|\s*(default_exp|export)', source(c)) for c in cells(page)), 'an experiment page exports nothing'

def test_dvc_passes_what_pages_take():
    assert EXPERIMENTS, 'no pages under nbs/experiments/'
    seen = list(commands())
    assert seen, 'no papermill command in dvc.yaml'
    for stage, page, passed, words in seen:
        pages = sorted(ROOT.glob(page.replace('FILLED-IN', '*')))
        assert pages, f'dvc.yaml: {stage} runs {page}, which does not exist'
        assert '-k python3' in ' '.join(words), f'dvc.yaml: {stage}: papermill without -k python3'
        for p in pages:
            unknown = set(passed) - {n for c in parameters(p) for n in assigned(c)}
            assert not unknown, f'dvc.yaml: {stage} passes {sorted(unknown)}, not in the parameters cell of {name(p)}'


def test_stages_take_the_profile_of_params(tmp_path):
    "DVC watches params.yaml: another profile in the shell would change results behind its back"
    file = yaml.safe_load(DVC_YAML.read_text())
    assert all('${run_page}' in body.get('do', body)['cmd'] for body in file['stages'].values())
    run_page = next(group['run_page'] for group in file['vars'] if 'run_page' in group)
    said = subprocess.run(['sh', '-c', f'{run_page.partition("papermill")[0]} echo "${{RESALIGN_PROFILE-none}}"'], cwd=tmp_path, env=os.environ | dict(RESALIGN_PROFILE='sd14'), capture_output=True, text=True)
    assert said.stdout.strip() == 'none', said


# ------------------------------------------------------------------ DVC

def test_lock_agrees():
    "dvc.lock against dvc.yaml, params.yaml and every file that git has; what is merely not restored here does not count"
    for f in (DVC_YAML, ROOT/'dvc.lock'): assert f.is_file(), f'{f.name} is missing'
    done = subprocess.run([sys.executable, '-m', 'dvc', 'status', '--json'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, wrong = tracked(), []
    def in_git(path): return path in ours or any(f.startswith(path.rstrip('/') + '/') for f in ours)
    for stage, changes in json.loads(done.stdout.strip().splitlines()[-1]).items():
        for change in changes:
            if isinstance(change, str): wrong.append(f'{stage}: {change}'); continue
            for kind, paths in change.items():
                for path, what in paths.items() if isinstance(paths, dict) else [(paths, '')]:
                    if what in ('deleted', 'not in cache') and not in_git(path): continue
                    wrong.append(f'{stage}: {kind}: {path} {what}')
    assert not wrong, 'dvc repro, then commit dvc.lock:\n' + '\n'.join(wrong)

def test_store_is_small():
    files = [p for p in (ROOT/'.dvc/store').rglob('*') if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    assert size <= 20*MB, f'the committed store holds {size/MB:.1f} MB, of at most 20'

def test_store_is_whole():
    "Each file of the store is what its name says, and git has it"
    for p in (ROOT/'.dvc/store/files/md5').glob('??/*'):
        assert hashlib.md5(p.read_bytes()).hexdigest() == (p.parent.name + p.name).removesuffix('.dir'), f'{name(p)} is damaged'
        assert name(p) in tracked(), f'{name(p)} is kept out of git'

def test_store_restores():
    "What `make reproduce` restores is there: every cached output of the stages in RESTORED, and data that no stage makes"
    def stored(md5): return ROOT/'.dvc/store/files/md5'/md5[:2]/md5[2:]
    restored = re.search(r'^RESTORED\s*:=\s*(.*)$', (ROOT/'Makefile').read_text(), re.M)[1].split()
    declared = yaml.safe_load(DVC_YAML.read_text())['stages']
    for stage, lock in yaml.safe_load((ROOT/'dvc.lock').read_text())['stages'].items():
        if stage.partition('@')[0] not in restored: continue
        restored = [r for r in restored if r != stage.partition('@')[0]]
        body = declared[stage.partition('@')[0]]
        plain = {p for o in body.get('do', body)['outs'] if isinstance(o, dict) for p, how in o.items() if how.get('cache') is False}
        for out in lock['outs']:
            if out['path'] in plain: continue
            assert stored(out['md5']).is_file(), f"{out['path']} is not in the store: dvc push {stage}"
            if not out['md5'].endswith('.dir'): continue
            for f in json.loads(stored(out['md5']).read_text()):
                assert stored(f['md5']).is_file(), f"{out['path']}/{f['relpath']} is not in the store: dvc push {stage}"
    assert not restored, f'the Makefile restores {restored}, which dvc.lock does not have'
    for source in filter(Path.is_file, ROOT.glob('*.dvc')):
        for out in yaml.safe_load(source.read_text())['outs']: assert stored(out['md5']).is_file(), f'{source.name} is not in the store: dvc push {source.name}'

def test_nothing_large_in_git():
    large = {f: (ROOT/f).stat().st_size for f in tracked() if (ROOT/f).is_file() and not f.startswith('.dvc/store/') and (ROOT/f).stat().st_size > 2*MB}
    assert not large, f'keep these with DVC: {large}'


# ------------------------------------------------------------------ results and README

def test_there_are_results():
    assert (ROOT/'results/main.csv').is_file(), 'results/main.csv is missing'

@pytest.mark.parametrize('path', RESULTS, ids=name)
def test_csv_is_tidy(path):
    with open(path, newline='', encoding='utf-8') as f: head, *rows = csv.reader(f)
    assert head and len(head) == len(set(head)) and all(re.fullmatch(r'[a-z][a-z0-9_]*', h) for h in head), f'one header of plain names: {head}'
    assert rows, 'no rows'
    assert head not in rows, 'the header stands twice'
    assert {len(r) for r in rows} == {len(head)}, 'rows of different lengths'

def test_main_csv_columns():
    with open(ROOT/'results/main.csv', newline='') as f: head = next(csv.reader(f))
    assert head == 'method seed phase finetune metric value low high n detector'.split()

def test_the_table_uses_what_tuning_chose():
    "The same number of trials for every method that has any to make, and the winner's settings in `unlearn`"
    import pandas as pd
    from resalign.stages import best_trials
    settings, rows = yaml.safe_load((ROOT/'params.yaml').read_text()), pd.read_csv(ROOT/'results/tuning.csv')
    trials = {m: t for m, t in settings['tuning']['trials'].items() if m != 'original'}
    assert len({len(t) for t in trials.values()}) == 1, 'unequal budgets'
    best = best_trials(rows, settings=settings['tuning']['settings']).set_index('method')
    for m, tried in trials.items():
        start, chosen = settings['tuning']['settings'][m], tried[best.trial[m]]
        assert settings['unlearn'][m] == start | chosen, f'params.yaml: unlearn.{m}: tuning chose {chosen}'
    first, full = settings['unlearn']['resalign-first-order'], settings['unlearn']['resalign']
    assert {k: full[k] for k in first if k != 'solver'} == {k: v for k, v in first.items() if k != 'solver'}, 'the two rows of ResAlign differ in the solver alone'

def test_readme_is_the_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme.convert(), 'run make readme'

def test_readme_points_at_files():
    missing = [l for l in readme.links((ROOT/'README.md').read_text(encoding='utf-8')) if not (ROOT/l).exists()]
    assert not missing, f'README.md points at {missing}'


# ------------------------------------------------------------------ safety

PICKLE = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}

def unpickles(code):
    "(line, what) of each call that could run code from a file"
    tree = ast.parse(code)
    for n in ast.walk(tree):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            mods = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or '']
            for m in mods:
                if m.split('.')[0] in PICKLE: yield n.lineno, f'import {m}'
            continue
        if not isinstance(n, ast.Call): continue
        called = ast.unparse(n.func)
        word = {k.arg: ast.unparse(k.value) for k in n.keywords}
        if called.endswith('torch.load') and word.get('weights_only') != 'True': yield n.lineno, 'torch.load without weights_only=True'
        if called.endswith('read_pickle'): yield n.lineno, called
        if word.get('allow_pickle', 'False') != 'False': yield n.lineno, f'{called}(allow_pickle)'
        if word.get('trust_remote_code', 'False') != 'False': yield n.lineno, f'{called}(trust_remote_code)'

@pytest.mark.parametrize('code, found', [('import pickle', 1), ('torch.load(f)', 1), ('torch.load(f, weights_only=True)', 0),
                                         ('np.load(f, allow_pickle=True)', 1), ('np.load(f)', 0), ('pd.read_pickle(f)', 1)])
def test_unpickles_is_seen(code, found): assert len(list(unpickles(code))) == found

@pytest.mark.parametrize('path', CODE, ids=name)
def test_nothing_is_unpickled(path):
    found = list(unpickles(path.read_text(encoding='utf-8')))
    assert not found, f'{name(path)}: {found}'

@every_experiment
def test_no_page_unpickles(page):
    for c in cells(page):
        text = '\n'.join(l for l in source(c).splitlines() if not l.lstrip().startswith(('%', '!')))
        assert not list(unpickles(text)), f'{name(page)}: {text[:80]}'


# ------------------------------------------------------------------ the package

def test_lock_covers_what_is_asked():
    "Each name of requirements.in and settings.ini is pinned"
    from configparser import ConfigParser
    def names(text): return {re.match(r'[\w.-]+', l)[0].lower().replace('_', '-') for l in text.split('\n') if l.strip() and l[0] != '#'}
    ini = ConfigParser(); ini.read(ROOT/'settings.ini')
    asked = names((ROOT/'requirements.in').read_text()) | names('\n'.join(f"{ini['DEFAULT']['requirements']} {ini['DEFAULT']['dev_requirements']}".split()))
    lock = (ROOT/'requirements.lock').read_text()
    assert not asked - names(lock), f'not in requirements.lock: {asked - names(lock)}'
    assert all('==' in l and '+' not in l for l in lock.split('\n') if l and l[0] != '#'), 'pin versions, without local suffixes'
    assert not {n for n in names(lock) if n.startswith('nvidia') or n in ('torchvision', 'torchaudio', 'triton')}

def test_environment_is_the_lock():
    from importlib.metadata import PackageNotFoundError, version
    def have(n):
        try: return version(n).partition('+')[0]
        except PackageNotFoundError: return None
    pins = [l.split('==') for f in ('requirements.lock', 'requirements-oracle.lock') for l in (ROOT/f).read_text().split() if '==' in l]
    other = {n: have(n) for n, v in pins if have(n) != v}
    assert pins and not other, f'make env: installed are {other}'

@pytest.mark.parametrize('command', 'unlearn finetune evaluate pretrain batch doctor'.split())
def test_commands_are_installed(command):
    from importlib.metadata import entry_points
    found = [e for e in entry_points(group='console_scripts') if e.name == f'resalign-{command}']
    assert found, f'resalign-{command} is not installed: make env'
    assert callable(found[0].load())

def test_kernel_is_the_environments():
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import KernelManager
    assert Path(KernelSpecManager().get_kernel_spec('python3').resource_dir).is_relative_to(sys.prefix), 'another python3 kernel comes first'
    assert Path(KernelManager(kernel_name='python3').format_kernel_cmd()[0]).parent == Path(sys.prefix)/'bin'
