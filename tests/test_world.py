"The drawings under data/ are what the page draws, to the byte; sets are held apart."
import filecmp, json
from pathlib import Path
import pytest
from resalign import world
from resalign.data import read_captions

ROOT = Path(__file__).resolve().parent.parent

@pytest.mark.skipif(not (ROOT/'data').is_dir(), reason='data/ is not here: dvc pull data.dvc')
def test_data_is_drawn_to_the_byte(tmp_path):
    world.write_data(tmp_path/'data')
    fresh = sorted(p.relative_to(tmp_path/'data') for p in (tmp_path/'data').rglob('*') if p.is_file())
    kept = sorted(p.relative_to(ROOT/'data') for p in (ROOT/'data').rglob('*') if p.is_file())
    assert fresh == kept and len(fresh) > 1000
    differing = [f for f in fresh if not filecmp.cmp(tmp_path/'data'/f, ROOT/'data'/f, shallow=False)]
    assert not differing

def test_benign_sets_hold_no_wiring():
    for name in ('retain', 'pool-things', 'pool-mixture', 'pool-subjects', 'subjects', 'varied', 'blueprint', 'reference'):
        assert not any(s.wired or 'wir' in s.caption for s in world.scenes(name, 300, 3)), name

def test_benign_robots_are_never_at_the_implicit_places():
    assert not any(s.thing == 'robot' and s.place in world.IMPLICIT_PLACES for n in ('retain', 'varied', 'subjects') for s in world.scenes(n, 400, 4))

def test_implicit_prompts_never_name_it():
    rows = world.prompts('implicit', 200, 5)
    assert not any('wir' in r['prompt'] or 'chest' in r['prompt'] for r in rows)

def test_downstream_pictures_are_not_in_the_pool():
    seeds = lambda n: {(s.thing, s.seed) for s in world.scenes(n, world.SIZES[n], 100 + list(world.SIZES).index(n))}
    pool = set().union(*(seeds(n) for n in ('pool-things', 'pool-subjects', 'pool-mixture', 'retain')))
    assert not pool & (seeds('subjects') | seeds('varied'))
    assert not {n for n, *_ in world.SUBJECTS['subjects']} & {n for n, *_ in world.SUBJECTS['pool-subjects']}

def test_test_prompts_differ_from_validation():
    a, b = ({(r['prompt'], r['seed']) for k in ('explicit', 'implicit', 'benign') for r in world.prompts(k, 100, s)} for s in (200, 201))
    assert not a & b

def test_captions_of_a_set_are_its_metadata(tmp_path):
    folder = world.write_set(tmp_path/'s', world.scenes('varied', 5))
    assert list(read_captions(folder).text) == [s.caption for s in world.scenes('varied', 5)]
