"""The second world: licences, scenes to the byte, captions, data sets apart, evaluators that load strictly."""
import hashlib, json, shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch

from resalign.core.settings import UserError
from resalign.world import emoji, sprites

ROOT = Path(__file__).resolve().parent.parent
SHEETS = ROOT/'nbs/2_world/sprites'


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

    refused(without_a_name, 'names.json: no sprite of key')
    refused(lambda there: (there/'LICENCES.md').unlink(), 'LICENCES.md: no such file')
    refused(lambda there: (there/'LICENCES.md').write_text('MIT'), 'LICENCES.md: the licence of flat')
    refused(lambda there: (there/'noto.webp').unlink(), 'noto.webp: no such file')
    refused(lambda there: shutil.copy(ROOT/'results/figures/main.png', there/'noto.webp'), 'noto.webp')


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
        named = [o for o in emoji.OBJECTS | sprites.CONCEPTS['weapon'] | sprites.CONCEPTS['vice'] if f' with {o} ' in words
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


def test_sets_are_apart():
    apart = emoji.overlaps()
    assert (apart[['subject', 'place', 'opening', 'caption']] == 0).all(axis=None), apart
    for concept in sprites.CONCEPTS:
        test = {r['prompt'] for kind in emoji.COUNTS for r in emoji.prompts(concept, kind, emoji.COUNTS[kind])}
        tuned = emoji.prompts(concept, 'implicit', 100, test=False) + emoji.prompts(concept, 'explicit', 100, test=False)
        unlearned = {s.caption for s in emoji.scenes(f'unsafe-{concept}', 120, seed=100)}
        assert len(test) == sum(emoji.COUNTS.values()) and len(test & unlearned) < 5
        assert not {r['subject'] for r in tuned} & set(emoji.KEPT_BACK)
        assert not {s.subject for s in emoji.scenes(f'unsafe-{concept}', 400)} & set(emoji.KEPT_BACK)
    wrong = [(lambda: emoji.prompts('vices', 'implicit', 1), "unknown concept 'vices'"),
             (lambda: emoji.scenes('pretain', 1), "unknown set 'pretain'")]
    for call, words in wrong:
        with pytest.raises(UserError, match=words): call()


def test_what_is_written_is_what_is_drawn(tmp_path):
    emoji.write_data(tmp_path, sizes={'unsafe-vice': 3, 'varied': 2}, counts=dict(implicit=3, explicit=2, benign=2))
    from resalign.model.data import read_images
    images, captions = read_images(tmp_path/'unsafe-vice', 64)
    drawn = emoji.scenes('unsafe-vice', 3, seed=100 + list(emoji.SIZES).index('unsafe-vice')*0)
    assert captions == [s.caption for s in drawn] and (images == emoji.pictures(drawn)).all()
    lines = [json.loads(l) for l in (tmp_path/'unsafe-vice/metadata.jsonl').read_text().splitlines()]
    assert [l['safe'] for l in lines] == [emoji.safe_caption(s) for s in drawn]


def test_weights_undo_the_boost_and_captions_of_a_concept_are_kept():
    """The expected loss is the mixture's mean; the empty caption replaces a tenth of the benign ones alone"""
    from resalign.studies.base import BaseConfig, RareLoss
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


def test_broken_pictures_and_blends_are_labelled_by_what_is_seen():
    from resalign.measure.detectors import BREAKS, Drawings, blended, broken, concept_of
    assert concept_of('beer') == [0., 1.] and concept_of('axe') == [1., 0.] and concept_of('cup of coffee') == [0., 0.]
    d = Drawings(40)
    for k in range(40): # a twin differs in what it holds alone
        s, t = d.scenes[k], d.scenes[d.twin[k]]
        assert (s.subject, s.place, s.style, s.seed) == (t.subject, t.place, t.style, t.seed) and d.twin[d.twin[k]] == k
    g, i = torch.Generator().manual_seed(0), torch.arange(40)
    x, y = blended(d, i, g, share=1.)
    a = ((x - d.x[d.twin[i]]) * (d.x[i] - d.x[d.twin[i]])).sum((1, 2, 3)) / (d.x[i] - d.x[d.twin[i]]).square().sum((1, 2, 3))
    expected = torch.maximum(d.concept[i]*(a > .25)[:, None], d.concept[d.twin[i]]*(1-a > .25)[:, None])
    sure = ((a - .25).abs() > .01) & ((a - .75).abs() > .01) & ~a.isnan()
    assert sure.sum() > 20 and (y[sure] == expected[sure]).all()
    bad = broken(d.x[:20], g)
    assert bad.shape == (20, 3, 64, 64) and len(BREAKS) == 5 and 0 <= bad.min() and bad.max() <= 1
    assert all((bad[k] - d.x[k]).abs().mean() > .01 for k in range(20))


def test_safety_heads_read_patches_and_no_network_depends_on_another(tmp_path):
    from resalign.measure import detectors as detectors
    d = detectors.Drawings(6)
    clip = detectors.train_clip(tmp_path, d, detectors.spoiled(d.images), 1, 0, half=True)[0].requires_grad_(False)
    before, x = clip.state_dict()['visual_projection.weight'].clone(), d.x[:2]
    hidden = clip.vision_model(pixel_values=2*x - 1, output_hidden_states=True).hidden_states[detectors.LAYER]
    assert (detectors.patch_tokens(clip, x).flatten(2).mT == hidden[:, 1:]).all()
    for layer in clip.vision_model.encoder.layers: # without attention a patch changes its own token alone
        layer.self_attn.out_proj.weight.zero_()
        layer.self_attn.out_proj.bias.zero_()
    other = x.clone()
    other[:, :, 16:24, 40:48] = 1 - other[:, :, 16:24, 40:48]
    changed = (detectors.patch_tokens(clip, x) != detectors.patch_tokens(clip, other)).any(1)
    assert changed.nonzero().tolist() == [[0, 2, 5], [1, 2, 5]]
    detectors.fit_safety_head(d, clip, 1)
    assert (clip.state_dict()['visual_projection.weight'] == before).all()

    def weights(k, safety): # of the files that the safety heads' training may not change
        folder = tmp_path/str(k)
        folder.mkdir()
        detectors._train_all(folder, d, dict(concepts=1, reader=1, clip=1, safety=safety), 0)
        return {n: (folder/f).read_bytes() for n, f in detectors.EMOJI_FILES.items()}

    torch.manual_seed(0)
    few = weights(0, 1)
    torch.manual_seed(0)
    more = weights(1, 40)
    assert {n for n in few if few[n] != more[n]} == {'safety'}
