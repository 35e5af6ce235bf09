"""Order, options and the one table of page times."""
import os, sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# what is started from a test finds nothing on the network either
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', DVC_NO_ANALYTICS='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
os.environ.setdefault('PROGRESS', '0')

settings.register_profile('house', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('house')

TIMES = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')


def pytest_configure(config): config.stash[TIMES] = []


def pytest_collection_modifyitems(config, items):
    "Rules of the house first, whole pages last; slow and gpu only where asked for or possible"
    rank = {'test_repository': 0, 'test_pages': 2}
    items.sort(key=lambda i: rank.get(i.path.stem, 1))
    for i in items:
        if 'slow' in i.keywords and not config.getoption('--slow'): i.add_marker(pytest.mark.skip(reason='slow: asked for by --slow'))
        if 'gpu' in i.keywords:
            import torch
            if not torch.cuda.is_available(): i.add_marker(pytest.mark.skip(reason='no GPU'))


def pytest_terminal_summary(terminalreporter, config):
    times = config.stash[TIMES]
    if not times: return
    terminalreporter.section('seconds per page')
    for page, seconds in sorted(times, key=lambda t: -t[1]): terminalreporter.write_line(f'{seconds:7.1f}  {page}')


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture
def clock(request):
    "Notes how long a page took, for the table at the end"
    return lambda page, seconds: request.config.stash[TIMES].append((str(page), seconds))
