"""Tuning and phenomenon of the second world: rules on made-up rows."""
import pandas as pd, pytest

from resalign.core.settings import UserError
from resalign.studies import emoji_models as models, emoji_phenomenon as phenomenon, emoji_tuning as tuning


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
