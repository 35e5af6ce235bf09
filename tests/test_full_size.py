"""SD v1.4's size, for real: the commands, one after the other, on a pipeline of its layout with random weights.

By `make test-full` (FULL=FOLDER keeps what is made, 10 GB, and a second call resumes there); it takes some ten minutes of one
core, and writes results/tables/full_size.csv. In the gate the same layout is read in narrow."""
import json, os, subprocess, sys
from pathlib import Path

import pandas as pd, pytest, torch

from full_size import PIXELS, PROFILE, write_pipeline, write_profile
from resalign.model.compute import device_name
from resalign.model.pipelines import generate, load_pipeline
from resalign.real import doctor
from resalign.real.profiles import Profile

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 16. # GB: what the whole has to do with

MEASURE = r'''
import json, os, re, subprocess, sys, time
start, own, done = time.monotonic(), 0., 0
child = subprocess.Popen(sys.argv[2:])
while not done:
    time.sleep(.05)
    try: own = max(own, int(re.search(r'RssAnon:\s+(\d+)', open(f'/proc/{child.pid}/status').read())[1])*1024/1e9)
    except (OSError, TypeError): pass # it has ended
    done, status, used = os.wait4(child.pid, os.WNOHANG)
figures = dict(seconds=time.monotonic() - start, cpu_seconds=used.ru_utime + used.ru_stime,
               peak_gb=used.ru_maxrss*1024/1e9, own_gb=own)
json.dump(figures, open(sys.argv[1], 'w'))
sys.exit(os.waitstatus_to_exitcode(status))
''' # of a small process: a child's peak begins with that of its parent; own: without the files that it has mapped

CARD = "from resalign.measure.photographs import write_card; write_card('evaluators', ['nudenet'])"

PLAIN = '''
import json, torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

def weights(folder, name='diffusion_pytorch_model'): return safe_open(f'{folder}/unet/{name}.safetensors', 'pt')

base, ours = weights('base', 'diffusion_pytorch_model.fp16'), weights('out')
assert set(base.keys()) == set(ours.keys())
changed = [k for k in ours.keys() if not torch.equal(base.get_tensor(k), ours.get_tensor(k))]
assert changed and all(k.endswith(('to_q.weight', 'to_k.weight', 'to_v.weight', 'to_out.0.weight')) for k in changed), changed
one = StableDiffusionPipeline.from_single_file('out/out.safetensors', config='out', torch_dtype=torch.float16)
for k, v in one.unet.state_dict().items(): assert torch.equal(v, ours.get_tensor(k)), k
del one
pipe = StableDiffusionPipeline.from_pretrained('out', safety_checker=None)
pipe.set_progress_bar_config(disable=True)
prompts = ['a photo of a nude woman', 'a photo of a dog']
for k, image in enumerate(pipe(prompts, num_inference_steps=4, guidance_scale=7.5).images): image.save(f'drawn-{k}.png')
print(json.dumps(dict(changed=len(changed), size=image.size)))
'''

STEPS = { # what it is called: the command
    'make the pipeline': [sys.executable, ROOT/'tests/full_size.py', '.'],
    'doctor': ['resalign-doctor', 'full'],
    'NudeNet': [sys.executable, '-c', CARD],
    'unlearn --dry': ['resalign-unlearn', 'base', 'unsafe', 'retain', 'dry', '--pool', 'd1=d1', '--dry'],
    'unlearn, one outer step': ['resalign-unlearn', 'base', 'unsafe', 'retain', 'out', '--pool', 'd1=d1', '--single-file'],
    'load and draw in plain diffusers': [sys.executable, '-c', PLAIN],
    'fine-tune, one step': ['resalign-finetune', 'out', 'd1', 'tuned'],
    'draw and evaluate': ['resalign-evaluate', 'tuned', 'prompts.csv', 'evaluators', 'scores']}


def step(folder, name, words): # -> a row
    "Run a command, unless this folder has its figures"
    log = folder/'log'/name.replace(' ', '-')
    if not log.with_suffix('.row').exists():
        log.parent.mkdir(exist_ok=True)
        env = os.environ | dict(PYTHONPATH=str(ROOT), PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
        command = [sys.executable, '-c', MEASURE, log.with_suffix('.part'), *words]
        with open(log.with_suffix('.txt'), 'w') as f:
            done = subprocess.run(list(map(str, command)), cwd=folder, env=env, stdout=f, stderr=subprocess.STDOUT)
        assert done.returncode == 0, (name, log.with_suffix('.txt').read_text()[-3000:])
        log.with_suffix('.part').rename(log.with_suffix('.row'))
    return dict(step=name, **json.loads(log.with_suffix('.row').read_text()))


def recommended(): # -> the profile, with what the doctor proposes for it
    words = doctor.what_fits(Profile(**PROFILE), MEMORY)
    assert words.startswith('pool.algorithm: [lora] ('), words
    return doctor.with_switches(Profile(**PROFILE), ['pool.algorithm: [lora]'])


@pytest.mark.skipif('FULL' not in os.environ, reason='long: make test-full')
def test_every_command_at_full_size(tmp_path):
    folder, rows = Path(os.environ['FULL'] or tmp_path), []
    folder.mkdir(parents=True, exist_ok=True)
    assert doctor.device_memory()[1] > MEMORY
    lighter = recommended()
    for name, words in STEPS.items():
        rows.append(step(folder, name, words))
        if name == 'make the pipeline': write_profile(folder, dict(PROFILE, unlearn=lighter.unlearn))
    figures = doctor.memory_figures(lighter)
    unlearn, = (gb for what, gb in figures.items() if what.startswith('unlearn'))
    expected = {'unlearn --dry': unlearn, 'unlearn, one outer step': unlearn,
                'fine-tune, one step': figures['finetune.varied-lora, float32']}
    table = pd.DataFrame(rows).assign(device=device_name(torch.device('cpu')), threads=torch.get_num_threads())
    table.insert(5, 'expected_gb', table.step.map(expected))
    check_results(folder)
    print(table.to_string())
    assert table.peak_gb.max() < MEMORY
    table = table.round(dict(seconds=0, cpu_seconds=0, peak_gb=2, own_gb=2, expected_gb=2))
    table.to_csv(ROOT/'results/tables/full_size.csv', index=False)


def check_results(folder):
    "What the commands left"
    log = lambda name: (folder/'log'/f'{name}.txt').read_text()
    assert 'missing' not in log('doctor') and 'about' in log('unlearn---dry')
    said = json.loads(log('load-and-draw-in-plain-diffusers').splitlines()[-1])
    assert said == dict(changed=128, size=[PIXELS, PIXELS])
    for out in 'out', 'tuned':
        losses = pd.read_csv(folder/out/'log.csv')
        assert len(losses) == 1 and losses.loss.notna().all()
    scores = pd.read_csv(folder/'scores/scores.csv')
    assert list(scores.detector) == ['nudenet']*2 and scores.score.between(0, 1).all()
    page = (folder/'scores/report.html').read_text()
    assert 'nudenet' in page and 'a photo of a dog' in page


def test_the_files_of_2022_are_read(tmp_path):
    "Narrow: the VAE's and the text encoder's earlier names, position_ids, a vocabulary of 49,408 words in two files, fp16 alone"
    write_pipeline(tmp_path, narrow=True)
    pipe = load_pipeline(tmp_path)
    assert len(pipe.tokenizer) == 49408 and pipe.tokenizer.model_max_length == 77
    ids = pipe.tokenizer('a dog', padding='max_length').input_ids
    assert len(ids) == 77 and ids[0] == 49406 and set(ids[4:]) == {49407}
    images = generate(pipe, ['a dog', 'a cat'], [0, 1], 2, 7.5)
    assert images.shape == (2, 64, 64, 3) and images.std() > 10
