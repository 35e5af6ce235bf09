"Counts of what was tried and what survived; the server of jobs; what the tests of faults share."
import csv, json, os, subprocess, sys
from contextlib import contextmanager
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
FULL = os.environ.get('FAULTS') == 'full'
HEAD = 'fault where cases survived bit_identical note'.split()


def some(cases) -> list:
    "All cases in the full form, every fifth in the short one, and at least one"
    cases = list(cases)
    return cases if FULL else cases[::5]


class Tally:
    "A line for each fault and place"
    def __init__(self):
        self.rows = {}

    @contextmanager
    def case(self, fault, where, identical=False, note=''):
        row = self.rows.setdefault((fault, where),
                                   dict(cases=0, survived=0, bit_identical=0 if identical else '', note=note))
        row['cases'] += 1
        row['note'] = note or row['note']
        try:
            yield
        except KeyboardInterrupt:
            row['cases'] -= 1
            raise # whoever ran the tests has stopped them
        row['survived'] += 1
        if identical: row['bit_identical'] += 1

    def note(self, fault, where, text):
        self.rows[fault, where]['note'] = text

    def save(self, path):
        with open(path, 'w', newline='') as f:
            w = csv.DictWriter(f, HEAD, lineterminator='\n')
            w.writeheader()
            w.writerows(dict(fault=f, where=where, **row) for (f, where), row in sorted(self.rows.items()))


TALLY = Tally()


@pytest.fixture(scope='session', autouse=True)
def record():
    "In the full form, the counts go to results/tables/survival.csv; test files import this"
    yield
    if FULL: TALLY.save(ROOT/'results/tables/survival.csv')


class Server:
    "tests/fault_server.py, one thread"
    def __init__(self, **env):
        env = dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore',
                   TRANSFORMERS_VERBOSITY='error', **env)
        self.p = subprocess.Popen([sys.executable, str(ROOT/'tests/fault_server.py')], env=env, cwd=ROOT,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert json.loads(self.p.stdout.readline()) == 'ready'

    def run(self, job, made, out, **how) -> dict:
        self.p.stdin.write(json.dumps(dict(job=job, made=str(made), out=str(out), **how)) + '\n')
        self.p.stdin.flush()
        return json.loads(self.p.stdout.readline())

    def close(self):
        self.p.stdin.close()
        self.p.wait(20)


def tree(folder) -> dict:
    "Every file under a folder, a link as a link, with what is in it"
    return {
        p.relative_to(folder).as_posix(): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(Path(folder).rglob('*'))
    }


def result(folder) -> dict:
    "The files of a result but its cost; of its record all but the number of threads"
    out = {k: v for k, v in tree(folder).items() if v is not None and not k.endswith('cost.json')}
    for k in [k for k in out if k.endswith('record.json')]:
        out[k] = {a: b for a, b in json.loads(out[k]).items() if a != 'threads'}
    return out


def leftovers(folder) -> list:
    "Names that no finished run leaves behind"
    return [
        p.name
        for p in Path(folder).rglob('.*') if '.tmp' in p.name or p.name.endswith(('.old', '.prev')) or 'album' in p.name
    ] + [p.name for p in Path(folder).rglob('.checkpoints/*')]
