"Algorithm 2 on several processes (torch.distributed, gloo on a CPU)."

import json, os, re, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from tests import ranks

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PROGRESS='0', PYTHONPATH=str(ROOT))


def two(*args):
    "The script on two processes"
    launch = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nproc_per_node',
        '2',
        '--standalone',
        str(ROOT / 'tests/ranks.py'),
    ]
    return subprocess.run([*launch, *map(str, args)], env=ENV, capture_output=True, text=True, timeout=400)


def largest(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "4 outer steps by one process and by two, and by each from the other's checkpoint after 2"
    from resalign.method.demo import demo

    folder, threads = tmp_path_factory.mktemp('ranks'), torch.get_num_threads()
    torch.set_num_threads(1)
    one = ranks.run(folder / 'one', 4)
    ranks.run(folder / 'half', 2, folder / 'checkpoint-of-one')
    done = two(folder)
    assert done.stdout.count('is done') == 2, done.stderr
    on = ranks.run(folder / 'two-then-one', 4, folder / 'checkpoint-of-two')
    torch.set_num_threads(threads)
    weights = {p.stem: load_file(p) for p in folder.glob('*.safetensors')}
    return weights, demo()[0].unet.state_dict(), one, on, done


def test_two_processes_give_what_one_gives(runs):
    """The first sum to 1e-6 of its largest number; the trained weights but for what the order of sums does; both
    ranks the same bits, and every solve"""
    weights, before, one, _, done = runs
    assert (
        largest(weights['two-0'], weights['two-1']) == 0
        and largest(weights['two-0-gradient'], weights['two-1-gradient']) == 0
    )
    scale = max(float(g.abs().max()) for g in weights['one-gradient'].values())
    assert scale > 0 and largest(weights['one-gradient'], weights['two-0-gradient']) < 1e-6 * scale
    assert largest(weights['one'], weights['two-0']) < 1e-3 * largest(weights['one'], before)
    solves = [(s, j) for s in range(4) for j in range(3)]
    assert (
        [(s['step'], s['j']) for s in one['solves']] == solves
        and len(one['log']) == 4
        and re.findall(r'rank \d: (.*)', done.stdout) == [f'4 rows, {solves}'] * 2
    )


def test_goes_on_with_another_number_of_processes(runs):
    "Two steps more, to the same weights"
    weights, before, one, on, done = runs
    assert re.findall(r'rank \d went on: (.*)', done.stdout) == ['4 rows, 2 sums'] * 2 and (len(on['log']), on['merged']) == (
        4,
        2,
    )
    small = 1e-3 * largest(weights['one'], before)
    assert {
        k: largest(weights['one'], weights[k]) < small
        for k in ('two-then-one', 'one-then-two-0', 'one-then-two-1', 'half', 'half-0')
    } == {'two-then-one': True, 'one-then-two-0': True, 'one-then-two-1': True, 'half': False, 'half-0': False}


def test_stops_when_a_rank_dies(runs):
    weights, *_, done = runs
    assert done.returncode != 0 and not [k for k in weights if k.startswith('died')], 'no result of half a run'
    assert 'another process of this run has died' in done.stderr or 'SIGKILL' in done.stderr, done.stderr


def test_the_command_starts_several_processes(tmp_path):
    "resalign-unlearn --processes 2 -> accelerate launch; one result, written once"
    from resalign.method.demo import demo
    from resalign.model.pipelines import save_pipeline
    from made import write_sets
    save_pipeline(demo()[0], tmp_path / 'base')
    write_sets(tmp_path, unsafe=4, retain=4)
    command = tmp_path / 'resalign-unlearn'  # as pip installs it
    command.write_text('from resalign.use.cli import unlearn\nunlearn()\n')
    asked = [*(tmp_path / name for name in ('base', 'unsafe', 'retain', 'out')), '--processes', 2]
    settings = [t for kv in ('steps=2', 'J=2', 'unsafe_batch=1', 'retain_batch=1') for t in ('--set', kv)]
    ran = [sys.executable, *map(str, [command, *asked]), *settings]
    done = subprocess.run(ran, env=ENV, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and done.stdout.count('wrote ') == 1, (done.stdout, done.stderr[-3000:])
    record = json.loads((tmp_path / 'out/record.json').read_text())
    assert record['method'] == 'resalign' and record['seed'] == 0 and record['settings']['J'] == 2
