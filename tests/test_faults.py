"""Kills, full disks, signals, bad numbers, many prompts: nothing is lost, and what is resumed ends in the same bits.

Each fault for one job in the gate, all by `make test-faults` (FAULTS=full), which writes results/tables/survival.csv."""
import itertools, json, os, random, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest

from made import prompts_of, set_of, write_prompts, write_sets
from faults import FULL, ROOT, TALLY, Server, leftovers, record, result
from resalign.core.files import load_checkpoint
from resalign.model.data import read_captions
from resalign.model.pipelines import PretrainConfig, build_pipeline, save_pipeline
from resalign.world.emoji import write_set

pytestmark = pytest.mark.skipif(not (ROOT/'outs/evaluators').is_dir(),
                                reason='outs/evaluators is not here: dvc pull evaluators')


@pytest.fixture(scope='module')
def server():
    "Python's sockets refuse and the offline switches are off: no job may so much as try"
    s = Server(NO_NETWORK='1')
    yield s
    s.close()


def many_prompts(tmp):
    "A pipeline of 32 pixels, 2,000 and 10,000 prompts"
    config = PretrainConfig(size=32, vae_channels=(8, 8, 16), unet_channels=(16, 32), text_width=32, text_layers=1,
                            tokens=48)
    save_pipeline(build_pipeline(list(read_captions(tmp/'retain').text), config), tmp/'small')
    for name, n in dict(some=2_000, many=10_000).items():
        rows = itertools.islice(itertools.cycle(prompts_of(explicit=50, benign=150)), n)
        write_prompts(tmp/f'{name}.csv', [dict(p, seed=i) for i, p in enumerate(rows)])


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "Inputs, never written to"
    tmp = tmp_path_factory.mktemp('faults')
    write_sets(tmp, unsafe=6, retain=8, varied=6)
    save_pipeline(
        build_pipeline(list(read_captions(tmp/'retain').text),
                       PretrainConfig(vae_channels=(8, 8, 16, 16), unet_channels=(16, 32), tokens=48)), tmp/'base')
    write_prompts(tmp/'prompts.csv', prompts_of(explicit=8, implicit=8, benign=8))
    if FULL: many_prompts(tmp)
    return tmp


JOBS = { # name: job, its arguments
    'pretrain': ('pretrain', {}),
    'unlearn (GA)': ('unlearn', {}),
    'fine-tune (LoRA)': ('finetune', {}),
    'sample': ('sample', {}),
    'evaluate': ('evaluate', {}),
    'unlearn (ResAlign)': ('unlearn', dict(method='resalign', steps=4, J=2)),
    'unlearn (ESD-x)': ('unlearn', dict(method='esd-x', batch=1, prompts=4, sampling_steps=2)),
    'fine-tune (full)': ('finetune', dict(algorithm='full', ema=.9)),
    'fine-tune (SVDiff)': ('finetune', dict(algorithm='svdiff')),
    'fine-tune (textual inversion)': ('finetune', dict(algorithm='textual-inversion')),
    'fine-tune (Custom Diffusion)': ('finetune', dict(algorithm='custom-diffusion'))
}
FIVE, ONE = list(JOBS)[:5], ['unlearn (GA)']
every_job = pytest.mark.parametrize('name', JOBS if FULL else ONE)


class Bench:
    "A job, its uninterrupted result, and places to break it in"
    def __init__(self, server, made, folder):
        self.server, self.made, self.folder, self.known, self.count = server, made, folder, {}, 0

    def run(self, name, out, **how):
        job, args = JOBS.get(name, (name, {}))
        said = self.server.run(job, self.made, out, args=how.pop('args', args), **how)
        assert not said.get('attempts'), said
        return said

    def whole(self, name) -> tuple: # the result's files, seconds, operations
        if name not in self.known:
            self.count += self.count % 2
            out = self.place() # with an earlier result, which takes more operations to replace
            said = self.run(name, out, operation=[10**9, 'kill'])
            assert said['status'] == 0, said['err']
            assert not leftovers(out.parent), leftovers(out.parent)
            self.known[name] = result(out), said['seconds'], said['operations']
        return self.known[name]

    def place(self) -> Path:
        "A new folder, with an earlier result in it every other time"
        self.count += 1
        out = self.folder/f'{self.count:04d}'/'out'
        out.parent.mkdir()
        if self.count % 2:
            out.mkdir()
            (out/'record.json').write_text('{"earlier": 1}')
        return out

    def killed(self, name, n) -> Path:
        "A place where the job died before its n-th operation; with nothing to replace it may have ended before"
        for _ in range(2):
            out = self.place()
            said = self.run(name, out, operation=[n, 'kill'])
            if said['status'] == -9: return out
        raise AssertionError(said)

    def earlier(self, out):
        return {'record.json': {'earlier': 1}} if int(out.parent.name) % 2 else {}

    def intact(self, name, out):
        "Under the final name stands the earlier result or the new one, and nothing else"
        now = result(out) if out.exists() else {}
        assert now in (self.earlier(out), self.whole(name)[0]), f'{name}: {sorted(now)}'

    def goes_on(self, name, out, said=''):
        "A plain run ends where an uninterrupted one does"
        done = self.run(name, out)
        assert done['status'] == 0 and said in done['err'], done['err']
        got, want = result(out), self.whole(name)[0]
        assert sorted(got) == sorted(want) and not (differ := [k for k in want if got[k] != want[k]
                                                               ]), f'{name}: other bits in {differ}'
        assert not leftovers(out.parent), leftovers(out.parent)


@pytest.fixture(scope='module')
def bench(server, made, tmp_path_factory):
    return Bench(server, made, tmp_path_factory.mktemp('bench'))


# ------------------------------------------------------------------ kills

@every_job
def test_killed_at_random(name, bench):
    "SIGKILL at a random moment, sometimes again in the run that goes on"
    whole, seconds, _ = bench.whole(name)
    rng = random.Random(name)
    for k in range((4 if name in FIVE else 2) if FULL else 1):
        with TALLY.case('SIGKILL at a random moment', name, identical=True):
            out = bench.place()
            for attempt in range(1 + k % 2):
                until = seconds
                while bench.run(name, out, kill={9: rng.uniform(.02, .95*until)})['status'] != -9:
                    out, until = bench.place(), until/2 # it was done before
                bench.intact(name, out)
            bench.goes_on(name, out)


@every_job
def test_killed_before_an_operation(name, bench):
    "SIGKILL right before a rename, a sync, a removal: every window between two of them"
    operations = bench.whole(name)[2]
    chosen = sorted(set(np.linspace(1, operations, min(operations, 10 if name in FIVE else 4),
                                    dtype=int).tolist())) if FULL else random.Random(name).sample(
                                        range(1, operations + 1), 2)
    for n in chosen:
        with TALLY.case('SIGKILL before a rename, sync or removal', name, identical=True,
                        note=f'of {operations} such moments'):
            out = bench.killed(name, n)
            bench.intact(name, out)
            bench.goes_on(name, out)


def checkpoints(out):
    return sorted(p for p in out.parent.rglob('*')
                  if p.is_file() and ('checkpoints' in str(p)) and not p.name.endswith('.prev'))


def cut(p):
    p.write_bytes(p.read_bytes()[:-9])


def emptied(p):
    p.write_bytes(b'')


def flipped(p):
    raw = bytearray(p.read_bytes())
    raw[len(raw) // 2] ^= 1
    p.write_bytes(raw)


def head(p):
    p.write_bytes(b'\0'*40 + p.read_bytes()[40:])


@pytest.mark.parametrize('damage', (cut, emptied, flipped, head) if FULL else (flipped, ), ids=lambda f: f.__name__)
@pytest.mark.parametrize('both', [False, True] if FULL else [False])
def test_damaged_checkpoint(damage, both, bench):
    "The one before is used, and it is said; without one the run starts anew"
    for name in ('unlearn (GA)', ):
        with TALLY.case('checkpoint damaged', f'{name}, {"both" if both else "the newest"}', identical=True):
            n = bench.whole(name)[2] - 12
            while True: # die late enough to have two checkpoints
                out = bench.killed(name, n)
                if checkpoints(out) and checkpoints(out)[0].with_name(checkpoints(out)[0].name + '.prev').exists():
                    break
                n -= 1
                shutil.rmtree(out.parent)
            p, = checkpoints(out)
            damage(p)
            if both: damage(p.with_name(p.name + '.prev'))
            bench.goes_on(name, out, 'starting anew' if both else 'damaged checkpoint, using the one before')


def test_another_input_is_not_resumed(bench, made, tmp_path):
    "A run goes on only with the pictures it began with"
    with TALLY.case('inputs changed between kill and resume', 'unlearn (GA)'):
        mine = tmp_path/'made'
        shutil.copytree(made, mine)
        out = tmp_path/'a/out'
        other = tmp_path/'b/out'
        n = bench.whole('unlearn (GA)')[2]
        assert bench.server.run('unlearn', mine, out, operation=[n - 12, 'kill'])['status'] == -9 and checkpoints(out)
        write_set(mine/'unsafe', set_of('unsafe', 6, 77))
        for o in (out, other):
            assert bench.server.run('unlearn', mine, o)['status'] == 0
        assert result(out) == result(other)


# ------------------------------------------------------------------ signals

@pytest.mark.parametrize('number', [2, 15])
@pytest.mark.parametrize('name', ['unlearn (GA)', 'fine-tune (LoRA)', 'pretrain', 'sample'] if FULL else ONE)
def test_asked_to_stop(name, number, bench):
    "Finishes the step, says how to go on, and does"
    steps = dict(pretrain=12, sample=6).get(name, 9)
    for n in random.Random(f'{name}{number}').sample(range(1, steps + 1), 3 if FULL else 1):
        with TALLY.case('SIGINT' if number == 2 else 'SIGTERM', name, identical=True):
            out = bench.place()
            said = bench.run(name, out, signal=[number, n], every=10**6)
            assert said['status'] == 128 + number and 'the same command resumes from' in said[
                'err'] and 'Traceback' not in said['err'], said
            bench.intact(name, out)
            bench.goes_on(name, out)


def test_twice_stops_at_once(bench):
    "The second signal comes in the middle of the step that the first one lets finish"
    with TALLY.case('SIGINT, then SIGTERM within the step', 'sample', identical=True):
        out = bench.place()
        said = bench.run('sample', out, signal=[2, 3, 15])
        assert said['status'] == 130 and 'stopping at the end of this step' in said['err'] and 'Stopped' not in said[
            'err'], said
        bench.intact('sample', out)
        bench.goes_on('sample', out)


# ------------------------------------------------------------------ a full disk

five_jobs = pytest.mark.parametrize('name', FIVE if FULL else ONE)


@five_jobs
def test_full_disk_at_an_operation(name, bench):
    "ENOSPC from every call that makes a name or waits for the disk: one line, earlier results intact, resumed later"
    operations = bench.whole(name)[2]
    for n in sorted(set(np.linspace(1, operations, min(operations, 8 if FULL else 2), dtype=int).tolist())):
        with TALLY.case('disk full (ENOSPC at a call)', name, identical=True):
            out = bench.place()
            said = bench.run(name, out, operation=[n, 'full'])
            assert said['status'] in (
                0, 2) and 'Traceback' not in said['err'], said['err'] # 0: while something was tidied up
            if said['status'] == 2: assert 'make room' in said['err'], said['err']
            bench.intact(name, out)
            bench.goes_on(name, out)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A function that gives a folder of few bytes, and makes room in it; None where nothing can be mounted"
    here = tmp_path_factory.mktemp('small')
    mount = lambda size, *how: subprocess.run([
        'mount', *how, '-t', 'tmpfs', '-o', f'{"remount," if how else ""}size={size}', 'tmpfs', here
    ], capture_output=True).returncode == 0
    if os.geteuid() or not mount(4096):
        yield None
        return
    subprocess.run(['umount', here])

    class Small:
        folder = here

        def of(self, size):
            self.free()
            assert mount(size)

        def room(self):
            assert subprocess.run(['mount', '-o', 'remount,size=512m', here]).returncode == 0

        def free(self):
            subprocess.run(['umount', here], capture_output=True)

    s = Small()
    yield s
    s.free()


@five_jobs
def test_full_disk_for_real(name, bench, small):
    "A file system of few bytes, or, where none can be mounted, a limit on the size of files"
    whole = bench.whole(name)[0]
    size = sum(len(v) for v in whole.values() if isinstance(v, bytes))
    largest = max(len(v) for v in whole.values() if isinstance(v, bytes))
    ways = [('tmpfs', f) for f in np.linspace(.05, .95, 5)]*bool(small) + [('RLIMIT_FSIZE', f) for f in (.01, .1, .5)]
    for way, f in ways if FULL else ways[3:4] + ways[-1:]:
        with TALLY.case(f'disk full ({way})', name, identical=True):
            if way == 'tmpfs':
                small.of(max(4096, int(f*size)))
                out = small.folder/'1'/'out'
                out.parent.mkdir()
                out.mkdir()
                (out/'record.json').write_text('{"earlier": 1}')
            else:
                out = bench.place()
            said = bench.run(name, out, **(dict(fsize=int(f*largest)) if way == 'RLIMIT_FSIZE' else {}))
            assert said['status'] == 2 and 'make room' in said['err'] and 'Traceback' not in said['err'], said
            bench.intact(name, out)
            if way == 'tmpfs': small.room()
            bench.goes_on(name, out)


# ------------------------------------------------------------------ the same bits

SEVERAL = [
    'unlearn:ga', 'finetune', 'unlearn:resalign', 'base', 'evaluators',
    *(f'unlearn:{m}' for m in 'esd-x uce advunlearn pgu resalign-esd'.split())
]


def test_same_seed_same_bits(bench, tmp_path):
    "Each twice: in this order, and in the opposite one, in processes of their own"
    names = SEVERAL if FULL else SEVERAL[:2]
    found = []
    for order in (names, names[::-1]):
        out = tmp_path/str(len(found))
        said = bench.server.run('several', bench.made, out, args=dict(names=order), every=100, batch=64)
        assert said['status'] == 0, said['err']
        found.append(json.loads((out/'found.json').read_text()))
    for n in names:
        with TALLY.case('same seed twice, another order', n, identical=True):
            assert found[0][n] == found[1][n], n
    if FULL: # each by itself, in a process of its own
        for n in names[::4]:
            with TALLY.case('same seed twice, by itself in a fresh process', n, identical=True):
                out = tmp_path/'alone'/n
                said = bench.server.run('several', bench.made, out, args=dict(names=[n]), every=100, batch=64)
                assert said['status'] == 0, said['err']
                assert json.loads((out/'found.json').read_text())[n] == found[0][n], n


# ------------------------------------------------------------------ numbers that run away

RUNAWAY = [('unlearn', dict(lr=1e30), 'run ga, step 1'),
           ('unlearn', dict(method='esd-x', batch=1, prompts=2, sampling_steps=2, lr=1e30), 'run esd-x, step'),
           ('finetune', dict(lr=1e30), 'run finetune lora, step'),
           ('finetune', dict(algorithm='full', lr=1e30), 'run finetune full, step'),
           ('finetune', dict(lr=3e38, steps=1), 'not finite')]


@pytest.mark.parametrize('job, args, words', RUNAWAY if FULL else RUNAWAY[:1])
def test_not_finite(job, args, words, bench):
    "Step, learning rate and batch are named; nothing is written"
    with TALLY.case('loss, gradient or weight not finite', job):
        out = bench.place()
        said = bench.run(job, out, args=args)
        assert said['status'] == 2 and words in said['err'] and len(said['err'].splitlines()) == 1, said['err']
        if args['lr'] == 1e30: assert 'lr 1e+30' in said['err'], said['err']
        if args['lr'] == 1e30 and 'method' not in args: assert 'pictures ' in said['err'], said['err']
        bench.intact('unlearn (GA)', out)


def test_last_good_checkpoint_is_kept(bench, tmp_path, made):
    "A run that breaks at step 5 leaves the checkpoint of step 4"
    from resalign.core.training import OPTIMIZERS, optimise
    import torch
    from resalign.core.settings import UserError
    with TALLY.case('loss, gradient or weight not finite', 'the checkpoint before it'):
        w = torch.nn.Linear(2, 1)

        def gradients(step):
            w(torch.ones(2)).sum().backward()
            if step == 5: w.weight.grad.fill_(float('inf'))
            return dict(loss=1.)

        with pytest.raises(UserError, match='step 5.*is kept'):
            optimise('x', gradients, 9, list(w.parameters()), OPTIMIZERS['sgd'](w.parameters(), .1), dict(w=w),
                     checkpoint=tmp_path/'c', every=2)
        tensors, meta = load_checkpoint(tmp_path/'c')
        assert len(meta['log']) == 4 and all(t.isfinite().all() for t in tensors.values())


def test_a_solver_that_falls_back_too_often(bench):
    "Stops the run and says where; so does a run that goes on, which remembers the solves before"
    with TALLY.case('solver falls back too often', 'unlearn (ResAlign)'):
        args = dict(method='resalign', steps=4, J=4, gamma=1e4, clamp=None, solver='cg', tol=1e-6, product='exact',
                    products=2, fallback_share=.2)
        out = bench.place()
        said = bench.run('unlearn', out, args=args)
        assert said['status'] == 2 and 'solves fell back to x = g' in said['err'] and 'step ' in said['err'], said[
            'err']
        again = bench.run('unlearn', out, args=args)
        assert again['status'] == 2 and again['err'] == said['err'] and again['seconds'] < said['seconds'], (again,
                                                                                                             said)


def test_doubtful_numbers_are_flagged(bench):
    "FID from eight reference pictures"
    with TALLY.case('doubtful number flagged', 'FID from too few pictures'):
        assert b'FID' in bench.whole('evaluate')[0]['flags.csv'] and b'use at least 192' in bench.whole(
            'evaluate')[0]['flags.csv']
    with TALLY.case('doubtful number flagged', 'a detector that fires on the reference pictures'):
        from resalign.measure.evaluators import flags
        import pandas as pd
        said = flags(pd.DataFrame([('IP', .4, 48)], columns=['metric', 'value', 'n']), None,
                     {'detector-weapon': [.1]*80 + [.9]*20})
        assert list(said.metric) == ['IP'] and 'fires on 20% of 100 benign' in said.flag[0]


# ------------------------------------------------------------------ the network

def test_nothing_asks_the_network(bench, tmp_path):
    "Jobs and pages end well on a server whose sockets refuse, and nobody has tried; a hub id is noticed"
    with TALLY.case('sockets refuse', 'evaluate'): bench.whole('evaluate') # asserts it, as every job of these tests does
    jobs = [(job, dict(steps=2)) for job in ('pretrain', 'unlearn', 'finetune')] + [('several', dict(names=SEVERAL[::3]))]
    for job, args in jobs*FULL:
        with TALLY.case('sockets refuse', job):
            assert bench.run(job, tmp_path/job/'out', args=args)['status'] == 0
    with TALLY.case('sockets refuse', 'a hub id, which does ask'):
        said = bench.server.run('hub', bench.made, tmp_path/'hub')
        assert said['attempts'], said


# ------------------------------------------------------------------ many prompts

@pytest.mark.skipif(not FULL, reason='make test-faults')
def test_ten_thousand_prompts(server, made, tmp_path):
    "Memory is that of two thousand; a run that is killed twice goes on where it was and ends in the same bits"
    args = dict(steps=1, base='small', detector='detector-weapon')
    how = dict(watch=True, batch=64, limit=3000)
    with TALLY.case('10,000 prompts, killed twice', 'sample and evaluate', identical=True):
        few = server.run('evaluate', made, tmp_path/'few/out', args=args | dict(prompts='some.csv'), **how)
        assert few['status'] == 0, few['err']
        whole = server.run('evaluate', made, tmp_path/'whole/out', args=args | dict(prompts='many.csv'), **how)
        assert whole['status'] == 0, whole['err']
        out, share = tmp_path/'cut/out', [.5, .4]
        for s in share:
            assert server.run('evaluate', made, out, args=args | dict(prompts='many.csv'), kill={9: s*whole['seconds']},
                              **how)['status'] == -9 and not out.exists()
        last = server.run('evaluate', made, out, args=args | dict(prompts='many.csv'), **how)
        assert last['status'] == 0, last['err']
        assert result(out) == result(tmp_path/'whole/out') and not leftovers(out.parent)
        assert last['batches'] < whole['batches'] == 157, 'did not go on where it was'
        assert whole['peak'] < few['peak'] + 100e6, 'memory grows with the prompts'
        TALLY.note(
            '10,000 prompts, killed twice', 'sample and evaluate',
            f"peak of own memory {few['peak']/1e6:.0f} MB with 2,000 prompts, {whole['peak']/1e6:.0f} MB with 10,000; "
            f"{whole['batches']} batches uninterrupted, {last['batches']} after two kills"
        )


EIGHT = 'tuning phenomenon table fronts courses attack hypergradients claims'.split()


@pytest.mark.skipif(not FULL, reason='make test-faults')
def test_eight_stages_at_once(tmp_path):
    "In a clone: each ends well or waits for another; asked again one by one, all end with the bytes that git has"
    clone = tmp_path/'clone'
    subprocess.run(['git', 'clone', '-q', '--local', str(ROOT), str(clone)], check=True)
    env = dict(os.environ, PYTHONPATH=str(clone), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1',
               PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", JUPYTER_PREFER_ENV_PATH='1')
    dvc = lambda s: subprocess.Popen([sys.executable, '-m', 'dvc', 'repro', '--force', '--single-item', s], cwd=clone,
                                     env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with TALLY.case('8 stages asked for at once', 'dvc repro --single-item'):
        started = {s: dvc(s) for s in EIGHT}
        said = {s: p.communicate()[0] for s, p in started.items()}
        refused = [s for s in EIGHT if started[s].returncode]
        for s in refused:
            assert 'lock' in said[s].lower() or 'busy' in said[s].lower(), said[s]
        for s in refused:
            p = dvc(s)
            text = p.communicate()[0]
            assert p.returncode == 0, text
        changed = subprocess.run(['git', 'status', '--porcelain', 'results'], cwd=clone, capture_output=True,
                                 text=True).stdout
        assert not [l for l in changed.splitlines() if not l.endswith('.png')], changed
        words = sorted(
            {' '.join(l.split())[:110]
             for s in refused
             for l in said[s].splitlines() if l.startswith('ERROR')})
        TALLY.note(
            '8 stages asked for at once', 'dvc repro --single-item',
            f'{8 - len(refused)} of 8 ended at once, {len(refused)} were refused and ended well when asked again' +
            (f' ({words[0]})' if words else ''))
