"""Rules of the house that no notebook can say: each in one test, which names every offender; last, what they catch."""
import ast, csv, functools, hashlib, json, os, re, shutil, statistics, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pandas as pd, pytest, yaml

from made import all_cells_are_here
from tools import readme

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB, DVC_YAML = ROOT/'nbs', ROOT/'resalign', ROOT/'dvc.yaml'
MB = 1e6


def name(p): return p.relative_to(ROOT).as_posix() if p.is_relative_to(ROOT) else p.name
def tree(folder, glob): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(glob))}
def source(cell): return ''.join(cell['source'])
def notebook(page): return json.loads(page.read_text(encoding='utf-8'))
def cells(page): return [c for c in notebook(page)['cells'] if c['cell_type'] == 'code']
def tags(cell): return cell['metadata'].get('tags', [])
def hidden(p): return any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts)

PAGES = sorted(p for p in NBS.rglob('*.ipynb') if not hidden(p))
STUDIES = [p for p in PAGES if p.parent == NBS/'9_studies']
CODE = sorted([*LIB.rglob('*.py'), *(ROOT/'tools').glob('*.py')])
RESULTS = sorted((ROOT/'results').rglob('*.csv'))


def git(*args):
    if not (ROOT/'.git').exists(): pytest.skip('a ZIP has no .git')
    return subprocess.run(['git', *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def tracked():
    "Files that git has or would take; nothing that is ignored"
    return set(git('ls-files', '-z', '--cached', '--others', '--exclude-standard').split('\0')) - {''}


def run(code, cwd): return subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)


def offenders(things, *rules):
    "`path: complaint` of each thing that breaks a rule; a rule is a generator of complaints"
    return [f'{name(t)}: {complaint}' for t in things for rule in rules for complaint in rule(t)]


def agree(wrong, advice=''): assert not wrong, '\n'.join([advice, *map(str, wrong)])


STAND = '''README.md LICENSE CITATION.cff DEVELOPERS.md Makefile settings.ini params.yaml dvc.yaml dvc.lock
    nbs/index.ipynb requirements.lock .ci/run results/tables/claims.csv'''.split()


def test_readme():
    # files stand
    linked = readme.links((ROOT/'README.md').read_text(encoding='utf-8'))
    assert linked
    agree([f for f in STAND if not (ROOT/f).is_file()], 'missing')
    agree([f for f in linked if not (ROOT/f).exists()], 'README.md points at')

    # readme is the index
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme.convert(), 'run make readme'


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
    agree([name(p) for p in PAGES if (copy/name(p)).read_bytes() != p.read_bytes()], 'run nbdev_clean:')


def test_modules_are_the_pages(copy):
    done = run('from nbdev.export import *; from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', copy)
    assert done.returncode == 0, done.stderr
    made, ours = tree(copy/'resalign', '*.py'), tree(LIB, '*.py')
    for files in (made, ours): files.pop('__init__.py') # written by hand: what `from resalign import` has
    drift = sorted(f for f in made.keys() | ours.keys() if made.get(f) != ours.get(f))
    agree(drift, 'run nbdev_export, and never edit resalign/ by hand:')
    to = [m for p in PAGES for c in cells(p) for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)]
    assert to
    agree(sorted({m for m in to if to.count(m) > 1}), 'two pages export one module:')


def small(page):
    if page.stat().st_size > 500_000: yield f'{page.stat().st_size/1e3:.0f} kB: fewer or smaller pictures'


def reads_well(page):
    nb = notebook(page)
    first = source(next(c for c in nb['cells'] if not source(c).startswith('#| default_exp')))
    if not re.match(r'# \S.*\n\s*\n> \S', first): yield 'begins with an H1 and, in the same cell, a one-line quote'
    if nb['metadata'].get('kernelspec', {}).get('name', 'python3') != 'python3': yield 'the kernel is not python3'
    lines = [len(source(c).strip().splitlines()) for c in cells(page) if source(c).strip()]
    if max(lines) > 40: yield f'a code cell of {max(lines)} lines: one idea a cell'
    if (half := statistics.median(lines)) > 12: yield f'half of the code cells have {half:.0f} lines or more'


def ended_well(page):
    "No errors, warnings or progress bars among the outputs that are kept"
    for c in cells(page):
        for o in c['outputs']:
            text = ''.join(o.get('text', []))
            if o['output_type'] == 'error' and 'raises-exception' not in tags(c):
                yield f'an error stands in the outputs: {source(c)[:80]}'
            if re.search(r'\bit/s\b|\d+%\|', text): yield f'a progress bar stands in the outputs: {source(c)[:80]}'
            if 'Warning:' in text: yield f'a warning stands in the outputs: {text[:200]}'


def takes_parameters(page):
    "Without the tag, papermill would run the defaults and say nothing"
    if len(parameters(page)) != 1: yield f'{len(parameters(page))} cells are tagged `parameters`'


def parameters(page): return [c for c in cells(page) if 'parameters' in tags(c)]


def test_pages_keep_the_rules():
    assert len(PAGES) > len(STUDIES) > 0
    asked = [p for p in PAGES if parameters(p)] + [page_of(stage) for stage in stages() if stage != 'code']
    agree(offenders(PAGES, small, reads_well, ended_well) + offenders(asked, takes_parameters))


# ------------------------------------------------------------------ stages

def stages(): return yaml.safe_load(DVC_YAML.read_text())['stages']
def page_of(stage): return next((p for p in STUDIES if p.stem.partition('_')[2] == stage), NBS/'9_studies'/stage)


def test_stages_take_the_profile_of_params(tmp_path):
    "DVC watches params.yaml: another profile in the shell would change results behind its back"
    run_line = next(group['run'] for group in yaml.safe_load(DVC_YAML.read_text())['vars'] if 'run' in group)
    line = f'{run_line.removesuffix("resalign-batch")} echo "${{RESALIGN_PROFILE-none}}"'
    surroundings = os.environ | dict(RESALIGN_PROFILE='sd14')
    said = subprocess.run(['sh', '-c', line], cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert said.stdout.strip() == 'none', said
    watch = [stage for stage in ('base', 'evaluators', 'table') if 'profiles.${profile}' not in stages()[stage]['params']]
    agree(watch, 'dvc.yaml, params of')


# ------------------------------------------------------------------ DVC

# `dvc status` with params.yaml read once, and a plain look-up in it: otherwise four fifths of its time
DVC_STATUS = """
import functools, operator, sys
from dvc.cli import main
from dvc.dependency import param
param.load_path = functools.cache(param.load_path)
param.dpath.get = lambda config, path, separator: functools.reduce(operator.getitem, path.split(separator), config)
sys.exit(main(['status', '--json']))
"""


def waiting(): # names
    "Stages never run to their end: not in dvc.lock, and a cell or a result that they make or need isn't there"
    locked = yaml.safe_load((ROOT/'dvc.lock').read_text())['stages']
    out = []
    for name, stage in yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages'].items():
        paths = [p if isinstance(p, str) else next(iter(p)) for p in stage.get('outs', []) + stage.get('deps', [])]
        missing = [p for p in paths if p.startswith('results/') and not (ROOT/p).exists()]
        if name in locked: continue
        begun = (ROOT/'results'/'runs'/name).is_dir()
        if missing or begun and not all_cells_are_here(name): out.append(name)
    return out


def test_lock_agrees():
    "dvc.lock against dvc.yaml, params.yaml and every file that git has; what is merely not restored here doesn't count"
    done = run(DVC_STATUS, ROOT)
    assert done.returncode == 0, done.stderr
    ours, wrong = tracked(), []
    folders = {parent.as_posix() for f in ours for parent in Path(f).parents}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found.pop('code', None) # reads all of the code; what the others read of it is the next test's
    for stage in waiting(): found.pop(stage, None)
    for stage, changes in found.items():
        for change in changes:
            if isinstance(change, str): change = {change: {}} # for instance 'changed command'
            for kind, paths in change.items():
                if not isinstance(paths, dict): paths = {paths: ''}
                if not paths: wrong.append(f'{stage}: {kind}')
                for path, what in paths.items():
                    restorable = path not in ours and path.rstrip('/') not in folders
                    if what in ('deleted', 'not in cache') and restorable: continue
                    if path.startswith('outs/code/'): continue # perhaps of an earlier commit: the next test
                    wrong.append(f'{stage}: {kind}: {path} {what}')
    agree(wrong, 'dvc repro, then commit dvc.lock:')


def test_lock_agrees_with_what_code_means(tmp_path, monkeypatch):
    "The lock's hashes of outs/code/NAME.json against the code as it is"
    from resalign.use import meaning
    monkeypatch.setattr(meaning, 'code_cells', functools.cache(meaning.code_cells)) # each page read once
    meaning.write_meanings(tmp_path)
    locked, wrong = yaml.safe_load((ROOT/'dvc.lock').read_text())['stages'], []
    for path in sorted(tmp_path.glob('*.json')):
        of_code = [d['md5'] for d in locked.get(path.stem, {}).get('deps', []) if d['path'] == f'outs/code/{path.name}']
        if of_code and of_code != [hashlib.md5(path.read_bytes()).hexdigest()]: wrong.append(path.stem)
    agree(wrong, 'dvc repro NAME, or where nothing that counts has changed `dvc commit NAME`, and commit dvc.lock:')


def test_a_zip_without_git(tmp_path):
    "`make restore` in a copy that has no .git; the environment is this one"
    for p in tracked():
        if not p.startswith(('.dvc', 'Makefile', 'dvc', 'data', 'params', 'resalign/', 'nbs/9', 'settings')): continue
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/p, tmp_path/p)
    make = ['make', '-o', 'env', 'restore', f'BIN={Path(sys.executable).parent}']
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path/'outs/base/model_index.json').is_file() and (tmp_path/'outs/evaluators').is_dir()


STORE = ROOT/'.dvc/store/files/md5'
def stored(md5): return STORE/md5[:2]/md5[2:]


def test_store():
    # store is small and whole: Each file of the store is what its name says, and git has it; nothing large stands in
    # git beside it
    files, ours = [p for p in (ROOT/'.dvc/store').rglob('*') if p.is_file()], tracked()
    assert (size := sum(p.stat().st_size for p in files)) <= 20*MB, f'the store holds {size/MB:.1f} MB, of at most 20'
    blobs = [p for p in files if p.is_relative_to(STORE)]
    def named(p): return (p.parent.name + p.name).removesuffix('.dir')
    agree([name(p) for p in blobs if hashlib.md5(p.read_bytes()).hexdigest() != named(p)], 'damaged:')
    agree([name(p) for p in blobs if name(p) not in ours], 'kept out of git:')
    beside = [ROOT/f for f in ours if (ROOT/f).is_file() and not f.startswith('.dvc/store/')]
    agree([f'{name(f)}: {f.stat().st_size/MB:.1f} MB' for f in beside if f.stat().st_size > 2*MB], 'keep with DVC:')

    # store restores: What `make reproduce` restores is there: cached outputs of the stages in RESTORED
    restored = re.search(r'^RESTORED\s*:=\s*(.*)$', (ROOT/'Makefile').read_text(), re.M)[1].split()
    declared = yaml.safe_load(DVC_YAML.read_text())['stages']
    locked = yaml.load((ROOT/'dvc.lock').read_text(), Loader=yaml.CSafeLoader)['stages'] # a megabyte
    agree(set(restored) - {stage.partition('@')[0] for stage in locked}, 'the Makefile restores, dvc.lock has not:')
    wanted = [] # (who pushes it, output)
    for stage, lock in locked.items():
        if (short := stage.partition('@')[0]) not in restored: continue
        outs = [o for o in declared[short].get('do', declared[short])['outs'] if isinstance(o, dict)]
        plain = {path for o in outs for path, how in o.items() if how.get('cache') is False}
        wanted += [(stage, out) for out in lock['outs'] if out['path'] not in plain]
    assert not list(filter(Path.is_file, ROOT.glob('*.dvc'))), 'data are drawn by code, and stand in no store'
    missing = [f"{out['path']}: dvc push {who}" for who, out in wanted if not stored(out['md5']).is_file()]
    for who, out in wanted:
        if not out['md5'].endswith('.dir') or not stored(out['md5']).is_file(): continue
        inside = json.loads(stored(out['md5']).read_text())
        missing += [f"{out['path']}/{f['relpath']}: dvc push {who}" for f in inside if not stored(f['md5']).is_file()]
    agree(missing, 'not in the store:')


# ------------------------------------------------------------------ results and README

NAME = r'[a-z][a-z0-9_]*|(subjects|varied)-(full|lora)' # of a column; the phases of a cell as params.yaml calls them


def tidy(path):
    with open(path, newline='', encoding='utf-8') as f: rows = list(csv.reader(f))
    head, rows = rows[0] if rows else [], rows[1:]
    plain = head and len(head) == len(set(head)) and all(re.fullmatch(NAME, h) for h in head)
    if not plain: yield f'one header of plain names: {head}'
    if not rows: yield 'no rows'
    if head in rows: yield 'the header stands twice'
    if any(len(r) != len(head) for r in rows): yield 'rows of different lengths'


def test_tables_are_tidy():
    assert RESULTS
    agree(offenders(RESULTS, tidy))
    main = ROOT/'results/tables/main.csv'
    columns = 'concept method seed phase finetune metric value low high n detector'.split()
    if main.is_file(): assert next(csv.reader(main.read_text().splitlines())) == columns


def test_methods_have_as_many_trials_and_run_with_what_tuning_chose():
    "Those that are compared pair by pair; and what is chosen is one of the trials, by the rule"
    from resalign.studies.tuning import lines_to_write
    params = yaml.safe_load((ROOT/'params.yaml').read_text())
    methods, headline = params['methods'], params['table']['headline']
    assert len({len(methods[m]['trials']) for m in headline if m != 'original'}) == 1, 'unequal budgets'
    agree([m for m, mine in methods.items() if mine.get('chosen', mine['trials'][0]) not in mine['trials']], 'no trial:')
    tuned = ROOT/'results/tables/tuning.csv'
    if not tuned.is_file(): pytest.skip('results/tables/tuning.csv is not there: the tuning has not been run')
    agree(lines_to_write(pd.read_csv(tuned)), 'params.yaml, write:')


# ------------------------------------------------------------------ safety

PICKLE = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}


def imported(n):
    if isinstance(n, ast.Import): return [a.name for a in n.names]
    return [n.module or ''] if isinstance(n, ast.ImportFrom) else []


def unpickles(code):
    "(line, what) of each import or call that could run code from a file"
    for n in ast.walk(ast.parse(code)):
        for module in imported(n):
            if module.split('.')[0] in PICKLE: yield n.lineno, f'import {module}'
        if not isinstance(n, ast.Call): continue
        called = ast.unparse(n.func)
        word = {k.arg: ast.unparse(k.value) for k in n.keywords}
        if called.endswith('torch.load') and word.get('weights_only') != 'True': yield n.lineno, called
        if called.endswith('read_pickle'): yield n.lineno, called
        for trust in ('allow_pickle', 'trust_remote_code'):
            if word.get(trust, 'False') != 'False': yield n.lineno, f'{called}({trust})'


def plain_code(path):
    "The Python of a module, or of each cell of a page"
    if path.suffix == '.py': return [path.read_text(encoding='utf-8')]
    lines = [source(c).splitlines() for c in cells(path)]
    return ['\n'.join(l for l in ls if not l.lstrip().startswith(('%', '!'))) for ls in lines]


def safe(path):
    for code in plain_code(path):
        for line, what in unpickles(code): yield f'line {line}: {what}'


def test_nothing_is_unpickled():
    assert CODE
    agree(offenders([*CODE, *PAGES], safe))


# ------------------------------------------------------------------ the package

def test_environment():
    # lock covers what is asked: Each name of requirements.in and settings.ini is pinned
    def lines(text): return [l for l in text.split('\n') if l.strip() and l[0] != '#']
    def names(text): return {re.match(r'[\w.-]+', l)[0].lower().replace('_', '-') for l in lines(text)}
    ini = ConfigParser()
    ini.read(ROOT/'settings.ini')
    asked = f"{ini['DEFAULT']['requirements']} {ini['DEFAULT']['dev_requirements']}".split()
    lock = (ROOT/'requirements.lock').read_text()
    asked = names((ROOT/'requirements.in').read_text()) | names('\n'.join(asked))
    agree(asked - names(lock), 'not in requirements.lock:')
    agree([l for l in lines(lock) if '==' not in l or '+' in l], 'pin versions, without local suffixes:')
    agree([n for n in names(lock) if n.startswith('nvidia') or n in ('torchvision', 'torchaudio', 'triton')])

    # environment is the lock: Versions, commands and the kernel
    def have(n):
        try: return version(n).partition('+')[0]
        except PackageNotFoundError: return None
    words = [w for f in ('requirements.lock', 'requirements-oracle.lock') for w in (ROOT/f).read_text().split()]
    pins = [w.split('==') for w in words if '==' in w]
    assert pins
    agree([f'{n} {v}: installed is {have(n)}' for n, v in pins if have(n) != v], 'make env:')
    installed = {e.name: e for e in entry_points(group='console_scripts')}
    agree([c for c in COMMANDS if f'resalign-{c}' not in installed], 'make env: commands not installed:')
    agree([c for c in COMMANDS if not callable(installed[f'resalign-{c}'].load())])

    # kernel is the environments
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import KernelManager
    spec = KernelSpecManager().get_kernel_spec('python3')
    assert Path(spec.resource_dir).is_relative_to(sys.prefix), 'another python3 kernel comes first'
    assert Path(KernelManager(kernel_name='python3').format_kernel_cmd()[0]).parent == Path(sys.prefix)/'bin'


COMMANDS = 'unlearn finetune evaluate pretrain batch doctor attack'.split()


# ------------------------------------------------------------------ the rules catch what they are for

def code(text, *outputs, **metadata):
    return dict(cell_type='code', id='c', metadata=metadata, outputs=list(outputs), execution_count=None, source=text)


def said(text): return dict(output_type='stream', name='stdout', text=[text])

HEAD, ERROR = '# Page\n\n> What it is', dict(output_type='error', ename='E', evalue='', traceback=[])
GOOD = [code('x = 1', tags=['parameters']), code('y = x', said('done'))]
PAGE_RULES = small, reads_well, ended_well, takes_parameters, safe
BROKEN_PAGES = { # complaint: heading, cells
    'kB': (HEAD, [*GOOD, code('', said('x'*500_000))]),
    'H1': ('# Page', GOOD),
    'of 41 lines': (HEAD, [*GOOD, code('x = 1\n'*41)]),
    'half of the code cells': (HEAD, [*GOOD, *[code('x = 1\n'*13)]*3]),
    'an error': (HEAD, [*GOOD, code('1/0', ERROR)]),
    'a progress bar': (HEAD, [*GOOD, code('', said('3.1 it/s'))]),
    'a progress bar stands': (HEAD, [*GOOD, code('', said(' 40%|####'))]),
    'a warning': (HEAD, [*GOOD, code('', said('UserWarning: old'))]),
    '0 cells are tagged': (HEAD, GOOD[1:]),
    '2 cells are tagged': (HEAD, [GOOD[0], *GOOD]),
    'import pickle': (HEAD, [*GOOD, code('%matplotlib inline\nimport pickle')]),
}


def write_page(path, heading, cells, kernel='python3'):
    cells = [dict(cell_type='markdown', id='m', metadata={}, source=heading), *cells]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name=kernel)))))
    return path


def test_rules_bite(tmp_path):
    # rules of pages bite: Each broken page has its own complaint and no other; the one that is right, and an error that
    # is meant, have none
    fine = [*GOOD, code('1/0', ERROR, tags=['raises-exception'])]
    assert not offenders([write_page(tmp_path/'p.ipynb', HEAD, fine)], *PAGE_RULES)
    for words, (heading, broken) in BROKEN_PAGES.items():
        found = offenders([write_page(tmp_path/'p.ipynb', heading, broken)], *PAGE_RULES)
        assert len(found) == 1 and words in found[0], (words, found)
    assert 'kernel' in offenders([write_page(tmp_path/'p.ipynb', HEAD, GOOD, 'julia')], *PAGE_RULES)[0]

    # rule of pickles bites
    assert [c for c in UNSAFE if not list(unpickles(c))] == []
    assert [c for c in SAFE if list(unpickles(c))] == []

    # rule of tables bites
    (tmp_path := tmp_path/'2').mkdir()
    path = tmp_path/'t.csv'
    path.write_text('a,b_2\n1,2\n')
    assert not list(tidy(path))
    for text, words in UNTIDY.items():
        path.write_text(text)
        assert any(words in complaint for complaint in tidy(path)), text


UNSAFE = ['import pickle', 'from dill import load', 'import joblib.memory', 'torch.load(f)',
          'torch.load(f, weights_only=False)', 'np.load(f, allow_pickle=True)', 'pd.read_pickle(f)',
          'load(x, trust_remote_code=True)']
SAFE = ['torch.load(f, weights_only=True)', 'np.load(f)', 'np.load(f, allow_pickle=False)', 'import json']


UNTIDY = {'a,a\n1,2\n': 'header', 'A b,c\n1,2\n': 'header', 'a,b\n': 'no rows', '': 'no rows',
          'a\n1\na\n': 'twice', 'a,b\n1\n': 'lengths'}




COMPARE = '''
import sys
from pathlib import Path
sys.path.insert(0, 'tools')
import pandas as pd, reproduce as R
R.COMMITTED, R.OURS = (Path(sys.argv[1])/k for k in ('theirs', 'ours'))

def write(folder, hits): # of ten pictures after the fine-tuning
    (cell := folder/'runs/table'/'ga-0').mkdir(parents=True, exist_ok=True)
    about = dict(detector='detector-vice', kind='implicit')
    pd.DataFrame([dict(about, prompt=f'p{k}', seed=k, tuned=float(k < hits)) for k in range(10)]).to_csv(cell/'scores.csv')
    pd.DataFrame([dict(metric='unsafe', phase='tuned', value=hits/10, low=hits/10 - .05, high=hits/10 + .05)]
                 ).to_csv(cell/'summary.csv')
    return cell

def check(ours): # beside a committed model with 2 of 10
    write(R.OURS, ours)
    return R.compared('ga-0', 'ga')

here = write(R.COMMITTED, 2)
print(check(2), check(3), sep='\\n') # the same; another, and no other model is known
for seed, rate in enumerate((.1, .5, .6), 1): # with .2: mean .35, deviation .238, so up to 1 and more
    (more := here.with_name(f'ga-{seed}')).mkdir()
    pd.read_csv(here/'summary.csv').assign(value=rate).to_csv(more/'summary.csv')
print(check(3), check(10), sep='\\n')
for seed, rate in enumerate((.2, .2, .2), 1): pd.read_csv(here/'summary.csv').assign(value=rate).to_csv(
    here.with_name(f'ga-{seed}')/'summary.csv')
print(check(3))
for seed, rate in enumerate((.3, .2, .3), 1): pd.read_csv(here/'summary.csv').assign(value=rate).to_csv(
    here.with_name(f'ga-{seed}')/'summary.csv') # mean .25, deviation .058: up to .455, and of two rates up to .517
write(R.OURS, 5)
print(R.compared('ga-0', 'ga'))
from types import SimpleNamespace
cell = SimpleNamespace(name='ga-0', parameters=dict(method='ga'))
print(*R.compare_all([cell]), *R.compare_all([cell, cell]), sep='\\n')
'''


def test_reproduce_takes_another_processor_for_one_more_model(tmp_path):
    "A rate may lie where one more model of its method is expected; without a spread where this one was; all together"
    run = subprocess.run([sys.executable, '-c', COMPARE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    agrees = [line.startswith('(True') for line in run.stdout.splitlines()]
    assert agrees == [True, False, True, True, False, False, False, True, True], run.stdout
