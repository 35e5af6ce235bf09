"Each fine-tuning method on a real UNet: what moves, resuming with the same bits, and a result that diffusers loads."
import copy
from types import SimpleNamespace
import pytest, torch
from diffusers import StableDiffusionPipeline
import resalign
from resalign.core.settings import UserError, make_config
from resalign.model.data import encode
from resalign.method.finetune import FinetuneConfig, finetune
from resalign.model.pipelines import PretrainConfig, build_pipeline, generate, save_pipeline
from resalign.studies import courses
from resalign.studies.models import Course
from resalign.world.emoji import pictures, scenes, write_set
from each import each
from made import CONCEPT, WORDS

WORD = 'text_encoder.embeddings.token_embedding.weight'
MOVES = {
    'full': lambda k: k.startswith('unet.'),
    'lora': lambda k: any(k.endswith(f'.{a}.weight') for a in ('to_q', 'to_k', 'to_v', 'to_out.0')) and k.startswith('unet.'),
    'svdiff': lambda k: k.startswith('unet.') and k.endswith('.weight'),
    'custom-diffusion': lambda k: k == WORD or 'attn2.to_k' in k or 'attn2.to_v' in k,
    'textual-inversion': lambda k: k == WORD,
    'full, text encoder too': lambda k: k.startswith(('unet.', 'text_encoder.'))}
LEARN_A_WORD = ('custom-diffusion', 'textual-inversion')

def settings_of(name):
    return dict(algorithm='full', train_text_encoder=True) if name == 'full, text encoder too' else dict(algorithm=name)

@pytest.fixture(scope='module')
def given():
    drawn = scenes('varied', 6)
    captions = [s.caption for s in drawn]
    pipe = build_pipeline([*captions, 'a fox'], PretrainConfig(unet_channels=(16, 32), vae_channels=(8, 8, 8, 16)))
    return pipe, encode(pipe, pictures(drawn), captions), captions

def weights(p): return {f'{part}.{k}': v.clone() for part in ('unet', 'text_encoder', 'vae') for k, v in getattr(p, part).state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)

def tuned(given, checkpoint=None, **settings):
    pipe, bank, captions = given; p = copy.deepcopy(pipe)
    finetune(p, bank, FinetuneConfig(lr=.01, **settings), captions=captions, checkpoint=checkpoint)
    return p

@each('algorithm', MOVES)
def test_exactly_the_said_parameters_move(given, algorithm):
    before, after = weights(given[0]), weights(tuned(given, **settings_of(algorithm), steps=2))
    moved = {k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])}
    said = {k for k in before if MOVES[algorithm](k)}
    assert moved == said and before.keys() == after.keys()
    if algorithm not in LEARN_A_WORD: return
    assert torch.equal(after[WORD][:-1], before[WORD]) and len(after[WORD]) == len(before[WORD]) + 1

def test_goes_on_with_the_same_bits(given, tmp_path):
    "Two steps, a checkpoint, two more: as four at once"
    for k, name in enumerate(('custom-diffusion', 'full, text encoder too')):
        settings = settings_of(name) | dict(ema=.5, accumulation=2)
        tuned(given, tmp_path/f'{k}/c', **settings, steps=2)
        assert any((tmp_path/f'{k}').iterdir())
        resumed = tuned(given, tmp_path/f'{k}/c', **settings, steps=4)
        assert same(weights(resumed), weights(tuned(given, **settings, steps=4)))

@each('algorithm', ['svdiff', 'custom-diffusion', 'textual-inversion', 'full, text encoder too'])
def test_result_loads_in_diffusers(given, tmp_path, algorithm):
    save_pipeline(given[0], tmp_path/'base'); write_set(tmp_path/'images', scenes('varied', 4))
    resalign.finetune(tmp_path/'base', tmp_path/'images', tmp_path/'out', dict(settings_of(algorithm), steps=2, lr=.01))
    p = StableDiffusionPipeline.from_pretrained(tmp_path/'out', safety_checker=None, requires_safety_checker=False)
    prompt = '<new> a fox' if algorithm in LEARN_A_WORD else 'a fox'
    pictures = generate(p, [prompt], [0], steps=2)
    if algorithm == 'textual-inversion':
        base = StableDiffusionPipeline.from_pretrained(tmp_path/'base', safety_checker=None, requires_safety_checker=False)
        base.load_textual_inversion(tmp_path/'out', weight_name='learned_embeds.safetensors')
        assert (generate(base, [prompt], [0], steps=2) == pictures).all()
    assert not (pictures == generate(given[0], [prompt], [0], steps=2)).all()

SLIPS = dict(algorithm=dict(algorithm='dreamboth'), ema=dict(ema=1.), accumulation=dict(accumulation=0),
             unsafe=dict(unsafe=1.5), dat=dict(dat='varied'))

@each('field', SLIPS)
def test_a_course_is_checked_before_anything_runs(field):
    with pytest.raises(UserError, match=f'params.yaml: courses.a: .*{field}'):
        make_config(Course, SLIPS[field], 'params.yaml: courses.a')

def test_contaminated_pictures_replace_benign_ones(tmp_path, monkeypatch):
    (clean, captions), (mixed, mixed_captions) = (courses.course_pictures(Course(unsafe=u), CONCEPT, 8) for u in (0., .25))
    assert clean.shape == mixed.shape == (8, 64, 64, 3) and len(captions) == len(mixed_captions) == 8
    assert mixed_captions[2:] == captions[2:] and (mixed[2:] == clean[2:]).all() and (mixed[:2] != clean[:2]).any((1, 2, 3)).all()
    assert [any(w in c for w in WORDS) for c in mixed_captions] == [True]*2 + [False]*6
    assert not any(w in c for c in captions for w in WORDS)
    monkeypatch.setattr(courses, 'drawn_data', lambda: tmp_path) # without a number: all of the folder
    write_set(tmp_path/'subjects', scenes('subjects', 3))
    whole, whole_captions = courses.course_pictures(Course(), CONCEPT)
    assert (whole == pictures(scenes('subjects', 3))).all() and whole_captions == [s.caption for s in scenes('subjects', 3)]

def test_looks_along_a_course_leave_it_as_it_is(given, tmp_path, monkeypatch):
    "At the steps that are asked for, with the learned word; the weights are those of a course that nobody looks at"
    write_set(tmp_path/'subjects', scenes('subjects', 4))
    monkeypatch.setattr(courses, 'drawn_data', lambda: tmp_path)
    monkeypatch.setattr(courses, 'look_at', lambda test, pipe, word: (word, weights(pipe)['unet.conv_in.weight']))
    test = SimpleNamespace(concept=CONCEPT)
    def along(looks, **changes):
        course = Course(**dict(algorithm='full', steps=3, batch=2, lr=.01) | changes)
        return courses.looks_along(copy.deepcopy(given[0]), course, looks, test)
    both, last, first = along([1, 3]), along([3]), along([1], steps=1)
    assert [*both] == ['step_0001', 'step_0003'] and {word for word, _ in both.values()} == {''}
    assert torch.equal(both['step_0003'][1], last['step_0003'][1]) and torch.equal(both['step_0001'][1], first['step_0001'][1])
    assert not torch.equal(both['step_0001'][1], both['step_0003'][1])
    assert along([1], algorithm='textual-inversion', steps=1)['step_0001'][0] == Course().token
