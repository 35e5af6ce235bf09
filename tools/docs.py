"""The site: pages, tables and an explorer of results, as static files that need no network. Nothing is executed.

    python tools/docs.py [OUT]      # OUT/src is what Sphinx reads, OUT/html the site; OUT is _docs unless named

A page is its notebook without directives and hidden cells; what it links to lies in the site too."""
import ast, html, json, os, re, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
from posixpath import normpath, relpath
from urllib.parse import unquote

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import docs_explorer # noqa: E402
from tools.docs_check import faults # noqa: E402

GONE = ('hide', 'default_exp', 'include: false') # cells with these directives aren't shown
LINK = re.compile(r'(!?)\[((?:[^\]\\]|\\.)*)\]\(([^)\s]+)\)')
PARTS = {'1_core': 'Foundations', '2_world': 'The embedded world', '3_model': 'Models', '4_method': 'The method',
         '5_baselines': 'Baselines', '6_measure': 'Measuring', '7_real': 'Real models', '8_use': 'Using it',
         '9_studies': 'Studies'}


def source(cell): return ''.join(cell['source'])
def notebook(page): return json.loads(page.read_text(encoding='utf-8'))
def directives(code): return [m[1] for m in re.finditer(r'^\s*#\|\s*(.*?)\s*$', code, re.M)]


def pages(root):
    "Notebooks in reading order: the index, the other front pages, the folders"
    found = [p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb')]
    found = [p for p in found if not any(part.startswith(('.', '_')) for part in p.parts)]
    return sorted(found, key=lambda p: (p.stem != 'index', len(p.parts), p.as_posix()))


# ------------------------------------------------------------------ names, and the cells that define them

KINDS = {ast.FunctionDef: 'function', ast.AsyncFunctionDef: 'function', ast.ClassDef: 'class'}


def defined(code):
    "{name: kind} of what a cell defines at its top level"
    out = {}
    for node in ast.parse(re.sub(r'^[%!].*', '', code, flags=re.M)).body:
        if type(node) in KINDS: out[node.name] = KINDS[type(node)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out |= {t.id: 'data' for t in targets if isinstance(t, ast.Name)}
    return out


def module_of(nb):
    code = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'code')
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', code, re.M)
    return f'resalign.{found[1]}' if found else None


def is_exported(code): return any(d.split()[:1] == ['export'] for d in directives(code))


def modules(root):
    "{module: (page, the names that it exports)}"
    out = {}
    for page in pages(root):
        nb = notebook(root/'nbs'/page)
        if not (module := module_of(nb)): continue
        code = [source(c) for c in nb['cells'] if c['cell_type'] == 'code']
        out[module] = page, {name for c in code if is_exported(c) for name in defined(c)}
    return out


# ------------------------------------------------------------------ a page

class Site:
    "What Sphinx reads: files under `src`, written only where they change, so that Sphinx reads only those again"

    def __init__(self, root, out):
        self.root, self.src, self.written = root, out/'src', set()
        self.modules = modules(root)
        self.as_page = {'DEVELOPERS.md': 'developers.md', 'CHANGELOG.md': 'changelog.md',
                        'results/tables/claims.csv': 'ledger.md', 'nbs/claim_map.csv': 'claim_map.md'}
        self.as_page |= {f'results/tables/{p.name}': f'{p.stem}.md' for p in (root/'results/tables').glob('*.md')}

    def write(self, name, content):
        path, blob = self.src/name, content if isinstance(content, bytes) else content.encode()
        self.written.add(path)
        if path.is_file() and path.read_bytes() == blob: return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)

    def remove_others(self):
        for path in self.src.rglob('*'):
            if path.is_file() and path not in self.written: path.unlink()

    # links: pages stay pages, code leads to the cell, any other file comes along

    def link(self, text, target, page):
        "Markdown of one link that stands in `page`"
        path, _, anchor = target.partition('#')
        there = normpath(f'nbs/{page.parent.as_posix()}/{unquote(path)}') if page.suffix == '.ipynb' else path
        if there.startswith('nbs/') and there.endswith('.ipynb'): to = there.removeprefix('nbs/')
        elif there.startswith('resalign/'): return self.to_code(text, there, page)
        elif there in self.as_page: to = self.as_page[there]
        elif (self.root/there).is_file():
            to = f'files/{there}'
            self.write(to, (self.root/there).read_bytes())
        elif (self.root/there).is_dir(): return text
        else: to = there # Sphinx says that there is no such file
        return f'[{text}]({relpath(to, page.parent.as_posix())}{"#"*bool(anchor)}{anchor})'

    def to_code(self, text, file, page):
        module = file.removesuffix('.py').replace('/', '.')
        where, names = self.modules.get(module, (None, ()))
        if where is None: return text
        said = re.findall(r'`(\w+)`', text)
        if said and set(said) <= names: return ', '.join(f'[`{n}`](#{module}.{n})' for n in said)
        return f'[{text}]({relpath(where.as_posix(), page.parent.as_posix())})'

    def moved(self, text, page):
        "Markdown with its links as the site has them; fenced code is left alone"
        def move(m):
            if re.match(r'[a-z]+:|//|#', m[3]): return m[0]
            return m[1] + self.link(m[2], m[3], page)
        parts = re.split(r'(^```.*?^```)', text, flags=re.S | re.M)
        return ''.join(p if p.startswith('```') else LINK.sub(move, p) for p in parts)

    def page(self, page):
        "A notebook as a reader of the site sees it"
        nb = notebook(self.root/'nbs'/page)
        module, cells = module_of(nb), []
        for cell in nb['cells']:
            if cell['cell_type'] == 'markdown': cell = cell | dict(source=self.moved(source(cell), page))
            if cell['cell_type'] == 'code': cell = self.code(cell, page, module)
            if cell: cells.append(cell)
        language = dict(name='python', pygments_lexer='ipython3')
        kernel = dict(name='python3', language='python', display_name='Python 3')
        return nb | dict(cells=cells, metadata=dict(kernelspec=kernel, language_info=language))

    def code(self, cell, page, module):
        "A code cell without its directives; None if it is hidden"
        said, code = directives(source(cell)), source(cell)
        if any(d.startswith(GONE) for d in said): return None
        tags = ['remove-input']*('echo: false' in said)
        metadata = dict(tags=tags)
        if is_exported(code) and module: metadata |= dict(defines=defined(code), module=module)
        code = re.sub(r'^\s*#\|.*\n?', '', code, flags=re.M).strip('\n')
        outputs = [self.output(o, page) for o in cell['outputs']]
        return cell | dict(source=code, metadata=metadata, outputs=outputs) if code else None

    def output(self, output, page):
        "Markdown that a cell made has links too; what a browser can't show goes"
        data = output.get('data')
        if data is None: return output
        if 'text/markdown' in data:
            data = data | {'text/markdown': self.moved(''.join(data['text/markdown']), page)}
        return output | dict(data=data)


# ------------------------------------------------------------------ navigation

def toctree(caption, names):
    listed = '\n'.join(names)
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n'


def navigation(found, results, house):
    "The pages in reading order, a part a folder"
    trees, folders = [], {}
    for p in found: folders.setdefault(p.parent.as_posix(), []).append(p.with_suffix('').as_posix())
    front = [p for p in folders.pop('.', []) if p != 'index']
    if front: trees.append(toctree('Start here', front))
    trees.append(toctree('What was found', results))
    for folder, names in folders.items(): trees.append(toctree(PARTS.get(folder, folder), names))
    return '\n'.join([*trees, toctree('The house', house)])


# ------------------------------------------------------------------ pages that are made of tables

def text(value): return '' if pd.isna(value) else html.escape(str(value), quote=False)
def read(path): return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else None
def chip(verdict): return f'<span class="verdict v-{re.sub("[^a-z]+", "-", verdict.lower())}">{text(verdict)}</span>'
def to(address, said): return f'<a href="{address}">{said}</a>'


def sortable(rows, name, wide=()):
    "An HTML table whose rows are dicts of HTML; docs/static/site.js sorts and filters it"
    heads = ''.join(f'<th{" class=wide"*(h in wide)}>{h}</th>' for h in rows[0])
    body = ''.join('<tr>' + ''.join(f'<td>{v}</td>' for v in row.values()) + '</tr>\n' for row in rows)
    head = f'<table class="sortable filtered" id="{name}"><thead><tr>{heads}</tr></thead>'
    return f'{head}\n<tbody>\n{body}</tbody></table>'


def raw(inner): return f'```{{raw}} html\n{inner}\n```\n'


def counted(claims):
    "How many of each verdict, as chips"
    counts = claims.verdict.value_counts()
    return ' '.join(f'{chip(verdict)} {n}' for verdict, n in counts.items())


def stage_page(site, stage):
    "The address of a stage's page, or None"
    return next((p.with_suffix('.html').as_posix() for p, _ in site.modules.values()
                 if p.parts[0] == '9_studies' and p.stem.partition('_')[2] == stage), None)


def ledger(site):
    "Every claim, what the paper says, what was measured"
    head = '# The ledger of claims\n\n> What the paper says, what was measured here, and the verdict.\n\n'
    claims = read(site.root/'results/tables/claims.csv')
    if claims is None: return head + 'The table of claims has not been made yet (`dvc repro claims`).\n'
    rows = [judged(site, c) for c in claims.to_dict('records')]
    site.write('files/results/tables/claims.csv', (site.root/'results/tables/claims.csv').read_bytes())
    note = ('\nA click on a heading sorts. How a verdict is reached: {rules}. '
            'The table as a file: [claims.csv](files/results/tables/claims.csv).\n\n')
    page = stage_page(site, 'claims')
    rules = f'[the claims ledger]({page.removesuffix(".html")}.ipynb)' if page else 'the page of the ledger'
    return head + raw(f'<p class="counts">{counted(claims)}</p>') + note.format(rules=rules) + \
        raw(sortable(rows, 'ledger', ('claim', 'here', 'test')))


def judged(site, c):
    "One line of the ledger as HTML"
    p = f' <small>(p {text(c["p"])})</small>' if c['p'] else ''
    return {'claim': f'<span id="{text(c["id"])}">{text(c["claim"])}</span>', 'verdict': chip(c['verdict']),
            'paper': arrows(c['paper']), 'here': arrows(c['ours']), 'test': text(c['test']) + p,
            'command': command(site, c['stage'], c['command'])}


def arrows(value): return text(value.replace('->', '→'))


def command(site, stage, said):
    "What makes a number, as a link to the page of its stage"
    page, shown = stage_page(site, stage), f'<code>{text(said)}</code>' if said else ''
    return to(page, shown) if page else shown


def claim_map(site):
    "Which statement of the paper is where: page, stage, table, figure, command, verdict"
    head = '# The claim map\n\n> Each statement of the paper: where it is implemented, measured and judged.\n\n'
    statements, claims = read(site.root/'nbs/claim_map.csv'), read(site.root/'results/tables/claims.csv')
    if statements is None: return head + 'There is no `nbs/claim_map.csv`.\n'
    verdicts = {} if claims is None else dict(zip(claims.id, claims.verdict))
    rows = [mapped(site, s, verdicts) for s in statements.to_dict('records')]
    site.write('files/nbs/claim_map.csv', (site.root/'nbs/claim_map.csv').read_bytes())
    note = ('A click on a heading sorts. A verdict leads to its line of [the ledger](ledger.md). '
            'The table as a file: [claim_map.csv](files/nbs/claim_map.csv).\n\n')
    return head + note + raw(sortable(rows, 'claim-map', ('statement',)))


def mapped(site, s, verdicts):
    "One statement of the map as HTML"
    shown = [to(f'ledger.html#{text(i)}', chip(verdicts[i])) for i in s['claims'].split() if i in verdicts]
    return {'statement': text(s['statement']), 'verdict': '<br>'.join(shown), 'in the paper': text(s['paper']),
            'page': '<br>'.join(to(page_address(p), text(title(site.root/'nbs'/p))) for p in s['page'].split()),
            'table': files(site, s['table']), 'figure': files(site, s['figure']),
            'command': command(site, s['stage'], s['command'])}


def title(page):
    "The H1 of a notebook, or the name of one that isn't there"
    if not page.is_file(): return page.stem
    return next((m[1] for c in notebook(page)['cells'] if (m := re.match(r'# (.*)', source(c)))), page.stem)


def page_address(page): return f'{page.removesuffix(".ipynb")}.html'


def files(site, names):
    "Links to files under the root; one that is not there yet is a name"
    out = []
    for name in names.split():
        path = site.root/name
        if path.is_file(): site.write(f'files/{name}', path.read_bytes())
        there = site.as_page.get(name, '').replace('.md', '.html') or f'files/{name}'
        out.append(to(there, text(path.name)) if path.is_file() else text(path.name))
    return '<br>'.join(out)


def index_of_names(site):
    "Every exported name"
    rows = [{'name': f'<a href="{page.with_suffix(".html").as_posix()}#def-{n}"><code>{n}</code></a>',
             'module': f'<code>{module}</code>', 'page': to(page.with_suffix('.html').as_posix(), page.with_suffix(''))}
            for module, (page, names) in site.modules.items() for n in names if not n.startswith('_')]
    rows.sort(key=lambda r: plain(r['name']).lower())
    head = f'# Names\n\n> The {len(rows)} names that pages export, each with the cell that defines it.\n\n'
    return head + raw(sortable(rows, 'names'))


def plain(markup): return re.sub('<[^>]+>', '', markup)


# ------------------------------------------------------------------ the build

def prepare(root=ROOT, out=ROOT/'_docs'):
    "Everything that Sphinx reads"
    site, found = Site(Path(root), Path(out)), pages(root)
    tables = [f'{p.stem}' for p in sorted((site.root/'results/tables').glob('*.md'))]
    house = ['names', *(f.removesuffix('.md').lower() for f in ('DEVELOPERS.md', 'CHANGELOG.md') if (root/f).is_file())]
    trees = navigation(found, ['ledger', 'claim_map', 'explorer', *tables], house)
    for p in found:
        nb = site.page(p)
        if p.stem == 'index' and len(p.parts) == 1: # it also holds the navigation
            nb['cells'].append(dict(cell_type='markdown', id='navigation', metadata={}, source=trees))
        site.write(p.as_posix(), json.dumps(nb))
    for name in [f for f in site.as_page if f.endswith('.md') and (root/f).is_file()]:
        site.write(site.as_page[name], site.moved((root/name).read_text(encoding='utf-8'), Path(site.as_page[name])))
    site.write('ledger.md', ledger(site))
    site.write('claim_map.md', claim_map(site))
    site.write('names.md', index_of_names(site))
    site.write('explorer.md', docs_explorer.page())
    site.remove_others()
    return site


def scripts(html_folder, root):
    "MathJax and Plotly from their packages, the explorer's data, the files that tables link to"
    static = html_folder/'_static'
    mathjax = Path(find_spec('sphinx-mathjax-offline').submodule_search_locations[0])/'static/mathjax/tex-svg.js'
    shutil.copy(mathjax, static)
    docs_explorer.write(html_folder, root)


def build(root=ROOT, out=ROOT/'_docs'):
    "The site under `out`/html; anything that Sphinx warns of is an error"
    site, made = prepare(root, out), Path(out)/'html'
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', '-c', str(ROOT/'docs'),
               '-d', str(Path(out)/'doctrees'), str(site.src), str(made)]
    quiet = os.environ | dict(PYTHONWARNINGS='ignore')
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'make docs: the site has faults\n{done.stdout}{done.stderr}')
    for old in made.rglob('*.html'): # of pages that are no more
        source = site.src/old.relative_to(made)
        if source.parts[len(site.src.parts)] == 'files' or old.stem in ('search', 'explorer_alone'): continue
        if not any(source.with_suffix(s).is_file() for s in ('.ipynb', '.md')): old.unlink()
    if (site.src/'files').is_dir(): shutil.copytree(site.src/'files', made/'files', dirs_exist_ok=True)
    scripts(made, site.root)
    if wrong := faults(made): raise SystemExit('\n'.join(['make docs: the site has faults', *wrong]))
    return made


if __name__ == '__main__':
    made = build(out=Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs').resolve())
    print(f'{made}/index.html')
