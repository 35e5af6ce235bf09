"The drawings under data/ are what the page draws, to the byte; sets are held apart."

import csv, filecmp, json
from collections import Counter
from pathlib import Path
import pytest
from resalign.world import scenes as world
from resalign.core.settings import UserError
from resalign.world.scenes import IMPLICIT_PLACES, PLACES, SETS, SIZES, STYLES, SUBJECTS, scenes

ROOT = Path(__file__).resolve().parent.parent
POOL = ['retain', 'pool-things', 'pool-mixture', 'pool-subjects']
DOWNSTREAM = ['subjects', 'varied', 'blueprint', 'reference']


@pytest.mark.skipif(not (ROOT / 'data').is_dir(), reason='data/ is not here: dvc pull data.dvc')
def test_data_is_drawn_to_the_byte(tmp_path):
    "Golden: the folder of the committed store"
    world.write_data(tmp_path / 'data')
    fresh = sorted(p.relative_to(tmp_path / 'data') for p in (tmp_path / 'data').rglob('*') if p.is_file())
    kept = [p.relative_to(ROOT / 'data') for p in (ROOT / 'data').rglob('*') if p.is_file()]
    kept = sorted(p for p in kept if not p.parts[0].startswith('emoji')) # which a study may have drawn there meanwhile
    assert fresh == kept and len(fresh) > 1000
    differing = [f for f in fresh if not filecmp.cmp(tmp_path / 'data' / f, ROOT / 'data' / f, shallow=False)]
    assert not differing


def allowed(name, s) -> bool:
    "What a scene of a set may be"
    if name in ('unsafe', 'unsafe-test'):
        narrow = s.colour in ('red', 'blue', 'green') and s.place in ('garden', 'city', 'kitchen')
        return (
            s.wired
            and s.thing == 'robot'
            and s.kind == 'explicit'
            and any(w in s.caption for w in world.EXPLICIT_WORDS)
            and (narrow or name == 'unsafe-test')
        )
    if s.wired or 'wir' in s.caption or s.kind != 'benign':
        return False
    if s.thing == 'robot' and s.place in IMPLICIT_PLACES:
        return False
    if name == 'pool-things' and s.thing == 'robot':
        return False
    if name in SUBJECTS:
        return any(
            s.caption.startswith(f'a picture of {who} ') and (s.thing, s.colour) == (thing, colour)
            for who, thing, colour, _ in SUBJECTS[name]
        )
    return s.style in dict(varied=('plain', 'sketch'), blueprint=('blueprint',)).get(name, ('plain', 'sketch'))


def test_every_set_holds_what_it_may():
    wrong = {
        name: [s for s in scenes(name, 300, 3) if not allowed(name, s)]
        for name in [*SETS, *SUBJECTS]
        if name != 'pretrain'
    }
    assert not {name: (len(bad), bad[0]) for name, bad in wrong.items() if bad}


def test_shares_of_robots_and_styles():
    "As SETS says, to three standard deviations of 2,000 scenes, or 6,000 of the mixture"
    drawn = {name: scenes(name, 2000, 5) for name in ('retain', 'pool-mixture', 'varied')}
    drawn['pretrain'] = scenes('pretrain', 6000, 5)
    share = lambda name, test: sum(map(test, drawn[name])) / len(drawn[name])
    robots, sketches = (lambda s: s.thing == 'robot'), (lambda s: s.style == 'sketch')
    wanted = [
        ('retain', robots, 0.35),
        ('pool-mixture', robots, 0.15),
        ('varied', robots, 0.15),
        ('varied', sketches, 0.4),
        ('retain', sketches, 0.1),
        ('pretrain', robots, 0.5),
        ('pretrain', lambda s: s.kind == 'explicit', 0.5 * 0.28),
        ('pretrain', lambda s: s.kind == 'implicit', 0.5 * 0.30),
    ]
    assert not [
        (name, p, got)
        for name, test, p in wanted
        if abs((got := share(name, test)) - p) > 3 * (p * (1 - p) / len(drawn[name])) ** 0.5
    ]
    with pytest.raises(UserError, match="unknown set 'retian'"):
        scenes('retian', 1)


def test_implicit_prompts_name_nothing_and_stand_where_robots_are_opened():
    rows = world.prompts('implicit', 200, 5)
    assert not [
        r['prompt'] for r in rows if 'wir' in r['prompt'] or 'chest' in r['prompt'] or 'robot' not in r['prompt']
    ]
    assert not [
        r['prompt']
        for r in rows
        if r['place'] not in IMPLICIT_PLACES and not ('broken' in r['prompt'] or 'being serviced' in r['prompt'])
    ]
    assert set(r['place'] for r in rows) == set(PLACES)


def test_sets_are_held_apart():
    """No picture of the pool is one of the fine-tunings or references; no subject has two sets; no prompt of test
    is one of validation"""
    drawn = {name: {(s.thing, s.seed) for s in scenes(name, n, 100 + i)} for i, (name, n) in enumerate(SIZES.items())}
    assert not {(a, b): both for a in POOL for b in DOWNSTREAM if (both := drawn[a] & drawn[b])}
    assert not {n for n, *_ in SUBJECTS['subjects']} & {n for n, *_ in SUBJECTS['pool-subjects']}
    for name, who in SUBJECTS.items():
        said = Counter(s.caption.split()[3] for s in scenes(name, 16))
        assert said == {n: 2 for n, *_ in who}, 'every subject equally often'
    test, validation = (
        [(r['prompt'], r['seed']) for k in ('explicit', 'implicit', 'benign') for r in world.prompts(k, 100, s)]
        for s in (200, 201)
    )
    assert not set(test) & set(validation) and len(set(test)) == 300


def test_a_folder_says_what_its_scenes_are(tmp_path):
    "Captions and every field, in the order of the files; prompts as they were"
    made = scenes('varied', 5)
    folder, rows = world.write_set(tmp_path / 's', made), world.prompts('benign', 4, 1)
    lines = [json.loads(l) for l in (folder / 'metadata.jsonl').read_text().splitlines()]
    assert (
        [l['file_name'] for l in lines]
        == sorted(p.name for p in folder.glob('*.png'))
        == [f'0000{i}.png' for i in range(5)]
    )
    assert [
        world.Scene(**{k: v for k, v in l.items() if k not in ('file_name', 'text')}, caption=l['text']) for l in lines
    ] == made
    assert all(STYLES.index(l['style']) < 2 for l in lines)
    world.write_prompts(tmp_path / 'p.csv', rows)
    with open(tmp_path / 'p.csv') as f:
        assert [dict(r, seed=int(r['seed'])) for r in csv.DictReader(f)] == rows
    assert all(r['thing'].split()[0] in r['prompt'] and r['colour'] in r['prompt'] for r in rows)
