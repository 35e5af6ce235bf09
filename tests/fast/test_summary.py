"Sentences and pictures of the summary, of a table by hand: who comes back, pairs of models, the typical seed."
import numpy as np, pandas as pd, pytest
from PIL import Image

from resalign.studies import summary as S

PHASES = 'before', 'varied-lora', 'subjects-full'


def table(**models): # method -> a row a model: unsafe before and after each fine-tuning
    rows = []
    for method, found in models.items():
        for seed, rates in [*enumerate(found), ('all', np.mean(found, axis=0))]:
            for at, rate in zip(PHASES, rates):
                phase, _, finetune = at.partition('-')
                rows.append(dict(method=method, seed=seed, phase=phase, finetune=finetune or 'none', metric='unsafe',
                                 value=rate, low=rate - .05, high=rate + .05, n=len(found)))
    return pd.DataFrame(rows)


def quality(method, objects, kept): # of unlearned models, and something else after a fine-tuning
    about = dict(method=method, seed='all', low=0., high=1., n=2)
    return pd.DataFrame([dict(about, phase=p, finetune=f, metric=m, value=v if p == 'before' else .99)
                         for p, f in (('before', 'none'), ('varied', 'lora'))
                         for m, v in (('objects', objects), ('subject_kept', kept))])


MAIN = table(original=[(.9, .9, .8)]*2, ga=[(.0, .4, .3), (.1, .5, .2)], uce=[(.0, .3, .7), (.0, .2, .8)],
             resalign=[(.0, .1, .0), (.0, .3, .1)])


def test_sentences():
    "Who comes back first; what it costs; how far pairs of models are apart"
    found = S.before_after(MAIN)
    back = S.sentence_back(found)
    assert '2 draw it again' in back and back.index('UCE, from 0% to 75%') < back.index('from 5% to 45%')
    assert 'of 2 other methods' in S.sentence_resalign(found) and 'to 20% (15 to 25)' in S.sentence_resalign(found)
    main = pd.concat([MAIN, quality('original', .8, .2), quality('resalign', .7, .6)])
    said = S.sentence_price(main)
    assert 'ResAlign draws 70% of benign prompts right, the original 80%' in said
    assert "the prompt's subject without it in 60% of pictures (the original in 20%)" in said
    lines = [S.front_lines(main, ['uce', 'resalign', 'salun'], seed) for seed in ('all', 1)]
    assert [list(t.models) for t in lines] == [['2', '2', ''], ['1', '1', '']]
    assert list(lines[1]['after the worst fine-tuning, %']) == ['80 (75 to 85)', '30 (25 to 35)', '']
    assert list(lines[0]['unsafe before, %']) == ['0', '0', S.NOT_RUN] and lines[0]['benign right, %'][1] == '70'

    # pairs of models, all at the fine-tuning that is the method's worst: more by -.2, .1 and .3, so one is near
    first = [(.0, .4, .9), (.0, .3, .0), (.0, .3, .0)]
    full = [(.0, .2, .0), (.0, .4, .0), (.0, .6, .0)]
    said = S.sentence_order(table(**{'resalign-first-order': first, 'resalign': full}))
    assert '33% of pictures are unsafe instead of 40%' in said and 'Over 3 pairs' in said
    assert '; 1 pairs lie within 15 points' in said


def test_who_ends_lower_at_equal_quality():
    "At the lowest point of each front that costs no more; the original isn't one of them"
    points = [('original', 'a', .1, 0), ('resalign', 'a', .3, 0), ('resalign', 'b', .2, 0), ('ga', 'a', .15, .04),
              ('uce', 'a', .1, .06), ('uce', 'b', .25, 0), ('salun', 'a', .2, 0)]
    fronts = pd.DataFrame([dict(method=m, setting=s, seed='all', unsafe_after=u, quality=q, n=3) for m, s, u, q in points])
    said = S.sentence_fronts(fronts)
    assert said.endswith('ResAlign ends at 20% (3 models); lower: GA + retain 15%.')
    assert S.sentence_fronts(fronts.assign(unsafe_after=.2, n=1)).endswith('20% (one model); lower: none.')
    assert S.sentence_fronts(None) == ''


def test_pictures_are_of_the_typical_seed_and_the_hardest_fine_tuning(tmp_path):
    "The median of the rises, which the mean is far from; the highest mean, not the highest rate"
    rises = {0: .9, 1: .05, 2: .1, 3: 0., 4: .5}
    main = table(original=[(.9, .9, .9)]*5, ga=[(0., rise/2, rise) for rise in rises.values()])
    assert dict(S.relapses(main, ['original', 'ga'])) == pytest.approx(rises)
    assert S.typical_seed(main, ['original', 'ga']) == 2
    hard = table(ga=[(.0, .9, .5)]*2, uce=[(.0, .1, .6)]*2, original=[(.9, .95, .0)]*2)
    assert S.hardest(hard, ['original', 'ga', 'uce']) == 'subjects-full'
    pd.DataFrame(dict(phase=np.repeat(PHASES, 2))).to_csv(tmp_path/'summary.csv')
    grey = np.repeat(np.array([10, 120, 230], np.uint8), 8)[:, None, None] + np.zeros((24, 16, 3), np.uint8)
    Image.fromarray(grey).save(tmp_path/'pictures.jpg')
    found = {phase: int(sheet[2:-2].mean().round(-1)) for phase, sheet in S.sheets(tmp_path).items()}
    assert found == dict(zip(PHASES, (10, 120, 230)))
