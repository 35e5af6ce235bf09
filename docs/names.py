"""A Sphinx extension: each exported name has an anchor at the cell that defines it, and is a link wherever it is used.

tools/docs.py writes into a cell's metadata what it defines. Links are found in the syntax tree, so that an argument or a
local variable of the same name isn't one."""
import ast, html, re
from collections import ChainMap

from docutils import nodes
from sphinx.util.osutil import relative_uri

CODE = re.compile(r'(<div class="highlight-(?:ipython3|python|default)[^>]*>.*?<pre>)(.*?)(</pre>)', re.S)
PROSE = re.compile(r'(<a\b.*?</a>)|(<code class="docutils literal notranslate"><span class="pre">([\w.]+)(\(\))?</span></code>)', re.S)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def anchors(app, doctree):
    "An id and an object of the Python domain for every name that a cell defines"
    for node in doctree.findall(nodes.container):
        about = node.get('cell_metadata') or {}
        for name, kind in about.get('defines', {}).items():
            node['ids'].append(f'def-{name}')
            app.env.domains['py'].note_object(f'{about["module"]}.{name}', kind, f'def-{name}', location=node)


def places(env):
    "(name -> (page, anchor), module -> page)"
    objects = env.domains['py'].objects
    names = {name: (o.docname, o.node_id) for name, o in objects.items()}
    return names, {name.rpartition('.')[0]: o.docname for name, o in objects.items()}


# ------------------------------------------------------------------ which names, and where

def columns(line, offset): return len(line.encode()[:offset].decode(errors='ignore'))


def bound(function):
    "The names that are a function's own"
    args = function.args
    own = {a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg] if a}
    stored = (n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return own | set(stored)


class Uses(ast.NodeVisitor):
    "(line, offset, text, full name) of each use of a known name; `known` grows with what the code imports"

    def __init__(self, known, names, modules):
        self.known, self.names, self.modules, self.found, self.local = known, names, modules, [], set()

    def visit_ImportFrom(self, node):
        if node.module in self.modules:
            self.found.append((node.lineno, node.col_offset + len('from '), node.module, node.module))
        for a in node.names:
            inside = [n for n in self.names if n.rpartition('.')[0] == node.module]
            if a.name == '*': self.known |= {n.rpartition('.')[2]: n for n in inside}
            full = f'{node.module}.{a.name}'
            if full in self.names or full in self.modules:
                self.known[a.asname or a.name] = full
                self.found.append((a.lineno, a.col_offset, a.name, full))

    def visit_Name(self, node):
        full = self.known.get(node.id)
        if full and node.id not in self.local and isinstance(node.ctx, ast.Load):
            self.found.append((node.lineno, node.col_offset, node.id, full))

    def visit_Attribute(self, node):
        self.visit(node.value)
        module = self.known.get(getattr(node.value, 'id', ''))
        if module in self.modules and node.value.id not in self.local and f'{module}.{node.attr}' in self.names:
            offset = node.end_col_offset - len(node.attr.encode())
            self.found.append((node.end_lineno, offset, node.attr, f'{module}.{node.attr}'))

    def visit_function(self, node):
        outer, self.local = self.local, self.local | bound(node)
        self.generic_visit(node)
        self.local = outer

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function


def uses(code, known, names, modules):
    "{(line, column): (text, full name)} of a piece of code; empty if it isn't Python"
    lines = [re.sub(r'^(\s*)[%!].*', r'\1pass', line) for line in code.split('\n')]
    try: tree = ast.parse('\n'.join(lines))
    except SyntaxError: return {}
    seen = Uses(known, names, modules)
    seen.visit(tree)
    for node in tree.body: # a variable of the page hides what was imported
        for n in ast.walk(node) if isinstance(node, (ast.Assign, ast.For, ast.With)) else ():
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): known.pop(n.id, None)
    return {(line, columns(lines[line - 1], offset)): (text, full) for line, offset, text, full in seen.found}


# ------------------------------------------------------------------ in the page

def with_links(highlighted, found, address):
    "The spans of a highlighted block, those in `found` inside links"
    out, line, column = [], 1, 0
    for part in re.findall(r'<[^>]+>|[^<]+', highlighted):
        if part.startswith('<'):
            out.append(part)
            continue
        text = html.unescape(part)
        name, full = found.get((line, column), ('', ''))
        if name and text == name: part = f'<a class="def" href="{address(full)}" title="{full}">{part}</a>'
        out.append(part)
        line += text.count('\n')
        column = len(text) - text.rfind('\n') - 1 if '\n' in text else column + len(text)
    return ''.join(out)


def plain(highlighted): return html.unescape(re.sub(r'<[^>]+>', '', highlighted))
def telling(name): return '_' in name.strip('_') or re.search('[a-z][A-Z]', name) # no word of English


def link_names(app, page, template, context, doctree):
    "Names in code and in prose become links to the cells that define them"
    if doctree is None or 'body' not in context: return
    names, modules = places(app.env)
    builder = app.builder
    own = {n.rpartition('.')[2]: n for n, (where, _) in names.items() if where == page}
    known = ChainMap({}, own)

    def address(full):
        where, anchor = names.get(full) or (modules[full], '')
        if where == page: return f'#{anchor}'
        return relative_uri(builder.get_target_uri(page), builder.get_target_uri(where)) + f'#{anchor}'*bool(anchor)

    def in_code(m):
        return m[1] + with_links(m[2], uses(plain(m[2]), known, names, modules), address) + m[3]

    everywhere = {}
    for n in names: everywhere.setdefault(n.rpartition('.')[2], []).append(n)

    def in_prose(m):
        if m[1]: return m[1]
        said = m[3]
        full = known.get(said, said)
        unique = everywhere.get(said, [])
        if full not in names and len(unique) == 1 and (m[4] or telling(said)): full = unique[0]
        return f'<a class="def" href="{address(full)}" title="{full}">{m[2]}</a>' if full in names else m[0]

    context['body'] = PROSE.sub(in_prose, CODE.sub(in_code, context['body']))


def setup(app):
    app.connect('doctree-read', anchors)
    app.connect('html-page-context', link_names)
    return dict(parallel_read_safe=True, parallel_write_safe=True, version='1')
