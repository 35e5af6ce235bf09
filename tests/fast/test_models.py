"What is counted of a look, over pictures and over models: by hand."
from pathlib import Path

import numpy as np, pandas as pd, pytest
from matplotlib.figure import Figure

from resalign.core.settings import UserError
from resalign.measure.metrics import DRAWN
from resalign.studies import models as M


def picture(detector, kind, score, prompt='a', run=0, seed=0):
    return dict(detector=detector, kind=kind, prompt=prompt, seed=seed, score=score, run=run)


def test_two_methods_look_at_pictures(monkeypatch):
    "With the concept's detector, on prompts that no table has; their models depend on it, the others' do not"
    rows = [dict(prompt=f'p{k}', kind=kind, seed=k) for k, kind in enumerate(['benign'] + ['explicit', 'implicit']*20)]
    monkeypatch.setattr(M, 'read_prompts', lambda path: rows if path.name == 'validation-vice.csv' else 1/0)
    monkeypatch.setattr(M, 'drawn_data', lambda: Path())
    monkeypatch.setattr(M, 'load_trained', lambda folder: {'detector-vice': 'a detector'})
    assert M.detector_for('rece', 'vice') == dict(detector='a detector', validation=[(f'p{k}', k) for k in range(1, 21)])
    assert M.detector_for('uce', 'vice') == {} == M.detector_for('safegen', None)
    monkeypatch.setattr(M, 'given', lambda concept: dict(unsafe='u', benign='b', pool={}, erase=[]))
    seen = dict(state='a')
    monkeypatch.setattr(M, 'content', lambda *paths: dict(seen) if M.EVALUATORS in paths else {})
    def keys(): return {m: M.Unlearned(m, 0, {}, 'vice').key for m in ('uce', 'rece', 'safegen')}
    before = keys()
    seen['state'] = 'b'
    assert {m for m, key in keys().items() if key != before[m]} == {'rece', 'safegen'}


def test_what_counts_as_right_and_as_drawn():
    rows = [dict(subject='fox', object='', kind='benign'), dict(subject='fox', object='apple', kind='benign'),
            dict(subject='fox', object='apple', kind='benign'), dict(subject='crab', object='', kind='subject'),
            dict(subject='crab', object='', kind='subject')]
    read = dict(subject=['fox', 'fox', 'fox', 'crab', 'crab'], object=['pen', 'apple', 'pen', 'pen', ''])
    assert list(M.right(rows, read, [.1, .1, .9, .6, .4])) == [1, 1, 0, 1, 0]
    assert list(M.drawn_as(rows, read, [.9, .9, .1, .9, .9], [.9, .1, .1, .1, .1])) == [0, 1, 3, 1, 1]


def test_each_metric_has_its_score_and_its_prompts():
    "Every score on every kind of prompt has a number of its own, so a metric that reads another one is seen"
    kinds, scores = ('explicit', 'implicit', 'benign', 'subject'), []
    names = ('detector-vice', 'safety-vice', 'detector-weapon', 'right', 'drawn', 'clip-score', 'aesthetics')
    for d, name in enumerate(names):
        for k, kind in enumerate(kinds): # of ten pictures d + k show it
            scores += [picture(name, kind, float(i < d + k), f'{kind}{i}') for i in range(10)]
    found = M.one_model(pd.DataFrame(scores), 'vice').set_index('metric')
    want = dict(unsafe=.05, explicit=0, IP=.1, benign=.2, US=.1, objects=.5, plasticity=.6, subject_kept=.45, CLIP=.7, aesthetics=.8)
    want |= {f'drawn: {what}': v for what, v in zip(DRAWN, (.55, .45, 0, 0))}
    assert dict(found.value) == pytest.approx(want)
    assert found.detector['US'] == 'safety-vice' and found.n['subject_kept'] == 20 and found.n['IP'] == 10
    assert M.one_model(pd.DataFrame(scores[:40]), 'weapon').empty # of the other concept nothing was scored


def test_a_real_profile_counts_above_the_thresholds_of_its_detectors():
    scores = [picture('nudenet', kind, s, str(s)) for kind in ('implicit', 'explicit') for s in (.45, .46, .9, 0.)]
    scores += [picture('mhsc', 'explicit', s) for s in (.5, .51)] + [picture('aesthetics-v2', 'benign', 5.5)]*2
    found = M.one_model(pd.DataFrame(scores), None).set_index('metric').value
    assert dict(found) == dict(IP=.5, explicit=.5, US=.5, **{'aesthetics-v2': 5.5})


def test_over_models():
    "Of prompts with several pictures each prompt weighs the same; a mean knows no bounds; one model has no interval"
    hits = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]] # three models; prompt x has three pictures, y one
    scores = [picture('detector-vice', 'implicit', s, p, run, seed)
              for run, row in enumerate(hits) for seed, (p, s) in enumerate(zip('xxxy', row))]
    scores += [picture('clip-score', 'benign', 30. + run, p, run) for run in range(3) for p in 'xy']
    sets = pd.DataFrame([dict(run=r, metric='FID', value=v, detector='inception') for r, v in enumerate((7., 8., 12.))])
    found = M.many_models(pd.DataFrame(scores), 'vice', sets).set_index('metric')
    assert dict(found.value) == pytest.approx(dict(unsafe=(.5 + 1/3 + 0)/3, IP=(.5 + 1/3 + 0)/3, CLIP=31, FID=9)) and set(found.n) == {3}
    assert (found.low < found.value).all() and (found.value < found.high).all() and found.low['IP'] >= 0
    assert found.detector['FID'] == 'inception' and 30 <= found.low['CLIP'] + 1 and found.high['FID'] > 9
    one = M.many_models(pd.DataFrame(scores).query('run == 0'), 'vice').set_index('metric')
    assert one.n['IP'] == 1 and np.isnan(one.low['IP']) and np.isnan(one.high['CLIP'])


def test_cells_are_read_and_written(tmp_path, monkeypatch):
    "A column a phase; what is missing is named, with the command that makes it"
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path))
    folder = tmp_path/'runs'/'table'/'ga-0'
    folder.mkdir(parents=True)
    looks = {}
    for k, phase in enumerate(('before', 'varied-lora')):
        scores = pd.DataFrame([picture('detector-vice', 'implicit', s, p) for p, s in zip('ab', (.1/3, k/1))])
        looks[phase] = M.one_model(scores, 'vice'), scores.drop(columns='run')[::1 - 2*k] # in another order
    M.write_cell(folder, looks)
    summary, scores = M.read_cells('table', ['ga-0'])['ga-0']
    assert list(scores) == [*M.PICTURE, 'before', 'varied-lora'] and len(scores) == 2
    assert scores.set_index('prompt')['varied-lora'].to_dict() == dict(a=pytest.approx(.1/3, abs=1e-9), b=1)
    assert list(summary.phase) == ['before']*2 + ['varied-lora']*2 and list(summary.value) == [0, 0, .5, .5]
    assert list(summary.metric) == ['unsafe', 'IP']*2
    with pytest.raises(UserError, match='uce-1/summary.csv: no such file, run resalign-batch table'):
        M.read_cells('table', ['ga-0', 'uce-1'])


def test_a_figure_of_made_up_numbers_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path))
    table = pd.DataFrame(dict(a=[1]))
    made_up, true = Figure(), Figure()
    M.set_title(made_up, 'Found', 'x')
    assert made_up.get_suptitle().startswith('Made-up numbers')
    assert 'made-up numbers' in [t.get_text() for t in made_up.texts]
    assert M.saved('x', 'nothing') == 'nothing'
    M.save_table(table, 'x')
    M.set_title(true.subplots(), 'Found', 'x')
    assert true.axes[0].get_title() == 'Found' and not true.texts and M.saved('x', 'nothing').equals(table)
