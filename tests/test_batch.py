"""Batches: every cell once, whatever is killed; mistakes before anything runs; nothing of a page's words in the
index unescaped."""

import json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import nbformat, pandas as pd, pytest
from resalign.use import batch as batches, cli
from resalign.use.meaning import content
from resalign.use.batch import Grid, batch, cells_of_page, combinations, name_of
from resalign.core.settings import UserError, make_config, params
from refusals import said

PYTHON = dict(kernelspec=dict(name='python3', display_name='Python', language='python'))


def write_page(path, *code, parameters='x = 1'):
    tagged = nbformat.v4.new_code_cell(parameters, metadata=dict(tags=['parameters']))
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell('words'), tagged, *map(nbformat.v4.new_code_cell, code)],
            metadata=PYTHON,
        ),
        path,
    )
    return path


def outputs(notebook):
    return [o for c in nbformat.read(notebook, 4).cells for o in c.get('outputs', [])]


# ------------------------------------------------------------------ which cells


def test_combinations_and_names(tmp_path):
    # every combination in order: The product's last name varies fastest, then what is zipped, then rows, which have the
    # last word
    grid = Grid(
        common=dict(a=0, s='params:methods.uce'),
        product=dict(p=[1, 2], q=['x', 'y']),
        zip=dict(z=[7, 8], w=[70, 80]),
        rows=[{}, dict(a=9)],
    )
    want = [
        dict(a=a, s=params('methods.uce'), p=p, q=q, z=z, w=10 * z)
        for p in (1, 2)
        for q in 'xy'
        for z in (7, 8)
        for a in (0, 9)
    ]
    assert combinations(grid) == want and combinations(Grid()) == [{}]
    assert combinations(Grid(rows=[dict(x=1), dict(x=1)])) == [dict(x=1)] * 2

    # names stay inside the folder and differ
    assert [name_of(c) for c in (dict(method='ga', seed=0), {}, dict(x=0.5))] == ['method=ga,seed=0', 'plain', 'x=0.5']
    assert name_of(dict(x='a' * 98)) == 'x=' + 'a' * 98 and len(name_of(dict(x='a' * 99))) == 80 + 9
    page, odd = write_page(tmp_path / 'page.ipynb', 'x'), [
        '../../etc/passwd',
        '.._.._etc_passwd',
        'a' * 500,
        'a' * 501,
        'ü/ü',
        '.',
    ]
    cells = cells_of_page(page, make_config(Grid, dict(rows=[dict(x=v) for v in odd])), tmp_path / 'out')
    assert all(Path(c.out).parent == tmp_path / 'out' for c in cells)
    assert len({c.name for c in cells}) == len({c.key for c in cells}) == len(odd)


def test_a_key_is_the_code_the_parameters_and_the_inputs(tmp_path):
    "Not the prose, the place, or the order in which parameters are named"
    page, data, other = (
        write_page(tmp_path / 'page.ipynb', 'x', parameters='x, y = 1, 2'),
        tmp_path / 'data.txt',
        tmp_path / 'other.ipynb',
    )
    data.write_text('one')
    key = lambda page=page, out='out', **row: cells_of_page(
        page, Grid(rows=[row or dict(x=1, y=2)], inputs=[str(data)]), tmp_path / out
    )[0].key
    first = key()
    nb = nbformat.read(page, 4)
    nb.cells[0].source = 'other words'
    nbformat.write(nb, other)
    assert first == key() == key(other) == key(out='elsewhere') == key(y=2, x=1)
    assert (
        len(
            {first, key(x=1, y=3), key(x=1), key(x='1', y=2), key(write_page(other, 'x + 1', parameters='x, y = 1, 2'))}
        )
        == 5
    )
    data.write_text('two')
    assert key() != first


def test_mistakes_are_found_before_anything_runs(tmp_path, monkeypatch):
    import distributed
    real = distributed.Client
    monkeypatch.setattr(distributed, 'Client', lambda where, timeout: real(where, timeout=timeout/10)) # nobody answers
    page = write_page(tmp_path / 'page.ipynb', 'x', parameters='x, y = 1, 2')
    (tmp_path / 'words.ipynb').write_text('words')
    nbformat.write(nbformat.v4.new_notebook(cells=[], metadata=PYTHON), tmp_path / 'bare.ipynb')
    grids = [
        (dict(prodcut={}), "did you mean 'product'"),
        (dict(zip=dict(x=[1], y=[1, 2])), "zip: expected lists of one length, got {'x': 1, 'y': 2}"),
        (dict(product=dict(x=[])), 'product: x'),
        (dict(zip=dict(y=[])), 'zip: y'),
        (dict(product=dict(xx=[1])), "page.ipynb: parameter: unknown 'xx', did you mean 'x'"),
        (dict(rows=[dict(x=1), dict(x=1)]), 'x=1 stands there twice'),
        (dict(inputs=['nowhere']), 'nowhere: no such file or folder'),
        (dict(product=dict(x=1)), 'product'),
        (dict(rows=[]), 'rows'),
        (dict(common=dict(x='params:methods.gaa')), "did you mean 'ga'"),
    ]
    ways = [((page, g), {}, words) for g, words in grids] + [
        ((tmp_path / f'{n}.ipynb', {}), {}, f'{n}.ipynb: {words}')
        for n, words in dict(none='no such notebook', words='not a notebook', bare='has no cell tagged').items()
    ]
    ways += [
        ((page, {}), dict(executor='slurm'), 'executor'),
        ((page, {}), dict(workers=0), 'got 0 and 1'),
        ((page, {}), dict(retries=-1), 'got 2 and -1'),
        (
            (page, {}),
            dict(executor='dask', workers=1, scheduler='tcp://127.0.0.1:9'),
            "--scheduler: 'tcp://127.0.0.1:9'",
        ),
    ]
    wrong = [
        (words, text) for args, kw, words in ways if words not in (text := said(batch, *args, tmp_path / 'out', **kw))
    ]
    assert not wrong and not (tmp_path / 'out').exists()


# ------------------------------------------------------------------ what is done once, again, or not again


@pytest.fixture
def scripted(monkeypatch):
    "Pages that aren't run: a script says how each attempt ends, by the cell's x; the attempts that were made"
    made, script = [], {}

    def run_page(cell, executed):
        x = cell.parameters['x']
        made.append(x)
        return script.get(x, []).pop(0) if script.get(x) else ('', False)

    monkeypatch.setattr(batches, 'run_page', run_page)
    return made, script


def test_what_is_done_is_skipped_and_what_failed_is_not(tmp_path, scripted):
    "Until code or inputs change; a record that says nothing counts for nothing"
    (made, script), page, data = scripted, write_page(tmp_path / 'page.ipynb', 'x'), tmp_path / 'data.txt'
    data.write_text('one')
    script[2] = [('ValueError: no', False)]

    def run(xs):
        made.clear()
        return list(
            batch(page, dict(product=dict(x=xs), inputs=[str(data)]), tmp_path / 'out', workers=1).status
        ), list(made)

    assert run([1, 2]) == (['done', 'failed'], [1, 2])
    assert run([1, 2, 3]) == (['skipped', 'done', 'done'], [2, 3])
    data.write_text('two')
    assert run([1, 2]) == (['done'] * 2, [1, 2])
    write_page(page, 'x + 1')
    assert run([1]) == (['done'], [1])
    for record in (
        '{}',
        json.dumps(json.loads((tmp_path / 'out/x=1/record.json').read_text()) | dict(status='failed')),
    ):
        (tmp_path / 'out/x=1/record.json').write_text(record)
        assert run([1]) == (['done'], [1])
    assert run([1]) == (['skipped'], [])


def test_an_attempt_is_made_again_where_the_error_may_pass(tmp_path, scripted):
    "As often as said, and no oftener; one that won't pass is not"
    (made, script), page, passing, lasting = (
        scripted,
        write_page(tmp_path / 'page.ipynb', 'x'),
        ('OSError: full', True),
        ('ValueError: \x1b[31mno\n way', False),
    )
    for x, (attempts, retries, end) in enumerate(
        [
            ([passing], 1, ('done', 2, '')),
            ([passing] * 2, 1, ('failed', 2, 'OSError: full')),
            ([passing] * 2, 2, ('done', 3, '')),
            ([passing], 0, ('failed', 1, 'OSError: full')),
            ([lasting], 3, ('failed', 1, 'ValueError: no way')),
            ([passing, lasting], 3, ('failed', 2, 'ValueError: no way')),
        ]
    ):
        script[x] = list(attempts)
        made.clear()
        table = batch(page, dict(product=dict(x=[x])), tmp_path / 'out', retries=retries)
        record = json.loads((tmp_path / f'out/x={x}/record.json').read_text())
        assert (table.status[0], table.attempts[0], table.error[0]) == end == (
            record['status'],
            record['attempts'],
            record['error'],
        ) and len(made) == end[1], x


def test_pages_for_real(tmp_path):
    """A mistake, which is kept and escaped; an error that may pass, and a kernel that dies: the second attempt has the
    parameters as given, and a picture"""
    code = f'''import io, os
from pathlib import Path
from types import SimpleNamespace
from PIL import Image as Picture
from IPython.display import Image
print(x, names)
assert x != 2, "<script>alert(1)</script>"
mark = Path(r'{tmp_path}')/str(x)
if x > 2 and not mark.exists():
    mark.touch()
    if x == 3: raise ConnectionError('no answer')
    os.kill(os.getpid(), 9)
Picture.new('RGB', (4, 4)).save(png := io.BytesIO(), 'png')
Image(png.getvalue())'''
    page, out = write_page(tmp_path / 'page.ipynb', code, parameters='x, names = 1, []'), tmp_path / 'out'
    grid = dict(product=dict(x=[2, 3, 4]), common=dict(names=['a', None, True]))
    table = batch(page, grid, out)
    assert (
        list(table.status) == ['failed', 'done', 'done']
        and list(table.attempts) == [1, 2, 2]
        and list(table.x) == [2, 3, 4]
    )
    assert table.error[0] == 'AssertionError: <script>alert(1)</script>' and not table.error[[1, 2]].any()
    folders = {
        x: next(
            p
            for p in out.iterdir()
            if p.is_dir() and json.loads((p / 'record.json').read_text())['parameters']['x'] == x
        )
        for x in (2, 3, 4)
    }
    assert [next(o.text for o in outputs(f / 'page.ipynb') if 'text' in o) for f in folders.values()] == [
        f"{x} ['a', None, True]\n" for x in (2, 3, 4)
    ]
    assert [o.ename for o in outputs(folders[2] / 'page.ipynb') if o.output_type == 'error'] == ['AssertionError']
    index = (out / 'index.html').read_text()
    assert (
        '<script>' not in index
        and '&lt;script&gt;' in index
        and index.count('data:image/png;base64,') == 2
        and index.count('class="failed"') == 1
        and f'{folders[2].name[:4]}' in index
    )
    assert pd.read_csv(out / 'summary.csv').status.tolist() == list(table.status)


def test_a_worker_that_is_killed_loses_nothing(tmp_path):
    "A cluster of two; one worker is killed in the middle: every cell is there once, whole, and none was written by two"
    from distributed import LocalCluster

    page = write_page(
        tmp_path / 'page.ipynb',
        f"import time\nopen('{tmp_path}/log', 'a').write(f'start {{x}}\\n')\ntime.sleep(2)\nprint(x)",
    )
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:

        def kill():
            while not (tmp_path / 'log').is_file() or len((tmp_path / 'log').read_text().splitlines()) < 2:
                time.sleep(0.05)  # both are at work
            os.kill(cluster.workers[0].pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        table = batch(
            page, dict(product=dict(x=[1, 2])), tmp_path / 'out', 'dask', scheduler=cluster.scheduler_address
        )
        killer.join()
    assert list(table.status) == ['done'] * 2
    folders = sorted(p.name for p in (tmp_path / 'out').iterdir() if p.is_dir() and not p.name.startswith('.'))
    assert folders == [name_of(dict(x=x)) for x in (1, 2)]
    assert [
        [o.text.split()[0] for o in outputs(tmp_path / f'out/x={x}/page.ipynb') if 'text' in o] for x in (1, 2)
    ] == [['1'], ['2']]
    starts = (tmp_path / 'log').read_text().split('\n')
    assert (
        max(starts.count(f'start {x}') for x in (1, 2)) == 2
    ), 'the killed worker had begun a cell, and another did it again'


# ------------------------------------------------------------------ studies of this repository


@pytest.fixture
def study(tmp_path, monkeypatch):
    "Two methods and two seeds, computed here; what a cell writes stands in `made`"
    grid, made, data = dict(ga=1, uce=2), [], tmp_path / 'data.txt'
    data.write_text('one')

    def cells():
        return {f'{m}-{s}': dict(method=m, seed=s, steps=n) for m, n in grid.items() for s in (0, 1)}

    def run(folder, method, seed, steps):
        made.append(f'{method}-{seed}')
        if steps == 13: raise ValueError('unlucky')
        (folder / 'looks.csv').write_text(f'steps\n{steps}\n')

    module = SimpleNamespace(__name__='resalign.studies.tuning', cells=cells, run=run, inputs=lambda **_: content(data))
    monkeypatch.setattr(batches, 'study_module', lambda name: module)
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path / 'results'))

    def run_study(cell):
        try: batches.call_study(cell.study, cell.parameters, cell.out)
        except SystemExit as e: return 'failed', e.code != 1
        return '', False

    monkeypatch.setattr(batches, 'end_with_batch', lambda: None) # here a cell runs in this process
    monkeypatch.setattr(batches, 'run_study', run_study)
    return SimpleNamespace(grid=grid, made=made, data=data, out=tmp_path / 'results/runs/toy')


def ran(study, **kw):
    study.made.clear()
    table = batches.run_study_cells('toy', workers=1, **kw)
    return dict(zip(table.name, table.status)), sorted(study.made)


def whys(): return {r.cell: r.why for r in batches.plan('toy').itertuples() if r.why}


def test_a_study_computes_its_stale_cells_and_says_why(study):
    "New, a setting changed, an input changed, a cell of the grid gone, one lost"
    everything = ['ga-0', 'ga-1', 'uce-0', 'uce-1']
    assert whys() == dict.fromkeys(everything, 'not run yet')
    assert ran(study, only=dict(method='ga')) == (dict.fromkeys(['ga-0', 'ga-1'], 'done'), ['ga-0', 'ga-1'])
    assert set(whys()) == {'uce-0', 'uce-1'}
    assert ran(study, only=dict(cell='uce-1'))[1] == ['uce-1']
    assert ran(study)[1] == ['uce-0'] and whys() == {}
    assert ran(study) == (dict.fromkeys(everything, 'skipped'), [])
    study.grid['uce'] = 3
    assert whys() == dict.fromkeys(['uce-0', 'uce-1'], 'parameters: steps')
    assert ran(study)[1] == ['uce-0', 'uce-1'] and (study.out / 'uce-0/looks.csv').read_text() == 'steps\n3\n'
    study.data.write_text('two')
    assert whys() == dict.fromkeys(everything, f'inputs: {study.data}')
    del study.grid['uce']
    ran(study)
    assert set(json.loads((study.out / 'keys.json').read_text())['cells']) == {'ga-0', 'ga-1'}
    shutil.rmtree(study.out / 'ga-1')
    assert whys() == {'ga-1': 'not run yet'}


def test_a_change_of_code_is_named_by_its_module(study, monkeypatch):
    ran(study)
    real = batches.meaning
    monkeypatch.setattr(batches, 'meaning', lambda *a: real(*a) | {'resalign.core.settings': 'f' * 64})
    assert set(whys().values()) == {'code: resalign.core.settings'}


def test_a_cell_that_fails_is_not_kept(study, capfd):
    study.grid['ga'] = 13
    states, made = ran(study, retries=3)
    assert states == {'ga-0': 'failed', 'ga-1': 'failed', 'uce-0': 'done', 'uce-1': 'done'}
    assert made == ['ga-0', 'ga-1', 'uce-0', 'uce-1'] and not (study.out / 'ga-0').exists() # no second try
    assert set(whys()) == {'ga-0', 'ga-1'} and 'toy: ga-0: ValueError: unlucky' in capfd.readouterr().err


def test_cells_whose_code_alone_changed_are_settled_by_a_sample(study, monkeypatch):
    "Same bytes: all stand, by the sample; another byte, another input or a failure: all stay stale"
    ran(study)
    real = batches.meaning
    monkeypatch.setattr(batches, 'meaning', lambda *a: real(*a) | {'resalign.core.settings': 'f' * 64})
    study.made.clear()
    assert batches.settle('toy', 2, workers=1) == {'code: resalign.core.settings': ''}
    assert sorted(study.made) == ['ga-0', 'uce-0'] and whys() == {}
    assert batches.kept_of_study('toy')['ga-1']['settled_by'] == ['ga-0', 'uce-0']
    monkeypatch.setattr(batches, 'meaning', real)
    (study.out / 'uce-0/looks.csv').write_text('steps\n99\n')
    assert batches.settle('toy', 2, workers=1) == {'code: resalign.core.settings': 'uce-0: looks.csv'}
    assert set(whys()) == {'ga-0', 'ga-1', 'uce-0', 'uce-1'}
    study.data.write_text('two')
    assert batches.settle('toy', 4, workers=1) == {}
    with pytest.raises(UserError, match='--again'): batches.settle('toy', 0)


def test_only_the_cells_that_were_asked_for(study, monkeypatch, capsys):
    "Each of the parameters is right, one of several values; they alone are settled and planned"
    ran(study)
    names = lambda **only: [cell.name for cell in batches.selected(batches.cells_of_study('toy'), only)]
    assert names(method='ga', seed=1) == ['ga-1'] and names(method='ga,uce', seed=1) == ['ga-1', 'uce-1']
    commas = [SimpleNamespace(name=name, parameters={}) for name in ('ga-1', 'ga-margin=1,alpha=2-0')]
    assert [c.name for c in batches.selected(commas, dict(cell=commas[1].name))] == [commas[1].name] # as it is printed
    real = batches.meaning
    monkeypatch.setattr(batches, 'meaning', lambda *a: real(*a) | {'resalign.core.settings': 'f' * 64})
    study.made.clear()
    cli.batch_study('toy', dict(method='ga'), False, 2, dict(workers=1))
    assert sorted(study.made) == ['ga-0', 'ga-1'] and capsys.readouterr().out == '0 of 2 cells would run\n'
    assert set(whys()) == {'uce-0', 'uce-1'}


def test_how_a_cell_of_a_study_ended(monkeypatch):
    "A mistake stays one; an error that may pass, and a process that was killed, are worth another try"
    failed = 'failed, see above'
    ends = {0: ('', False), 1: (failed, False), 2: (failed, True), -9: ('killed by signal 9', True)}
    for status, end in ends.items():
        process = SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=status)
        monkeypatch.setattr(batches, 'fork_server', lambda: SimpleNamespace(Process=lambda target, args: process))
        assert batches.run_study(SimpleNamespace(study='toy', parameters={}, out='out')) == end


def test_what_differs_and_what_is_shown(tmp_path):
    "Files of folders below too, and one that is gone; of a page its last picture"
    for name in 'ab':
        (tmp_path / name / 'below').mkdir(parents=True)
        (tmp_path / name / 'same.csv').write_text('x')
        (tmp_path / name / 'below/it.csv').write_text(name)
    (tmp_path / 'a/gone.csv').write_text('x')
    assert batches.files_that_differ(tmp_path / 'a', tmp_path / 'b') == 'below/it.csv, gone.csv'
    assert batches.changed(dict(a=1), {}) == 'a'
    pictures = [nbformat.v4.new_output('display_data', {'image/png': png}) for png in ('first', 'last\n')]
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('x', outputs=pictures)])
    nbformat.write(page, tmp_path / 'page.ipynb')
    assert batches.thumbnail(tmp_path / 'page.ipynb') == 'last'


ALONE = """
import multiprocessing, os, sys, time
from resalign.use.batch import end_with_batch

def cell(file):
    end_with_batch()
    with open(file, 'w') as f: f.write(str(os.getpid()))
    time.sleep(400)

if __name__ == '__main__':
    multiprocessing.get_context('forkserver').Process(target=cell, args=(sys.argv[1],)).start()
    time.sleep(400)
"""


def test_a_cell_ends_with_its_batch(tmp_path):
    "Also when the batch is killed and can tell nobody"
    (tmp_path/'alone.py').write_text(ALONE)
    batch = subprocess.Popen([sys.executable, 'alone.py', 'pid'], cwd=tmp_path)
    pid, limit = tmp_path/'pid', time.monotonic() + 200
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < limit: time.sleep(.2)
    batch.kill()
    batch.wait()
    cell = Path('/proc')/pid.read_text()
    while cell.exists() and 'Z' not in (cell/'stat').read_text().split()[2] and time.monotonic() < limit: time.sleep(.1)
    assert time.monotonic() < limit
