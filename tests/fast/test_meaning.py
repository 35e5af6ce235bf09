"What a result depends on, in a package of a few modules and pages of one cell."
import json
import pytest
from resalign.core.settings import UserError
from resalign.use import meaning
from resalign.use.meaning import REGISTRY, defined, meaning as digests, page_of, parsed, reached, study_meaning

STUDY, ONE, TWO, HELPER = (f'resalign.{n}' for n in ('studies.toy', 'baselines.one', 'baselines.two', 'helper'))
PACKAGE = {
    STUDY: '''
from ..baselines.methods import run_method
from ..helper import double as twice, triple
from .. import helper as whole
STEPS, UNUSED = 3, 4
def inner(x: 'Quoted'): return twice(x)
class Quoted: pass
def run(): return inner(STEPS) + run_method()
def lazy():
    from ..helper import triple
    return triple
def title(): return f'{UNUSED} {triple(1)}'
def all_of_it(): return whole.double
''',
    HELPER: '''
FACTORS = {}
FACTORS['two'] = 2
def double(x): return FACTORS['two']*x
def triple(x): return 3*x
''',
    'resalign.other': 'x = 1\n',
    REGISTRY: 'def run_method(): pass\ndef shown(): return 5\n',
    ONE: 'from ..helper import triple\ndef one(): return triple(1)\nMETHODS = {"one": one}\n',
    TWO: 'def two(): pass\nMETHODS = dict(two=two)\n',
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A function that replaces text in a module; what has been read of modules is forgotten"
    for module, code in PACKAGE.items(): (tmp_path/f'{module}.py').write_text(code)
    caches = (meaning.definitions, meaning.leads_to, meaning.reached, meaning.statement_digests)
    def forget():
        for cached in caches: cached.cache_clear()
    def edit(module, old, new):
        text = (tmp_path/f'{module}.py').read_text()
        assert old in text
        (tmp_path/f'{module}.py').write_text(text.replace(old, new))
        forget()
    monkeypatch.setattr(meaning, 'modules', lambda: frozenset(PACKAGE))
    monkeypatch.setattr(meaning, 'modules_of_methods', lambda: dict(one=ONE, two=TWO))
    monkeypatch.setattr(meaning, 'file_of', lambda module: tmp_path/f'{module}.py')
    forget()
    yield edit
    forget()


def names(*roots, methods=()):
    "module -> what is reached of it, by name"
    return {m: sorted(found - {''}) for m, found in reached(STUDY, roots, methods).items()}


def test_what_a_function_reaches(package):
    "Through names, imports under another name, imports inside functions, quoted annotations"
    assert names('run') == {STUDY: ['Quoted', 'STEPS', 'UNUSED', 'inner', 'run', 'run_method', 'twice'],
                            HELPER: ['FACTORS', 'double'], REGISTRY: ['run_method']}
    # the import at the top has that name
    assert names('lazy') == {STUDY: ['lazy', 'triple'], HELPER: ['FACTORS', 'triple']}
    assert names('all_of_it')[HELPER] == ['FACTORS', 'double', 'triple'] # a module that is imported as a whole
    assert set(reached(STUDY)[STUDY]) >= {'title', 'UNUSED', 'lazy', 'run'}


def test_a_result_depends_on_the_methods_that_it_is_of(package):
    "With what they import; where none is named, on all"
    assert set(names('run', methods=('one',))) == {STUDY, HELPER, REGISTRY, ONE}
    assert set(names('run', methods=('two',))) == {STUDY, HELPER, REGISTRY, TWO}
    assert set(names('run', methods=None)) == {*PACKAGE} - {'resalign.other'}
    assert set(names('title', methods=None)) == {STUDY, HELPER} # which looks nothing up


CHANGES = [ # module, old, new, whether what `run` computes with method one depends on it
    (STUDY, 'STEPS, UNUSED = 3, 4', 'STEPS, UNUSED = 5, 4', True),
    (STUDY, 'return inner(STEPS)', 'return inner(STEPS)*2', True),
    (STUDY, "f'{UNUSED} {triple(1)}'", "'words'", False),
    (STUDY, 'class Quoted: pass', 'class Quoted: x = 1', True),
    (HELPER, "FACTORS['two'] = 2", "FACTORS['two'] = 4", True), # defines nothing: counts with its module
    (HELPER, 'return 3*x', 'return 4*x', True), # by the method
    (HELPER, 'def triple', '# a comment\ndef triple', False),
    (ONE, 'triple(1)', 'triple(2)', True),
    (TWO, 'pass', 'return 1', False)]


def test_what_makes_it_stale(package):
    before, wrong = digests(STUDY, ['one'], ['run']), []
    for module, old, new, matters in CHANGES:
        package(module, old, new)
        now = digests(STUDY, ['one'], ['run'])
        changed = {m for m in before | now if before.get(m) != now.get(m)}
        if changed != ({module} if matters else set()): wrong.append((module, new, changed))
        package(module, new, old)
    assert not wrong


def test_a_name_that_is_nowhere(package):
    "Is refused, and a module that isn't there"
    with pytest.raises(UserError, match=f'{STUDY}: defines no nothing'): reached(STUDY, ('nothing',))
    with pytest.raises(UserError, match='resalign.nothing: no such module of the package'): reached('resalign.nothing')


DEFINED = {
    'a = b = 1': ['a', 'b'], 'a, (b, *c) = f()': ['a', 'b', 'c'], 'a: int = 1': ['a'], 'a |= b': ['a'], 'a[0] = b': [],
    'a.b = c': [], 'f(a)': [], 'a = [b for b in c]': ['a'], 'import a.b, c as d': ['a', 'd'],
    'from a import b as c': ['c'],
    'def a(b): pass': ['a'], 'class a: b = 1': ['a'], 'if a: b = 1': []}


def test_what_a_statement_defines():
    assert {code: defined(parsed(code).body[0]) for code in DEFINED} == DEFINED


def test_a_study_is_its_own_page_too(tmp_path, monkeypatch):
    "Found by its whole name, wherever it lies; its code counts and its comments don't"
    def write(name, module, code):
        cell = dict(cell_type='code', source=[f'#| default_exp {module}\n', code])
        (tmp_path/'nbs').mkdir(exist_ok=True)
        (tmp_path/'nbs'/name).write_text(json.dumps(dict(cells=[cell])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meaning, 'reached', lambda module, also=(): {module: {'f'}})
    monkeypatch.setattr(meaning, 'definitions', lambda module: {'': [], 'f': []})
    monkeypatch.setattr(meaning, 'digests_of', lambda found: {m: 'digest' for m in found})
    write('1.ipynb', 'studies.toys', 'x = 1')
    write('2.ipynb', 'studies.toy', 'x = 1')
    assert page_of('resalign.studies.toy').name == '2.ipynb'
    first = study_meaning('toy')
    write('2.ipynb', 'studies.toy', 'x = 1 # one')
    assert study_meaning('toy') == first and first['resalign.studies.toy'] == 'digest'
    write('2.ipynb', 'studies.toy', 'x = 2')
    assert study_meaning('toy') != first


def test_what_a_page_imports(package, monkeypatch):
    "Counts for the stage, if its module is reached anyway"
    monkeypatch.setattr(meaning, 'page_of', lambda module: 'page')
    code = [f'from {REGISTRY} import shown', 'from resalign.other import x']
    monkeypatch.setattr(meaning, 'code_cells', lambda page: code)
    before = study_meaning('toy')
    package(REGISTRY, 'return 5', 'return 6')
    now = study_meaning('toy')
    assert {m for m in before | now if before.get(m) != now.get(m)} == {REGISTRY} and 'resalign.other' not in now
    assert 'shown' not in reached(STUDY)[REGISTRY]


def test_how_keys_are_made_is_no_part_of_them():
    "A study that names what makes keys does not depend on it"
    study = 'resalign.studies.courses'
    assert 'content' in reached(study, ('inputs',))[study]
    assert meaning.__name__ not in digests(study) and 'resalign.core.files' in digests(study)
    assert meaning.__name__ in digests(meaning.__name__)
