"""Every page runs from top to bottom, in a process of its own. That it leaves nothing behind: tests/conftest.py."""
import json, os, subprocess, sys

import pytest

import pages
from pages import ROOT, literate, study

# A page's bound is a minute on a quiet machine; this only stops one that hangs
LIMIT = int(os.environ.get('PAGE_SECONDS', 600))

def found(*globs): return sorted(p.relative_to(ROOT).as_posix() for g in globs for p in (ROOT/'nbs').glob(g))

BY_PAPERMILL = 'nbs/8_use/40_cell.ipynb'
STUDIES = found('9_studies/*.ipynb')
PAGES = [p for p in found('*.ipynb', '*/*.ipynb') if p not in (*STUDIES, BY_PAPERMILL)]


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    "Nothing is a page's time but its own"
    status, _, said = pages.run(pages.nothing, '', tmp_path_factory.mktemp('server')/'log', LIMIT)
    assert status == 0, said


def runs(how, page, tmp_path, record_property):
    status, seconds, said = pages.run(how, page, tmp_path/'log', LIMIT)
    record_property(page, seconds)
    if status is None: pytest.fail(f'{page}: not done after {LIMIT} s\n{said[-6000:]}', pytrace=False)
    if status: pytest.fail(f'{page}: exit status {status}\n{said[-6000:]}', pytrace=False)


def test_pages_and_what_they_find(server, tmp_path):
    # there are pages
    assert PAGES and STUDIES and (ROOT/BY_PAPERMILL).is_file(), 'no pages under nbs/'

    # what a page finds
    status, _, said = pages.run(pages.surroundings, '', tmp_path/'log', LIMIT)
    assert not status, said
    want = dict(ours=[], absent=[], threads=1, backend='agg', offline='1', cwd=str(ROOT), group=True)
    assert said.splitlines()[0] == str(want), said

    # a page that ends well: Cells flagged slow are left out of literate pages; a cell that is meant to raise may, in a
    # study
    (tmp_path := tmp_path/'2').mkdir()
    write_page(tmp_path/'literate.ipynb', '#| slow\n1/0', '#| eval: false\n1/0', 'x = 1')
    write_page(tmp_path/'study.ipynb', '1/0', 'x = 1', tags=['raises-exception'])
    for how in (literate, study):
        status, _, said = pages.run(how, str(tmp_path/f'{how.__name__}.ipynb'), tmp_path/'log', LIMIT)
        assert status == 0, said


@pytest.mark.page
@pytest.mark.parametrize('page', PAGES)
def test_page(page, server, tmp_path, record_property):
    runs(literate, page, tmp_path, record_property)


@pytest.mark.page
@pytest.mark.parametrize('page', STUDIES)
def test_study(page, server, tmp_path, record_property):
    "With the defaults of its parameters cell: the smoke setting"
    runs(study, page, tmp_path, record_property)


@pytest.mark.page
def test_papermill_passes_parameters(tmp_path):
    "As the stages run a page: what is passed replaces the defaults (an unknown name is refused: test_faults_input.py)"
    made = tmp_path/'made.ipynb'
    papermill = [sys.executable, '-m', 'papermill', '--no-progress-bar', '-k', 'python3', BY_PAPERMILL, str(made)]
    passed = '-p method uce -p seed 7'.split()
    done = subprocess.run([*papermill, *passed], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert not done.returncode, done.stderr[-4000:]
    cells = json.loads(made.read_text())['cells']
    tags = [t for c in cells for t in c['metadata'].get('tags', [])]
    shown = ''.join(t for c in cells for o in c.get('outputs', []) for t in o.get('data', {}).get('text/plain', []))
    assert tags[:2] == ['parameters', 'injected-parameters'], tags
    assert "('uce', 7, 'lora')" in shown, shown


# ------------------------------------------------------------------ the server itself


BROKEN = { # what the second cell does: exit status (None: killed), a word of what is said
    'raises': ('print("before"); 1/0', 1, 'ZeroDivisionError'),
    'fails an assertion': ('assert 1 == 2, "not so"', 1, 'not so'),
    'does not parse': ('x = (', 1, 'SyntaxError'),
    'dies': ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', -9, ''),
    'hangs': ('import time; time.sleep(60)', None, 'Timeout'),
}


def test_a_broken_page_fails(server, tmp_path):
    "Each kind of failure is seen, and said; the cell after it is never run"
    wrong = []
    for how, name in [(study, name) for name in BROKEN] + [(literate, 'raises')]:
        source, want, word = BROKEN[name]
        (folder := tmp_path/f'{how.__name__} {name}').mkdir()
        page, log, after = (folder/file for file in ('page.ipynb', 'log', 'after'))
        write_page(page, 'x = 1', source, f'open({str(after)!r}, "w")')
        status, seconds, said = pages.run(how, str(page), log, 1 if name == 'hangs' else LIMIT)
        if status != want or word not in said or after.exists(): wrong.append((folder.name, status, seconds, said))
    assert not wrong, wrong


STALE = { # code as it was: as it is
    "print('a dog')": "print('a cat')", "print('loss 0.31')": "print('loss 0.62')", '[1, 2]': '[1, 2, 3]', "'nothing'": 'None',
    'None': "'something'"}


def outputs(code):
    "What a cell of one expression shows"
    if code.startswith('print'): return [dict(output_type='stream', name='stdout', text=[eval(code[6:-1]) + '\n'])]
    data = {'text/plain': [repr(eval(code))]}
    return [dict(output_type='execute_result', execution_count=None, metadata={}, data=data)]*(code != 'None')


def test_a_stale_output_is_noticed(server, tmp_path):
    """Words, numbers and values that a page's code no longer makes, in every cell; for numbers, 5% apart is the same"""
    page, log = tmp_path/'page.ipynb', tmp_path/'log'
    write_page(page, *STALE.values(), outputs=[outputs(code) for code in STALE])
    status, _, said = pages.run(study, str(page), log, LIMIT)
    missed = [code for code in STALE.values() if f'a stored output is stale, in the cell that begins {code!r}' not in said]
    assert status == 1 and not missed, (missed, said)
    same = [*STALE, *(code.replace('0.31', '0.311') for code in STALE)]
    write_page(page, *same, outputs=[outputs(code) for code in [*STALE]*2])
    status, _, said = pages.run(study, str(page), log, LIMIT)
    assert status == 0, said


def write_page(path, *cells, tags=(), outputs=None):
    "A page of code cells, each with its outputs; the first has the tags"
    cells = [dict(cell_type='code', id=f'c{i}', metadata=dict(tags=list(tags)) if not i else {},
                  outputs=outputs[i] if outputs else [], execution_count=None, source=c) for i, c in enumerate(cells)]
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))
