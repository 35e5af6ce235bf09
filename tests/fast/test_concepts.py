"""Whose detectors count, and what a reader's words are compared with: toys of the emoji evaluators, by hand."""
import numpy as np, pandas as pd, pytest

from resalign.core.settings import UserError
from resalign.measure import detectors as D
from resalign.measure import evaluators as E
from resalign.measure import metrics as M

PAIRS = ['detector-weapon', 'safety-weapon', 'detector-vice', 'safety-vice']


def test_rates_have_the_concept_in_their_name_where_there_are_several():
    one = dict(IP=('detector-vice', 'implicit', .5), US=('safety-vice', 'explicit', .5),
               explicit=('detector-vice', 'explicit', .5))
    assert E.metric_tables(['clip-score', *PAIRS[2:]]) == (one, E.MEANS, False)
    both = E.metric_tables(PAIRS)[0]
    assert {k: v for k, v in both.items() if k.endswith('-vice')} == {f'{k}-vice': v for k, v in one.items()}
    assert list(both) == [f'{m}-{c}' for c in ('weapon', 'vice') for m in one]
    assert E.concepts_of(['safety-vice', 'clip-score', 'detector-', 'wiring']) == ['vice']


def test_prompts_say_whose_detectors_count():
    evaluators = {name: name for name in [*PAIRS, 'clip-score', 'reader']}
    def kept(*concepts): return list(E.about_concept(evaluators, [dict(concept=c) for c in concepts], 'p.csv'))
    assert kept('', ' vice', 'vice ') == [*PAIRS[2:], 'clip-score', 'reader']
    assert kept('', None) == list(evaluators) == list(E.about_concept(evaluators, [dict(prompt='a')], 'p.csv'))
    photos = dict(nudenet=1, reader=2)
    assert E.about_concept(photos, [dict(concept='nudity')], 'p.csv') == photos # of a world without concepts
    for concepts, words in (['arms'], "p.csv: column 'concept': unknown 'arms'"), (['vice', 'weapon'], 'vice and weapon'):
        with pytest.raises(UserError, match=words): kept(*concepts)


def test_a_reader_is_compared_with_what_the_prompt_says_and_nothing_else():
    class Reader:
        def read(self, images):
            return dict(subject=['fox', 'bear', 'fox'], object=['', 'pen', 'book'], style=['noto']*3, place=['snow']*3)
    told = [dict(subject='fox', object='', style='noto'), dict(subject='fox', object='pen', style='flat'),
            dict(subject='dragon', object='book', style='')]
    rows = [dict(prompt=str(k), kind='benign', seed=k, place='night') | row for k, row in enumerate(told)]
    images = np.arange(3*12, dtype=np.uint8).reshape(3, 2, 2, 3)
    table = M.objects_right(Reader(), images, rows)
    assert list(table) == ['prompt', 'kind', 'seed', 'image_hash', 'subject', 'object', 'style', 'seen_subject',
                           'seen_object', 'seen_style', 'subject_right', 'object_right', 'style_right']
    assert table.subject_right.tolist() == [True, False, False] and table.object_right.tolist() == [True]*3
    assert table.style_right.tolist() == [True, False, False]
    scores = pd.DataFrame(columns=['detector', 'kind', 'prompt', 'score'])
    found = E.summarise(scores, table).set_index('metric') # a dragon, no object and no style can't be right or wrong
    assert found.value.to_dict() == dict(subjects=.5, objects=1, styles=.5) and found.n.tolist() == [2, 2, 2]
    with pytest.raises(UserError, match='row 1: object is missing'):
        M.objects_right(Reader(), images, [rows[0], {k: v for k, v in rows[1].items() if k != 'object'}, rows[2]])

    # every name that the reader knows counts; nothing, a word that it doesn't know, and what is no subject don't
    for asked, metric in dict(subject='subjects', object='objects', style='styles').items():
        names = [name for name in D.CLASSES[asked] if name not in ('', D.NOTHING)]
        words = [*names, '', 'zorb', D.NOTHING]
        right = [True] + [False]*(len(words) - 1)
        row, = E.summarise(scores, pd.DataFrame({asked: words, f'{asked}_right': right})).to_dict('records')
        assert (row['metric'], row['value'], row['n']) == (metric, 1/len(names), len(names))
