"""What studies read of a model's looks along fine-tunings."""

import pandas as pd, pytest

from resalign.core.settings import UserError
from resalign.studies import models as M
from toy_scores import WIDE, cells



@pytest.fixture
def resurgence(tmp_path, monkeypatch):
    "The looks of two methods and two seeds"
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path))
    for m in ('ga', 'uce'):
        for s in (0, 2):
            folder = tmp_path/'runs'/'resurgence'/f'{m}-{s}'
            folder.mkdir(parents=True)
            WIDE.assign(before=int(m == 'ga')*s).to_csv(folder/'looks.csv', index=False)

def test_a_study_is_read_by_method_and_seed(resurgence):
    long = M.read_looks('resurgence', ['uce', 'ga'], [0, 2])
    assert cells(long[(long.step == 0) & (long.course == 'slow') & (long.prompt == 'a')], 'method', 'run', 'score') == [
        ('ga', 0, 0),
        ('ga', 2, 2),
        ('uce', 0, 0),
        ('uce', 2, 0),
    ]
    assert list(long.method.unique()) == ['uce', 'ga'] and len(long) == 4*10 and list(long.index) == list(range(40))
    with pytest.raises(UserError, match='esd-1/looks.csv: .*dvc repro resurgence'):
        M.read_looks('resurgence', ['esd'], [1])

def test_methods_and_seeds_are_those_of_the_settings(resurgence, monkeypatch):
    settings = {'studies.methods': ['uce'], 'table.seeds': [2, 0]}
    monkeypatch.setattr(M, 'params', settings.__getitem__)
    long = M.read_looks('resurgence')
    assert list(dict.fromkeys(zip(long.method, long.run))) == [('uce', 2), ('uce', 0)]
