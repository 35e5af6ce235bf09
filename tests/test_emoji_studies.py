"""Tuning, phenomenon and table of the second world: rules on made-up rows, and a small run through the command."""
import copy, json, shutil
from pathlib import Path

import matplotlib.pyplot as plt, pandas as pd, pytest, yaml

from resalign.core.settings import UserError
from resalign.measure.emoji_detectors import train_emoji_evaluators
from resalign.studies import emoji_base, emoji_evaluators, emoji_models as models, emoji_phenomenon as phenomenon
from resalign.studies import emoji_table, emoji_tuning as tuning
from resalign.studies.emoji_base import EmojiConfig, train_emoji_base
from resalign.use import batch, cli

ROOT = Path(__file__).resolve().parent.parent


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


# ------------------------------------------------------------------ through the command

SIZES = dict({f'unsafe-{c}': 8 for c in ('weapon', 'vice')}, retain=8, subjects=6, varied=8, reference=8,
             **{'pool-subjects': 4, 'pool-things': 4, 'pool-mixture': 4})
FEW = dict(prompts=dict(explicit=2, implicit=2, benign=3))
GA = dict(steps=2, unsafe_batch=2, retain_batch=2, unsafe_bank=8, retain_bank=8, beta=0.)


def shrink(settings):
    "The profile of two methods, with trials of two steps"
    settings = copy.deepcopy(settings)
    profile = settings['profiles']['emoji']
    one = dict(algorithm='lora', steps=2, batch=2, lr=1e-3)
    profile |= dict(finetune={'varied-lora': one}, evaluate=dict(steps=2, guidance=3.))
    parts = profile['sections']
    parts['methods'] = dict(original=dict(start={}, trials=[{}]),
                            ga=dict(start=GA, trials=[dict(margin=.03), dict(margin=.06)]))
    parts['tuning'] |= dict(look=FEW)
    parts['phenomenon'] |= dict(methods=['original', 'ga'], seeds=[0, 1])
    parts['table'] |= dict(look=dict(FEW, subjects=2), headline=['original', 'ga'], headline_seeds=2,
                           finetunings=['varied-lora'])
    return settings


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A repository with a small base, small evaluators and small data; studies run in this process"
    settings = shrink(yaml.safe_load((ROOT/'params.yaml').read_text()))
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(settings))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'nbs').symlink_to(ROOT/'nbs')
    train_emoji_base(tmp_path/'outs/emoji', EmojiConfig(**emoji_base.SMOKE))
    train_emoji_evaluators(tmp_path/'outs/emoji_evaluators', **emoji_evaluators.SMOKE)
    write = models.write_emoji_data
    counts = dict(implicit=3, explicit=3, benign=3)
    monkeypatch.setattr(models, 'write_emoji_data', lambda folder: write(folder, SIZES, counts))
    monkeypatch.setattr(batch, 'run_study', here)
    monkeypatch.setattr(batch, 'run_page', page_here)
    monkeypatch.setenv('RESALIGN_PROFILE', 'emoji')
    monkeypatch.delenv('RESALIGN_RESULTS', raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def here(cell):
    batch.call_study(cell.study, cell.parameters, cell.out)
    return '', False


def page_here(cell, executed):
    "The code of a page with its parameters, in this process; a figure is closed again"
    space = {}
    for c in json.loads(Path(cell.page).read_text())['cells']:
        if c['cell_type'] != 'code': continue
        exec(''.join(c['source']), space)
        if 'parameters' in c['metadata'].get('tags', []): space |= cell.parameters
    plt.close('all')
    return '', False


def test_studies_through_the_command(small, capsys):
    for study, words in ('scores', "unknown 'scores'"), ('table', 'no row of ga, expected its trials'):
        with pytest.raises(UserError, match=words): cli.batch(study, workers=1)

    cli.batch('tuning', dry=True)
    assert '3 of 3 cells would run' in capsys.readouterr().out
    cli.batch('tuning', workers=1)
    rows = pd.read_csv(small/'results/emoji/tables/tuning.csv')
    assert len(rows) == 2*3 and list(rows.columns) == tuning.COLUMNS and rows.objects.between(0, 1).all()

    cli.batch('table', workers=1)
    main = pd.read_csv(small/'results/emoji/tables/main.csv')
    assert list(main.columns) == emoji_table.COLUMNS and set(main.concept) == {'vice'}
    assert {'IP', 'US', 'subject_kept', 'KID', 'CMMD', 'CLIP', 'aesthetics', 'plasticity'} <= set(main.metric)
    assert set(main.seed.astype(str)) == {'0', '1', 'all'} and not main.duplicated(emoji_table.COLUMNS[:6]).any()
    assert (main.n[main.seed == 'all'] == 2).all() # models

    # the phenomenon asks for the same models and looks: only those of the other concept are new
    kept = {p.name for p in (small/'outs/models').iterdir()}
    cli.batch('phenomenon', workers=1, only=['concept=vice', 'seed=0'])
    assert {p.name for p in (small/'outs/models').iterdir()} == kept
    cli.batch('table', dry=True)
    assert '0 of 4 cells would run' in capsys.readouterr().out
