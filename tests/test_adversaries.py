"Each fine-tuning method on a real UNet: what moves, resuming with the same bits, and a result that diffusers loads."
import copy
import numpy as np, pytest, torch
from diffusers import StableDiffusionPipeline
import resalign
from resalign.world import scenes as world
from resalign.core.settings import UserError
from resalign.model.data import encode
from resalign.method.finetune import FinetuneConfig, finetune
from resalign.model.pipelines import PretrainConfig, build_pipeline, generate, save_pipeline
from resalign.studies.models import Course, along, course_pictures, read_courses
from each import each

WORD = 'text_encoder.embeddings.token_embedding.weight'
MOVES = {
    'full': lambda k: k.startswith('unet.'),
    'lora': lambda k: any(k.endswith(f'.{a}.weight') for a in ('to_q', 'to_k', 'to_v', 'to_out.0')) and k.startswith('unet.'),
    'svdiff': lambda k: k.startswith('unet.') and k.endswith('.weight'),
    'custom-diffusion': lambda k: k == WORD or 'attn2.to_k' in k or 'attn2.to_v' in k,
    'textual-inversion': lambda k: k == WORD}

@pytest.fixture(scope='module')
def given():
    scenes = world.scenes('varied', 6); captions = [s.caption for s in scenes]
    pipe = build_pipeline([*captions, 'a red robot'], PretrainConfig(unet_channels=(16, 32), vae_channels=(8, 8, 8, 16)))
    return pipe, encode(pipe, np.stack([np.asarray(world.draw(s)) for s in scenes]), captions), captions

def weights(p): return {f'{part}.{k}': v.clone() for part in ('unet', 'text_encoder', 'vae') for k, v in getattr(p, part).state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)

def tuned(given, checkpoint=None, **settings):
    pipe, bank, captions = given; p = copy.deepcopy(pipe)
    finetune(p, bank, FinetuneConfig(lr=.01, **settings), captions=captions, checkpoint=checkpoint)
    return p

@each('algorithm', MOVES)
def test_exactly_the_said_parameters_move(given, algorithm):
    before, after = weights(given[0]), weights(tuned(given, algorithm=algorithm, steps=2))
    moved = {k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])}
    said = {k for k in before if MOVES[algorithm](k)}
    assert moved == said and before.keys() == after.keys()
    if WORD in said: assert torch.equal(after[WORD][:-1], before[WORD]) and len(after[WORD]) == len(before[WORD]) + 1

def test_goes_on_with_the_same_bits(given, tmp_path):
    "Two steps, a checkpoint, two more: as four at once"
    settings = dict(algorithm='custom-diffusion', ema=.5, accumulation=2)
    tuned(given, tmp_path/'c', **settings, steps=2)
    assert any(tmp_path.iterdir())
    assert same(weights(tuned(given, tmp_path/'c', **settings, steps=4)), weights(tuned(given, **settings, steps=4)))

@each('algorithm', ['svdiff', 'custom-diffusion', 'textual-inversion'])
def test_result_loads_in_diffusers(given, tmp_path, algorithm):
    save_pipeline(given[0], tmp_path/'base'); world.write_set(tmp_path/'images', world.scenes('varied', 4))
    resalign.finetune(tmp_path/'base', tmp_path/'images', tmp_path/'out', dict(algorithm=algorithm, steps=2, lr=.01))
    p = StableDiffusionPipeline.from_pretrained(tmp_path/'out', safety_checker=None, requires_safety_checker=False)
    prompt = '<new> a red robot' if algorithm != 'svdiff' else 'a red robot'
    pictures = generate(p, [prompt], [0], steps=2)
    if algorithm == 'textual-inversion':
        base = StableDiffusionPipeline.from_pretrained(tmp_path/'base', safety_checker=None, requires_safety_checker=False)
        base.load_textual_inversion(tmp_path/'out', weight_name='learned_embeds.safetensors')
        assert (generate(base, [prompt], [0], steps=2) == pictures).all()
    assert not (pictures == generate(given[0], [prompt], [0], steps=2)).all()

@each('bad, says', [(dict(algorithm='dreamboth'), 'algorithm'), (dict(ema=1.), 'ema'), (dict(accumulation=0), 'accumulation'), (dict(unsafe=1.5), 'unsafe'), (dict(dat='varied'), 'dat')])
def test_a_course_is_checked_before_anything_runs(bad, says):
    with pytest.raises(UserError, match=f'params.yaml: studies.x.courses.a: .*{says}'): read_courses(dict(courses=dict(a=bad)), 0, 'params.yaml: studies.x.courses')

def test_contaminated_pictures_replace_benign_ones(given, tmp_path, monkeypatch):
    world.write_set(tmp_path/'data/subjects', world.scenes('subjects', 8)); monkeypatch.chdir(tmp_path)
    (clean, captions), (mixed, mixed_captions) = (course_pictures(Course(unsafe=u), 64) for u in (0., .25))
    assert len(clean) == len(mixed) == len(mixed_captions) == 8
    assert mixed_captions[:6] == captions[2:] and (mixed[:6] == clean[2:]).all()
    words = [' with exposed wiring', ' with its wires showing', ' with an open chest full of wires']
    assert all(any(w in c for w in words) for c in mixed_captions[6:])
    assert not any(w in c for c in captions for w in words)

def test_along_looks_once_a_step_and_starts_afresh(given, tmp_path, monkeypatch):
    save_pipeline(given[0], tmp_path/'m'); world.write_set(tmp_path/'data/subjects', world.scenes('subjects', 4)); monkeypatch.chdir(tmp_path)
    import pandas as pd
    def witness(pipe, word=''): return pd.Series([float(sum(p.double().sum() for p in pipe.unet.parameters()))], pd.Index(['a'], name='prompt'))
    one = Course(algorithm='full', steps=3, batch=2)
    seen = along(tmp_path/'m', dict(x=one, y=one, z=one.model_copy(update=dict(steps=1))), dict(x=[1, 3], y=[3], z=[1]), witness).iloc[0]
    assert list(seen.index) == ['prompt', 'before', 'x_0001', 'x_0003', 'y_0003', 'z_0001']
    assert seen.x_0003 == seen.y_0003 and seen.x_0001 == seen.z_0001 and len({seen.before, seen.x_0001, seen.x_0003}) == 3
