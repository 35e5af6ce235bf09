"""Studies of the second world: rules on made-up rows, and what is asked for."""
import pandas as pd, pytest

from resalign.baselines.methods import config_of
from resalign.core.settings import UserError, make_config
from resalign.studies import (attack as attack, courses as courses, fronts as fronts,
                              models as models, phenomenon as phenomenon, table as table,
                              tuning as tuning)
from resalign.studies.models import Course
from resalign.use.attacks import AttackConfig


# ------------------------------------------------------------------ rules on made-up rows

def trials(**methods): # method -> (before, after, objects) of each trial
    rows = [dict(method=m, trial=k, changes='{}', phase=phase, explicit=u + .1, implicit=u - .1, objects=right)
            for m, found in methods.items() for k, (before, after, right) in enumerate(found)
            for phase, u in (('before', before), ('varied-lora', after))]
    return pd.DataFrame(rows)


CHOICES = [ # trials, number of the chosen one, within the budget?
    ([(.0, .5, .9), (.2, .4, .9)], 1, True),                 # the lowest after, whatever it was before
    ([(.0, .1, .71), (.2, .4, .72)], 1, True),               # 90% of .8 is .72
    ([(.3, .0, .1), (.1, .9, .2)], 1, False),                # none within: the lowest before, whatever it is after
    ([(.1, .2, .9), (.0, .2, .9)], 0, True)]                 # of equal ones the first


def test_the_rule_of_choice():
    wrong = []
    for found, trial, within in CHOICES:
        best = tuning.best_trials(trials(original=[(.9, .9, .8)], ga=found)).loc['ga']
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


def test_what_counts_as_right_and_as_drawn():
    rows = [dict(subject='fox', object='', kind='benign'), dict(subject='fox', object='apple', kind='benign'),
            dict(subject='fox', object='apple', kind='benign'), dict(subject='crab', object='', kind='subject'),
            dict(subject='crab', object='', kind='subject')]
    read = dict(subject=['fox', 'fox', 'fox', 'crab', 'crab'], object=['pen', 'apple', 'pen', 'pen', ''])
    assert list(models.right(rows, read, [.1, .1, .9, .6, .4])) == [1, 1, 0, 1, 0]
    assert list(models.drawn_as(rows, read, [.9, .9, .1, .9, .9], [.9, .1, .1, .1, .1])) == [0, 1, 3, 1, 1]


# ------------------------------------------------------------------ what the further studies ask for

@pytest.fixture
def tuned(monkeypatch):
    "As if the tuning had chosen every start"
    start = lambda method: dict(models.section(f'methods.{method}.start'))
    for study in (fronts, courses, attack, table): monkeypatch.setattr(study, 'chosen_settings', start)


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


def test_before_the_tuning_there_are_no_cells(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, 'tuning_csv', lambda: tmp_path/'tuning.csv')
    whole = models.section
    without = lambda section: {k: v for k, v in whole(section).items() if k != 'chosen'} if 'methods.' in section else whole(section)
    monkeypatch.setattr(tuning, 'section', without)
    for study in (fronts, courses, attack):
        with pytest.raises(UserError, match='expected its trials: RESALIGN_PROFILE=emoji resalign-batch tuning'): study.cells()


# ------------------------------------------------------------------ over models

def pictures(rates, **about): # one rate a model; explicit and implicit prompts, as many of each
    rows = [dict(about, run=run, kind=kind, prompt=f'{kind}{k}', seed=7, detector='detector-vice', score=float(k < 10*r))
            for run, r in enumerate(rates) for kind in models.UNSAFE for k in range(10)]
    return pd.DataFrame(rows)


def test_fronts_take_each_method_where_it_costs_no_more(tuned):
    points = {('resalign', 'a'): ([.1, .2, .3], .2), ('resalign', 'b'): ([.5, .5, .5], .1), ('ga', 'a'): ([.6, .5, .7], .21),
              ('ga', 'b'): ([0., 0., 0.], .23), ('uce', 'a'): ([.3, .3, .3], .1)} # rates of three models, quality
    after = pd.concat([pictures(r, method=m, setting=s, phase='varied-lora') for (m, s), (r, _) in points.items()])
    summary = [dict(method=m, setting=s, seed=k, phase='before', metric=metric, value=v)
               for (m, s), (_, q) in points.items() for k in range(3) for metric, v in (('CMMD', q), ('subject_kept', 1 - q))]
    rows = fronts.front_table(pd.DataFrame(summary), fronts.unsafe_pictures(after, 'vice'))
    each, whole = rows[rows.seed != 'all'], rows[rows.seed == 'all'].set_index(['method', 'setting'])
    assert len(each) == 15 and whole.n.eq(3).all()
    for point, (rates, quality) in points.items():
        assert whole.unsafe_after[point] == pytest.approx(sum(rates)/3) and whole.quality[point] == pytest.approx(quality)
    best = fronts.at_equal_cost(rows)
    assert dict(best.setting) == dict(resalign='a', ga='a', uce='a') # GA's b costs more than a tenth more
    tests = fronts.front_tests(best, fronts.unsafe_pictures(after, 'vice')).set_index('method')
    assert tests.difference['ga'] == pytest.approx(.4) and tests.p['ga'] == 2/2**3 and tests.p['uce'] == 1/2
    assert 'not below' not in fronts.front_title(best)
    assert 'not below' in fronts.front_title(best.assign(unsafe_after=best.unsafe_after.where(best.index != 'uce', .2)))


def test_contaminated_sets_hold_what_they_say(tuned):
    of = lambda share: courses.course_pictures(Course(unsafe=share, seed=3), 'weapon', 100)[1]
    none, one, half, all_ = (of(s) for s in (0., .01, .5, 1.))
    for captions, k in ((none, 0), (one, 1), (half, 50), (all_, 100)):
        assert [any(w in c for w in models.words_of('weapon')) for c in captions] == [True]*k + [False]*(100 - k)
        assert captions[:k] == all_[:k] and captions[k:] == none[k:] # a smaller share is part of a larger one
