"""Order, options, what a run leaves behind, and the one table of page times.

`-n 2` (as `make test` has it): a file's tests on one worker, one after the other; pages wherever there is room. What takes
long comes first, by tests/seconds.csv, so that the workers end together; `TIMES=write make test` writes it anew."""
import collections, csv, gc, os, subprocess, sys
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# what is started from a test finds nothing on the network either
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', DVC_NO_ANALYTICS='1', TOKENIZERS_PARALLELISM='false',
                  MPLBACKEND='agg')
os.environ.setdefault('PROGRESS', '0')
WORKER = 'PYTEST_XDIST_WORKER' in os.environ
if WORKER: os.environ.setdefault('OMP_NUM_THREADS', '1') # one core a worker

settings.register_profile('house', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('house')

BEFORE = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')


def pytest_configure(config):
    if config.getoption('--slow'): os.environ['SLOW_CELLS'] = '1' # of pages, see tests/pages.py
    config.option.loadscopereorder = False # by time, not by the number of tests


def worktree(): # what git sees, but for the records that `make test-faults` and `make test-full` are asked for
    if not (ROOT/'.git').exists(): return '' # a ZIP
    asked = dict(survival=os.environ.get('FAULTS') == 'full', full_size='FULL' in os.environ)
    record = ['--', '.', *(f':!results/tables/{name}.csv' for name, yes in asked.items() if yes)]
    return subprocess.run(['git', 'status', '--porcelain', '-uall', *record], cwd=ROOT, check=True, capture_output=True,
                          text=True).stdout


def pytest_sessionstart(session):
    if not WORKER: session.config.stash[BEFORE] = worktree()


def pytest_sessionfinish(session):
    "Tests and pages that are merely run leave nothing in the working tree: otherwise one failure more"
    if WORKER or worktree() == (before := session.config.stash[BEFORE]): return
    said = f'files left in the working tree, or changed\n--- before\n{before}--- after\n{worktree()}'
    session.config.hook.pytest_runtest_logreport(
        report=pytest.TestReport('working tree', ('', None, ''), {}, 'failed', said, 'call'))
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


TIMES = Path(__file__).with_name('seconds.csv')


def scope(nodeid):
    "What stays on one worker: a page, or a file"
    return nodeid.partition('[')[2].rstrip(']') or nodeid if 'test_pages' in nodeid else nodeid.split('::')[0]


def seconds(): # of each scope, in the run that was last written down
    with open(TIMES, newline='') as f: return {r['scope']: float(r['seconds']) for r in csv.DictReader(f)}


class Together(LoadScopeScheduling):
    "A file's tests stay together, for what they share is made once (xdist's own groups do nothing under pytest 9.2)"
    def _split_scope(self, nodeid):
        return scope(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Together(config, log)


def pytest_collection_modifyitems(config, items):
    """Rules of the house, fast mathematics, the rest, whole pages, of each what takes longest (or is new) first; slow and
    gpu only where asked for or possible"""
    rank, known = {'test_repository': 0, 'test_pages': 3}, seconds()
    def place(i): return 1 if i.path.parent.name == 'fast' else rank.get(i.path.stem, 2)
    items.sort(key=lambda i: (place(i), -known.get(scope(i.nodeid), float('inf'))))
    for i in items:
        if 'slow' in i.keywords and not config.getoption('--slow'):
            i.add_marker(pytest.mark.skip(reason='slow: asked for by --slow'))
        if 'gpu' in i.keywords:
            import torch
            if not torch.cuda.is_available(): i.add_marker(pytest.mark.skip(reason='no GPU'))


def pytest_collection_finish(session):
    "What has been imported stays: whoever collects garbage later needn't look at it"
    gc.collect()
    gc.freeze()


def write_seconds(terminalreporter):
    "What each scope took, the longest first"
    took = collections.Counter()
    for kind in ('passed', 'failed', ''): # '': set-up and teardown
        for r in terminalreporter.getreports(kind): took[scope(r.nodeid)] += getattr(r, 'duration', 0)
    with open(TIMES, 'w', newline='') as f:
        csv.writer(f, lineterminator='\n').writerows([('scope', 'seconds'), *((s, f'{t:.0f}') for s, t in took.most_common())])


def pytest_terminal_summary(terminalreporter):
    if os.environ.get('TIMES') == 'write': write_seconds(terminalreporter)
    times = [
        p for kind in ('passed', 'failed') for r in terminalreporter.getreports(kind) for p in r.user_properties
        if p[0].endswith('.ipynb')
    ]
    if not times: return
    terminalreporter.section('seconds per page')
    for page, seconds in sorted(times, key=lambda t: -t[1]):
        terminalreporter.write_line(f'{seconds:7.1f}  {page}')


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture
def offline(monkeypatch):
    "Whoever asks the network fails"
    import socket
    from huggingface_hub import constants
    def no(*args, **kw): raise AssertionError('asked the network')
    monkeypatch.setattr(socket.socket, 'connect', no)
    monkeypatch.setattr(socket, 'getaddrinfo', no)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
