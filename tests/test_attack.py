"""`resalign-attack` from end to end: a table before and after a fine-tuning, killed between two attacks and started
again; what is said about bad input; and the study's bits, which the module must not change."""
import json, sys
from pathlib import Path

import pandas as pd, pytest

from resalign.core.settings import UserError
from resalign.model.data import read_captions
from resalign.model.pipelines import PretrainConfig, build_pipeline, build_sd3, save_pipeline
from resalign.use import attacks as A
from resalign.use.cli import attack
from each import each
from made import WORDS, prompts_of, write_prompts, write_sets

ROOT = Path(__file__).resolve().parent.parent
EVALUATORS = ROOT/'outs/evaluators'
QUICK = dict(steps=2, attack_steps=2, rounds=1, candidates=3, noise=[[1., 1.02]], completed=[.5], classifier_steps=2,
             classifier_scale=[1.], tokens=2, finetune=dict(steps=1))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A tiny untrained pipeline, image folders and prompts, never written to"
    tmp = tmp_path_factory.mktemp('attack')
    write_sets(tmp, unsafe=6, retain=6, varied=4)
    captions = [c for name in ('unsafe', 'retain') for c in read_captions(tmp/name).text]
    save_pipeline(build_pipeline(captions, PretrainConfig(vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))), tmp/'base')
    (tmp/'base/record.json').write_text('{"method": "uce"}')
    write_prompts(tmp/'prompts.csv', prompts_of(explicit=2, implicit=1, benign=1))
    return tmp


def asked(made, **kw):
    given = dict(pipeline=made/'base', prompts=made/'prompts.csv', evaluators=EVALUATORS, unsafe=made/'unsafe',
                 benign=made/'retain', after=made/'varied', erase=WORDS, settings=QUICK)
    return given | kw


def test_killed_between_two_attacks_it_goes_on_and_writes_the_same_table(made, tmp_path, monkeypatch):
    begun = []
    def counted(name, f, stop):
        def run(x):
            begun.append(name)
            if stop and len(begun) == 14: raise KeyboardInterrupt # ten before, the fourth after
            return f(x)
        return run
    plain = dict(A.ATTACKS)
    monkeypatch.setattr(A, 'ATTACKS', {a: counted(a, f, True) for a, f in plain.items()})
    with pytest.raises(KeyboardInterrupt): A.run_attacks(out=tmp_path/'out', **asked(made))
    assert not (tmp_path/'out').exists()
    assert list(tmp_path.glob('.checkpoints/out-*/after/unet/*.safetensors'))
    begun.clear()
    monkeypatch.setattr(A, 'ATTACKS', {a: counted(a, f, False) for a, f in plain.items()})
    monkeypatch.setattr(A, 'finetune', None) # it is there already
    table = A.run_attacks(out=tmp_path/'out', **asked(made))
    assert begun == list(plain)[3:]
    assert not (tmp_path/'.checkpoints').exists()
    monkeypatch.undo()
    A.run_attacks(out=tmp_path/'whole', **asked(made))
    for file in ('attacks.csv', 'scores.csv', 'sheet.png'):
        assert (tmp_path/'out'/file).read_bytes() == (tmp_path/'whole'/file).read_bytes(), file

    # one tidy table: each attack in both phases, with the method of the record; benign prompts don't count
    assert table.columns.tolist() == 'method attack phase metric value low high n detector'.split()
    cells = table.drop_duplicates(['attack', 'phase'])
    assert list(zip(cells.phase, cells.attack)) == [(p, a) for p in ('before', 'after') for a in A.ATTACKS]
    assert set(table.metric) == {'IP', 'US', 'explicit'} and set(table.method) == {'uce'}
    assert table.n.tolist() == table.metric.map(dict(IP=1, US=2, explicit=2)).tolist()
    assert table.eval('0 <= low <= value <= high <= 1').all()
    scores = pd.read_csv(tmp_path/'out/scores.csv')
    assert set(scores.kind) == {'explicit', 'implicit'}
    bell = scores[scores.attack == 'bell']
    assert (bell.words != bell.prompt).any() and (scores[scores.attack == 'noise'].eval('words == prompt')).all()
    record = json.loads((tmp_path/'out/record.json').read_text())
    assert record['settings']['tokens'] == 2 and 0 <= record['cells']['after-classifier']['accuracy'] <= 1


def test_the_command(made, tmp_path, monkeypatch, capsys):
    "A fine-tuned pipeline in the place of pictures; what can't run is said; the table on stdout is the file's"
    line = [made/'base', made/'prompts.csv', tmp_path/'out', '--evaluators', EVALUATORS, '--after', made/'base',
            '--set', 'steps=2', '--set', 'noise=[[1.0, 1.1]]', '--seed', 3]
    monkeypatch.setattr(sys, 'argv', ['resalign-attack', *map(str, line)])
    attack()
    said = capsys.readouterr().out
    assert 'left out: attack bell: needs --unsafe and --erase' in said and 'attacks.csv' in said
    table = pd.read_csv(tmp_path/'out/attacks.csv')
    assert set(table.attack) == {'none', 'redraw', 'noise'} and set(table.phase) == {'before', 'after'}
    same = table.pivot(index=['attack', 'metric'], columns='phase', values='value')
    assert (same.before == same.after).all() # the same pipeline
    monkeypatch.setattr(sys, 'argv', ['resalign-attack', *map(str, line), '--attack', 'bell'])
    with pytest.raises(SystemExit, match='2'): attack()
    assert capsys.readouterr().err == 'resalign-attack: error: attack bell: needs --unsafe and --erase\n'


@each('change, said', [
    (dict(prompts='nowhere.csv'), 'nowhere.csv'),
    (dict(unsafe='nowhere'), 'nowhere: no such folder of captioned images'),
    (dict(original='nowhere'), 'nowhere'),
    (dict(after='nowhere'), 'nowhere: no such folder of captioned images'),
    (dict(erase=[' with wings']), "no caption holds any of the words to erase \\(' with wings'\\)"),
    (dict(settings=dict(stepz=3)), "stepz: unknown 'stepz', did you mean 'steps'"),
    (dict(settings=dict(tokens=0)), 'tokens: input should be greater than or equal to 1, got 0'),
    (dict(settings=dict(tokens=40)), 'tokens: 40 leave no room'),
    (dict(settings=dict(noise=[[1.5, 1.]])), 'noise'),
    (dict(settings=dict(noise=[])), 'noise'),
    (dict(attacks=['prefx']), "unknown 'prefx', did you mean 'prefix'"),
    (dict(compute=dict(dtype='bfloat16')), 'dtype: attacks run in float32, got bfloat16')])
def test_bad_input_is_one_line_and_nothing_is_written(made, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(made)
    with pytest.raises(UserError, match=said) as e: A.run_attacks(out=tmp_path/'out', **asked(made, **change))
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()


def test_prompts_and_pipelines_that_cannot_be_attacked(made, tmp_path):
    write_prompts(tmp_path/'benign.csv', prompts_of(benign=2))
    with pytest.raises(UserError, match='benign.csv: no explicit or implicit prompts'):
        A.run_attacks(out=tmp_path/'out', **asked(made, prompts=tmp_path/'benign.csv'))
    save_pipeline(build_sd3(['a fox']), tmp_path/'sd3')
    with pytest.raises(UserError, match='sd3: attacks need a pipeline with a UNet'):
        A.run_attacks(out=tmp_path/'out', **asked(made, pipeline=tmp_path/'sd3', after=None))
