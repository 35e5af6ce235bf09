"""Mutation testing: small faults, one at a time, in the modules that hold the mathematics; do the fast tests notice?

`make mutants` runs all of them, resumable; `--sample N` runs N drawn at random. The tool is cosmic-ray: its operators,
and three more (a dropped operand, a dropped method call, a dropped statement). Starting Python with torch and diffusers
takes ten seconds, so each mutant's tests run in a fork of a process that has imported the libraries, never resalign.
Only tests that run the changed statement are asked, the quickest first: the first failure ends a mutant."""
import argparse
import ast
import contextlib
import csv
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import coverage
import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parent.parent
SESSIONS = ROOT/'outs'/'mutants'
TABLES = ROOT/'results'/'tables'
FAST = 'tests/fast'
OFF = 'cacheprovider unraisableexception threadexception logging faulthandler junitxml pastebin'.split()
PLUGINS = [f'-pno:{name}' for name in OFF]
MEMORY = 12*2**30 # bytes that a mutant may ask for

# module -> files of its fast tests; a baseline's is called like the baseline
MODULES = {
    'method/hypergrad': ['test_hypergrad.py', 'test_hypergrad_safe.py', 'test_hypergrad_adjoint.py'],
    'method/resalign': ['test_meta.py'],
    'method/finetune': ['test_finetune.py', 'test_adversaries.py'], 'core/training': ['test_training.py'],
    'model/losses': ['test_losses.py', 'test_flow.py'], 'model/data': ['test_data.py'],
    'measure/metrics': ['test_metrics.py'], 'studies/claims': ['test_claims.py']}
MODULES |= {f'baselines/{p.stem}': [f'test_{p.stem}.py'] for p in sorted((ROOT/'resalign'/'baselines').glob('*.py'))
            if p.stem not in ('__init__', 'methods')}

BINARY = 'Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitOr_BitAnd BitAnd_BitOr'.split()
COMPARE = ('Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is').split()
UNARY = 'USub_UAdd Delete_USub Delete_Not Delete_Invert'.split()
OTHERS = ('AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue '
          'ReplaceContinueWithBreak NumberReplacer RemoveDecorator ZeroIterationForLoop').split()


# ------------------------------------------------------------------ operators

class DropOperand(Operator):
    "a + b → a, a * b → b: an operand of a sum or product, and the operator before it"
    def mutation_positions(self, node):
        if node.type not in ('arith_expr', 'term'): return
        for _ in list(self.droppable(node)): yield node.start_pos, node.end_pos

    def droppable(self, node):
        "Index ranges of children that may go: each operand with its operator; the first one where nothing hangs on it"
        if node.children[1].value in '*+@': yield 0, 2
        for i in range(1, len(node.children), 2): yield i, i + 2

    def mutate(self, node, index):
        first, last = list(self.droppable(node))[index]
        del node.children[first:last]
        return node

    @classmethod
    def examples(cls): return ()


class DropCall(Operator):
    "x.detach() → x: a method call, where the chain goes on from the value before it"
    modules = 'torch np pd os re json math stats shutil time hashlib random F plt sns contextlib'.split()

    def mutation_positions(self, node):
        for _ in list(self.droppable(node)): yield node.start_pos, node.end_pos

    def droppable(self, node):
        if node.type not in ('atom_expr', 'power'): return
        parts = node.children
        for i in range(1, len(parts) - 1):
            if i == 1 and getattr(parts[0], 'value', '') in self.modules: continue
            if self.is_call(parts[i], parts[i + 1]): yield i

    def is_call(self, name, call):
        return name.type == call.type == 'trailer' and name.children[0] == '.' and call.children[0] == '('

    def mutate(self, node, index):
        i = list(self.droppable(node))[index]
        del node.children[i:i + 2]
        return node

    @classmethod
    def examples(cls): return ()


class DropStatement(Operator):
    "A statement that is only a call, or an augmented assignment, becomes `pass`"
    def mutation_positions(self, node):
        if self.droppable(node): yield node.start_pos, node.end_pos

    def droppable(self, node):
        if node.parent is None or node.parent.type not in ('simple_stmt', 'suite'): return False
        if node.type == 'atom_expr': return node.children[-1].type == 'trailer'
        return node.type == 'expr_stmt' and node.children[1].type == 'operator' and node.children[1].value != '='

    def mutate(self, node, index):
        return parso.python.tree.Keyword('pass', node.start_pos, node.get_first_leaf().prefix)

    @classmethod
    def examples(cls): return ()


def operators() -> dict: # name -> operator
    "cosmic-ray's that stay near the original, and the three above"
    names = [f'ReplaceBinaryOperator_{n}' for n in BINARY]
    names += [f'ReplaceComparisonOperator_{n}' for n in COMPARE]
    names += [f'ReplaceUnaryOperator_{n}' for n in UNARY]
    names += OTHERS
    ours = {c.__name__: c() for c in (DropOperand, DropCall, DropStatement)}
    return {n: get_operator(f'core/{n}')() for n in names} | ours


# ------------------------------------------------------------------ one mutant

class Recorder:
    "A pytest plugin: which lines of a module each test runs, and how long it takes"
    def __init__(self, file):
        self.file, self.seconds = str(file), {}
        self.coverage = coverage.Coverage(data_file=None, include=[self.file])
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid):
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def save(self, path):
        self.coverage.stop()
        lines = self.coverage.get_data().contexts_by_lineno(self.file)
        path.write_text(json.dumps(dict(lines=lines, seconds=self.seconds)))


class Order:
    "A pytest plugin: quick tests first; only those that run one of the lines, unless an import runs it too, or no test"
    def __init__(self, recorded, lines=()):
        self.seconds = recorded['seconds']
        self.near = {test for line in lines for test in recorded['lines'].get(str(line), ())}
        self.all = not self.near or '' in self.near

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.all or item.nodeid in self.near]
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0))


def run_tests(folder:Path, tests:list, limit:float, plugin=lambda: None, caches=False) -> str: # how it ended
    "pytest on fast files in a fork of this process, with the copy of the package in `folder`"
    pid = os.fork()
    if pid == 0:
        sys.dont_write_bytecode = not caches
        child(folder, tests, plugin)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return 'survived' if os.waitstatus_to_exitcode(status) in (0, 5) else 'killed' # 5: no test was asked
        time.sleep(.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 'timeout'

def child(folder, tests, plugin):
    "Never returns"
    os.setsid()
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder/FAST), str(folder/'tests')]
    with open(folder/'said', 'w') as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    status = 3
    try:
        used = plugin()
        asked = ['-x', '-q', '--tb=line', '--noconftest', *PLUGINS, *(f'{FAST}/{test}' for test in tests)]
        status = int(pytest.main(asked, plugins=[used] if used else []))
        if isinstance(used, Recorder): used.save(folder/'recorded')
    finally: os._exit(status)

def known_modules(folder, tests) -> list:
    "Names of the libraries that test files import; not the package, not the tests"
    out = folder/'imported'
    pid = os.fork()
    if pid == 0:
        sys.path[:0] = [str(folder), str(folder/FAST), str(folder/'tests')]
        try:
            for test in tests: __import__(Path(test).stem)
            found = [name for name, module in list(sys.modules.items()) if not ours(folder, name, module)]
            out.write_text('\n'.join(found))
        finally: os._exit(0)
    os.waitpid(pid, 0)
    return out.read_text().split() if out.exists() else []

def ours(folder, name, module) -> bool:
    file = str(getattr(module, '__file__', None) or '')
    return name.partition('.')[0] in ('resalign', 'tests') or file.startswith(str(folder))

def preload(folder, tests):
    "The libraries, out of the garbage collector's sight, which would look at all of them in every child"
    for name in known_modules(folder, tests):
        with contextlib.suppress(Exception): importlib.import_module(name)
    gc.freeze()


# ------------------------------------------------------------------ all mutants of a module

def digest(module) -> str:
    "What a session's results depend on: the module, its tests, and what of tests/fast these import"
    tests = [ROOT/FAST/test for test in MODULES[module]]
    helpers = [p for p in sorted((ROOT/FAST).glob('*.py')) if not p.name.startswith('test_')]
    text = '\n'.join(test.read_text(encoding='utf-8') for test in tests)
    files = [ROOT/'resalign'/f'{module}.py', *tests, *(p for p in helpers if re.search(rf'\b{p.stem}\b', text))]
    return hashlib.sha256(b''.join(p.read_bytes() for p in files)).hexdigest()[:12]

def session(folder, module) -> Path:
    "The work of a module; one of earlier code is removed"
    name = module.replace('/', '-')
    path = folder/f'{name}-{digest(module)}.sqlite'
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f'{name}-{"?"*12}.sqlite'):
        if old != path: old.unlink()
    if not path.exists(): enumerate_mutants(module, path)
    return path

def enumerate_mutants(module, path):
    "Every place where an operator fits becomes a work item"
    tree = get_ast_from_path(ROOT/'resalign'/f'{module}.py')
    items = []
    for name, operator in operators().items():
        places = ((node, *place) for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for k, (node, start, end) in enumerate(places):
            where = ASTQuery(node).get_definition_name()
            spec = MutationSpec(f'resalign/{module}.py', name, k, start, end, {}, where)
            items.append(WorkItem.single(f'{name}-{k}', spec))
    new = path.with_suffix('.new')
    with use_db(new) as db: db.add_work_items(items)
    new.rename(path)

def changed(code, mutant) -> tuple: # line, as it was, as it is
    "The first line that differs"
    before, after = code.splitlines(), mutant.splitlines()
    k = next(i for i in range(len(before)) if i >= len(after) or before[i] != after[i])
    return k + 1, before[k].strip(), after[k].strip() if k < len(after) else ''

def mutate(module, spec) -> tuple: # code, mutated code
    code = (ROOT/'resalign'/f'{module}.py').read_text(encoding='utf-8')
    return code, mutate_code(code, operators()[spec.operator_name], spec.occurrence)

def compiles(code) -> bool:
    try: compile(code, 'mutant', 'exec')
    except (SyntaxError, ValueError): return False
    return True

def statement(code, line) -> range: # lines
    "The smallest statement around a line, as far as its body"
    spans = [(n.lineno, n.body[0].lineno - 1 if hasattr(n, 'body') else n.end_lineno)
             for n in ast.walk(ast.parse(code)) if isinstance(n, ast.stmt)]
    around = [(last - first, first, last) for first, last in spans if first <= line <= last]
    _, first, last = min(around, default=(0, line, line))
    return range(first, last + 1)

def tried(folder, module, spec, limit, recorded) -> WorkResult:
    "A mutant put in the place of the module, its tests, and the module again"
    code, mutant = mutate(module, spec)
    if mutant is None or mutant == code or not compiles(mutant): return WorkResult(WorkerOutcome.SKIPPED)
    file = folder/'resalign'/f'{module}.py'
    file.write_text(mutant, encoding='utf-8')
    line, before, after = changed(code, mutant)
    order = Order(recorded, statement(code, line))
    try: outcome = run_tests(folder, MODULES[module], limit, lambda: order)
    finally: file.write_text(code, encoding='utf-8')
    survived = TestOutcome.SURVIVED if outcome == 'survived' else TestOutcome.KILLED
    return WorkResult(WorkerOutcome.NORMAL, outcome, survived, f'{line}\t{before}\t{after}')

def copied(folder) -> Path:
    "A copy of package and tests; everything else as links"
    for p in ROOT.iterdir():
        if p.name in ('resalign', 'tests'):
            shutil.copytree(p, folder/p.name, ignore=shutil.ignore_patterns('__pycache__'))
        elif p.name not in ('.git', '.venv'): (folder/p.name).symlink_to(p)
    return folder

def lane(k, lanes, sessions, sample, seed):
    "Every `lanes`-th work item of each module"
    os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'
    with tempfile.TemporaryDirectory(prefix='mutants-') as tmp:
        folder = copied(Path(tmp))
        for module, path in sessions.items(): share(folder, module, path, k, lanes, sample, seed)

def record_tests(folder, module) -> dict: # lines: tests of each; seconds of each test
    "The tests on the code as it is: all of them pass, in the order of the file and quick ones first"
    file = folder/'resalign'/f'{module}.py'
    as_written = run_tests(folder, MODULES[module], 600, lambda: Recorder(file), caches=True)
    recorded = json.loads((folder/'recorded').read_text()) if as_written == 'survived' else {}
    if recorded and run_tests(folder, MODULES[module], 600, lambda: Order(recorded)) == 'survived': return recorded
    said = (folder/'said').read_text()[-2000:]
    sys.exit(f'mutants: {FAST}: {", ".join(MODULES[module])} fails on the code as it is:\n{said}')

def share(folder, module, path, k, lanes, sample, seed):
    "This lane's part of a module, after its tests have passed on the code as it is"
    with use_db(path) as db:
        items = sorted(db.work_items, key=lambda item: item.job_id)
        pending = {item.job_id for item in db.pending_work_items}
    if sample: items = random.Random(f'{seed} {module}').sample(items, min(sample, len(items)))
    mine = [item for item in items[k::lanes] if item.job_id in pending]
    if not mine: return
    preload(folder, MODULES[module])
    start = time.monotonic()
    recorded = record_tests(folder, module)
    limit = 10 + 5*(time.monotonic() - start)
    for n, item in enumerate(mine, 1):
        result = tried(folder, module, item.mutations[0], limit, recorded)
        with use_db(path) as db: db.set_result(item.job_id, result)
        if n % 50 and n < len(mine): continue
        print(f'{module}: lane {k}: {n}/{len(mine)} {time.monotonic() - start:.0f}s', flush=True)


# ------------------------------------------------------------------ the record

def outcomes(module, path) -> list: # dicts
    "Every mutant that was tried"
    out = []
    with use_db(path) as db:
        for item, result in db.completed_work_items:
            if result.worker_outcome != WorkerOutcome.NORMAL: continue
            spec = item.mutations[0]
            line, before, after = result.diff.split('\t')
            out.append(dict(module=module, function=spec.definition_name or '', line=int(line),
                            operator=spec.operator_name, before=before, after=after, outcome=result.output))
    return sorted(out, key=lambda r: (r['line'], r['operator'], r['after']))

def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, rows[0].keys(), lineterminator='\n')
        table.writeheader()
        table.writerows(rows)

def record(sessions) -> list: # a row a module
    "results/tables/mutants.csv, and the survivors beside it"
    rows, survivors = [], []
    for module, path in sessions.items():
        found = outcomes(module, path)
        count = {what: sum(r['outcome'] == what for r in found) for what in ('killed', 'survived', 'timeout')}
        with use_db(path) as db: left = len(db.pending_work_items)
        score = f'{1 - count["survived"]/len(found):.4f}' if found else ''
        rows.append(dict(module=module, mutants=len(found), **count, score=score, left=left))
        survivors += [{k: v for k, v in r.items() if k != 'outcome'} for r in found if r['outcome'] == 'survived']
    write(TABLES/'mutants.csv', rows)
    write(TABLES/'mutants_survived.csv', survivors)
    return rows

def arguments():
    ask = argparse.ArgumentParser(description='Mutation testing of the modules that hold the mathematics')
    ask.add_argument('modules', nargs='*', metavar='MODULE', help=f'default: all of {", ".join(MODULES)}')
    ask.add_argument('--lanes', type=int, default=os.cpu_count(), help='processes side by side; default: one a core')
    ask.add_argument('--sample', type=int, default=0, help='only so many of each module, drawn at random')
    ask.add_argument('--seed', type=int, default=0, help='of the sample')
    ask.add_argument('--sessions', type=Path, default=SESSIONS, help='where the work done so far is kept')
    ask.add_argument('--survivors', action='store_true', help='run nothing: write and print what is known so far')
    args = ask.parse_args()
    unknown = set(args.modules) - set(MODULES)
    if unknown: ask.error(f'unknown module: {", ".join(sorted(unknown))}')
    return args

def side_by_side(lanes, *args):
    running = [multiprocessing.Process(target=lane, args=(k, lanes, *args)) for k in range(lanes)]
    for p in running: p.start()
    for p in running: p.join()
    if any(p.exitcode for p in running): sys.exit(1)

def main():
    args = arguments()
    sessions = {module: session(args.sessions, module) for module in args.modules or MODULES}
    if not args.survivors: side_by_side(args.lanes, sessions, args.sample, args.seed)
    if not (args.sample or args.modules): record(sessions)
    for module, path in sessions.items():
        found = outcomes(module, path)
        survived = [r for r in found if r['outcome'] == 'survived']
        print(f'{module}: {len(survived)} of {len(found)} survived')
        for r in survived: print(f"  {r['line']}: {r['operator']}\n    - {r['before']}\n    + {r['after']}")

if __name__ == '__main__': main()
