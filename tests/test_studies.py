"""Studies: rules on made-up rows, what is asked for, and that all of it could run."""
import pandas as pd, pytest

from resalign.baselines.methods import config_of
from resalign.core.settings import UserError, make_config
from resalign.real import profiles
from resalign.studies import attack, courses, fronts, models, phenomenon, table, tuning
from resalign.studies.models import Course
from resalign.use.attacks import AttackConfig


# ------------------------------------------------------------------ rules on made-up rows

def trials(**methods): # method -> (before, after, objects, perhaps the share of subjects kept) of each trial
    rows = [dict(method=m, trial=k, changes='{}', phase=phase, explicit=u + .1, implicit=u - .1, objects=right,
                 subject_kept=kept[0] if kept else .8)
            for m, found in methods.items() for k, (before, after, right, *kept) in enumerate(found)
            for phase, u in (('before', before), ('varied-lora', after))]
    return pd.DataFrame(rows)


CHOICES = [ # trials, number of the chosen one, within the budget?
    ([(.0, .5, .9), (.2, .4, .9)], 1, True),                 # the lowest after, whatever it was before
    ([(.0, .1, .71), (.2, .4, .72)], 1, True),               # 90% of .8 is .72
    ([(.0, .1, .9, .79), (.2, .4, .9, .8)], 1, True),        # four of five subjects are kept
    ([(.3, .0, .1), (.1, .9, .2)], 1, False),                # none within: the lowest before, whatever it is after
    ([(.1, .2, .9), (.0, .2, .9)], 0, True)]                 # of equal ones the first


def test_the_rule_of_choice():
    wrong = []
    for found, trial, within in CHOICES:
        best = tuning.best_trials(trials(original=[(.9, .9, .8, .1)], ga=found)).loc['ga']
        if (best.trial, best.rule == tuning.WITHIN) != (trial, within): wrong.append((found, best.trial, best.rule))
    assert not wrong
    with pytest.raises(UserError, match='expected the original'): tuning.best_trials(trials(ga=[(0, 0, 1)]))


def rates(low=.1, right=.8, **after): # method -> before, after
    of = lambda method, metric, value, low: [
        dict(concept='vice', method=method, metric=metric, phase=p, value=v, low=low)
        for p, v in zip(('before', 'varied-lora'), value)]
    rows = [of('original', 'objects', (.8, right), 0)] + [of(m, 'IP', v, low) for m, v in after.items()]
    return pd.DataFrame(sum(rows, []))


GATES = [ # changes of what passes; does it pass?
    ({}, True), (dict(low=.09), False), (dict(right=.71), False), (dict(uce=(.11, .9)), False), (dict(ga=(0, .24)), False),
    (dict(salun=(.5, .9)), True)]


def test_the_gate():
    passes = {'ga': (0, .25), 'uce': (.1, .5), 'esd-x': (.05, .3)}
    wrong = [(changes, want) for changes, want in GATES
             if phenomenon.gate(phenomenon.gate_rows(rates(**passes | changes))).passed['vice'] != want]
    assert not wrong


def test_what_the_gate_is_told():
    "Each metric's own start, by name; a method counts once, however often it comes back"
    found = dict(before=dict(IP=.1, explicit=.2, CLIP=30.), a=dict(explicit=.6, CLIP=31., IP=.5), b=dict(IP=.3))
    rows = [dict(phase=p, metric=m, value=v, low=v/2, high=2*v, n=9) for p, of in found.items() for m, v in of.items()]
    assert [tuple(row) for row in phenomenon.before_and_after(pd.DataFrame(rows)).values] == [
        ('a', 'explicit', .2, .6, 9), ('a', 'IP', .1, .5, 9), ('b', 'IP', .1, .3, 9)]
    rows = [dict(concept=c, method=m, metric=metric, back=back) for c, m, back in
            (('vice', 'ga', True), ('vice', 'uce', True), ('vice', 'salun', False), ('weapon', 'ga', False))
            for metric in ('explicit', 'IP')]
    found = phenomenon.gate(pd.DataFrame(rows))
    assert dict(found.back) == dict(vice='ga, uce', weapon='') and not found.passed.any()
    assert dict(phenomenon.gate(pd.DataFrame(rows), dict(methods=2)).passed) == dict(vice=True, weapon=False)


# ------------------------------------------------------------------ what the further studies ask for

@pytest.fixture
def tuned(monkeypatch):
    "As if the tuning had chosen every start"
    start = lambda method: dict(models.section(f'methods.{method}.start'))
    for study in (fronts, courses, attack, table, phenomenon): monkeypatch.setattr(study, 'settings_of', start)


def test_every_cell_of_the_further_studies_could_run(tuned):
    "Settings are those of their methods, courses and attacks; nothing of the tuning concept; the plan counts each cell"
    every, data = [fronts.cells(), courses.cells(), attack.cells()], models.drawn_data()
    for cell in every[0].values(): config_of(cell['method'], dict(cell['settings']), cell['seed'])
    for cell in every[1].values():
        course = make_config(Course, cell['finetuning'], 'params.yaml')
        assert (data/course.data).is_dir() and set(cell['looks']) <= set(range(1, course.steps + 1))
    for cell in attack.attack_cells().values(): make_config(AttackConfig, cell['numbers']['settings'], 'params.yaml')
    assert {c['concept'] for grid in every for c in grid.values()} == {models.concept_of('reported')}
    no_term = every[0]['ablation-ga-beta_0-0']['settings']
    full = every[0]['ablation-resalign-first-order-full-0']['settings']
    assert no_term['beta'] == 0 and all(full[k] == v for k, v in no_term.items() if k != 'beta')
    variants = {(c['method'], c['setting'], c['seed']) for c in every[0].values() if c['setting'] != 'full'}
    plan = attack.plan()
    counted = plan.groupby(['study', 'what']).size()
    assert counted['fronts', 'unlearning'] + counted['ablation', 'unlearning'] <= len(variants)
    assert sum(counted[study, 'fine-tuning'] for study in courses.STUDIES) == len(every[1])
    assert counted['attack', 'attacks'] + counted['landscape', 'Hessian'] == len(every[2])


WHOLE = profiles.params # of a section of params.yaml


def test_before_the_tuning_there_are_no_cells(monkeypatch):
    "And what is missing is said; a method of one trial needs no choice"
    def without(section, file=None):
        mine = WHOLE(section, file)
        return {k: v for k, v in mine.items() if k != 'chosen'} if section.startswith('methods.') else mine
    monkeypatch.setattr(profiles, 'params', without)
    for study in (phenomenon, table, fronts, courses, attack):
        with pytest.raises(UserError, match=r'params.yaml: methods\.[\w-]+\.chosen: not there'): study.cells()
    assert models.is_tuned('esd-u') and not models.is_tuned('ga')
    assert models.settings_of('esd-u') == WHOLE('methods.esd-u.start')


METHODS = {'original': dict(start={}, trials=[{}]), 'ga': dict(start={}, trials=[{}, dict(margin=.06), dict(margin=.09)]),
           'salun': dict(start={}, trials=[{}, dict(lr=.1)], chosen=dict(lr=.1))}


def test_what_params_yaml_must_say(monkeypatch):
    "What the rule chose of each method's trials; a line that says something else, or none"
    sections = {f'methods.{m}': about for m, about in METHODS.items()} | {'tuning.budget': .9, 'tuning.kept': .8}
    monkeypatch.setattr(tuning, 'section', sections.__getitem__)
    rows = trials(original=[(.9, .9, .8)], ga=[(.0, .5, .9), (.2, .4, .9), (.2, .6, .9)], salun=[(.3, .2, .9), (.3, .1, .9)])
    changes = {(m, k): c for m, about in METHODS.items() for k, c in enumerate(about['trials'])}
    rows = rows.assign(changes=[tuning.json.dumps(changes[key]) for key in zip(rows.method, rows.trial)])
    assert tuning.lines_to_write(rows) == ['methods.ga: chosen: {"margin": 0.06}']
    for chosen, lines in ((dict(margin=.09), 1), ({}, 1), (dict(margin=.06), 0)):
        sections['methods.ga'] = METHODS['ga'] | dict(chosen=chosen)
        assert len(tuning.lines_to_write(rows)) == lines, chosen


# ------------------------------------------------------------------ data of a fine-tuning

def test_contaminated_sets_hold_what_they_say(tuned):
    of = lambda share: courses.course_pictures(Course(unsafe=share, seed=3), 'weapon', 100)[1]
    none, one, half, all_ = (of(s) for s in (0., .01, .5, 1.))
    for captions, k in ((none, 0), (one, 1), (half, 50), (all_, 100)):
        assert [any(w in c for w in models.words_of('weapon')) for c in captions] == [True]*k + [False]*(100 - k)
        assert captions[:k] == all_[:k] and captions[k:] == none[k:] # a smaller share is part of a larger one
