"Batches: every cell once, whatever is killed; mistakes before anything runs; nothing of a page's words in the index unescaped."
import json, os, signal, threading, time
from pathlib import Path
import nbformat, pandas as pd, pytest
from resalign.batch import Grid, batch, cells, jobs_of, name_of
from resalign.core import UserError, make_config

PYTHON = dict(kernelspec=dict(name='python3', display_name='Python', language='python'))

def write_page(path, *code, parameters='x = 1'):
    tagged = nbformat.v4.new_code_cell(parameters, metadata=dict(tags=['parameters']))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('words'), tagged, *map(nbformat.v4.new_code_cell, code)], metadata=PYTHON), path)
    return path

def outputs(notebook): return [o for c in nbformat.read(notebook, 4).cells for o in c.get('outputs', [])]

def test_a_cell_gets_its_parameters(tmp_path):
    page = write_page(tmp_path/'page.ipynb', 'print(x, names)', parameters="x, names = 1, []")
    table = batch(page, dict(rows=[dict(x=2.5, names=['a', None, True])]), tmp_path/'out')
    assert list(table.status) == ['done']
    assert "2.5 ['a', None, True]" in outputs(next((tmp_path/'out').glob('x=*/page.ipynb')))[-1].text

def test_what_is_done_is_skipped_until_code_parameters_or_inputs_change(tmp_path):
    page, data = write_page(tmp_path/'page.ipynb', 'x'), tmp_path/'data.txt'
    data.write_text('one')
    def run(grid=None): return list(batch(page, grid or dict(product=dict(x=[1]), inputs=[str(data)]), tmp_path/'out').status)
    assert run() == ['done'] and run() == ['skipped']
    nb = nbformat.read(page, 4); nb.cells[0].source = 'other words'; nbformat.write(nb, page)
    assert run() == ['skipped']
    data.write_text('two'); assert run() == ['done']
    write_page(page, 'x + 1'); assert run() == ['done']
    assert run(dict(product=dict(x=[1, 2]), inputs=[str(data)])) == ['skipped', 'done']
    record = next((tmp_path/'out').glob('x=2/record.json')); record.write_text('{}')
    assert run(dict(product=dict(x=[1, 2]), inputs=[str(data)])) == ['skipped', 'done'] # a record that says nothing counts for nothing

@pytest.mark.parametrize('first', ['raise ConnectionError("no answer")', 'os.kill(os.getpid(), 9)'])
def test_what_may_pass_is_tried_again(tmp_path, first):
    page = write_page(tmp_path/'page.ipynb', f"import os\nfrom pathlib import Path\nmark = Path('{tmp_path}/tried')\nif not mark.exists(): mark.touch(); {first}\nx")
    table = batch(page, dict(product=dict(x=[1])), tmp_path/'out')
    assert (table.status[0], table.attempts[0], table.error[0]) == ('done', 2, '')

def test_a_mistake_is_not_tried_again_and_its_notebook_is_kept(tmp_path):
    page = write_page(tmp_path/'page.ipynb', 'assert x != 2, "<script>alert(1)</script>"')
    table = batch(page, dict(product=dict(x=[1, 2])), tmp_path/'out', retries=3)
    assert list(table.status) == ['done', 'failed'] and table.attempts[1] == 1 and 'AssertionError' in table.error[1]
    assert any(o.output_type == 'error' for o in outputs(tmp_path/'out/x=2/page.ipynb'))
    index = (tmp_path/'out/index.html').read_text()
    assert '<script>' not in index and '&lt;script&gt;' in index and 'x=2/page.ipynb' in index
    assert pd.read_csv(tmp_path/'out/summary.csv').status.tolist() == ['done', 'failed']

def test_the_index_shows_the_last_picture(tmp_path):
    page = write_page(tmp_path/'page.ipynb', 'import io\nfrom PIL import Image as Picture\nfrom IPython.display import Image\nPicture.new("RGB", (4, 4)).save(png := io.BytesIO(), "png")\nImage(png.getvalue())')
    batch(page, dict(product=dict(x=[1])), tmp_path/'out')
    assert 'data:image/png;base64,' in (tmp_path/'out/index.html').read_text()

GRIDS = {'unknown part': (dict(prodcut={}), "did you mean 'product'"), 'unequal zip': (dict(zip=dict(x=[1], y=[1, 2])), 'lists of one length'), 'empty list': (dict(product=dict(x=[])), 'at least one value'),
         'unknown parameter': (dict(product=dict(xx=[1])), "did you mean 'x'"), 'twice': (dict(rows=[dict(x=1), dict(x=1)]), 'twice'), 'input': (dict(inputs=['nowhere']), 'nowhere: no such file'),
         'no list': (dict(product=dict(x=1)), 'product'), 'no rows': (dict(rows=[]), 'rows'), 'unknown section': (dict(common=dict(x='params:unlearn.gaa')), "did you mean 'ga'")}

@pytest.mark.parametrize('case', GRIDS)
def test_mistakes_are_found_before_anything_runs(tmp_path, case):
    grid, said = GRIDS[case]
    with pytest.raises(UserError, match=said): batch(write_page(tmp_path/'page.ipynb', 'x', parameters='x, y = 1, 2'), grid, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_other_mistakes(tmp_path):
    page = write_page(tmp_path/'page.ipynb', 'x')
    (tmp_path/'words.ipynb').write_text('words')
    nbformat.write(nbformat.v4.new_notebook(cells=[], metadata=PYTHON), tmp_path/'bare.ipynb')
    for args, said in [((tmp_path/'none.ipynb', {}, tmp_path/'o'), 'no such notebook'), ((tmp_path/'words.ipynb', {}, tmp_path/'o'), 'not a notebook'), ((tmp_path/'bare.ipynb', {}, tmp_path/'o'), 'no cell tagged'),
                       ((page, {}, tmp_path/'o', 'slurm'), 'executor: unknown'), ((page, {}, tmp_path/'o', 'dask', 1, 'tcp://127.0.0.1:9'), 'does not answer')]:
        with pytest.raises(UserError, match=said): batch(*args)

def test_names_stay_inside_the_folder(tmp_path):
    page = write_page(tmp_path/'page.ipynb', 'x')
    jobs = jobs_of(page, make_config(Grid, dict(rows=[dict(x='../../etc/passwd'), dict(x='a'*500), dict(x='ü/ü'), dict(x='.')])), tmp_path/'out')
    assert all(Path(j['out']).parent == tmp_path/'out' and len(j['name']) < 120 for j in jobs) and len({j['name'] for j in jobs}) == 4

def test_named_configs():
    cell, = cells(Grid(common=dict(settings='params:unlearn.uce')))
    assert cell['settings']['tokens'] == 'rest'

def test_a_worker_that_is_killed_loses_nothing(tmp_path):
    "A cluster of two; one worker is killed in the middle: every cell is there once, whole, and none was written by two"
    from distributed import LocalCluster
    page = write_page(tmp_path/'page.ipynb', f"import time, uuid\nmine = uuid.uuid4().hex\nopen('{tmp_path}/log', 'a').write(f'start {{x}}\\n')\ntime.sleep(3)\nprint(x, mine)")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        def kill():
            while not (tmp_path/'log').is_file() or len((tmp_path/'log').read_text().splitlines()) < 2: time.sleep(.1) # both are at work
            os.kill(cluster.workers[0].pid, signal.SIGKILL)
        killer = threading.Thread(target=kill); killer.start()
        table = batch(page, dict(product=dict(x=[1, 2, 3, 4])), tmp_path/'out', 'dask', scheduler=cluster.scheduler_address)
        killer.join()
    assert list(table.status) == ['done']*4
    folders = sorted(p.name for p in (tmp_path/'out').iterdir() if p.is_dir() and not p.name.startswith('.'))
    assert folders == [name_of(dict(x=x)) for x in (1, 2, 3, 4)]
    for x in (1, 2, 3, 4):
        folder = tmp_path/'out'/f'x={x}'
        assert json.loads((folder/'record.json').read_text())['status'] == 'done'
        assert [o.text.split()[0] for o in outputs(folder/'page.ipynb') if 'text' in o] == [str(x)]
    starts = (tmp_path/'log').read_text().split('\n')
    assert max(starts.count(f'start {x}') for x in (1, 2, 3, 4)) == 2, 'the killed worker had begun a cell, and another did it again'
