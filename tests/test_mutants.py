"A sample of small faults in the mathematics: the fast tests notice all but the explained."
import csv
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = 'method/finetune', 'model/losses', 'baselines/esd' # of those whose tests take seconds


def test_a_sample_is_noticed(tmp_path):
    "All faults of the whole run: `make mutants`, and the page nbs/9_studies/92_tests.ipynb"
    run = [sys.executable, 'tools/mutants.py', *SAMPLE, '--lanes', '1', '--sample', '6', '--sessions', str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with open(ROOT/'nbs/9_studies/survivors.csv', newline='', encoding='utf-8') as f:
        explained = {(r['before'], r['after']) for r in csv.DictReader(f)}
    survived = re.findall(r'^    - (.*)\n    \+ (.*)$', done.stdout, re.M)
    assert re.findall(r'^(\S+): \d+ of \d survived$', done.stdout, re.M) == list(SAMPLE), done.stdout
    assert set(survived) <= explained, f'nobody noticed, and nobody explained: {set(survived) - explained}'
