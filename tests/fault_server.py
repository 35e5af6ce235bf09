"""Runs jobs in children of one process that has imported everything: a run that is killed costs a second, not ten.

A line of JSON on stdin is a job, with what should happen to it; a line of JSON on stdout is what became of it."""
import gc, hashlib, json, os, re, resource, shutil, signal, socket, sys, tempfile, time, traceback
from pathlib import Path

ATTEMPTS = []
if os.environ.get('NO_NETWORK'): # before anything is imported
    os.environ.pop('HF_HUB_OFFLINE', None)
    os.environ.pop('TRANSFORMERS_OFFLINE', None)

    def refuse(what):
        def f(*args, **kw):
            ATTEMPTS.append(f'{what} {args[1:] if what == "connect" else args}')
            raise OSError('no network here')

        return f

    connect = socket.socket.connect
    socket.socket.connect = lambda s, address: connect(s, address) if s.family == socket.AF_UNIX else refuse('connect')(
        s, address)
    socket.getaddrinfo = refuse('getaddrinfo')
    socket.create_connection = refuse('create_connection')

import numpy as np, pandas as pd, torch

torch.set_num_threads(1)
from resalign.core import files as core_files
import resalign
from resalign.model import pipelines
from resalign.core.settings import make_config, params
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from resalign.baselines import methods # noqa: F401: every job would import it once more
from resalign.measure.detectors import train_evaluators
from resalign.studies import base, evaluators, pretraining
from resalign.core import training
from resalign.core.runs import Stopped
from resalign.core.settings import UserError
from resalign.core.files import sha256
from resalign.model.pipelines import PretrainConfig

from made import WORDS

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(unsafe_bank=8, retain_bank=8, unsafe_batch=1, retain_batch=1)


# ------------------------------------------------------------------ jobs: what they leave in `out`

def pretrain(made, out, steps=6):
    pretraining.pretrain(
        made/'retain', out,
        PretrainConfig(size=32, vae_channels=(8, 8, 16), unet_channels=(16, 32), vae_batch=2, batch=2, text_width=32,
                       text_layers=1, vae_steps=steps, steps=steps))


def unlearn(made, out, method='ga', steps=9, **settings):
    resalign.unlearn(made/'base', made/'unsafe', made/'retain', out, method,
                 (QUICK if 'batch' not in settings else {}) | dict(steps=steps) | settings, [made/'varied'],
                 WORDS)


def finetune(made, out, **settings):
    resalign.finetune(made/'base', made/'varied', out, dict(steps=9, batch=1) | settings)


def sample(made, out, n=24, steps=2):
    "Pictures alone, with a store"
    store = out.parent/f'.{out.name}.album'
    pipe = pipelines.load_pipeline(made/'base')
    images = pipelines.generate(pipe, [f'a picture of fox {i}' for i in range(n)], range(n), steps, store=store)
    with core_files.atomic_dir(out) as tmp:
        np.save(tmp/'images.npy', images)
    shutil.rmtree(store)


def evaluate(made, out, prompts='prompts.csv', steps=2, base='base', detector='all'):
    resalign.evaluate(made/base, made/prompts, out, ROOT/'outs/evaluators', made/'retain', detector, steps=steps)


def hub(made, out):
    pipelines.load_pipeline('nobody/nothing')


def several(made, out, names=()):
    "What a page makes with smoke on, and unlearned models, one after the other; a fingerprint of each"
    os.chdir(ROOT)
    found = {}
    for name in names:
        job, *method = name.split(':')
        folder = out/name
        folder.parent.mkdir(parents=True, exist_ok=True)
        if job == 'unlearn': unlearn(made, folder, *method, steps=2)
        elif job == 'finetune': finetune(made, folder, steps=2)
        elif job == 'base': base.train_base(folder, make_config(base.BaseConfig, base.SMOKE, 'smoke'))
        else: train_evaluators(folder, **evaluators.SMOKE)
        found[name] = files(folder)
    (out/'found.json').write_text(json.dumps(found))


def fingerprint(value) -> str:
    if isinstance(value, (tuple, list)): return [fingerprint(v) for v in value]
    if isinstance(value, pd.DataFrame):
        return hashlib.sha256(value.to_csv(float_format='%.17g').encode()).hexdigest()[:16]
    return hashlib.sha256(json.dumps(steady(value), default=lambda o: type(o).__name__,
                                          sort_keys=True).encode()).hexdigest()[:16]


def steady(x):
    "Without times, and without the folders' random names"
    if isinstance(x, dict): return {k: steady(v) for k, v in x.items() if k not in ('seconds', 'cost')}
    return re.sub(r'/[^ ]*/tmp\w+', '', x) if isinstance(x, str) else [steady(v)
                                                                            for v in x] if isinstance(x, list) else x


def files(folder) -> dict: # path: hash; but for what it cost
    out = {}
    for p in sorted(Path(folder).rglob('*')):
        if not p.is_file() or p.name == 'cost.json': continue
        name = re.sub(r'tmp\w{8}/', '', p.relative_to(folder).as_posix())
        out[name] = fingerprint(json.loads(p.read_text())) if p.name in ('record.json', 'card.json') else sha256(p)[:16]
    return out


# ------------------------------------------------------------------ what may happen to a job

def at_operation(n: int, what: str):
    "At the n-th call that changes names or waits for the disk: die, or find the disk full"
    count = [0]

    def around(f):
        def g(*args, **kw):
            count[0] += 1
            if count[0] == n or what == 'full' and n < count[0] < n + 3:
                if what == 'kill': os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, 'No space left on device')
            return f(*args, **kw)

        return g

    os.replace, os.fsync, os.mkdir, core_files._exchange = map(around, (os.replace, os.fsync, os.mkdir, core_files._exchange))
    if what == 'kill': os.unlink, os.rmdir = around(os.unlink), around(os.rmdir)
    return count


def signal_at(number: int, n: int, then: int = 0):
    "The n-th step of a training, or batch of pictures, finds a signal, and a tenth of a second later another"
    count = [0]

    def around(f):
        def g(*args, **kw):
            count[0] += 1
            if count[0] == n:
                os.kill(os.getpid(), number)
                if then:
                    time.sleep(.1)
                    os.kill(os.getpid(), then)
            return f(*args, **kw)

        return g

    training.optimizer_step, pipelines.ImageStore.add = around(training.optimizer_step), around(pipelines.ImageStore.add)


def count_batches() -> list:
    "How many batches of pictures were drawn"
    count, keep = [0], pipelines.ImageStore.add

    def add(self, *args, **kw):
        count[0] += 1
        return keep(self, *args, **kw)

    pipelines.ImageStore.add = add
    return count


def child(job: dict):
    "In the child: exit status 0, 2 for a UserError, 128 + n for a stop, 1 for a traceback"
    for k, v in job.get('env', {}).items():
        os.environ[k] = v
    every, batch = job.get('every', 2), job.get('batch', 4)
    d = list(training.optimise.__defaults__)
    d[d.index(100)] = every
    training.optimise.__defaults__ = tuple(d)
    d = dict(zip(
        ('steps', 'guidance', 'batch', 'bf16', 'embeds', 'store', 'negative'), pipelines.generate.__defaults__)) | dict(batch=batch)
    pipelines.generate.__defaults__ = tuple(d.values())
    if limit := job.get('fsize'):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    counted = at_operation(*job['operation']) if job.get('operation') else [0]
    if job.get('signal'): signal_at(*job['signal'])
    batches = count_batches()
    out = Path(job['out'])
    status = 0
    try:
        globals()[job['job']](Path(job['made']), out, **job.get('args', {}))
    except UserError as e:
        status = 2
        print(f'UserError: {e}', file=sys.stderr)
    except Stopped as e:
        status = 128 + e.signal
        print(f'Stopped: {e}', file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        status = 1
        traceback.print_exc()
    print(json.dumps(dict(operations=counted[0], batches=batches[0], attempts=ATTEMPTS)), file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)


def memory(pid) -> int: # bytes of its own, without what is mapped from files
    try:
        return next(int(l.split()[1])*1024 for l in open(f'/proc/{pid}/status') if l.startswith('RssAnon'))
    except (OSError, StopIteration):
        return 0


def run(job: dict) -> dict:
    "Start a child, and do to it what the job says: kill {signal: seconds}"
    with tempfile.TemporaryFile('w+') as err:
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            os.dup2(err.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            child(job)
        todo, peak = sorted((t, int(s)) for s, t in job.get('kill', {}).items()), 0
        while True:
            now = time.monotonic() - start
            if todo and now >= todo[0][0]: os.kill(pid, todo.pop(0)[1])
            if job.get('watch'): peak = max(peak, memory(pid))
            done, status = os.waitpid(pid, os.WNOHANG)
            if done: break
            if now > job.get('limit', 600): os.kill(pid, signal.SIGKILL)
            time.sleep(.002 if todo else .01)
        err.seek(0)
        text = err.read().splitlines()
    said = json.loads(text.pop()) if text and text[-1].startswith('{"operations"') else {}
    return dict(status=os.waitstatus_to_exitcode(status), seconds=round(time.monotonic() - start, 3), peak=peak,
                err='\n'.join(text), **said)


def main():
    os.environ['PROGRESS'] = '0'
    params('evaluate') # read, and made, once and not by every job: params.yaml, transformers' table of renamed weights
    get_checkpoint_conversion_mapping('clip_text_model')
    gc.collect()
    gc.freeze() # no child looks at all that was imported
    print(json.dumps('ready'), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == '__main__': main()
