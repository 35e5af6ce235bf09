"""README.md from nbs/index.ipynb: Markdown by nbconvert, links seen from the root, pictures as files of results/."""
import base64, re, sys
from pathlib import Path, PurePosixPath
from posixpath import normpath

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
HEAD = '<!-- Made from nbs/index.ipynb by `make readme`: edit the page, not this file. -->\n\n'
HIDDEN = {'hide', 'export', 'exporti', 'default_exp', 'include: false'}
LINK = re.compile(r'(!?\[[^\]]*\]\()([^)\s]+)((?:\s+"[^"]*")?\))|(<(?:img|a|source)\b[^>]*?\b(?:src|href)=")([^"]+)(")')


def directives(source):
    "The `#|` lines at the top of a cell, and the rest"
    lines = source.splitlines()
    n = next((i for i, l in enumerate(lines) if not re.match(r'\s*#\|', l)), len(lines))
    return {re.sub(r'^\s*#\|\s*', '', l).strip() for l in lines[:n]}, '\n'.join(lines[n:]).strip()


def picture(png, root):
    "The file under results/ that holds exactly this picture: outputs are shown, never stored twice"
    blob = base64.b64decode(png)
    for f in sorted((root/'results').rglob('*.png')):
        if f.stat().st_size == len(blob) and f.read_bytes() == blob: return f.relative_to(root).as_posix()
    raise SystemExit('nbs/index.ipynb: a cell shows a picture that is no file of results/: '
                     "show Image(filename=...) of a stage's figure")


def shown(output, root):
    "One output as a Markdown cell, or None"
    data = output.get('data', {})
    if output.output_type == 'error': raise SystemExit('nbs/index.ipynb: a cell ended in an error')
    if output.output_type == 'stream': text = f'```\n{output.text.rstrip()}\n```' if output.name == 'stdout' else None
    elif 'image/png' in data: text = f'![]({picture(data["image/png"], root)})'
    elif 'text/markdown' in data: text = from_root(data['text/markdown'])
    elif 'text/html' in data: text = re.sub(r'<style.*?</style>\s*', '', data['text/html'], flags=re.S)
    else: text = f'```\n{data.get("text/plain", "").rstrip()}\n```'
    return text and nbformat.v4.new_markdown_cell(text)


def from_root(text):
    "Links of a page in nbs/, as they read from the repository's root (fenced code is left alone)"
    def move(m):
        pre, target, post = (m[1], m[2], m[3]) if m[1] else (m[4], m[5], m[6])
        path, _, anchor = target.partition('#')
        if not path or re.match(r'[a-z]+:|//', path): return m[0]
        return pre + normpath(str(PurePosixPath('nbs')/path)) + ('#' + anchor if anchor else '') + post
    parts = re.split(r'(^```.*?^```)', text, flags=re.S | re.M)
    return ''.join(p if p.startswith('```') else LINK.sub(move, p) for p in parts)


def convert(root=ROOT):
    "The text of README.md"
    nb, cells = nbformat.read(root/'nbs/index.ipynb', as_version=4), []
    for c in nb.cells:
        if c.cell_type == 'markdown': cells.append(nbformat.v4.new_markdown_cell(from_root(c.source)))
        if c.cell_type != 'code': continue
        flags, source = directives(c.source)
        if flags & HIDDEN or not source: continue
        if 'echo: false' not in flags: cells.append(nbformat.v4.new_markdown_cell(f'```python\n{source}\n```'))
        cells += filter(None, (shown(o, root) for o in c.outputs))
    body, _ = MarkdownExporter().from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    return HEAD + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def links(text):
    "Relative files that a Markdown text points at"
    found = (m[2] or m[5] for m in LINK.finditer(re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)))
    return sorted({l.partition('#')[0] for l in found if not re.match(r'[a-z]+:|//|#', l)})


if __name__ == '__main__':
    (ROOT/'README.md').write_text(convert(), encoding='utf-8')
    missing = [l for l in links(convert()) if not (ROOT/l).exists()]
    sys.exit(f"README.md: no such file: {', '.join(missing)}" if missing else 0)
