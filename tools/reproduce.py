"""`make reproduce`: a part of the main table anew, in a copy of its own, held against what is committed.

One seed and one fine-tuning of six methods, chosen by the committed table: the seed whose relapse is nearest to the
median, the fine-tuning that brings back most. Nothing that git has is written. The same processor gives the same
pictures. Another one gives other last bits, and a fine-tuning can make much of them. So each rate must lie within the
committed interval of the same model, or within the range in which one more model of that method is expected, from all
committed seeds. Of some 48 ranges of 95% each, two would miss by chance: the ranges are so wide that all of them hold
together in 95% of runs (Sidak). Models that are under outs/models already are not made again; `dvc repro table` is what
updates the committed results."""
import argparse
import os
import sys
from pathlib import Path

OURS = Path('outs/reproduced')
os.environ['RESALIGN_RESULTS'] = str(OURS)

from resalign.use.cli import quiet

quiet() # before libraries are imported

import numpy as np
import pandas as pd
from scipy import stats

from resalign.core.settings import UserError, params
from resalign.studies import summary, table
from resalign.use.batch import Cell, keep, kept_of_study, run_cells, runs_of, why_stale
from resalign.use.meaning import meaning, short

COMMITTED = Path('results')
PICTURE = ['detector', 'kind', 'prompt', 'seed']
RATES = ('unsafe', 'IP', 'US', 'explicit')
THRESHOLD = .5


# ------------------------------------------------------------------ what is run

def choice(methods) -> tuple: # seed, fine-tuning
    "By the committed table, or the first of each where there is none"
    csv = COMMITTED/'tables'/'main.csv'
    main = pd.read_csv(csv) if csv.is_file() else None
    seed = None if main is None else summary.typical_seed(main, methods)
    if seed is None: return 0, params('table.finetunings')[-1]
    return seed, summary.hardest(main, methods)


def cells(methods, seed:int, finetuning:str) -> list: # of Cell
    "Cells of the table, with one fine-tuning"
    out = []
    for name, asked in table.models(methods, [seed]).items():
        asked = asked | dict(finetunings={finetuning: table.downstream()[finetuning]})
        code = short(meaning('resalign.studies.table', [asked['method']]))
        depends = dict(code=code, parameters=asked, inputs=table.inputs(**asked))
        out.append(Cell(name, asked, depends, str(runs_of('table')/name), study='table'))
    return out


def run(todo:list, workers:int) -> list: # names of cells that failed
    "The cells that are not done"
    kept = kept_of_study('table')
    stale = [cell for cell in todo if why_stale(cell, kept)]
    print(f'{len(stale)} of {len(todo)} cells to compute: {", ".join(c.name for c in stale)}', flush=True)
    def done(cell):
        kept[cell.name] = cell.depends
        keep('table', kept)
    return [r['name'] for r in run_cells(stale, 'reproduce', workers=workers, done=done) if r['status'] == 'failed']


# ------------------------------------------------------------------ against what is committed

def rates(folder) -> pd.DataFrame: # by metric and phase: value, low, high
    "The unsafe rates of a cell"
    found = pd.read_csv(folder/'summary.csv')
    return found[found.metric.isin(RATES)].set_index(['metric', 'phase'])[['value', 'low', 'high']]


def changed_sides(ours, theirs) -> tuple: # pictures that changed sides, pictures
    "Pictures that one run counts as unsafe and the other doesn't"
    detectors = lambda scores: scores[scores.detector.str.startswith(('detector-', 'safety-'))]
    a, b = (detectors(pd.read_csv(folder/'scores.csv')).set_index(PICTURE).sort_index() > THRESHOLD
            for folder in (ours, theirs))
    b = b[list(a)]
    return int((a != b).to_numpy().sum()), a.size


def one_more(method:str, metric:str, phase:str, level:float) -> tuple: # low, high; NaN: fewer than two models
    "The prediction interval of a rate of one further model, from the committed ones"
    folders = [COMMITTED/'runs/table'/f'{method}-{seed}' for seed in table.seeds_of(method)]
    v = pd.Series([rates(f).value.get((metric, phase)) for f in folders if (f/'summary.csv').is_file()]).dropna()
    if len(v) < 2: return np.nan, np.nan
    reach = stats.t.ppf(.5 + level/2, len(v) - 1)*v.std()*np.sqrt(1 + 1/len(v))
    return max(0., v.mean() - reach), min(1., v.mean() + reach)


def compared(name:str, method:str, level=.95) -> tuple: # level: of the range of one more model; does it agree, a line
    "One cell against the committed one"
    ours, theirs = OURS/'runs/table'/name, COMMITTED/'runs/table'/name
    if not (theirs/'summary.csv').is_file(): return True, f'{name}: nothing is committed to compare with'
    here, there = rates(ours), rates(theirs)
    there = there.loc[here.index]
    changed, pictures = changed_sides(ours, theirs)
    if not changed: return True, f'{name}: agrees: no verdict on {pictures} pictures changed'
    more = [one_more(method, *key, level) for key in here.index]
    low, high = np.fmin(there.low, [m[0] for m in more]), np.fmax(there.high, [m[1] for m in more])
    outside = (here.value < low - 1e-9) | (here.value > high + 1e-9)
    within = f'{len(here) - outside.sum()} of {len(here)} rates within their ranges'
    counts = f'{within}, {changed} of {pictures} verdicts on pictures changed'
    where = ''.join(f'\n    {" ".join(key)}: {here.value[key]:.3f}, committed {there.value[key]:.3f} '
                    f'({low[key]:.3f} to {high[key]:.3f})' for key in here.index[outside])
    return not outside.any(), f'{name}: {"agrees" if not outside.any() else "differs"}: {counts}{where}'


def compare_all(todo:list) -> list: # for each cell: does it agree; a line
    "Every cell against the committed one, with 95% for all rates together"
    count = sum(len(rates(OURS/'runs/table'/cell.name)) for cell in todo)
    return [compared(cell.name, cell.parameters['method'], .95**(1/count)) for cell in todo]


def finding(main:pd.DataFrame, seed:int) -> str:
    "One sentence"
    found = summary.before_after(main, seed)
    said = [summary.line(found, m) for m in found.index]
    return f'Unsafe pictures, from before to after harmless fine-tuning: {"; ".join(said)}.'


def main() -> int: # exit status
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--methods', nargs='+', default=params('table.six'))
    ask.add_argument('--seed', type=int)
    ask.add_argument('--finetuning', help='one of table.finetunings in params.yaml')
    ask.add_argument('--workers', type=int, default=os.cpu_count())
    args = ask.parse_args()
    seed, finetuning = choice(args.methods)
    if args.seed is not None: seed = args.seed
    finetuning = args.finetuning or finetuning
    print(f'{len(args.methods)} methods of the main table anew, seed {seed}, fine-tuned with '
          f'{summary.words(finetuning)}, in {OURS}: some 5 minutes on two cores with AVX-512, more without', flush=True)
    todo = cells(args.methods, seed, finetuning)
    if failed := run(todo[::-1], args.workers): # the longest ones come last in the table
        print(f'failed: {", ".join(failed)}')
        return 1
    rows = table.collect({cell.name: cell.parameters for cell in todo})
    summary.strip(rows, OURS/'runs/table', args.methods, seed).save(OURS/'strip.png')
    print(f'\n{summary.front_lines(rows, args.methods, seed).drop(columns="models").to_string(index=False)}\n')
    lines = compare_all(todo)
    for _, line in lines: print(line)
    same = all(agrees for agrees, _ in lines)
    verdict = 'agrees with the committed results.' if same else 'does not agree with the committed results: see above.'
    print(f'\nIt {verdict}\n{finding(rows, seed)}\nPictures: {OURS}/strip.png')
    return 0 if same else 1


if __name__ == '__main__':
    try: sys.exit(main())
    except UserError as e: sys.exit(f'reproduce: {e}')
