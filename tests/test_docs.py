"""The site: whole, without warnings or dead links, nothing from another host; names, tables, what the explorer shows."""
import collections, csv, html, importlib.util, json, re, shutil

import pandas as pd, pytest, yaml
from pathlib import Path
from scipy import stats

from tools import docs, docs_explorer
from tools.docs_check import faults

ROOT = Path(__file__).resolve().parent.parent
found = importlib.util.spec_from_file_location('names', ROOT/'docs/names.py')
names = importlib.util.module_from_spec(found)
found.loader.exec_module(names)


def rows(path): return list(csv.DictReader(path.open(encoding='utf-8')))
def agree(wrong, advice): assert not wrong, '\n'.join([advice, *map(str, wrong)])
def plain(markup): return html.unescape(re.sub(r'<[^>]+>', '', markup))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Built as `make docs` builds it, which refuses warnings of Sphinx, dead links and what another host would serve"
    return docs.build(out=tmp_path_factory.mktemp('site'))


def test_the_site_is_whole(site):
    # every page, in reading order
    pages = [p.with_suffix('.html').as_posix() for p in docs.pages(ROOT)]
    shown = (site/'index.html').read_text(encoding='utf-8')
    tree = re.search(r'<div class="sidebar-tree">.*?</aside>', shown, re.S)[0]
    listed = [a for a in re.findall(r'href="([^"#]+)"', tree) if a in pages]
    assert listed == [p for p in pages if p != 'index.html'] and len(pages) > 40
    agree([p for p in pages if not (site/p).is_file()], 'not built:')

    # mathematics and search come from files beside the pages
    page = (site/'4_method/00_hypergrad.html').read_text(encoding='utf-8')
    assert 'src="../_static/tex-svg.js"' in page and (site/'_static/tex-svg.js').stat().st_size > 1e6
    assert 'class="math' in page and '#| ' not in plain(page)
    assert 'hypergradient' in (site/'searchindex.js').read_text(encoding='utf-8')

    # the ledger and the map show every line
    for file, page in (('results/tables/claims.csv', 'ledger.html'), ('nbs/claim_map.csv', 'claim_map.html')):
        text = (site/page).read_text(encoding='utf-8')
        lines, table = rows(ROOT/file), re.search(r'<table class="sortable.*?</table>', text, re.S)[0]
        assert table.count('<tr>') == len(lines) + 1
        said = plain(table)
        agree([v for r in lines for v in [r.get('claim') or r['statement']] if v not in said], f'{page}:')

    # names lead to the cell that defines them, from code and from prose, also from another page
    modules = docs.modules(ROOT)
    agree([(m, n) for m, (page, exported) in modules.items() for n in exported
           if f'id="def-{n}"' not in (site/page.with_suffix('.html')).read_text(encoding='utf-8')], 'no anchor:')
    index = (site/'index.html').read_text(encoding='utf-8')
    assert '4_method/00_hypergrad.html#def-hypergradient' in index
    page = (site/'4_method/30_resalign.html').read_text(encoding='utf-8')
    link = r'<span class="n"><a class="def" href="00_hypergrad.html#def-hypergradient"[^>]*>hypergradient</a>'
    assert re.search(link, page)

    # the explorer by itself: nothing beside it, every table and picture within
    alone = (site/'explorer_alone.html').read_text(encoding='utf-8')
    data = json.loads(re.search(r'window\.RESULTS = (.*?)</script>', alone, re.S)[1].replace('<\\/', '</'))
    assert not re.search(r'<(script|link|img)[^>]*(src|href)=', re.sub(r'<script>.*?</script>', '', alone, flags=re.S))
    sources = [seed['src'] for seeds in data['pictures'].values() for seed in seeds.values()]
    drawn = docs_explorer.pictures(ROOT, docs_explorer.method_labels(ROOT))
    assert len(sources) == sum(map(len, drawn.values())) and all(s.startswith('data:image/') for s in sources)
    tables = {t['name']: len(t['rows']) for t in data['tables']}
    assert set(tables) == {t['name'] for t in docs_explorer.found(ROOT)['tables']}
    whole = {p.stem: pd.read_csv(p) for p in (ROOT/'results/tables').glob('*.csv')} # a row a number, and over models
    whole = {k: t for k, t in whole.items() if {'method', 'seed', 'value', 'low'} <= set(t) and 'all' in set(t.seed)}
    assert {k: tables[k] for k in whole} == {k: t.value.count() for k, t in whole.items()}


def test_the_claim_map():
    "Pages, stages and results that there are; every claim of the ledger in one line"
    lines, stages = rows(ROOT/'nbs/claim_map.csv'), yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']
    outs = {o if isinstance(o, str) else next(iter(o)) for s in stages.values() for o in s['outs']}
    named = [f'nbs/{p}' for r in lines for p in r['page'].split()]
    made = [f for r in lines for f in f'{r["table"]} {r["figure"]}'.split()]
    agree([p for p in named if not (ROOT/p).is_file()], 'no such page:')
    agree([r['stage'] for r in lines if r['stage'] and r['stage'] not in stages], 'no such stage:')
    agree([f for f in made if f not in outs and not (ROOT/f).is_file()], 'made by no stage:')
    counted = collections.Counter(i for r in lines for i in r['claims'].split())
    ledger = {r['id'] for r in rows(ROOT/'results/tables/claims.csv')}
    agree({i for i, n in counted.items() if n > 1} | counted.keys() ^ ledger, 'nbs/claim_map.csv, claims: each id once:')


CODE = '''from pkg.a import solve, rate as share
from pkg import b
import pkg.a
%time solve(b.step)
def f(solve, x):
    rate = x
    return solve(rate, share)
y = [solve(share=1) for b in y]
share = 3
share + solve.other
'''


def test_names_in_code():
    "Imports, aliases, attributes of modules; not arguments, local variables, keywords, or what a variable hides"
    known = collections.ChainMap({}, {})
    defined = {'pkg.a.solve': 0, 'pkg.a.rate': 0, 'pkg.b.step': 0}
    found = names.uses(CODE, known, defined, {'pkg.a': 0, 'pkg.b': 0})
    lines = CODE.splitlines()
    wrong = [(at, text) for at, (text, _) in found.items() if not lines[at[0] - 1][at[1]:].startswith(text)]
    assert not wrong
    assert sorted((line, text, full) for (line, _), (text, full) in found.items()) == [
        (1, 'pkg.a', 'pkg.a'), (1, 'rate', 'pkg.a.rate'), (1, 'solve', 'pkg.a.solve'), (2, 'b', 'pkg.b'),
        (7, 'share', 'pkg.a.rate'), (8, 'solve', 'pkg.a.solve'), (10, 'share', 'pkg.a.rate'), (10, 'solve', 'pkg.a.solve')]
    assert names.uses('share', known, defined, {}) == {} and names.uses('not python', known, defined, {}) == {}
    spans = '<span class="n">θ</span> <span class="n">solve</span>(<span class="s">&quot;solve&quot;</span>)'
    linked = names.with_links(spans, {(1, 2): ('solve', 'pkg.a.solve')}, lambda full: f'#{full}')
    assert linked.count('<a ') == 1 and 'href="#pkg.a.solve" title="pkg.a.solve"><span' not in linked
    assert '<span class="n"><a class="def" href="#pkg.a.solve" title="pkg.a.solve">solve</a></span>' in linked


WRONG = {'<a href="no.html">': 'no such file: no.html', '<a href="b.html#no">': 'no such anchor: b.html#no',
         '<img src="https://x.org/a.png">': 'fetches https://x.org/a.png', '<a href="#no">': 'no such anchor: #no',
         '<script src="//x.org/a.js"></script>': 'fetches //x.org/a.js'}


def test_faults_are_found(tmp_path):
    (tmp_path/'b.html').write_text('<h1 id="here">')
    for good in ('<a href="b.html#here">', '<a href="https://x.org">', '<a href="mailto:a@x.org">', '<img src="data:,">'):
        (tmp_path/'a.html').write_text(good)
        assert not faults(tmp_path), good
    for bad, complaint in WRONG.items():
        (tmp_path/'a.html').write_text(bad)
        assert faults(tmp_path) == [f'a.html: {complaint}'], bad
    (tmp_path/'a.html').unlink()
    (tmp_path/'a.css').write_text('@import "https://x.org/a.css"; p { background: url(a.png) }')
    assert faults(tmp_path) == ['a.css: fetches https://x.org/a.css']


def page(*cells):
    run = dict(code=dict(outputs=[], execution_count=None), markdown={})
    cells = [dict(cell_type=kind, id=f'c{k}', metadata={}, source=text) | run[kind] for k, (kind, text) in enumerate(cells)]
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells))


def test_a_site_without_results_and_with_a_dead_link(tmp_path):
    "What isn't there yet is said; hidden cells are gone; a link to a page that isn't there is refused"
    root, out = tmp_path/'root', tmp_path/'out'
    (root/'nbs/1_one').mkdir(parents=True)
    front = '# Front\n\nSee [one](1_one/00_a.ipynb), [`f`](../resalign/one/a.py).'
    (root/'nbs/index.ipynb').write_text(page(('markdown', front)))
    cells = [('markdown', '# One\n\n$x^2$, `f`'), ('code', '#| default_exp one.a'), ('code', '#| export\ndef f(): return 1'),
             ('code', '#| hide\nsecret()')]
    (root/'nbs/1_one/00_a.ipynb').write_text(page(*cells, ('markdown', '[gone](99_gone.ipynb)')))
    with pytest.raises(SystemExit) as refused: docs.build(root, out)
    assert str(refused.value).count('WARNING') == 1 and '99_gone' in str(refused.value), refused.value
    made = out/'html' # all the same, Sphinx has written the rest
    one = (made/'1_one/00_a.html').read_text(encoding='utf-8')
    article = plain(re.search('<article.*</article>', one, re.S)[0])
    assert 'secret' not in one and 'id="def-f"' in one and 'return 1' in article and 'export' not in article
    assert 'has not been made yet' in (made/'ledger.html').read_text(encoding='utf-8')
    assert docs_explorer.found(root)['tables'] == []


def test_what_the_explorer_makes_of_tables(tmp_path):
    # wide: a metric a column, `low` and `high` belong to the column before them; settings are keys
    wide = 'solver,lr,worst,low,high,area,area_low,area_high,n,fid\na,0.1,0.5,0.4,0.6,7,6,8,9,20\na,0.2,0.3,0.2,0.4,5,4,6,9,30\n'
    (tmp_path/'wide.csv').write_text(wide)
    t = docs_explorer.table(tmp_path/'wide.csv', {})
    got = {(r[1], r[2]): r[3:] for r in t['rows']}
    assert t['columns'] == ['solver', 'metric', 'lr'] and t['share'] == ['worst']
    assert got['worst', '0.1'] == [.5, .4, .6, 9] and got['area', '0.2'] == [5, 4, 6, 9] and got['fid', '0.2'] == [30, None, None, 9]

    # seeds: all of them together by Student, within 0 and 1; methods by their labels; a key that follows is no choice
    values = [.1, .2, .6]
    seeds = pd.DataFrame(dict(method='ga', seed=range(3), step=5, device='x', unsafe=values))
    pd.concat([seeds, seeds.assign(step=6, unsafe=1.)]).to_csv(tmp_path/'long.csv', index=False)
    t = docs_explorer.table(tmp_path/'long.csv', dict(ga='GA'))
    pooled = next(r for r in t['rows'] if r[t['columns'].index('seed')] == 'all' and '5' in r)
    low, high = stats.t.interval(.95, 2, loc=.3, scale=stats.sem(values))
    assert low < 0 and pooled[-4:-1] == pytest.approx([.3, 0, high], rel=1e-4)
    assert pooled[0] == 'GA' and t['along'] == ['step'] and t['others'] == [] and t['seed']

    # the main table: phase and fine-tuning are one choice, rates are shares and distances aren't, intervals are over models
    about = dict(concept='vice', method=['ga', 'ga', 'resalign'], seed=['0', 'all', 'all'], low=.1, high=.3, n=2, detector='d')
    rows = [pd.DataFrame(about | dict(phase=phase, finetune=how, metric=metric, value=.2))
            for phase, how in (('before', 'none'), ('varied', 'lora')) for metric in ('IP', 'KID')]
    pd.concat(rows).to_csv(tmp_path/'main.csv', index=False)
    t = docs_explorer.table(tmp_path/'main.csv', dict(ga='GA'))
    assert t['share'] == ['IP'] and t['others'] == ['fine-tuning'] and t['seed'] and len(t['rows']) == 12
    assert {r[t['columns'].index('fine-tuning')] for r in t['rows']} == {'before', 'varied, LoRA'}

    # pictures: of the table's models alone, whatever else lies under results/runs
    cells = 'table/ga-0 table/resalign-ca-1 phenomenon/vice-ga-2 tuning/ga-3 table/other-0 courses/share-ga-4'.split()
    for cell in cells:
        (tmp_path/'results/runs'/cell).mkdir(parents=True)
        (tmp_path/'results/runs'/cell/'pictures.jpg').write_bytes(b'')
    found = docs_explorer.pictures(tmp_path, {'ga': 'GA', 'ca': 'CA', 'resalign-ca': 'ResAlign on CA'})
    assert {m: sorted(seeds) for m, seeds in found.items()} == {'GA': ['0', '2'], 'ResAlign on CA': ['1']}

    # tables that aren't for it, and such as can't be read
    for text in ('a,b\n1,2\n', 'method,value\nga,1\n', 'method,value,low,high\n', ''):
        (tmp_path/'other.csv').write_text(text)
        assert docs_explorer.table(tmp_path/'other.csv', {}) is None
