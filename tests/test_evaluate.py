"""`resalign-evaluate` with the evaluators of emoji: the prompts say whose detectors count, mistakes are one line."""
import json, shutil, sys
from pathlib import Path

import pandas as pd, pytest

from resalign.measure.detectors import EMOJI_FILES
from resalign.model.pipelines import PretrainConfig, build_pipeline, save_pipeline
from resalign.use import cli
from resalign.world.emoji import prompts, scenes, write_set

EVALUATORS = Path(__file__).resolve().parent.parent/'outs/evaluators'
pytestmark = pytest.mark.skipif(not EVALUATORS.is_dir(), reason='outs/evaluators is not here: dvc pull evaluators')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    there = tmp_path_factory.mktemp('made')
    rows = [row for kind in ('explicit', 'implicit', 'benign') for row in prompts('weapon', kind, 3)]
    table = pd.DataFrame(rows)
    table.to_csv(there/'prompts.csv', index=False)
    table.drop(columns=['concept', 'subject', 'object', 'style']).to_csv(there/'plain.csv', index=False)
    table.replace({'concept': {'weapon': 'wepon'}}).to_csv(there/'typo.csv', index=False)
    table.assign(concept=['weapon', 'vice', *['']*7]).to_csv(there/'two.csv', index=False)
    write_set(there/'reference', scenes('reference', 4))
    config = PretrainConfig(vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))
    save_pipeline(build_pipeline([row['prompt'] for row in rows], config), there/'base')
    return there


@pytest.fixture
def call(made, tmp_path, monkeypatch, capsys):
    def run(csv, *options, evaluators=EVALUATORS):
        words = ['resalign-evaluate', made/'base', made/csv, evaluators, tmp_path/'out', '--set', 'steps=2', *options]
        monkeypatch.setattr(sys, 'argv', [str(w) for w in words])
        try: status = cli.evaluate() or 0
        except SystemExit as e: status = e.code
        return status, capsys.readouterr().err.strip()
    return run


def test_the_detectors_of_the_prompts_concept_count(call, tmp_path):
    status, err = call('prompts.csv')
    assert status == 0, err
    summary = pd.read_csv(tmp_path/'out/summary.csv').set_index('metric')
    assert dict(summary.detector) == dict(
        IP='detector-weapon', US='safety-weapon', explicit='detector-weapon', CLIP='clip-score',
        aesthetics='aesthetics', subjects='reader', objects='reader', styles='reader')
    scores = pd.read_csv(tmp_path/'out/scores.csv')
    assert set(scores.detector) == {'detector-weapon', 'safety-weapon', 'clip-score', 'aesthetics'}
    hits = scores[scores.detector == 'detector-weapon'].groupby('kind').score.agg(lambda s: (s > .5).mean())
    assert summary.value['IP'] == hits['implicit'] and summary.value['explicit'] == hits['explicit']
    seen = pd.read_csv(tmp_path/'out/objects.csv', keep_default_na=False)
    assert summary.value['subjects'] == (seen.subject == seen.seen_subject).mean() and len(seen) == 3
    assert summary.n['objects'] == (seen.object != '').sum()


def test_without_a_concept_all_detectors_score_and_rates_say_whose_they_are(call, made, tmp_path):
    status, err = call('plain.csv', '--reference', made/'reference')
    assert status == 0, err
    summary = pd.read_csv(tmp_path/'out/summary.csv')
    rates = [f'{metric}-{concept}' for concept in ('weapon', 'vice') for metric in ('IP', 'US', 'explicit')]
    assert list(summary.metric) == [*rates, 'CLIP', 'aesthetics', 'FID'] # prompts that say nothing have no objects
    assert list(summary.detector[:2]) == ['detector-weapon', 'safety-weapon'] and set(summary.n[:6]) == {3}
    flags = pd.read_csv(tmp_path/'out/flags.csv')
    assert flags.flag[0] == 'from 3 pictures and 96 features; use at least 192' and 'FID' in set(flags.metric)


def test_mistakes_are_one_line(call, tmp_path):
    def spoiled(name, change):
        shutil.copytree(EVALUATORS, tmp_path/name)
        change(tmp_path/name)
        return dict(evaluators=tmp_path/name)

    def kind(folder):
        card = json.loads((folder/'card.json').read_text())
        (folder/'card.json').write_text(json.dumps(card | dict(kind='emojis')))

    cases = [('typo.csv', [], {}, "typo.csv: column 'concept': unknown 'wepon', did you mean 'weapon'? (known: weapon, vice)"),
             ('two.csv', [], {}, "two.csv: column 'concept' names vice and weapon, expected one concept a file"),
             ('prompts.csv', ['--detector', 'detector-wepon'], {}, "unknown 'detector-wepon', did you mean 'detector-weapon'"),
             ('prompts.csv', ['--detector', 'detector-vice'], {}, "column 'concept': unknown 'weapon' (known: vice)"),
             ('prompts.csv', [], spoiled('kind', kind), "card.json: kind: unknown 'emojis', did you mean 'emoji'?")]
    for name, file in EMOJI_FILES.items():
        gone = spoiled(name, lambda folder: (folder/file).unlink())
        cases.append(('prompts.csv', [], gone, f'{name}/{file}: no such file, expected'))
    for csv, options, evaluators, words in cases:
        status, err = call(csv, *options, **evaluators)
        assert status == 2 and '\n' not in err and words in err and err.startswith('resalign-evaluate: error: '), (words, err)
        assert not (tmp_path/'out').exists()
