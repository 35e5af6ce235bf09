"Algorithm 2 on several processes (torch.distributed, gloo on a CPU)."

import json, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from resalign.method.demo import demo
from resalign.model.pipelines import save_pipeline
from resalign.studies import scaling
from resalign.use import cli
from made import write_sets
from tests import ranks

ROOT = Path(__file__).resolve().parent.parent
ALSO = ['timed']*(ROOT / 'outs/base').is_dir()


def two(folder, monkeypatch):
    "`resalign-unlearn --processes 2`, which starts its own script on two processes: here tests/ranks.py"
    ended = []

    def run(start, env):
        ended.append(subprocess.run(start, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400))
        return ended[0]

    monkeypatch.setattr(cli, 'subprocess', SimpleNamespace(run=run))
    monkeypatch.setattr(sys, 'argv', [str(ROOT / 'tests/ranks.py'), str(folder), *ALSO])
    for name, value in dict(ACCELERATE_USE_CPU='true', PROGRESS='0', PYTHONPATH=str(ROOT)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        ranks.unlearn(folder, processes=2)
    assert left.value.code == ended[0].returncode
    return ended[0]


def largest(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "2 outer steps by one process and by two, and by each from the other's checkpoint after 1; all in one start of two"
    folder, threads = tmp_path_factory.mktemp('ranks'), torch.get_num_threads()
    torch.set_num_threads(1)
    pipe, _ = demo(ranks.TINY)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    save_pipeline(pipe, folder / 'base')
    write_sets(folder, unsafe=4, retain=4)
    (folder / 'request.json').write_text(json.dumps(dict(J=2, steps=2, pictures=4)))
    one = ranks.run(folder / 'one', 2)
    ranks.run(folder / 'half', 1, folder / 'checkpoint-of-one')
    with pytest.MonkeyPatch.context() as monkeypatch:
        done = two(folder, monkeypatch)
    assert done.stdout.count('is done') == 2, done.stderr
    on = ranks.run(folder / 'two-then-one', 2, folder / 'checkpoint-of-two')
    torch.set_num_threads(threads)
    weights = {p.stem: load_file(p) for p in folder.glob('*.safetensors')}
    return SimpleNamespace(folder=folder, weights=weights, before=before, one=one, on=on, done=done)


def test_two_processes_give_what_one_gives(runs):
    """The first sum to 1e-6 of its largest number; the trained weights but for what the order of sums does; both
    ranks the same bits, and every solve"""
    weights, one = runs.weights, runs.one
    assert (
        largest(weights['two-0'], weights['two-1']) == 0
        and largest(weights['two-0-gradient'], weights['two-1-gradient']) == 0
    )
    scale = max(float(g.abs().max()) for g in weights['one-gradient'].values())
    assert scale > 0 and largest(weights['one-gradient'], weights['two-0-gradient']) < 1e-6 * scale
    assert largest(weights['one'], weights['two-0']) < 1e-3 * largest(weights['one'], runs.before)
    solves = [(s, j) for s in range(2) for j in range(3)]
    assert (
        [(s['step'], s['j']) for s in one['solves']] == solves
        and len(one['log']) == 2
        and re.findall(r'rank \d: (.*)', runs.done.stdout) == [f'2 rows, {solves}'] * 2
    )


def test_goes_on_with_another_number_of_processes(runs):
    "A step more, to the same weights"
    weights, on = runs.weights, runs.on
    assert re.findall(r'rank \d went on: (.*)', runs.done.stdout) == ['2 rows, 1 sums'] * 2
    assert (len(on['log']), on['merged']) == (2, 1)
    small = 1e-3 * largest(weights['one'], runs.before)
    assert {
        k: largest(weights['one'], weights[k]) < small
        for k in ('two-then-one', 'one-then-two-0', 'one-then-two-1', 'half', 'half-0')
    } == {'two-then-one': True, 'one-then-two-0': True, 'one-then-two-1': True, 'half': False, 'half-0': False}


def test_stops_when_a_rank_dies(runs):
    done = runs.done
    assert done.returncode != 0 and not [k for k in runs.weights if k.startswith('died')], 'no result of half a run'
    assert 'another process of this run has died' in done.stderr or 'SIGKILL' in done.stderr, done.stderr


def test_the_command_starts_several_processes(runs):
    "resalign-unlearn --processes 2 -> accelerate launch; one result, written once"
    assert runs.done.stdout.count('wrote ') == 1, (runs.done.stdout, runs.done.stderr[-3000:])
    record = json.loads((runs.folder / 'out/record.json').read_text())
    assert record['method'] == 'resalign' and record['seed'] == 0 and record['settings']['J'] == 2


@pytest.mark.skipif(not ALSO, reason='outs/base is not here: dvc pull base')
def test_an_outer_step_is_timed_on_two_processes(runs, monkeypatch):
    "studies/scaling: the first rank writes the times; torch.distributed.run is told what to start, and how often"
    seconds = json.loads((runs.folder / 'seconds.json').read_text())
    assert len(seconds) == 1 and seconds[0] > 0
    started = []

    def run(start, check, env):
        started.append(start)
        out = re.search(r"run_rank\('.*', '(.*)'\)", start[-1])[1]
        Path(out).write_text(json.dumps(seconds))

    monkeypatch.setattr(scaling, 'subprocess', SimpleNamespace(run=run))
    assert [scaling.outer_steps_on(n, 2, 2) for n in (1, 2)] == [seconds] * 2
    one, two = started
    asked = get_args_parser().parse_args(two[3:])
    assert asked.nproc_per_node == '2' and asked.no_python and asked.standalone
    assert [asked.training_script, *asked.training_script_args][:2] == one[:2] == [sys.executable, '-c']
