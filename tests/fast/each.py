"One test over many cases: each one runs, and pytest names every one that fails."
import functools, inspect, reprlib

import pytest


def each(names, cases):
    "Like parametrize, but one test; `tmp_path` and `monkeypatch` are a case's own"
    names = [name.strip() for name in names.split(',')]

    def over_all(test):
        fixtures = inspect.signature(test).parameters

        @functools.wraps(test)
        def run(subtests, **given):
            for k, case in enumerate(cases):
                asked = dict(zip(names, case if len(names) > 1 else [case], strict=True))
                said = ', '.join(f'{name}={reprlib.repr(value)}' for name, value in asked.items())
                with subtests.test(said), pytest.MonkeyPatch.context() as patches:
                    own = {}
                    if 'subtests' in fixtures: own['subtests'] = subtests # of another `each`
                    if 'monkeypatch' in given: own['monkeypatch'] = patches
                    if 'tmp_path' in given:
                        own['tmp_path'] = given['tmp_path']/str(k)
                        own['tmp_path'].mkdir()
                    test(**given | own | asked)

        first = inspect.Parameter('subtests', inspect.Parameter.POSITIONAL_OR_KEYWORD)
        others = [p for name, p in fixtures.items() if name not in names and name != 'subtests']
        run.__signature__ = inspect.Signature([first, *others])
        return run

    return over_all
