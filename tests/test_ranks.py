"Algorithm 2 on several processes (torch.distributed, gloo on a CPU)."
import os, re, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ENV = os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PROGRESS='0')

def start(processes, *args, **kw):
    "The script on so many processes"
    launch = [sys.executable] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--standalone']
    return subprocess.run([*launch, str(HERE/'ranks.py'), *map(str, args)], env=ENV, capture_output=True, text=True, timeout=240, **kw)

def weights(out, rank=0): return load_file(f'{out}-{rank}.safetensors')

def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

def close(a, b, start):
    "Equal but for the order of a sum: the difference is small beside what training has changed"
    moved = max(float((a[k] - start[k]).abs().max()) for k in a)
    return max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3*moved

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "4 steps on one and on two processes; 0 changed weights to compare with"
    from resalign.baselines.parts import demo
    folder = tmp_path_factory.mktemp('ranks')
    for n in (1, 2):
        done = start(n, folder/f'by{n}', 4)
        assert done.returncode == 0, done.stderr
    return folder, demo()[0].unet.state_dict(), done.stdout

def test_two_processes_give_what_one_gives(runs):
    folder, before, said = runs
    one, two, other = weights(folder/'by1'), weights(folder/'by2', 0), weights(folder/'by2', 1)
    assert same(two, other), 'ranks hold different weights'
    assert not same(one, before) and close(one, two, before)
    tables = re.findall(r'rank \d: (.*)', said)
    assert tables == [f'4 rows, {[(s, j) for s in range(4) for j in range(3)]}']*2, 'every rank knows every solve'

@pytest.mark.parametrize('first, then', [(2, 1), (1, 2)])
def test_goes_on_with_another_number_of_processes(runs, tmp_path, first, then):
    folder, before, _ = runs
    assert start(first, tmp_path/'half', 2, tmp_path/'checkpoint').returncode == 0
    done = start(then, tmp_path/'whole', 4, tmp_path/'checkpoint')
    assert done.returncode == 0, done.stderr
    half, whole = weights(tmp_path/'half'), weights(tmp_path/'whole')
    assert not same(half, whole) and close(weights(folder/'by1'), whole, before)

def test_stops_when_a_rank_dies(tmp_path):
    done = start(2, tmp_path/'dead', 4, tmp_path/'checkpoint', 'dies')
    assert done.returncode != 0 and not list(tmp_path.glob('dead*')), 'no result of half a run'
    assert 'another process of this run has died' in done.stderr or 'SIGKILL' in done.stderr, done.stderr

def test_the_command_and_the_page_start_several_processes(monkeypatch):
    "Stage -> resalign-unlearn --processes 2 -> accelerate launch; one result, written once"
    from resalign.stages import unlearn_stage
    for k, v in ENV.items(): monkeypatch.setenv(k, v)
    record = unlearn_stage('resalign', 0, processes=2)
    assert record['method'] == 'resalign' and record['seed'] == 0 and record['seconds'] > 0
