"""Every page runs from top to bottom, in a process of its own. That it leaves nothing behind: tests/conftest.py."""
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A page's bound is a minute on a quiet machine; this only stops one that hangs
LIMIT = int(os.environ.get('PAGE_SECONDS', 300))

def found(*globs): return sorted(p.relative_to(ROOT).as_posix() for g in globs for p in (ROOT/'nbs').glob(g))

PAGES, EXPERIMENTS = found('*.ipynb', '70_baselines/*.ipynb'), found('experiments/*.ipynb')

# nbdev's own test of a page: cells flagged in tst_flags or `eval: false` are left out
RUN_PAGE = """
import sys; from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
ok, seconds = test_nb(Path(sys.argv[1]).resolve(), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(not ok)
"""


def run(cmd, page, record_property):
    "Run `cmd` at the root in a process group of its own; its last lines are the message if it fails"
    start = time.time()
    with subprocess.Popen(cmd, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True) as p:
        try: out, _ = p.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            pytest.fail(f'{page}: not done after {LIMIT} s\n' + p.communicate()[0][-4000:], pytrace=False)
        except BaseException: os.killpg(p.pid, signal.SIGKILL); raise
    record_property(page, time.time() - start)
    if p.returncode: pytest.fail(f'{page}: exit status {p.returncode}\n{out[-6000:]}', pytrace=False)


def test_there_are_pages():
    assert PAGES and EXPERIMENTS, 'no pages under nbs/ or nbs/experiments/'


@pytest.mark.page
@pytest.mark.parametrize('page', PAGES)
def test_page(page, record_property):
    run([sys.executable, '-c', RUN_PAGE, page], page, record_property)


@pytest.mark.page
@pytest.mark.parametrize('page', EXPERIMENTS)
def test_experiment(page, record_property, tmp_path):
    "With the defaults of its parameters cell: the smoke setting"
    run([sys.executable, '-m', 'papermill', '--no-progress-bar', '-k', 'python3', page, str(tmp_path/Path(page).name)], page, record_property)
