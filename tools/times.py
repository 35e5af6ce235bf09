"""How long the grid takes: what papermill noted in the pages that stages ran, and that times the number of stages of a kind.

python tools/times.py [FOLDER ...] rewrites results/times.csv from folders of executed pages, outs/pages if none is named; kinds that weren't run there keep what stands in the file"""
import json, re, sys
from pathlib import Path

import pandas as pd
from dvc.repo import Repo

FILE = Path('results/times.csv')


def seconds(page:Path) -> float|None:
    "Of a page that was run to its end"
    noted = json.loads(page.read_text(encoding='utf-8'))['metadata'].get('papermill', {}) if page.is_file() else {}
    return None if noted.get('exception') else noted.get('duration')


def times(folders, before=None) -> pd.DataFrame: # a row a kind of stage: stages, alone (1: one at a time), measured, seconds (mean of one), minutes (of all, one after the other)
    rows = []
    for s in Repo().index.stages:
        for page in re.findall(r'outs/pages/(\S+\.ipynb)', s.cmd or ''):
            found = [t for f in folders if (t := seconds(Path(f)/page))]
            rows.append((s.name.partition('@')[0], int('OMP_NUM_THREADS=1' not in s.cmd), min(found, default=None))) # the quietest run
    kinds = pd.DataFrame(rows, columns=['stage', 'alone', 'seconds']).groupby('stage', sort=False).agg(stages=('seconds', 'size'), alone=('alone', 'max'), measured=('seconds', 'count'), seconds=('seconds', 'mean'))
    if before is not None and (old := kinds.index[kinds.measured == 0].intersection(before.index)).size: kinds.loc[old, ['measured', 'seconds']] = before.loc[old, ['measured', 'seconds']]
    return kinds.assign(minutes=lambda d: d.seconds*d.stages/60)


if __name__ == '__main__':
    table = times(sys.argv[1:] or ['outs/pages'], pd.read_csv(FILE, index_col='stage') if FILE.exists() else None)
    table.round(1).to_csv(FILE)
