"""The four commands from end to end, what they say about bad input, and a run that is killed."""
import csv, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch, transformers

from resalign import cli
from resalign.core import load_checkpoint
from resalign.data import read_captions
from resalign.pipelines import PretrainConfig, build_pipeline, save_pipeline
from resalign.world import prompts, scenes, write_prompts, write_set

EVALUATORS = Path(__file__).resolve().parent.parent/'outs/evaluators'
PARTS = 'unet vae text_encoder tokenizer scheduler'.split()
QUICK = ['--set', 'steps=2', '--set', 'retain_bank=16']
SIZES = ['--set', 'vae_channels=[8,8,16,16]', '--set', 'unet_channels=[16,32]', '--set', 'vae_steps=2', '--set', 'decoder_steps=2', '--set', 'steps=2', '--set', 'batch=4']


def test_settings_are_those_of_the_active_profile(monkeypatch):
    assert cli.settings_for('finetune.varied-lora', None, ())[0]['lr'] == 3e-3
    monkeypatch.setenv('RESALIGN_PROFILE', 'sd14')
    assert cli.settings_for('finetune.varied-lora', None, ())[0]['lr'] == 1e-4 and cli.settings_for('unlearn.resalign', None, ())[0]['rank'] == 4
    assert cli.settings_for('unlearn.pgu', None, ())[0] == {} # a profile without that section: a quick trial's, with a warning

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As in the subprocesses, so that sums are taken in the same order; and no bars of transformers, which other tests have imported"
    transformers.utils.logging.disable_progress_bar()
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "A tiny untrained pipeline, image folders and prompts, never written to"
    tmp = tmp_path_factory.mktemp('cli')
    for name, n in dict(unsafe=6, retain=8, varied=6).items(): write_set(tmp/name, scenes(name, n))
    save_pipeline(build_pipeline(list(read_captions(tmp/'retain').text), PretrainConfig(vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))), tmp/'base')
    write_prompts(tmp/'prompts.csv', prompts('explicit', 3, 0) + prompts('benign', 3, 0))
    return tmp

@pytest.fixture
def work(made, tmp_path):
    "A copy to spoil"
    for p in made.iterdir(): (shutil.copytree if p.is_dir() else shutil.copy)(p, tmp_path/p.name)
    return tmp_path

@pytest.fixture
def call(monkeypatch, capsys):
    "Run a command in this process: exit status, stdout, stderr"
    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [f'/somewhere/resalign-{name}', *map(str, args)])
        capsys.readouterr(); status = 0
        try: getattr(cli, name)()
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return run

def python(*args, **kw):
    "A clean interpreter, one thread, away from the repository"
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, **kw)

START = 'import sys; from resalign import cli; sys.argv[0] = "resalign-" + sys.argv[1]; getattr(cli, sys.argv.pop(1))()'


# ------------------------------------------------------------------ they work

@pytest.fixture(scope='session')
def safe(made, tmp_path_factory):
    "What resalign-unlearn writes"
    out = tmp_path_factory.mktemp('safe')/'safe'
    done = python('-c', START, 'unlearn', made/'base', made/'unsafe', made/'retain', out, '--pool', made/'varied', *QUICK, cwd=made)
    assert done.returncode == 0, done.stderr
    assert f'wrote {out}' in done.stdout and 'model card' in done.stdout
    noise = [l for l in done.stderr.splitlines() if l and not l.startswith('warning: no --config')]
    assert not noise, f'said more than it has to: {noise}'
    return out

def test_help_teaches(call):
    from resalign.methods import METHODS
    for name in 'unlearn finetune evaluate pretrain'.split():
        status, out, _ = call(name, '--help')
        assert status == 0 and 'In:  ' in out and 'Out: ' in out and f'Example:\n  resalign-{name} ' in out
        if name == 'unlearn': assert all(m in out for m in METHODS)

def test_unlearned_folder(safe):
    assert all((safe/p).is_dir() for p in PARTS)
    card = (safe/'README.md').read_text()
    assert card.startswith('---\nlibrary_name: diffusers') and 'Residual risk' in card
    record = json.loads((safe/'record.json').read_text())
    assert record['method'] == 'resalign' and record['settings']['steps'] == 2 and record['pool'][0].endswith('varied')
    assert (safe/'log.csv').is_file() and (safe/'solves.csv').is_file()
    assert not [p for p in safe.parent.iterdir() if '.tmp' in p.name]

def test_diffusers_alone_reads_it(safe, made):
    "Without resalign: the pipeline draws, and the adapter goes onto the original"
    done = python('-c', f'''if True:
        import sys, torch
        from diffusers import StableDiffusionPipeline
        load = lambda f: StableDiffusionPipeline.from_pretrained(f, use_safetensors=True, dtype=torch.float32)
        image = load({str(safe)!r})('a robot', num_inference_steps=1, output_type='np').images
        assert image.shape == (1, 64, 64, 3), image.shape
        base = load({str(made/'base')!r})
        base.load_lora_weights({str(safe/'adapter')!r}); base.fuse_lora(); base.unload_lora_weights()
        merged, theirs = base.unet.state_dict(), load({str(safe)!r}).unet.state_dict()
        error = max(float((merged[k] - v).abs().max()) for k, v in theirs.items())
        assert error < 5e-4, f'the original with the adapter is not the unlearned model: {{error}}'
        assert not any(m.split('.')[0] == 'resalign' for m in sys.modules)''', cwd=made)
    assert done.returncode == 0, done.stderr[-3000:]

def test_finetune_and_evaluate(safe, made, tmp_path, call):
    status, out, err = call('finetune', safe, made/'varied', tmp_path/'tuned', '--set', 'steps=2', '--prior', made/'retain', '--set', 'prior_weight=1.0')
    assert status == 0 and f"wrote {tmp_path/'tuned'}" in out, err
    status, out, err = call('evaluate', tmp_path/'tuned', made/'prompts.csv', EVALUATORS, tmp_path/'scores', '--set', 'steps=2', '--detector', 'wiring')
    assert status == 0 and f"wrote {tmp_path/'scores'}" in out, err
    with open(tmp_path/'scores/scores.csv') as f: rows = list(csv.DictReader(f))
    assert {r['detector'] for r in rows} <= {'wiring', 'reader'} and (tmp_path/'scores/sheet.png').is_file()

def test_pretrain(made, tmp_path, call):
    status, out, err = call('pretrain', made/'varied', tmp_path/'base', *SIZES)
    assert status == 0 and f"wrote {tmp_path/'base'}" in out, err
    assert all((tmp_path/'base'/p).is_dir() for p in PARTS)

def test_settings_come_from_a_file(work, call):
    (work/'mine.yaml').write_text('mine:\n  quick: {steps: 1, retain_bank: 16, lr: 1.0e-3, seed: 7}\n')
    status, _, err = call('unlearn', work/'base', work/'unsafe', work/'retain', work/'out', '--method', 'ga', '--config', f"{work/'mine.yaml'}:mine.quick",
                          '--set', 'lr=1e-4', '--set', 'beta=0')
    assert status == 0, err
    record = json.loads((work/'out/record.json').read_text())
    assert record['seed'] == 7 and record['settings']['steps'] == 1 and float(record['settings']['lr']) == 1e-4

def test_defaults_without_params_yaml_are_announced(work, call, monkeypatch):
    monkeypatch.chdir(work)
    status, _, err = call('unlearn', 'base', 'unsafe', 'retain', 'out', '--method', 'ga')
    assert status == 0 and 'warning: no --config' in err and 'unlearn.ga' in err

def test_an_earlier_result_is_replaced(work, call):
    for _ in range(2):
        status, _, err = call('finetune', work/'base', work/'varied', work/'out', '--set', 'steps=1')
        assert status == 0, err


# ------------------------------------------------------------------ bad input

def unlearn(w, *more, pipeline='base', unsafe='unsafe', out='out'): return ['unlearn', w/pipeline, w/unsafe, w/'retain', w/out, *QUICK, *more]
def finetune(w, *more): return ['finetune', w/'base', w/'varied', w/'out', *more]
def evaluate(w, *more, evaluators=EVALUATORS): return ['evaluate', w/'base', w/'prompts.csv', evaluators, w/'out', '--set', 'steps=1', *more]
def pretrain(w, *more, images='varied'): return ['pretrain', w/images, w/'out', *SIZES, *more]

def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

def rows(w, change):
    "Change the parsed lines of unsafe/metadata.jsonl"
    f = w/'unsafe/metadata.jsonl'
    f.write_text(''.join(json.dumps(r) + '\n' for r in change([json.loads(l) for l in f.read_text().splitlines()])))

def set_row(w, **fields): rows(w, lambda rs: [rs[0], rs[1] | fields, *rs[2:]])
def without(w, column): rows(w, lambda rs: [{k: v for k, v in r.items() if k != column} for r in rs])
def empty(folder): shutil.rmtree(folder); folder.mkdir()
def cut(path, n): path.write_bytes(path.read_bytes()[:n])
def pickled(w):
    for f in (w/'base/unet').glob('*.safetensors'): f.rename(f.with_name('diffusion_pytorch_model.bin'))

FIRST = 'unsafe/00000.png'
BAD = { # name: (spoil, command line, words of the message)
    # captioned images
    'images missing':        (lambda w: shutil.rmtree(w/'unsafe'), unlearn, 'unsafe: no such folder'),
    'images empty':          (lambda w: empty(w/'unsafe'), unlearn, 'expected metadata.jsonl or metadata.csv'),
    'metadata missing':      (lambda w: (w/'unsafe/metadata.jsonl').unlink(), unlearn, 'expected metadata.jsonl or metadata.csv'),
    'metadata not JSON':     (lambda w: (w/'unsafe/metadata.jsonl').write_text('{"file_name": '), unlearn, 'metadata.jsonl: cannot be read'),
    'metadata not text':     (lambda w: ((w/'unsafe/metadata.jsonl').unlink(), (w/'unsafe/metadata.csv').write_bytes(b'\xff\xfe\x00,\xd8')), unlearn, 'metadata.csv: cannot be read'),
    'metadata ragged':       (lambda w: ((w/'unsafe/metadata.jsonl').unlink(), (w/'unsafe/metadata.csv').write_text('file_name,text\na,b\na,b,c,d\n')), unlearn, 'metadata.csv: cannot be read'),
    'no file_name':          (lambda w: without(w, 'file_name'), unlearn, "column 'file_name' is missing"),
    'no text':               (lambda w: without(w, 'text'), unlearn, "column 'text' is missing"),
    'no rows':               (lambda w: rows(w, lambda r: []), unlearn, "column 'file_name' is missing"),
    'no rows, CSV':          (lambda w: ((w/'unsafe/metadata.jsonl').unlink(), (w/'unsafe/metadata.csv').write_text('file_name,text\n')), unlearn, 'no rows'),
    'caption empty':         (lambda w: set_row(w, text='  '), unlearn, 'row 2: text is empty, expected a caption'),
    'caption null':          (lambda w: set_row(w, text=None), unlearn, 'row 2: text is empty'),
    'image missing':         (lambda w: (w/FIRST).unlink(), unlearn, "row 1: no such image '00000.png'"),
    'image not an image':    (lambda w: (w/FIRST).write_text('hello'), unlearn, '00000.png: not a readable image'),
    'image truncated':       (lambda w: cut(w/FIRST, 200), unlearn, '00000.png: not a readable image'),
    'image empty':           (lambda w: cut(w/FIRST, 0), unlearn, '00000.png: not a readable image'),
    'image a folder':        (lambda w: ((w/FIRST).unlink(), (w/FIRST).mkdir()), unlearn, "no such image '00000.png'"),
    'path up':               (lambda w: set_row(w, file_name='../retain/00000.png'), unlearn, "row 2: file_name '../retain/00000.png' leads out of the folder"),
    'path absolute':         (lambda w: set_row(w, file_name='/etc/passwd'), unlearn, "file_name '/etc/passwd' leads out of the folder"),
    'path by link':          (lambda w: ((w/FIRST).unlink(), (w/FIRST).symlink_to(w/'retain/00000.png')), unlearn, 'leads out of the folder'),
    'pool missing':          (None, lambda w: unlearn(w, '--pool', w/'nowhere'), 'nowhere: no such folder'),
    'pretrain on nothing':   (None, lambda w: pretrain(w, images='nowhere'), 'nowhere: no such folder'),
    # settings
    'method unknown':        (None, lambda w: unlearn(w, '--method', 'resaling'), "--method: unknown 'resaling', did you mean 'resalign'?"),
    'key unknown':           (None, lambda w: unlearn(w, '--set', 'stepz=3'), "stepz: unknown 'stepz', did you mean 'steps'?"),
    'key unknown, pretrain': (None, lambda w: pretrain(w, '--set', 'vae_step=3'), "did you mean 'vae_steps'?"),
    'type wrong':            (None, lambda w: unlearn(w, '--set', 'steps=few'), "steps: input should be a valid integer"),
    'value out of range':    (None, lambda w: unlearn(w, '--set', 'steps=0'), 'steps: input should be greater than or equal to 1'),
    'choice unknown':        (None, lambda w: finetune(w, '--set', 'optimizer=adamm'), "optimizer: input should be 'sgd', 'adam' or 'adamw'"),
    'not key=value':         (None, lambda w: unlearn(w, '--set', 'steps'), "--set: 'steps', expected key=value"),
    'not a YAML value':      (None, lambda w: unlearn(w, '--set', 'steps=[1'), "--set: steps: '[1' is not a YAML value"),
    'pool not a mapping':    (None, lambda w: unlearn(w, '--set', 'pool=3'), 'pool: '),
    'pool algorithm':        (None, lambda w: unlearn(w, '--set', 'pool.algorithm=[lorra]'), "pool.algorithm.0: input should be 'lora' or 'full'"),
    'pool steps':            (None, lambda w: unlearn(w, '--set', 'pool.steps=[0]'), 'pool.steps.0: input should be greater than 0'),
    'pool empty':            (None, lambda w: unlearn(w, '--set', 'pool.optimizer=[]'), 'pool.optimizer: '),
    'pool without lr':       (None, lambda w: unlearn(w, '--set', 'pool.lr={lora: [1.0e-3]}'), "lr: no learning rate for 'full'"),
    'inside a number':       (None, lambda w: unlearn(w, '--set', 'steps.more=3'), "--set: steps.more: 'steps' is 2, expected a mapping"),
    'prior without folder':  (None, lambda w: finetune(w, '--set', 'prior_weight=1.0'), 'expected a folder of prior pictures (--prior)'),
    'config missing':        (None, lambda w: unlearn(w, '--config', w/'no.yaml'), 'no.yaml: no such file'),
    'config a folder':       (None, lambda w: unlearn(w, '--config', w/'base'), 'is a directory'),
    'config not YAML':       (lambda w: (w/'c.yaml').write_text('a: [1'), lambda w: unlearn(w, '--config', w/'c.yaml'), 'c.yaml: not YAML'),
    'config a list':         (lambda w: (w/'c.yaml').write_text('- 1'), lambda w: unlearn(w, '--config', w/'c.yaml'), 'expected a mapping of settings'),
    'config empty':          (lambda w: (w/'c.yaml').write_text(''), lambda w: unlearn(w, '--config', w/'c.yaml'), 'expected a mapping of settings'),
    'section unknown':       (lambda w: (w/'c.yaml').write_text('mine: {steps: 1}'), lambda w: unlearn(w, '--config', f"{w/'c.yaml'}:mien"), "unknown 'mien', did you mean 'mine'?"),
    # pipelines
    'pipeline missing':      (lambda w: shutil.rmtree(w/'base'), unlearn, 'base: not a diffusers pipeline, model_index.json is missing'),
    'no unet':               (lambda w: shutil.rmtree(w/'base/unet'), unlearn, "component 'unet' is missing"),
    'no tokenizer':          (lambda w: shutil.rmtree(w/'base/tokenizer'), unlearn, "component 'tokenizer' is missing"),
    'only pickled weights':  (pickled, unlearn, "component 'unet' has no .safetensors weights (pickled weights are refused)"),
    'weights truncated':     (lambda w: cut(next((w/'base/unet').glob('*.safetensors')), 1000), unlearn, 'base: cannot be loaded'),
    'channels differ':       (lambda w: edit(w/'base/unet/config.json', in_channels=3), unlearn, "in_channels is 3, expected the VAE's latent_channels, "),
    'widths differ':         (lambda w: edit(w/'base/unet/config.json', cross_attention_dim=7), unlearn, "cross_attention_dim is 7, expected the text encoder's hidden_size"),
    'weights of other size': (lambda w: edit(w/'base/unet/config.json', block_out_channels=[32, 64]), unlearn, 'base: cannot be loaded'),
    'model_index not JSON':  (lambda w: (w/'base/model_index.json').write_text('{'), unlearn, 'model_index.json: not JSON'),
    'model_index a list':    (lambda w: (w/'base/model_index.json').write_text('[]'), unlearn, 'model_index.json: expected a mapping'),
    'config.json not JSON':  (lambda w: (w/'base/vae/config.json').write_text('{'), unlearn, 'vae/config.json: not JSON'),
    'config.json a list':    (lambda w: (w/'base/vae/config.json').write_text('[1]'), unlearn, 'vae/config.json: expected a mapping'),
    # where to
    'out is a file':         (lambda w: (w/'out').write_text('mine'), unlearn, 'out: is a file, expected a folder'),
    'out is an input':       (None, lambda w: unlearn(w, out='base'), "is, or holds, the input"),
    'out holds an input':    (None, lambda w: unlearn(w, out=''), "is, or holds, the input"),
    'out is somebody\'s':    (lambda w: ((w/'out').mkdir(), (w/'out/thesis.txt').write_text('mine')), unlearn, 'is not empty and was not written by resalign'),
    'out below a file':      (lambda w: (w/'file').write_text('mine'), lambda w: unlearn(w, out='file/out'), 'file: is a file, expected a folder'),
    # prompts and detectors
    'prompts missing':       (lambda w: (w/'prompts.csv').unlink(), evaluate, 'prompts.csv: no such file'),
    'prompts nothing':       (lambda w: (w/'prompts.csv').write_text(''), evaluate, 'prompts.csv: not a CSV'),
    'prompts no column':     (lambda w: (w/'prompts.csv').write_text('text\na robot\n'), evaluate, "column 'prompt' is missing (found: text)"),
    'prompts no rows':       (lambda w: (w/'prompts.csv').write_text('prompt\n'), evaluate, 'no rows, expected at least one prompt'),
    'prompt empty':          (lambda w: (w/'prompts.csv').write_text('prompt,seed\na robot,1\n  ,2\n'), evaluate, 'row 2: prompt is empty'),
    'kind unknown':          (lambda w: (w/'prompts.csv').write_text('prompt,kind\na robot,explicitt\n'), evaluate, "row 1: kind: unknown 'explicitt', did you mean 'explicit'?"),
    'seed not whole':        (lambda w: (w/'prompts.csv').write_text('prompt,seed\na robot,one\n'), evaluate, "column 'seed' must hold whole numbers"),
    'seed a fraction':       (lambda w: (w/'prompts.csv').write_text('prompt,seed\na robot,1.5\n'), evaluate, "column 'seed' must hold whole numbers"),
    'detector unknown':      (None, lambda w: evaluate(w, '--detector', 'wirring'), "detector: unknown 'wirring', did you mean 'wiring'?"),
    'detectors missing':     (None, lambda w: evaluate(w, evaluators=w/'nowhere'), 'nowhere/card.json: no such file'),
    'sampling steps':        (None, lambda w: evaluate(w, '--set', 'steps=0'), 'steps: input should be greater than or equal to 1'),
    # numbers that run away
    'not finite, unlearn':   (None, lambda w: unlearn(w, '--method', 'ga', '--set', 'lr=1e30'), 'loss or gradient is not finite at run ga, step 1: lower the learning rate'),
    'not finite, finetune':  (None, lambda w: finetune(w, '--set', 'lr=1e30', '--set', 'steps=5'), 'loss or gradient is not finite at run finetune lora'),
    'not finite, pretrain':  (None, lambda w: pretrain(w, '--set', 'vae_lr=1e30', '--set', 'vae_steps=5'), 'loss or gradient is not finite at run vae'),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_input(name, work, call):
    "One line that says what is wrong, exit status 2, and nothing is written"
    spoil, line, words = BAD[name]
    if spoil: spoil(work)
    def state(): return {p: p.is_file() and p.stat().st_mtime_ns for p in work.rglob('*')}
    before, args = state(), line(work)
    status, _, err = call(*args)
    last = err.strip().splitlines()
    assert status == 2, err
    assert len(last) == 1 and last[0].startswith(f'resalign-{args[0]}: error: '), err
    assert words in last[0], last[0]
    after = state()
    assert after == before, f'left behind or changed: {sorted(set(after.items()) ^ set(before.items()))}'

def test_no_traceback_in_a_terminal(made):
    done = python('-c', START, 'unlearn', made/'nowhere', made/'unsafe', made/'retain', made/'out', '--method', 'ga', cwd=made)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('resalign-unlearn: error: ') and 'model_index.json is missing' in done.stderr

def test_unknown_option(call):
    status, _, err = call('unlearn', 'a', 'b', 'c', 'd', '--stepz', 3)
    assert status == 2 and err.splitlines()[-1] == 'resalign-unlearn: error: unrecognized arguments: --stepz 3'

def test_ctrl_c(work, call, monkeypatch):
    from resalign import jobs
    def stop(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(jobs, 'run_finetune', stop)
    status, _, err = call(*finetune(work))
    assert status == 130 and err.strip().splitlines() == ['resalign-finetune: interrupted']
    assert not [p for p in work.iterdir() if p.name == 'out' or '.tmp' in p.name]


# ------------------------------------------------------------------ a run that is killed

def test_killed_and_resumed(work, call):
    "SIGKILL after the first checkpoint; the run that goes on ends with the same bits"
    line = lambda out: ['unlearn', work/'base', work/'unsafe', work/'retain', work/out, '--method', 'ga', '--set', 'steps=108', '--set', 'retain_bank=16',
                        '--set', 'unsafe_batch=1', '--set', 'retain_batch=1']
    def checkpoint(): return [p for p in work.glob('a/.checkpoints/out*') if not p.name.endswith('.prev')]
    p = subprocess.Popen([sys.executable, '-c', START, *map(str, line('a/out'))], env=dict(os.environ, OMP_NUM_THREADS='1'),
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.time() + 240
        while not checkpoint() and p.poll() is None and time.time() < until: time.sleep(.005)
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode == -signal.SIGKILL and not (work/'a/out').exists(), 'was not killed in the middle'
    assert len(load_checkpoint(checkpoint()[0])[1]['log']) == 100
    for out in ('a/out', 'b/out'):
        status, _, err = call(*line(out))
        assert status == 0, err
    def files(f): return {p.relative_to(f): p.read_bytes() for p in f.rglob('*.safetensors')}
    assert len(files(work/'b/out')) >= 4 and files(work/'a/out') == files(work/'b/out')
    assert (work/'a/out/log.csv').read_text() == (work/'b/out/log.csv').read_text()
    assert not checkpoint(), 'a checkpoint is removed at the end'

def test_a_checkpoint_of_other_settings_is_not_taken(work, call, monkeypatch):
    "A killed run's checkpoint, then a run into the same folder that asks for something else"
    from resalign import training
    with monkeypatch.context() as m:
        m.setattr(training, 'clear_checkpoint', lambda path: None)
        assert call(*finetune(work, '--set', 'steps=1', '--set', 'lr=1e-2'))[0] == 0
    assert list(work.glob('.checkpoints/out*'))
    for out in ('out', 'fresh'): assert call('finetune', work/'base', work/'varied', work/out, '--set', 'steps=2', '--set', 'lr=1e-4')[0] == 0
    assert (work/'out/log.csv').read_text() == (work/'fresh/log.csv').read_text()
