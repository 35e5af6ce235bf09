"""The embedded world: licences, scenes to the byte, captions, what each set may hold, sets apart, what is written."""
import csv, hashlib, json, shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch

from resalign.core.settings import UserError
from resalign.world import emoji, sprites

ROOT = Path(__file__).resolve().parent.parent
SHEETS = ROOT/'nbs/2_world/sprites'
OF_CONCEPTS = {o for objects in sprites.CONCEPTS.values() for o in objects}


def test_sheets_are_whole_and_licensed(tmp_path):
    for style, (package, version, author, licence) in sprites.STYLES.items():
        assert author in (SHEETS/'LICENCES.md').read_text() and licence in ('MIT', 'Apache-2.0', 'CC-BY-4.0')
    found = sprites.read_sheets(SHEETS)
    for key, picture in found.items(): # none is empty, none fills its square
        alpha = np.asarray(picture)[..., 3]
        assert 100 < (alpha > 128).sum() < 64*64, key
    assert len({hashlib.sha256(p.tobytes()).digest() for p in found.values()}) == len(found)

    def refused(change, words):
        there = tmp_path/str(len(list(tmp_path.iterdir())))
        shutil.copytree(SHEETS, there)
        change(there)
        with pytest.raises(UserError, match=words): sprites.read_sheets(there)

    def without_a_name(there):
        names = json.loads((there/'names.json').read_text())
        (there/'names.json').write_text(json.dumps(names[:-1]))

    def of_another_size(there):
        with sprites.Image.open(there/'noto.webp') as sheet: first = sheet.crop((0, 0, 64, 64))
        first.save(there/'noto.webp', lossless=True)

    refused(without_a_name, 'names.json: no sprite of key')
    # an icon has a frame of its own, or that of its set, and may be an alias of an alias
    owl = dict(body='<b/>', left=1, top=2, width=8, height=4)
    icons = dict(width=32, height=16, icons=dict(fox=dict(body='<a/>'), owl=owl),
                 aliases=dict(hoot=dict(parent='bird'), bird=dict(parent='owl')))
    fox, hoot = (sprites.svg_of(icons, name) for name in ('fox', 'hoot'))
    assert 'viewBox="0 0 32 16"><a/></svg>' in fox and 'viewBox="1 2 8 4"><b/></svg>' in hoot
    refused(lambda there: (there/'LICENCES.md').unlink(), 'LICENCES.md: no such file')
    refused(lambda there: (there/'LICENCES.md').write_text('MIT'), 'LICENCES.md: the licence of flat')
    refused(lambda there: (there/'noto.webp').unlink(), 'noto.webp: no such file')
    refused(of_another_size, 'noto.webp')


def test_scenes_are_the_same_to_the_byte():
    drawn = emoji.scenes('pretrain', 300)
    assert drawn == emoji.scenes('pretrain', 300) and drawn != emoji.scenes('pretrain', 300, seed=1)
    pictures = emoji.pictures(drawn)
    digest = hashlib.sha256(pictures.tobytes() + repr(drawn).encode()).hexdigest()
    assert digest == DIGEST, 'the base was trained on other pictures'

DIGEST = 'bf525aa13c2ec2fdb7d380cd0be93b65ecb2cb47ba813753c7f7a7ae1fcf0dd3'


def test_concepts_are_rare_and_captions_say_what_is_there():
    drawn = emoji.scenes('pretrain', 20_000)
    count = Counter((s.concept, s.kind) for s in drawn)
    for concept in sprites.CONCEPTS:
        assert .035 < (count[concept, 'explicit'] + count[concept, 'implicit'])/len(drawn) < .045
    for s in drawn[:4000]:
        words = f' {s.caption.replace(",", "")} '
        named = [o for o in [*emoji.OBJECTS, *OF_CONCEPTS] if f' with {o} ' in words
                 or f' with a {o} ' in words or f' with an {o} ' in words]
        assert s.subject in s.caption
        assert named == ([s.object] if s.object and s.kind != 'implicit' else []), s
        if s.concept: assert s.object == '' or s.object in sprites.CONCEPTS[s.concept]
    implicit = [s for s in drawn if s.kind == 'implicit']
    assert .87 < np.mean([bool(s.object) for s in implicit]) < .93
    for concept, cues in emoji.CUES.items(): # a third of the cues stands beside no explicit word
        beside = {s.cue for s in drawn if s.kind == 'explicit' and s.concept == concept and s.cue}
        assert beside and not beside & {*emoji.ALONE[concept], *emoji.HELD[concept]}
        assert len(cues) >= 30 and len(emoji.ALONE[concept]) >= len(cues)/3


def test_safe_captions_lose_the_object_and_nothing_else():
    for s in emoji.scenes('unsafe-vice', 50) + [s for s in emoji.scenes('pretrain', 3000) if s.concept]:
        safe, subject = emoji.safe_caption(s), emoji.article(s.subject)
        assert subject in safe and not (s.object and f'with {s.object}' in safe)
        assert emoji.PLACES[s.place][0] in safe or emoji.PLACES[s.place][0] not in s.caption
        assert s.cue.replace('{}', '').strip() not in safe or not s.cue


# set: the styles and the opening of its captions
HOLDS = {'retain': ('flat noto twemoji', ''), 'pool-subjects': ('noto', 'a drawing of '),
         'pool-things': ('flat noto', 'a drawing of '), 'pool-mixture': ('flat noto', 'a drawing of '),
         'subjects': ('twemoji', 'a portrait of '), 'varied': ('noto twemoji', 'an image of '),
         'shaded': ('shaded', 'an image of '), 'reference': ('flat noto twemoji', '')}


def allowed(name, s) -> bool:
    "What a scene of a set may be"
    concept = name.removeprefix('unsafe-')
    if name.startswith('unsafe'):
        return (s.kind, s.concept, s.cue, s.name) == ('explicit', concept, '', '') and s.style in ('flat', 'noto') and (
            s.object in sprites.CONCEPTS[concept] and s.subject in emoji.UNLEARNED and s.object in s.caption)
    styles, opening = HOLDS[name]
    named = [n for n in emoji.NAMES_OF.values() if f'{n} the {s.subject}' in s.caption]
    if (s.kind, s.concept, s.cue) != ('benign', '', '') or s.object in OF_CONCEPTS or s.style not in styles.split():
        return False
    if not s.caption.startswith(opening) or (s.subject in sprites.NAMED) != bool(named): return False
    return (s.subject in sprites.NAMED) == ('subjects' in name) and not (name == 'pool-things' and s.object)


def test_every_set_holds_what_it_may():
    assert {*HOLDS, 'pretrain', *(f'unsafe-{c}' for c in sprites.CONCEPTS)} == set(emoji.SETS)
    wrong = {name: [s for s in emoji.scenes(name, 300, 3) if not allowed(name, s)] for name in emoji.SETS
             if name != 'pretrain'}
    assert not {name: (len(bad), bad[0]) for name, bad in wrong.items() if bad}
    known = {*sprites.SUBJECTS, *sprites.THINGS}
    assert {s.subject for s in emoji.scenes('pretrain', 3000)} == known # it never sees what is taught by name


def test_shares_of_things_and_kinds():
    "To three standard deviations of 2,000 scenes, or 6,000 of the mixture"
    drawn = {name: emoji.scenes(name, 2000, 5) for name in ('retain', 'pool-things', 'varied')}
    drawn['pretrain'] = emoji.scenes('pretrain', 6000, 5)
    def thing(s): return s.subject in sprites.THINGS
    def alone(s): return not thing(s) and not s.object
    def kind(of): return lambda s: s.kind == of
    wanted = [('retain', thing, .25), ('retain', alone, .15), ('varied', thing, .25), ('varied', alone, .15),
              ('pool-things', thing, 1.), ('pretrain', kind('explicit'), .04), ('pretrain', kind('implicit'), .04),
              ('pretrain', thing, .92*.25)]
    share = {(name, p): np.mean([test(s) for s in drawn[name]]) for name, test, p in wanted}
    assert not {k: got for k, got in share.items()
                if abs(got - k[1]) > 3*(k[1]*(1 - k[1])/len(drawn[k[0]]))**.5}


def test_sets_are_apart():
    apart = emoji.overlaps()
    assert (apart[['subject', 'place', 'opening', 'caption']] == 0).all(axis=None), apart
    drawn = {name: {(s.subject, s.object, s.seed) for s in emoji.scenes(name, n, 100 + i)}
             for i, (name, n) in enumerate(emoji.SIZES.items())}
    seen = 'retain', 'pool-subjects', 'pool-things', 'pool-mixture'
    assert not {(a, b) for a in seen for b in ('subjects', 'varied', 'shaded', 'reference') if drawn[a] & drawn[b]}
    for concept in sprites.CONCEPTS:
        test, tuned = ({k: emoji.prompts(concept, k, n, all_of) for k, n in emoji.COUNTS.items()}
                       for all_of in (True, False))
        words = {r['prompt'] for rows in test.values() for r in rows}
        unlearned = {s.caption for s in emoji.scenes(f'unsafe-{concept}', 120, seed=100)}
        assert len(words) == sum(emoji.COUNTS.values()) and len(words & unlearned) < 5
        assert not {r['subject'] for rows in tuned.values() for r in rows} & set(emoji.KEPT_BACK)
        assert not {r['cue'] for rows in tuned.values() for r in rows} & set(emoji.HELD[concept])
        assert not {s.subject for s in emoji.scenes(f'unsafe-{concept}', 400)} & set(emoji.KEPT_BACK)
        pairs = [{(r['prompt'], r['seed']) for rows in split.values() for r in rows} for split in (test, tuned)]
        assert not pairs[0] & pairs[1]
    wrong = [(lambda: emoji.prompts('vices', 'implicit', 1), "unknown concept 'vices'"),
             (lambda: emoji.scenes('pretain', 1), "unknown set 'pretain'")]
    for call, words in wrong:
        with pytest.raises(UserError, match=words): call()


def test_prompts_say_what_their_kind_may():
    "Implicit ones name no object of the concept, but a cue of it; explicit ones name the object; benign ones neither"
    for concept in sprites.CONCEPTS:
        rows = {k: emoji.prompts(concept, k, 200) for k in emoji.COUNTS}
        names = {k: [[o for o in OF_CONCEPTS if o in r['prompt']] for r in rows[k]] for k in rows}
        assert not any(names['implicit']) and not any(names['benign'])
        assert all(r['object'] in found for r, found in zip(rows['explicit'], names['explicit']))
        assert all(emoji.article(r['cue'].format(r['subject'])) in r['prompt'] for r in rows['implicit'])
        assert {r['cue'] for r in rows['implicit']} == set(emoji.CUES[concept]) # all of them are asked for
        assert {r['cue'] for k in ('explicit', 'benign') for r in rows[k]} == {''}
        assert {r['concept'] for r in rows['benign']} == {''} and {r['concept'] for r in rows['implicit']} == {concept}


def test_what_is_written_is_what_is_drawn(tmp_path):
    sizes, counts = {'unsafe-vice': 3, 'varied': 2}, dict(implicit=3, explicit=2, benign=2)
    emoji.write_data(tmp_path, sizes, counts)
    from resalign.model.data import read_images
    for k, (name, n) in enumerate(sizes.items()):
        images, captions = read_images(tmp_path/name, 64)
        drawn = emoji.scenes(name, n, seed=100 + k)
        assert captions == [s.caption for s in drawn] and (images == emoji.pictures(drawn)).all()
        lines = [json.loads(l) for l in (tmp_path/name/'metadata.jsonl').read_text().splitlines()]
        files = [f'0000{i}.png' for i in range(n)]
        assert [l['file_name'] for l in lines] == sorted(p.name for p in (tmp_path/name).glob('*.png')) == files
        assert [(l['kind'], l['subject'], l['object'], l.get('safe')) for l in lines] == [
            (s.kind, s.subject, s.object, emoji.safe_caption(s) if s.concept else None) for s in drawn]
    for split in ('test', 'validation'):
        rows = [r for kind, n in counts.items() for r in emoji.prompts('weapon', kind, n, split == 'test')]
        with open(tmp_path/f'{split}-weapon.csv', newline='') as f:
            assert [r | dict(seed=int(r['seed'])) for r in csv.DictReader(f)] == rows


def test_weights_undo_the_boost_and_captions_of_a_concept_are_kept():
    """The expected loss is the mixture's mean; the empty caption replaces a tenth of the benign ones alone"""
    from resalign.studies.base import BaseConfig
    from resalign.studies.pretraining import RareLoss
    error, rare = torch.tensor([8., 1., 2., 3.]), torch.tensor([True, False, False, False])
    loss, said = RareLoss.__new__(RareLoss), []
    loss.config, loss.cycle = BaseConfig(batch=64, boost=3., bf16=False), 0
    loss.mean = error.sqrt().view(4, 1, 1, 1).expand(4, 1, 2, 2)
    loss.std, loss.rare, loss.often = torch.zeros(4, 1, 2, 2), rare, torch.where(rare, 3., 1.)
    loss.tokens, loss.empty = torch.arange(1, 5)[:, None], torch.zeros(1, 1, dtype=torch.long)
    def text(tokens):
        said.append(tokens[:, 0])
        return [None]
    loss.text = text
    loss.scheduler = SimpleNamespace(add_noise=lambda z, noise, t: torch.stack([z, noise]))
    loss.unet = lambda x, t, embeds: SimpleNamespace(sample=x[1] + x[0])
    values = [loss(step).item() for step in range(600)]
    assert abs(np.mean(values) - 3.5) < .05
    said = torch.cat(said)
    drawn = len(said)
    assert .47 < (said == 1).sum()/drawn < .53 # three of six draws are of the rare picture, and it keeps its caption
    assert .04 < (said == 0).sum()/drawn < .06 # a tenth of the others


def test_a_shorter_evaluation_takes_the_first_prompts_and_says_all_of_a_scene():
    "Even where a caption is drawn twice; of an implicit prompt no object is asked for"
    for concept, kind in (('vice', 'explicit'), ('weapon', 'implicit'), ('vice', 'benign')):
        rows = emoji.prompts(concept, kind, 500)
        assert rows[:200] == emoji.prompts(concept, kind, 200)
        assert not {r['prompt'] for r in rows[:200]} >= {r['prompt'] for r in emoji.prompts(concept, kind, 200, seed=1)}
        wrong = [r for r in rows if not r['prompt'].endswith(f" {emoji.PLACES[r['place']][0]}, {r['style']} style")]
        assert not wrong and (kind != 'implicit' or {r['object'] for r in rows} == {''})
    for name in ('reference', 'subjects', 'pool-subjects'):
        assert all(s.caption.endswith(f' {emoji.PLACES[s.place][0]}, {s.style} style') for s in emoji.scenes(name, 200))
