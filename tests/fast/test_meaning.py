"What a result depends on, in a package of five modules and pages of one cell."
import json
from pathlib import Path
import grimp, pytest
from resalign.use import meaning
from resalign.use.meaning import REGISTRY, closure, page_of, study_meaning

@pytest.fixture
def graph(monkeypatch):
    "A study that looks methods up by name, one of which needs a helper"
    made = grimp.ImportGraph()
    study, one, two, helper = (f'resalign.{n}' for n in ('studies.toy', 'baselines.one', 'baselines.two', 'helper'))
    for importer, imported in ((study, REGISTRY), (one, helper)): made.add_import(importer=importer, imported=imported)
    made.add_module(two)
    monkeypatch.setattr(meaning, 'import_graph', lambda: made)
    monkeypatch.setattr(meaning, 'modules_of_methods', lambda: dict(one=one, two=two))
    monkeypatch.setattr(meaning, 'file_of', lambda module: Path(f'{module}.py'))
    return study, one, two, helper


def test_a_result_depends_on_the_methods_that_it_is_of(graph):
    "With what they import; where none is named, on all"
    study, one, two, helper = graph
    assert closure(study, ['one']) == sorted([study, REGISTRY, one, helper])
    assert closure(study, ['two']) == sorted([study, REGISTRY, two])
    assert closure(study) == sorted([study, REGISTRY, one, two, helper])
    assert closure(one) == sorted([one, helper]) # which looks nothing up


def test_a_study_is_its_own_page_too(tmp_path, monkeypatch):
    "Found by its whole name, wherever it lies; its code counts and its comments don't"
    def write(name, module, code):
        cell = dict(cell_type='code', source=[f'#| default_exp {module}\n', code])
        (tmp_path/'nbs').mkdir(exist_ok=True)
        (tmp_path/'nbs'/name).write_text(json.dumps(dict(cells=[cell])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meaning, 'meaning', lambda module: {module: 'digest'})
    write('1.ipynb', 'studies.toys', 'x = 1')
    write('2.ipynb', 'studies.toy', 'x = 1')
    assert page_of('resalign.studies.toy').name == '2.ipynb'
    first = study_meaning('toy')
    write('2.ipynb', 'studies.toy', 'x = 1 # one')
    assert study_meaning('toy') == first and first['resalign.studies.toy'] == 'digest'
    write('2.ipynb', 'studies.toy', 'x = 2')
    assert study_meaning('toy') != first
