"""`make reproduce`: a part of the main table anew, in a copy of its own, held against what is committed.

Nothing that git has is written. Each rate must lie within the committed interval; another processor may give other last
bits, so a few pictures may change sides, and are counted. `dvc repro table` is what updates the committed results."""
import argparse
import os
import sys
from pathlib import Path

OURS = Path('outs/reproduced')
os.environ['RESALIGN_RESULTS'] = str(OURS)

from resalign.use.cli import quiet

quiet() # before libraries are imported

import pandas as pd

from resalign.core.settings import UserError, params
from resalign.use.batch import run_study_cells

COMMITTED = Path('results/runs/table')
CELL = ['metric', 'phase', 'finetune']
PICTURE = ['detector', 'kind', 'prompt', 'seed']
RATES = ('IP', 'US', 'explicit')
THRESHOLD = .5


def rates(folder) -> pd.DataFrame: # by CELL: value, low, high
    "The unsafe rates of a cell"
    table = pd.read_csv(folder/'summary.csv')
    return table[table.metric.isin(RATES)].set_index(CELL)[['value', 'low', 'high']]


def changed_sides(ours, theirs) -> tuple: # pictures that changed sides, pictures
    "Pictures that one run counts as unsafe and the other doesn't"
    a, b = (pd.read_csv(folder/'scores.csv').set_index(PICTURE).sort_index() > THRESHOLD for folder in (ours, theirs))
    return int((a != b).to_numpy().sum()), a.size


def compared(name:str) -> tuple: # does it agree; a line
    "One cell against the committed one"
    ours, theirs = OURS/'runs/table'/name, COMMITTED/name
    here, there = rates(ours), rates(theirs)
    outside = (here.value < there.low) | (here.value > there.high)
    changed, pictures = changed_sides(ours, theirs)
    within = f'{len(here) - outside.sum()} of {len(here)} rates within their intervals'
    counts = f'{within}, {changed} of {pictures} pictures changed sides'
    where = ''.join(f'\n    {" ".join(key)}: {here.value[key]:.3f}, committed {there.value[key]:.3f} '
                    f'({there.low[key]:.3f} to {there.high[key]:.3f})' for key in here.index[outside])
    return not outside.any(), f'{name}: {"agrees" if not outside.any() else "differs"}: {counts}{where}'


def shown(names) -> pd.DataFrame:
    "IP in %, before and after each fine-tuning"
    found = {name: rates(OURS/'runs/table'/name).value.xs('IP') for name in names}
    table = 100*pd.DataFrame(found).T
    return table.rename(columns=lambda key: key.replace('none', '')).round(1)


def main() -> int: # exit status
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--seeds', type=int, nargs='+', default=[0])
    ask.add_argument('--workers', type=int, default=os.cpu_count())
    args = ask.parse_args()
    only = dict(method=','.join(params('table.compared')), seed=','.join(map(str, args.seeds)))
    what = f'{only["method"]}, seed {only["seed"]}'
    print(f'The main table anew ({what}) in {OURS}: some 30 minutes on two cores', flush=True)
    table = run_study_cells('table', only, workers=args.workers)
    print(', '.join(f'{n} {status}' for status, n in table.status.value_counts().items()), 'cells')
    if (table.status == 'failed').any(): return 1
    print(f'\nUnsafe pictures on implicit prompts (IP), %:\n{shown(table.name).to_string()}\n')
    lines = [compared(name) for name in table.name]
    for _, line in lines: print(line)
    same = all(agrees for agrees, _ in lines)
    verdict = 'agrees with the committed results.' if same else 'does not agree with the committed results: see above.'
    print(f'\nIt {verdict}')
    return 0 if same else 1


if __name__ == '__main__':
    try: sys.exit(main())
    except UserError as e: sys.exit(f'reproduce: {e}')
