"What studies' cells ask for and hand on: split, concept, settings, seeds, phases, folders. Nothing is trained here."
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, yaml

from resalign.method.finetune import FinetuneConfig
from resalign.studies import attack, courses, fronts, hypergradients, phenomenon, remedies, table, tuning
from resalign.studies import models as M
from resalign.world.emoji import SIZES, scenes

ROOT = Path(__file__).resolve().parents[2]
PARAMS = yaml.safe_load((ROOT/'params.yaml').read_text())


# ------------------------------------------------------------------ what is asked for

TUNING, REPORTED = ('validation', 'weapon'), ('test', 'vice') # no choice may see what is reported
WANTED = {tuning: TUNING, phenomenon: REPORTED, table: REPORTED, fronts: REPORTED, courses: REPORTED}


def test_choices_see_the_tuning_concept_alone():
    asked = {(study.__name__, name): ((c['look']['split'], c['concept']), want)
             for study, want in WANTED.items() for name, c in study.cells().items()}
    asked |= {('remedies', name): ((c['look']['split'], c['concept']),
                                   REPORTED if name.startswith('reported-') else TUNING)
              for name, c in remedies.cells().items()}
    asked |= {('unlearning', name): ((c['look']['split'], c['concept']), TUNING)
              for name, c in hypergradients.unlearning_cells().items()}
    kinds = {kind.rpartition('.')[2] for kind, _ in asked}
    assert len(asked) > 500 and kinds >= {'tuning', 'table', 'remedies', 'unlearning'}
    assert not {key: got for key, (got, want) in asked.items() if got != want}
    assert {c['concept'] for c in hypergradients.cells().values()} == {'weapon'}
    assert {c['concept'] for c in attack.cells().values()} == {'vice'}


def test_what_is_tried_wins_over_the_start():
    for name, c in tuning.cells().items():
        changes = PARAMS['methods'][c['method']]['trials'][c['trial']]
        assert all(c['settings'][k] == v for k, v in changes.items()), name
    found, asked = remedies.variants(), PARAMS['remedies']
    changes = {name: own for group in ('variants', 'encoded', 'alone') for name, own in asked[group].items()}
    for name, own in changes.items():
        assert all(found[name]['settings'][k] == v for k, v in own.items()), name
    for variant, own in PARAMS['hypergradients']['unlearning']['variants'].items():
        cells = [c for c in hypergradients.unlearning_cells().values() if c['variant'] == variant]
        assert cells and all(c['settings'][k] == v for c in cells for k, v in own.items()), variant


def test_a_trial_counts_by_its_worst_fine_tuning():
    rows = [dict(method=m, trial=k, changes='{}', phase=phase, explicit=u, implicit=u, objects=.9, subject_kept=.9)
            for m, k, rates in (('original', 0, (.9, .9, .9)), ('ga', 0, (0, .1, .9)), ('ga', 1, (0, .5, .5)))
            for phase, u in zip(('before', 'varied-lora', 'subjects-full'), rates)]
    best = tuning.best_trials(pd.DataFrame(rows)).loc['ga']
    assert (best.trial, best.after) == (1, .5)


# ------------------------------------------------------------------ what models are made of

def test_a_fine_tuning_gets_its_seed_and_its_start(monkeypatch):
    "Further fine-tunings have seeds of their own; a separate module is merged after a fine-tuning of the base"
    asked = []
    monkeypatch.setattr(M, 'finetune', lambda *args, **kw: asked.append((args, kw)))
    monkeypatch.setattr(M.Unlearned, 'made', lambda self: Path('start'))
    monkeypatch.setattr(M, 'pictures_of', lambda name: Path(name))
    monkeypatch.setattr(M.sources, 'compute_settings', lambda **kw: {})
    for method, name in (('ga', 'varied-lora'), ('ga', 'varied-lora@2'), ('modular-lora', 'varied-lora')):
        M.Finetuned(M.Unlearned(method, 7, {}, 'vice'), name, dict(steps=3)).make(Path('out'))
    (a, plain), (_, again), (c, apart) = asked
    assert a == (Path('start'), Path('varied'), Path('out'), dict(steps=3)) and c[0] == M.BASE
    assert (plain['seed'], again['seed'], apart['seed']) == (7, 2007, 7)
    assert (plain['module'], apart['module']) == (None, Path('start/adapter'))


def test_the_data_of_a_method_and_a_fine_tuning_s_share(monkeypatch):
    monkeypatch.setattr(M, 'drawn_data', lambda: Path('data'))
    found = M.given('vice')
    assert (found['unsafe'].name, found['benign'].name) == ('unsafe-vice', 'retain')
    asked = dict(benign={}, contaminated=dict(unsafe=.1, steps=4))
    made = hypergradients.downstream_models('ga', 3, {}, 'vice', asked)
    assert [(m.share, m.settings) for m in (made['benign'], made['contaminated'])] == [(0, {}), (.1, dict(steps=4))]


def test_a_look_has_a_key_of_its_own(monkeypatch):
    "Whatever it asks for changes what is kept"
    monkeypatch.setattr(M, 'look_inputs', lambda look: {})
    look = dict(concept='vice', split='test', prompts=dict(explicit=3), subjects=2, steps=10, guidance=3.)
    changes = dict(prompts=dict(explicit=4)), dict(subjects=3), dict(steps=9), dict(guidance=2.)
    assert len({M.look_key(SimpleNamespace(key='a'), look | own) for own in ({}, *changes)}) == 5


# ------------------------------------------------------------------ what is looked at

class Toy:
    "An evaluator that remembers what it saw"
    def __init__(self, score): self.score, self.saw = score, []
    def __call__(self, images, prompts=None): return np.full(len(images), self.score)
    def read(self, images): return dict(subject=['fox']*len(images), object=['']*len(images))
    def features(self, images): return self.remember(images)
    def embed(self, images, prompts): return self.remember(images), None
    def remember(self, images):
        self.saw.append(images[:, 0, 0, 0].tolist())
        return np.stack([images[:, 0, 0, 0], self.score*np.arange(len(images))], 1).astype(float)


KINDS = 'explicit', 'implicit', 'benign'
ROWS = [dict(prompt=f'{kind} {k}', kind=kind, seed=k, subject='fox', object='') for kind in KINDS for k in range(3)]


def marked(numbers):
    "Pictures that can be told by their number"
    return np.array(numbers, np.uint8)[:, None, None, None] + np.zeros((len(numbers), 2, 2, 3), np.uint8)


@pytest.fixture
def looking(monkeypatch):
    "`PictureTest` without a model: the picture of row k is k, that of a real scene 100 + k"
    scores = {'detector-vice': .9, 'safety-vice': .1, 'clip-score': .3, 'aesthetics': 5., 'reader': .8}
    seen, toys = {}, {name: Toy(score) for name, score in scores.items()}
    def read_prompts(path): return seen.setdefault('prompts', path) and ROWS
    def read_images(folder):
        seen['reference'] = folder
        return marked(range(100, 104)), ['a']*4
    def generate(pipe, prompts, seeds, **kw):
        seen['sampling'] = kw
        return marked(range(len(prompts)))
    stubs = dict(drawn_data=lambda: Path('data'), load_trained=lambda folder: toys, read_prompts=read_prompts,
                 read_images=read_images, generate=generate, subject_rows=lambda n: [],
                 kid=lambda real, fake: M.Stat(real.sum(), 0, 0, 1),
                 cmmd=lambda real, fake: M.Stat(fake.sum(), 0, 0, 1))
    for name, stub in stubs.items(): monkeypatch.setattr(M, name, stub)
    return seen, toys


def test_a_look_draws_and_compares_what_it_says(looking):
    seen, toys = looking
    test = M.PictureTest('vice', 'validation', dict(explicit=2, implicit=2, benign=3), steps=7, guidance=2., bf16=True)
    _, scores, summary = test('a pipeline')
    assert seen == dict(prompts=Path('data/validation-vice.csv'), reference=Path('data/reference'),
                        sampling=dict(steps=7, guidance=2., bf16=True))
    benign = [4., 5., 6.] # rows of the seven
    assert toys['reader'].saw == toys['clip-score'].saw == [[100, 101, 102, 103], benign]
    value = summary.set_index('metric').value
    assert value['KID'] == sum(range(100, 104)) + .8*6 and value['CMMD'] == pytest.approx(sum(benign) + .3*3)
    unsafe = scores[(scores.detector == 'drawn') & (scores.kind != 'benign')].score
    assert set(unsafe) == {float(M.DRAWN.index('the concept'))} # as the concept's detector says


def test_an_attacker_has_test_prompts_and_the_original(looking, monkeypatch):
    seen, _ = looking
    monkeypatch.setattr(attack, 'drawn_data', lambda: Path('data'))
    monkeypatch.setattr(attack, 'read_images', lambda folder: folder)
    monkeypatch.setattr(attack, 'load_pipeline', lambda folder: folder)
    monkeypatch.setattr(attack, 'Attacked', lambda pipe, given: (pipe, given))
    pipe, given = attack.attacked('mine', 'vice', dict(prompts=2, settings={}))
    assert (pipe, given.original, given.unsafe) == ('mine', attack.BASE, Path('data/unsafe-vice'))
    assert seen['prompts'] == Path('data/test-vice.csv')
    assert [r['kind'] for r in given.rows] == ['explicit']*2 + ['implicit']*2


def test_an_attack_counts_each_prompt_s_best_picture(monkeypatch):
    x = SimpleNamespace(given=SimpleNamespace(rows=ROWS[:2], prompts=['a', 'b']))
    monkeypatch.setattr(attack, 'attacked', lambda *args: x)
    see = lambda images, prompts: np.array(images)
    two_sets = lambda x: SimpleNamespace(sets=[[.2, .9], [.6, .1]])
    monkeypatch.setattr(attack, 'load_trained', lambda folder: {'detector-vice': see})
    monkeypatch.setattr(attack, 'ATTACKS', dict.fromkeys(['none', 'noise', 'redraw'], two_sets))
    found = attack.attack_scores('pipe', 'vice', dict(attacks=['noise']))
    assert list(found.attack) == ['none']*2 + ['noise']*2 + ['redraw']*2 and list(found.score) == [.6, .9]*3


# ------------------------------------------------------------------ runs

@pytest.fixture
def handed(monkeypatch):
    "What `run` functions hand on; a model is its phase"
    notes = {}
    stubs = dict(load_pipeline=lambda f: f, drawn_data=lambda: Path('data'), read_look=lambda found: found,
                 looked=lambda model, look: (model.made(), look),
                 write_csv=lambda path, table, **kw: notes.update({path.name: table}),
                 write_cell=lambda folder, found: notes.update(cell=found))
    for study in (attack, remedies, courses, hypergradients):
        for name in stubs.keys() & vars(study).keys(): monkeypatch.setattr(study, name, stubs[name])
    monkeypatch.setattr(M.Unlearned, 'made', lambda self: 'before')
    monkeypatch.setattr(M.Finetuned, 'made', lambda self: self.name)
    return notes


def test_every_phase_is_attacked_on_its_own_model(handed, monkeypatch):
    score = lambda pipe, concept, numbers: pd.DataFrame(dict(model=[pipe], concept=[concept]))
    for study in (attack, remedies): monkeypatch.setattr(study, 'attack_scores', score)
    own = dict(method='ga', seed=1, settings={}, concept='vice')
    for phase in ('before', 'varied-lora'):
        attack.run(Path(), study='attack', finetunings={'varied-lora': {}}, phase=phase, numbers={}, **own)
        assert list(handed['scores.csv'].model) == [phase]
    remedies.run(Path(), look={}, attack=dict(phases=['before', 'varied-lora']), finetunings={'varied-lora': {}},
                 mixed=dict(share_005=dict(settings={}, share=.05)), **own)
    found = handed['attack.csv']
    assert list(found.model) == list(found.phase) == ['before', 'varied-lora'] and set(found.concept) == {'vice'}
    looked = {phase: made for phase, (made, _) in handed['cell'].items()}
    assert looked == {phase: phase for phase in ('before', 'varied-lora', 'share_005')}
    monkeypatch.setattr(attack, 'curvature', lambda pipe, unsafe, **kw: dict(unsafe=unsafe.name, pipe=pipe, **kw))
    attack.run(Path(), study='landscape', finetunings={}, phase='before', numbers=dict(pairs=2, probes=3), **own)
    assert handed['curvature.csv'].to_dict('records') == [dict(unsafe='unsafe-vice', pipe='before', pairs=2, probes=3)]


def test_a_course_has_the_seed_of_its_cell(handed, monkeypatch):
    monkeypatch.setattr(courses, 'PictureTest', lambda **look: look)
    monkeypatch.setattr(courses, 'looks_along', lambda *args: dict(step_0003=args))
    asked = dict(finetuning=dict(steps=3, data='varied'), looks=[3], pictures=9, look=dict(prompts={}))
    courses.run(Path(), 'ga', 5, {}, 'vice', study='contamination', course='share', **asked)
    pipe, course, looks, test, n = handed['cell']['step_0003']
    assert (pipe, course.seed, course.steps, course.data, looks, n) == ('before', 5, 3, 'varied', [3], 9)
    assert test['concept'] == 'vice' and handed['cell']['before'][0] == 'before'


def test_slopes_are_of_the_cell_s_seed_and_place(handed, monkeypatch):
    asked = {}
    monkeypatch.setattr(hypergradients, 'load_bank', lambda pipe, folder, n: (folder.name, n))
    def outer_state(pipe, banks, settings, seed, steps):
        asked.update(banks=banks, seed=seed, steps=steps)
        return SimpleNamespace(config=SimpleNamespace(lr=.5))
    monkeypatch.setattr(hypergradients, 'outer_state', outer_state)
    monkeypatch.setattr(hypergradients, 'end_loss', lambda state, ft: SimpleNamespace(ft=ft))
    columns = 'length direction method predicted measured error gamma'.split()
    monkeypatch.setattr(hypergradients, 'slope_rows', lambda f, lr, *args: [dict.fromkeys(columns, f.ft.seed + lr)])
    finetunings = dict(sgd=dict(optimizer='sgd', lr=.1))
    hypergradients.run_slopes(Path(), 'late', 40, 3, 'weapon', {}, 8, [1.], 1, 1, finetunings)
    assert (asked['seed'], asked['steps']) == (3, 40)
    assert asked['banks']['unsafe'] == ('unsafe-weapon', 8) and asked['banks']['retain'] == ('retain', 8)
    row, = handed['slopes.csv'].to_dict('records')
    assert (row['error'], row['seed'], row['where'], row['optimizer']) == (3.5, 3, 'late', 'sgd')


def test_the_end_of_a_slope_is_fine_tuned_on_the_pool(monkeypatch):
    monkeypatch.setattr(hypergradients, 'FinetuneLoss', lambda model, bank, ft, seeds, prior: (bank, prior))
    data = SimpleNamespace(pool={hypergradients.POOL_FOLDER: 'pool'}, unsafe='unsafe', retain='retain')
    parts = dict(harmful=SimpleNamespace(draw=lambda n, gen: n), config=SimpleNamespace(unsafe_batch=4))
    state = SimpleNamespace(model='m', data=data, params=[], adapter={}, **parts)
    assert hypergradients.end_loss(state, FinetuneConfig()).loss == ('pool', 'retain')


# ------------------------------------------------------------------ what is counted

def test_rates_of_hypergradients_are_means_of_explicit_and_implicit(monkeypatch):
    values = dict(explicit=.2, IP=.4, US=.9, objects=.7)
    rows = [dict(cell=f'c{k}', phase='benign', metric=m, value=v) for k in range(2) for m, v in values.items()]
    monkeypatch.setattr(hypergradients, 'read_part', lambda grid, name: pd.DataFrame(rows))
    found = hypergradients.unsafe_rates({f'c{k}': dict(variant='adjoint') for k in range(2)})
    assert found.value.tolist() == pytest.approx([.3]) and found.objects.tolist() == pytest.approx([.7])


def test_an_aim_is_held_against_the_original():
    values = dict(original=.8, variant=.75)
    rows = [dict(variant=v, seed='all', phase=p, metric=m, value=value if m in ('objects', 'plasticity') else 0.)
            for v, value in values.items() for p, m, _ in remedies.AIMS]
    found = remedies.against_aims(pd.DataFrame(rows)).query("variant == 'variant'").set_index('metric')
    objects, plasticity = found.loc['objects'], found.loc['plasticity']
    assert objects.value == pytest.approx(.9375) and objects.reached # .75 would not reach .9
    assert plasticity.value == pytest.approx(-.05) and plasticity.reached


def test_attacks_on_remedies_are_counted_model_by_model(monkeypatch):
    about = dict(detector='detector-vice', kind='implicit', seed=0, phase='before')
    def scores(rate): # under no attack all is unsafe
        return pd.DataFrame([dict(about, prompt=f'p{k}', attack=attack, score=float(k < 10*r))
                             for attack, r in (('none', 1), ('prefix', rate)) for k in range(10)])
    monkeypatch.setattr(remedies, 'read_files', lambda study, grid, file: {'a': scores(.2), 'b': scores(.6)})
    grid = {name: dict(variant='plain', seed=seed) for name, seed in (('a', 4), ('b', 9))}
    found = remedies.attack_rows(grid, 'vice')
    assert set(found.phase) == {'before, prefix'} and set(found.seed) == {4, 9, 'all'}
    whole = found[(found.seed == 'all') & (found.metric == 'IP')].iloc[0]
    assert whole.value == pytest.approx(.4) and whole.n == 2


def test_a_front_s_points_have_worst_fine_tunings_of_their_own(monkeypatch):
    rates = {('weak', 'a'): .9, ('weak', 'b'): .1, ('strong', 'a'): .0, ('strong', 'b'): .3}
    about = dict(method='ga', run=0, prompt='x')
    pictures = pd.DataFrame([dict(about, setting=s, phase=p, value=v) for (s, p), v in rates.items()])
    monkeypatch.setattr(fronts, 'gather', lambda *args: (None, None))
    monkeypatch.setattr(fronts, 'unsafe_pictures', lambda *args: pictures)
    saved = {}
    monkeypatch.setattr(fronts, 'front_table', lambda summary, after: after)
    monkeypatch.setattr(fronts, 'at_equal_cost', lambda rows: rows)
    monkeypatch.setattr(fronts, 'front_tests', lambda best, after: after)
    monkeypatch.setattr(fronts, 'save_table', lambda t, name: saved.update({name: t}))
    fronts.write_fronts({})
    assert dict(saved['fronts'].set_index('setting').phase) == dict(weak='a', strong='b')


def test_each_study_s_table_is_of_its_own_cells_of_whole_seeds(monkeypatch, tmp_path):
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path))
    for module, folder in ((fronts, 'fronts'), (courses, 'courses')):
        grid = {f'{study}-{m}-{s}': dict(study=study, method=m, seed=s)
                for study in module.STUDIES for m in ('ga', 'uce') for s in (0, 1)}
        monkeypatch.setattr(module, 'cells', lambda grid=grid: grid)
        for name in grid:
            if not name.endswith('uce-1'): (tmp_path/'runs'/folder/name).mkdir(parents=True)
        for study in module.STUDIES:
            assert list(module.whole_seeds(study)) == [f'{study}-ga-0', f'{study}-uce-0']


# ------------------------------------------------------------------ courses

def test_the_pictures_of_a_course(monkeypatch):
    "Unsafe ones are new for each seed; those for prior preservation are others than it trains on"
    monkeypatch.setattr(courses, 'drawn', lambda chosen: chosen)
    def pictures(seed): return courses.course_pictures(M.Course(unsafe=.5, seed=seed), 'vice', 20)[0]
    def unsafe(seed): return scenes('unsafe-vice', 20, M.UNSAFE_SEED + seed)
    for seed in (0, 1): assert [s in unsafe(seed) for s in pictures(seed)] == [True]*10 + [False]*10
    assert set(map(str, pictures(0))).isdisjoint(map(str, pictures(1)))
    monkeypatch.setattr(courses, 'drawn_data', lambda: Path('data'))
    monkeypatch.setattr(courses, 'load_bank', lambda pipe, folder: folder)
    assert courses.prior_bank('pipe', M.Course(data='subjects', prior_weight=1.)) == Path('data/varied')
    assert courses.prior_bank('pipe', M.Course(data='subjects')) is None


def test_a_learned_word_stands_before_each_prompt(monkeypatch):
    seen = {}
    monkeypatch.setattr(courses, 'generate', lambda pipe, prompts, seeds, **kw: seen.update(prompts=prompts, kw=kw))
    for name in ('scores_of', 'one_model'): monkeypatch.setattr(courses, name, lambda *args: pd.DataFrame())
    test = SimpleNamespace(rows=ROWS[:2], sampling=dict(steps=4), evaluators={}, concept='vice',
                           distances=lambda images: pd.DataFrame())
    for word, want in (('<new>', ['<new> explicit 0', '<new> explicit 1']), ('', ['explicit 0', 'explicit 1'])):
        courses.look_at(test, 'pipe', word)
        assert seen == dict(prompts=want, kw=dict(steps=4))


def test_the_steps_of_a_course(monkeypatch):
    rows = pd.DataFrame([dict(method='ga', course='slow', phase=p, seed=0, metric='IP', value=0., low=0., high=1., n=1)
                         for p in ('before', 'step_0025', 'step_0300')])
    monkeypatch.setattr(courses, 'gather', lambda *args: (rows, None))
    monkeypatch.setattr(courses, 'over_models', lambda *args: rows[:0])
    assert list(courses.course_table({}).step) == [0, 25, 300]


# ------------------------------------------------------------------ held out

def test_pictures_that_no_training_set_has():
    "Those of courses, mixtures and looks at named subjects"
    written = {str(s) for i, (name, n) in enumerate(SIZES.items()) for s in scenes(name, n, seed=100 + i)}
    new = scenes('subjects', 24, M.SUBJECT_SEED)
    for seed in range(3): new = new + scenes('unsafe-vice', 120, M.UNSAFE_SEED + seed)
    assert len(written) > 500 and written.isdisjoint(map(str, new))
