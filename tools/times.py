"""How long the grid takes: what papermill noted in the pages that stages ran, and that times the number of stages of a kind.

python tools/times.py [FOLDER ...] > results/times.csv; folders of executed pages, outs/pages if none is named"""
import json, re, sys
from pathlib import Path

import pandas as pd
from dvc.repo import Repo


def seconds(page:Path) -> float|None:
    "Of a page that was run to its end"
    noted = json.loads(page.read_text(encoding='utf-8'))['metadata'].get('papermill', {}) if page.is_file() else {}
    return None if noted.get('exception') else noted.get('duration')


def times(folders) -> pd.DataFrame: # a row a kind of stage: stages, measured, seconds (mean of one), minutes (of all, one after the other)
    rows = []
    for s in Repo().index.stages:
        for page in re.findall(r'outs/pages/(\S+\.ipynb)', s.cmd or ''):
            found = [t for f in folders if (t := seconds(Path(f)/page))]
            rows.append((s.name.partition('@')[0], min(found, default=None))) # the quietest run
    kinds = pd.DataFrame(rows, columns=['stage', 'seconds']).groupby('stage', sort=False).seconds.agg(['size', 'count', 'mean'])
    return kinds.set_axis(['stages', 'measured', 'seconds'], axis=1).assign(minutes=lambda d: d.seconds*d.stages/60)


if __name__ == '__main__': times(sys.argv[1:] or ['outs/pages']).round(1).to_csv(sys.stdout)
