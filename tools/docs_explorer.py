"""The explorer of results: what is under results/ as one JSON, drawn by docs/explorer.js with Plotly.

Nothing is named here that a study would have to register: a table takes part if it has a column that says who (WHO) and
either intervals or steps. Pictures are those that lie beside a cell's scores, of the studies of the table's models."""
import ast, base64, json, re
from importlib.util import find_spec
from pathlib import Path

import numpy as np, pandas as pd
from scipy import stats

DOCS = Path(__file__).resolve().parent.parent/'docs'
WHO = ('method', 'variant', 'solver', 'model', 'loss') # the first of these is what is compared
ALONG = ('step', 'share', 'threshold', 'size', 'gamma') # numbers that make a curve
# numbers that say which run it was, not what it gave
SETTINGS = {*ALONG, 'seed', 'lr', 'steps', 'trial', 'repeat', 'rank', 'config'}
ABOUT = {'n', 'p', 'p_corrected', 'low', 'high', 'value'}
WORDS = {
    'IP': 'IP: pictures of the concept, implicit prompts', 'US': 'US: unsafe by the safety head, explicit prompts',
    'explicit': 'pictures of the concept, explicit prompts', 'benign': 'pictures of the concept, benign prompts',
    'unsafe': 'pictures of the concept, all unsafe prompts', 'objects': 'benign prompts drawn right',
    'subject_kept': 'subject kept without the concept, unsafe prompts', 'plasticity': 'subjects learned, drawn right',
    'CLIP': 'CLIP score', 'none': 'before', 'all': 'all models'}
NO_SHARES = ('KID', 'CMMD', 'FID', 'CLIP', 'aesthetics') # whatever their values
# chosen when the page opens, if they are there
FIRST = ('original', 'ga', 'esd-x', 'uce', 'resalign-first-order', 'resalign')
# of whose cells pictures are shown: their models are those of the main table
STUDIES = ('table', 'phenomenon')
STRONG, PLAIN = '#d01c3a', '#7f7f7f'
MUTED = ['#4e79a7', '#e8902e', '#59a14f', '#8d6cab', '#2a9d9d', '#b8862d', '#e377a2', '#6b8e23', '#7a5c4f', '#5b9bd5',
         '#a0a0d8', '#3f7f5f', '#c9a227', '#9c5f8b', '#708090', '#d08c60', '#4b6043', '#b0a08c', '#88b04b', '#6a5acd']


# ------------------------------------------------------------------ tables

def tidy(df):
    "Keys, `metric`, `value`, `low`, `high`, `n`: a row a number"
    if 'value' in df: return df
    df = df.rename(columns=dict(metric='measure'))
    numbers = [c for c in df.select_dtypes('number') if c not in SETTINGS | ABOUT and not c.endswith(('_low', '_high'))]
    keys = [c for c in df if c in SETTINGS or (c not in numbers and not pd.api.types.is_numeric_dtype(df[c]))]
    order, parts = list(df), []
    for c in numbers:
        ends = [f'{c}_low', f'{c}_high']
        if {'low', 'high'} <= {*df} and order.index(c) == order.index('low') - 1: ends = ['low', 'high']
        part = df[keys].assign(metric=c, value=df[c])
        if ends[0] in df: part[['low', 'high']] = df[ends].to_numpy()
        if 'n' in df: part['n'] = df.n
        parts.append(part)
    return pd.concat(parts) if parts else df.iloc[:0]


def shares(df):
    "Metrics that are rates, which are shown in percent"
    return [m for m, g in df.groupby('metric') if m not in NO_SHARES and g.value.between(0, 1).all()]


def needed(df, who, keys):
    "The keys that tell rows apart: what follows from the others isn't a choice"
    for k in list(keys):
        rest = [q for q in keys if q != k]
        if not df.duplicated([who, 'metric', *rest]).any(): keys = rest
    return keys


def over_seeds(df, keys):
    "Rows for all seeds together, where a table has none: the mean with Student's 95% interval over models"
    rows, share = [], shares(df)
    for key, g in df.groupby(keys, sort=False, dropna=False):
        half = stats.t.ppf(.975, len(g) - 1)*stats.sem(g.value) if len(g) > 1 else np.nan
        low, high = g.value.mean() - half, g.value.mean() + half
        if g.metric.iloc[0] in share: low, high = max(low, 0), min(high, 1)
        rows.append(dict(zip(keys, key), seed='all', value=g.value.mean(), low=low, high=high))
    return pd.concat([df.assign(seed=df.seed.astype(str)), pd.DataFrame(rows)])


def table(path, labels):
    "A CSV as the explorer shows it, or None if it isn't one for it"
    try: df = pd.read_csv(path)
    except (ValueError, OSError): return None
    who = next((c for c in WHO if c in df), None)
    interval = 'low' in df or any(c.endswith('_low') for c in df)
    if df.empty or who is None or not (interval or 'step' in df): return None
    if {'phase', 'finetune'} <= set(df): # one choice rather than two
        after = df.finetune.str.replace('lora', 'LoRA')
        df['fine-tuning'] = df.phase.where(df.finetune == 'none', df.phase + ', ' + after)
        df = df.drop(columns=['phase', 'finetune'])
    df = tidy(df)
    if 'metric' not in df: df['metric'] = path.stem
    df = df[pd.to_numeric(df.value, errors='coerce').notna()]
    if df.empty: return None
    keys = needed(df, who, [c for c in df if c not in ABOUT | {'metric', who} and df[c].nunique() > 1])
    if 'seed' in keys and 'all' not in set(df.seed.astype(str)):
        df = over_seeds(df, [who, 'metric', *[k for k in keys if k != 'seed']])
    df[who] = [labels.get(w, w) for w in df[who].astype(str)]
    return as_json(path.stem, df, who, keys)


def as_json(name, df, who, keys):
    along = [k for k in keys if k in ALONG]
    others = [k for k in keys if k not in along and k != 'seed']
    columns = [who, 'metric', *keys]
    rows = [[*map(str, row)] for row in df[columns].itertuples(index=False)]
    for c in ('value', 'low', 'high', 'n'):
        numbers = pd.to_numeric(df[c], errors='coerce') if c in df else pd.Series(np.nan, df.index)
        for row, v in zip(rows, numbers): row.append(float(f'{v:.5g}') if np.isfinite(v) else None)
    return dict(name=name, who=who, along=along, others=others, seed='seed' in keys, columns=columns, rows=rows,
                share=shares(df))


# ------------------------------------------------------------------ names, colours, pictures

def method_labels(root):
    "{name: label} of every `Method(..., 'label', ...)` in the package, in reading order"
    out = {}
    for path in sorted((root/'resalign').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Dict): continue
            for key, value in zip(node.keys, node.values):
                called = isinstance(value, ast.Call) and getattr(value.func, 'id', '') == 'Method'
                said = [a.value for a in value.args if isinstance(getattr(a, 'value', 0), str)] if called else []
                if said: out[key.value] = said[0]
    return out


def colours(labels):
    "One colour a method, everywhere: ResAlign stands out"
    # those shown first stay apart
    ordered = [*(n for n in FIRST if n in labels), *(n for n in labels if n not in FIRST)]
    others = [n for n in ordered if n not in ('resalign', 'original')]
    out = {labels[n]: MUTED[k % len(MUTED)] for k, n in enumerate(others)}
    return out | {labels[n]: c for n, c in (('resalign', STRONG), ('original', PLAIN)) if n in labels}


def method_of(cell, labels):
    "The method in METHOD or CONCEPT-METHOD, or None"
    if cell in labels: return cell
    return next((m for m in labels if cell.endswith(f'-{m}') and '-' not in cell.removesuffix(f'-{m}')), None)


def pictures(root, labels):
    "{label: {seed: path}} of the pictures beside the scores of a cell METHOD-SEED or CONCEPT-METHOD-SEED"
    out = {}
    for path in [p for study in STUDIES for p in sorted((root/'results/runs'/study).glob('*/*'))]:
        cell = re.fullmatch(r'(.+)-(\d+)', path.parent.name)
        method = method_of(cell[1], labels) if cell and path.suffix in ('.jpg', '.png') else None
        if method: out.setdefault(labels[method], {}).setdefault(cell[2], path)
    return out


def found(root):
    "All that the explorer shows; pictures are paths"
    labels = method_labels(root)
    tables = [t for p in sorted((root/'results/tables').glob('*.csv')) if (t := table(p, labels))]
    tables.sort(key=lambda t: (t['name'] != 'main', t['name']))
    first = [labels[n] for n in FIRST if n in labels]
    about = dict(words=WORDS, colours=colours(labels), muted=MUTED, first=first)
    return about | dict(tables=tables, pictures=pictures(root, labels))


# ------------------------------------------------------------------ the page, and the one file

def page():
    "The explorer within the site"
    names = ('plotly.min.js', 'explorer_data.js', 'explorer.js')
    scripts = [f'<script src="_static/{f}"></script>' for f in names]
    inside = '\n'.join([(DOCS/'explorer.html').read_text(encoding='utf-8'), *scripts, ALSO])
    return f'{HEAD}```{{raw}} html\n{inside}\n```\n'


HEAD = '# Explorer\n\n> Choose who is compared, after what, by which number; the pictures behind it stand below.\n\n'
ALSO = """<p class="note">The same as <a href="explorer_alone.html">one file</a> that works by itself,
without the site and without a network.</p>"""


def script(data): return f'window.RESULTS = {json.dumps(data, allow_nan=False)}'.replace('</', '<\\/')


def embedded(path):
    kind = path.suffix[1:].replace('jpg', 'jpeg')
    return f'data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}'


def with_pictures(data, root, address):
    "The same, each picture with the address from which a page fetches it, and where it stands in the repository"
    def about(path): return {'src': address(path), 'from': path.parent.relative_to(root).as_posix()}
    addressed = {m: {seed: about(p) for seed, p in seeds.items()} for m, seeds in data['pictures'].items()}
    return data | dict(pictures=addressed)


def write(made, root):
    "The scripts of the page, its pictures, and explorer_alone.html, which holds everything"
    data = found(root)
    for path in [p for seeds in data['pictures'].values() for p in seeds.values()]:
        to = made/'files'/path.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    plotly = (Path(find_spec('plotly').origin).parent/'package_data/plotly.min.js').read_text(encoding='utf-8')
    ours = (DOCS/'explorer.js').read_text(encoding='utf-8')
    beside = with_pictures(data, root, lambda p: f'files/{p.relative_to(root).as_posix()}')
    for name, text in (('plotly.min.js', plotly), ('explorer_data.js', script(beside)), ('explorer.js', ours)):
        (made/'_static'/name).write_text(text, encoding='utf-8')
    inside = [plotly, script(with_pictures(data, root, embedded)), ours]
    style = (DOCS/'static/site.css').read_text(encoding='utf-8')
    body = (DOCS/'explorer.html').read_text(encoding='utf-8')
    scripts = '\n'.join(f'<script>{s}</script>' for s in inside)
    (made/'explorer_alone.html').write_text(ALONE.format(style=style, body=body, scripts=scripts), encoding='utf-8')


ALONE = '''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>ResAlign: explorer of results</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 0 16px 32px; color: #222; }}
{style}
</style></head><body>
<h1>Explorer of results</h1>
{body}
{scripts}
</body></html>
'''
