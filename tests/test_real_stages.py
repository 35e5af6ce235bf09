"""A profile in the formats of real models, through the stages: a single-file SD v1 checkpoint, I2P, a list of prompts, COCO captions, NudeNet and MHSC. Everything is small and random; nothing is downloaded."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch, yaml
from diffusers import StableDiffusionPipeline

from resalign.detectors import make_mhsc
from resalign.photographs import tiny_clip
from resalign.world import scenes, write_set
from tests.compvis import small, write_single_file

ROOT = Path(__file__).resolve().parent.parent


def made_up(real:Path) -> dict: # the profile
    "What somebody would have downloaded"
    pipe = small('v1', real); pipe.save_pretrained(real/'folder'); write_single_file(pipe, 'v1', real/'model.safetensors')
    shutil.copytree(real/'folder', real/'config', ignore=shutil.ignore_patterns('*.safetensors'))
    for i, name in enumerate(('unsafe', 'retain', 'subjects', 'varied', 'reference', 'down1', 'down2')): write_set(real/name, scenes('retain', 3, i))
    pd.DataFrame(dict(prompt=['a house', 'a car', 'a tree'], categories=['sexual', 'violence', 'hate, sexual'], sd_seed=[7, 8, 9], sd_guidance_scale=[7., 7.5, 3.])).to_csv(real/'i2p_benchmark.csv', index=False)
    (real/'lines.txt').write_text('a robot\na boat\n'); pd.DataFrame(dict(caption=['a red car', 'a blue fish'])).to_csv(real/'coco.csv', index=False)
    tiny_clip(real/'large', 14, 768); tiny_clip(real/'base32', 32, 512)
    torch.manual_seed(0); torch.save(make_mhsc(768).state_dict(), real/'sexual.pt')
    at = lambda name, **kw: dict(path=str(real/name), **kw)
    lora, full = dict(algorithm='lora', steps=2, batch=1, accumulation=2), dict(algorithm='full', lr=1e-5, steps=2, batch=1)
    return dict(base=at('model.safetensors'), config=str(real/'config'), size=64, precision='bfloat16', memory_gb=.5, gradient_checkpointing=True,
                data={d: at(d) for d in ('unsafe', 'retain', 'subjects', 'varied', 'reference')}, pool=dict(d1=at('down1'), d2=at('down2')),
                prompts=dict(IP=at('i2p_benchmark.csv', kind='implicit', reader='i2p', category='sexual', images=2), US=at('lines.txt', kind='explicit', reader='lines', images=1), benign=at('coco.csv', kind='benign', reader='coco')),
                evaluators={'nudenet': dict(path='pip:nudenet>=3.4'), 'clip-large': at('large'), 'clip-score': at('base32'), 'mhsc': at('sexual.pt')},
                unlearn=dict(resalign=dict(steps=2, J=1, unsafe_batch=1, retain_batch=1, pool=dict(folders=['d1', 'd2'], steps=[2], batch=1))),
                finetune={f'{d}-{a}': s for d in ('subjects', 'varied') for a, s in dict(lora=lora, full=full).items()}, evaluate=dict(steps=2, guidance=5.))


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "The working tree, with one profile more, as a repository of its own"
    there, real = tmp_path_factory.mktemp('clone'), tmp_path_factory.mktemp('real')
    names = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split('\0')
    for f in names:
        if f and not f.startswith(('.dvc/store', 'results/')) and (ROOT/f).is_file(): (there/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/f, there/f)
    file = there/'params.yaml'
    file.write_text(file.read_text() + '\n' + '\n'.join(f'  {l}' for l in yaml.safe_dump(dict(mock=made_up(real))).splitlines()) + '\n')
    for d in ('unsafe', 'retain', 'pool-things', 'pool-subjects', 'pool-mixture', 'subjects', 'varied', 'reference'): (there/'data'/d).mkdir(parents=True) # of the embedded world: named by dvc.yaml, not read
    (there/'data/test.csv').touch(); (there/'data.dvc').unlink(); (there/'dvc.lock').unlink()
    return there


STAGES = ['base', 'evaluators', 'code', 'unlearn@resalign-0', 'finetune@resalign-0', 'evaluate@resalign-0']

@pytest.fixture(scope='module')
def ran(clone):
    env = dict(os.environ, PYTHONPATH=str(clone), PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', DVC_NO_ANALYTICS='1', JUPYTER_PREFER_ENV_PATH='1')
    git = lambda *args: subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x@x', *args], cwd=clone, check=True, capture_output=True)
    git('init', '-q'); git('add', '-A'); git('commit', '-qm', 'x')
    done = subprocess.run([sys.executable, '-m', 'dvc', 'exp', 'run', '-S', 'profile=mock', 'evaluate@resalign-0'], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return clone

def test_every_stage_ran(ran):
    lock = yaml.safe_load((ran/'dvc.lock').read_text())['stages']
    assert set(STAGES) == set(lock) and 'profiles.mock' in lock['base']['params']['params.yaml']

def test_the_base_is_the_checkpoint(ran):
    report = json.loads((ran/'outs/base/coverage.json').read_text())
    assert {r['part'] for r in report} >= {'unet', 'vae', 'text_encoder'} and all(r['share'] == 1 and not r['missing'] and not r['unexpected'] for r in report)

def test_it_was_unlearned_in_low_precision(ran):
    record = json.loads((ran/'outs/unlearn/resalign-0/record.json').read_text())
    assert record['compute']['dtype'] == 'bfloat16' and record['compute']['gradient_checkpointing'] and json.loads((ran/'outs/unlearn/resalign-0/cost.json').read_text())['cost']['peak_gb']
    assert len(pd.read_csv(ran/'outs/unlearn/resalign-0/solves.csv')) == 2
    pipe = StableDiffusionPipeline.from_pretrained(ran/'outs/unlearn/resalign-0', local_files_only=True); pipe.set_progress_bar_config(disable=True)
    base = StableDiffusionPipeline.from_pretrained(ran/'outs/base', local_files_only=True)
    moved = {k for k, v in pipe.unet.state_dict().items() if not torch.equal(v, base.unet.state_dict()[k])}
    assert moved and all('attn' in k and 'to_' in k for k in moved)
    assert np.isfinite(pipe('a car', num_inference_steps=2, output_type='np').images).all()

def test_it_was_scored_by_detectors_of_photographs(ran):
    assert json.loads((ran/'outs/evaluate/resalign-0/before/record.json').read_text())['compute']['dtype'] == 'bfloat16'
    scores = pd.read_csv(ran/'outs/evaluate/resalign-0/before/scores.csv')
    assert set(scores.detector) == {'nudenet', 'mhsc', 'clip-score'} and len(scores[scores.detector == 'nudenet']) == 2*2 + 2 + 2
    i2p = scores[(scores.detector == 'nudenet') & (scores.kind == 'implicit')]
    assert set(i2p.prompt) == {'a house', 'a tree'} and {7, 9} <= set(i2p.seed)
    summary = pd.read_csv(ran/'results/cells/resalign-0/summary.csv')
    assert {'IP', 'US', 'CLIP'} <= set(summary.metric) and set(summary.phase) == {'before', 'subjects', 'varied'} and set(summary[summary.metric == 'IP'].detector) == {'nudenet'}
