"""The commands from end to end, what they say about bad input, and how they end."""

import csv, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pandas as pd, pytest, torch, transformers
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard, metadata_load
from safetensors.torch import load_file, save_file

from compvis import single_file, small
from made import WORDS, prompts_of, write_prompts, write_sets
from resalign.use import batch
from resalign.use import cli
from resalign.use import jobs
from resalign.use import publish
from resalign.real import doctor
from resalign.core.runs import Stopped
from resalign.core.settings import UserError, params
from resalign.model.data import read_captions
from resalign.baselines.methods import METHODS
from resalign.model.pipelines import PretrainConfig, build_pipeline, save_pipeline

ROOT = Path(__file__).resolve().parent.parent
EVALUATORS = ROOT / 'outs/evaluators'
COMMANDS = 'unlearn finetune evaluate pretrain batch doctor attack'.split()
PARTS = 'unet vae text_encoder tokenizer scheduler'.split()
QUICK = ['--set', 'steps=2', '--set', 'retain_bank=16']
SIZES = [
    f'--set={s}'
    for s in (
        'vae_channels=[8,8,16,16]',
        'unet_channels=[16,32]',
        'vae_steps=2',
        'steps=2',
        'batch=4',
    )
]


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "So that sums are taken in the same order everywhere; and no bars of transformers, which other tests have imported"
    transformers.utils.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A tiny untrained pipeline, image folders and prompts, never written to"
    tmp = tmp_path_factory.mktemp('cli')
    write_sets(tmp, unsafe=6, retain=8, varied=6)
    save_pipeline(
        build_pipeline(
            list(read_captions(tmp / 'retain').text),
            PretrainConfig(vae_channels=(8, 8, 16, 16), unet_channels=(16, 32)),
        ),
        tmp / 'base',
    )
    write_prompts(tmp / 'prompts.csv', prompts_of(explicit=3, benign=3))
    return tmp


def copied(made, to):
    "A copy to spoil"
    to.mkdir(exist_ok=True)
    for p in made.iterdir():
        (shutil.copytree if p.is_dir() else shutil.copy)(p, to / p.name)
    return to


@pytest.fixture
def work(made, tmp_path):
    return copied(made, tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    "Run a command in this process: exit status, stdout, stderr"

    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [f'/somewhere/resalign-{name}', *map(str, args)])
        capsys.readouterr()
        status = 0
        try:
            getattr(cli, name)()
        except SystemExit as e:
            status = e.code or 0
        return status, *capsys.readouterr()

    return run


def told(path):
    return json.loads(path.read_text())


# ------------------------------------------------------------------ who they are


def test_the_entry_points(made):
    "Listed for installation; started as a user does, away from the repository: one line, exit status 2, no traceback"
    ini = ConfigParser()
    ini.read(ROOT / 'settings.ini')
    assert set(ini['DEFAULT']['console_scripts'].split()) == {
        f'resalign-{c}=resalign.use.cli:{c}' for c in COMMANDS
    }
    start = 'import sys; from resalign.use import cli; sys.argv[0] = "resalign-unlearn"; cli.unlearn()'
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            start,
            *(str(made / f) for f in ('nowhere', 'unsafe', 'retain', 'out')),
            '--method',
            'ga',
        ],
        cwd=made,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore'),
    )
    lines = done.stderr.strip().splitlines()
    assert (
        done.returncode == 2
        and len(lines) == 1 # without a warning: the package carries its defaults
        and lines[0].startswith('resalign-unlearn: error: ')
        and 'no such folder' in lines[0]
        and not done.stdout
    )


def test_help_teaches_and_a_slip_is_named(call):
    # help teaches: What goes in, what comes out, an example; the methods and profiles there are
    wrong = []
    for name in COMMANDS:
        status, out, _ = call(name, '--help')
        words = (
            ['In:  ', 'Out: ', f'Example:\n  resalign-{name} ']
            + list(METHODS) * (name == 'unlearn')
            + ['sd14-paper'] * (name == 'doctor')
        )
        if status or not all(w in out for w in words):
            wrong.append((name, status, [w for w in words if w not in out]))
    assert not wrong

    # a profile that is none
    status, out, err = call('doctor', 'yours')
    assert status == 2 and not out and "unknown 'yours'" in err and err.count('\n') == 1


def test_exit_statuses(made, call, monkeypatch, tmp_path):
    """2 unknown options, 130 for Ctrl-C, 128 and the signal where a run is asked to stop, 1 where something failed
    or is missing; a bug is not hidden"""
    line = ('finetune', made / 'base', made / 'varied', tmp_path / 'out')
    status, _, err = call('unlearn', 'a', 'b', 'c', 'd', '--stepz', 3)
    assert status == 2 and err.splitlines()[-1] == 'resalign-unlearn: error: unrecognized arguments: --stepz 3'

    def ends(e):
        def stop(*a, **kw):
            raise e

        monkeypatch.setattr('resalign.finetune', stop)
        return call(*line)

    assert ends(KeyboardInterrupt())[::2] == (130, 'resalign-finetune: interrupted\n') and ends(Stopped('kept', 15))[
        ::2
    ] == (143, 'resalign-finetune: kept\n')
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())
    assert not list(tmp_path.glob('out')) + list(tmp_path.glob('*.tmp*'))
    for statuses, ended in ((['done', 'skipped'], 0), (['done', 'failed'], 1)):
        (tmp_path / 'grid.yaml').write_text('rows: [{x: 1}]')
        asked = []
        monkeypatch.setattr(batch, 'batch', lambda *a, **kw: asked.append((a, kw)) or pd.DataFrame(dict(status=statuses)))
        assert (
            call('batch', 'page.ipynb', tmp_path / 'grid.yaml', tmp_path / 'runs', '--workers', 3, '--retries', 4)[0]
            == ended
        )
        where = dict(executor='local', workers=3, scheduler=None, retries=4)
        assert asked == [(('page.ipynb', dict(rows=[dict(x=1)]), str(tmp_path / 'runs')), where)]
    for state, ended in (('ok', 0), ('note', 0), ('missing', 1)):
        asked = []
        monkeypatch.setattr(
            doctor,
            'check_profile',
            lambda name, hashes: asked.append((name, hashes)) or [doctor.Finding('a', state, 'said', 'bring it')],
        )
        assert call('doctor', 'mine', *['--quick'] * (state == 'note'))[0] == ended and asked == [
            ('mine', state != 'note')
        ]
    monkeypatch.undo()


# ------------------------------------------------------------------ settings


def test_settings_of_files_and_options(tmp_path):
    "A file, a section below it; an option goes deeper by dots, and changes nothing but what it is given; the seed"
    (tmp_path / 'c.yaml').write_text('mine:\n  quick: {steps: 1, pool: {steps: [3], batch: 2}, seed: 7}\n  1: {a: b}\n')
    at = lambda section: cli.read_config(f"{tmp_path/'c.yaml'}:{section}")
    whole = at('mine.quick')
    assert whole == dict(steps=1, pool=dict(steps=[3], batch=2), seed=7) and list(
        cli.read_config(str(tmp_path / 'c.yaml'))['mine']
    ) == ['quick', 1]
    changed = cli.set_pairs(
        at('mine.quick'), ['lr=1.0e-4', 'pool.batch=4', 'new.deep.x=[a, 1]', 'steps=2', 'steps=3', 'text=a=b', 'none=']
    )
    assert changed == dict(
        steps=3, pool=dict(steps=[3], batch=4), seed=7, lr=1e-4, new=dict(deep=dict(x=['a', 1])), text='a=b', none=None
    )
    inner = dict(batch=2)
    cli.set_pairs(dict(pool=inner), ['pool.batch=4'])
    assert inner == dict(batch=2)
    of = lambda pairs=(), seed=None: cli.settings_for('unlearn.ga', f"{tmp_path/'c.yaml'}:mine.quick", pairs, seed)
    assert of()[1] == 7 and of(['seed=8'])[1] == 8 and of(['seed=8'], 9)[1] == 9 and of(['steps=5'])[0]['steps'] == 5
    for seed in (-1, 2**31, 1.5, 'x', True):
        with pytest.raises(UserError, match='seed: '):
            of([f'seed={seed}'])
    assert of(seed=2**31 - 1)[1] == 2**31 - 1 and of(seed=0)[1] == 0


# ------------------------------------------------------------------ they work


@pytest.fixture(scope='module')
def safe(made, tmp_path_factory):
    "What resalign-unlearn writes, from settings in a file, changed by options; what it says"
    tmp = tmp_path_factory.mktemp('safe')
    (tmp / 'mine.yaml').write_text('quick: {steps: 1, retain_bank: 16, lr: 1.0e-2, seed: 7}\n')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            sys,
            'argv',
            [
                'resalign-unlearn',
                *map(
                    str,
                    (
                        made / 'base',
                        made / 'unsafe',
                        made / 'retain',
                        tmp / 'safe',
                        '--pool',
                        made / 'varied',
                        '--config',
                        f"{tmp/'mine.yaml'}:quick",
                        '--set',
                        'steps=2',
                    ),
                ),
            ],
        )
        lines = []
        m.setattr('builtins.print', lambda *a, file=None, **kw: None if file else lines.append(' '.join(map(str, a))))
        cli.unlearn()
    return tmp / 'safe', lines


def test_the_unlearned_folder(safe, made):
    # unlearned folder: The pipeline's parts, the record of what was asked, a card, a row for each step; nothing else
    # beside it
    folder, lines = safe
    record = told(folder / 'record.json')
    assert [l.split()[0] for l in lines] == [
        'wrote',
        'model_index.json',
        'record.json',
        'cost.json',
        'adapter',
        'log.csv',
        'solves.csv',
        'README.md',
    ] and lines[0] == f'wrote {folder}'
    assert {p.name for p in folder.iterdir()} == {
        *PARTS,
        'model_index.json',
        'adapter',
        'record.json',
        'cost.json',
        'log.csv',
        'solves.csv',
        'README.md',
    } and {p.name for p in folder.parent.iterdir()} <= {'safe', 'mine.yaml', '.checkpoints'}
    assert (record['job'], record['method'], record['seed'], record['pool'], record['unsafe'], record['benign']) == (
        'unlearn',
        'resalign',
        7,
        [str(made / 'varied')],
        str(made / 'unsafe'),
        str(made / 'retain'),
    )
    assert (record['settings']['steps'], record['settings']['lr'], record['settings']['retain_bank']) == (2, 1e-2, 16)
    card = (folder / 'README.md').read_text()
    assert (
        card.startswith('---\nlibrary_name: diffusers')
        and 'Residual risk' in card
        and len(pd.read_csv(folder / 'log.csv')) == 2
    )

    # diffusers alone reads it: No class but those of diffusers and transformers is named; the pipeline draws; the
    # adapter goes onto the original and makes the same UNet
    folder, _ = safe
    libraries = {v[0] for v in told(folder / 'model_index.json').values() if isinstance(v, list)}
    assert libraries <= {'diffusers', 'transformers', None} and not [
        p for p in folder.glob('*/*.json') if 'resalign' in p.read_text()
    ]
    load = lambda f: StableDiffusionPipeline.from_pretrained(f, use_safetensors=True, dtype=torch.float32)
    pipe, base = load(folder), load(made / 'base')
    pipe.set_progress_bar_config(disable=True)
    assert pipe('a fox', num_inference_steps=1, output_type='np').images.shape == (1, 64, 64, 3)
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    base.load_lora_weights(folder / 'adapter')
    base.fuse_lora()
    base.unload_lora_weights()
    theirs, merged = pipe.unet.state_dict(), base.unet.state_dict()
    far = lambda a, b: max(float((a[k] - v).abs().max()) for k, v in b.items())
    assert far(merged, theirs) < 5e-4 and far(before, theirs) > 5 * far(merged, theirs)


@pytest.mark.skipif(not EVALUATORS.is_dir(), reason='outs/evaluators is not here: dvc pull evaluators')
def test_finetune_and_evaluate(safe, made, tmp_path, call):
    "In place of an earlier result, with prior pictures; a row for each picture and detector"
    for steps in 1, 2:
        status, out, err = call(
            'finetune',
            safe[0],
            made / 'varied',
            tmp_path / 'tuned',
            '--set',
            f'steps={steps}',
            '--prior',
            made / 'retain',
            '--set',
            'prior_weight=1.0',
        )
        assert status == 0 and f"wrote {tmp_path/'tuned'}" in out, err
    assert (
        len(pd.read_csv(tmp_path / 'tuned/log.csv')) == 2
        and told(tmp_path / 'tuned/record.json')['settings']['prior_weight'] == 1
    )
    status, out, err = call(
        'evaluate',
        tmp_path / 'tuned',
        made / 'prompts.csv',
        EVALUATORS,
        tmp_path / 'scores',
        '--set',
        'steps=2',
        '--detector',
        'detector-weapon',
        '--seed',
        1,
    )
    assert status == 0 and f"wrote {tmp_path/'scores'}" in out, err
    with open(tmp_path / 'scores/scores.csv') as f:
        rows = list(csv.DictReader(f))
    want = [(r['prompt'], int(r['seed']) + 1_000_003) for r in prompts_of(explicit=3, benign=3)]
    assert [(r['prompt'], int(r['seed']), r['detector']) for r in rows] == [(*w, 'detector-weapon') for w in want]
    record = told(tmp_path / 'scores/record.json')
    assert (record['steps'], record['seed'], list(record['evaluators'])) == (2, 1, ['reader', 'detector-weapon']) and (
        tmp_path / 'scores/sheet.png'
    ).is_file()
    page = (tmp_path / 'scores/report.html').read_text()
    assert 'report.html' in out and rows[0]['prompt'] in page and page.count('data:image/jpeg') == 6
    again = ('evaluate', tmp_path / 'tuned', made / 'prompts.csv', EVALUATORS, tmp_path / 'scores')
    status, _, err = call(*again, '--before', made / 'unsafe')
    assert status == 2 and 'expected a folder that resalign-evaluate wrote' in err
    status, _, err = call(*again, '--before', tmp_path / 'scores')
    assert status == 2 and 'is, or holds, the input' in err
    beside = (tmp_path / 'later', '--before', tmp_path / 'scores', '--set', 'steps=2', '--detector', 'detector-weapon')
    status, _, err = call(*again[:4], *beside, '--seed', 1)
    assert status == 0 and (tmp_path / 'later/report.html').read_text().count('data:image/jpeg') == 12, err


# ------------------------------------------------------------------ before a long run, and after it


def test_a_dry_run_writes_nothing(work, call, monkeypatch):
    "Time, memory and an estimate for all steps, from one step on two pictures"
    monkeypatch.chdir(work)
    state = lambda: {p: p.is_file() and p.stat().st_mtime_ns for p in work.rglob('*')}
    before = state()
    status, out, err = call(*unlearn(work, '--dry', '--set', 'steps=500'))
    said = dict(line.split('  ', 1) for line in out.splitlines())
    assert status == 0 and state() == before, err
    assert [*said] == ['device', 'loading', 'encoding', 'before the steps', 'one step', 'memory', 'the whole run']
    assert '22 pictures' in said['encoding'] and 'simulated fine-tunings of ' in said['one step']
    assert 'GB at most' in said['memory'] and said['the whole run'].endswith('for 500 steps')
    found = jobs.dry_run(work / 'base', work / 'unsafe', work / 'retain', 'uce', erase=WORDS)
    assert found['steps'] == 1 and found['whole'] >= found['step'] > 0  # in closed form


def test_one_file(made, tmp_path, call):
    """Names and numbers are those of a published checkpoint of this kind; diffusers reads the file that the command
    writes, and draws the same picture"""
    wrong = {}
    for kind in ('v1', 'v2', 'xl'):
        (tmp_path / kind).mkdir()
        pipe = small(kind, tmp_path / kind)
        pipe.save_pretrained(tmp_path / kind / 'folder')
        ours, theirs = publish.single_file(tmp_path / kind / 'folder'), single_file(pipe, kind)
        unread = ('position_ids', 'betas', 'alphas_cumprod', 'logit_scale')
        nobodys = [k for k in theirs if k.endswith(unread)]
        nobodys += [k for k in theirs if kind == 'v2' and re.search(r'resblocks\.23\.|\.text_projection$', k)]
        lost = theirs.keys() - ours.keys() - set(nobodys)
        wrong[kind] = [*lost, *(ours.keys() - theirs.keys()), *(k for k in ours if not torch.equal(ours[k], theirs[k]))]
    assert not any(wrong.values()), wrong
    command, *inputs = unlearn(made)[:4]
    status, out, err = call(command, *inputs, tmp_path / 'out', '--method', 'ga', *QUICK, '--single-file')
    assert status == 0 and '*.safetensors' in out, err
    one = StableDiffusionPipeline.from_single_file(
        str(tmp_path / 'out/out.safetensors'),
        config=str(tmp_path / 'out'),
        local_files_only=True,
        dtype=torch.float32,
        safety_checker=None,
        feature_extractor=None,
    )
    many = StableDiffusionPipeline.from_pretrained(tmp_path / 'out', dtype=torch.float32)
    pictures = []
    for pipe in one, many:
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        pictures.append(pipe('a fox', num_inference_steps=2, output_type='np', generator=noise).images)
    assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 0


def test_where_one_file_is_written_and_what_it_is_read_from(tmp_path, monkeypatch):
    "Named after its folder, or as asked; of weights in several files all"
    (tmp_path / 'mine/unet').mkdir(parents=True)
    for k in range(2): save_file({f'{k}': torch.ones(k + 1)}, tmp_path / f'mine/unet/model-{k}.safetensors')
    (tmp_path / 'mine/unet/config.json').write_text('{}')
    monkeypatch.setattr(publish, 'single_file', lambda folder: publish.read_part(folder, 'unet')[0])
    monkeypatch.chdir(tmp_path / 'mine')
    for asked, file in ((None, 'mine.safetensors'), (tmp_path / 'other.safetensors', '../other.safetensors')):
        publish.write_single_file('.', asked)
        assert {k: len(v) for k, v in load_file(file).items()} == {'0': 1, '1': 2}
    assert [p.name for p in (tmp_path / 'mine').glob('*.safetensors')] == ['mine.safetensors']


def test_to_the_hub(made, safe, call, monkeypatch):
    "Offline, without a token, or where the hub refuses it: one line, before anything is computed"
    asked = []
    monkeypatch.setattr(jobs, 'unlearn', lambda *a: asked.append(a))
    monkeypatch.setattr('resalign.unlearn', lambda *a: asked.append(a), raising=False)
    line = unlearn(made, '--push', 'me/safe')

    def refused(words, line=line):
        status, out, err = call(*line)
        assert (status, out, asked) == (2, '', []) and err.count('\n') == 1 and words in err, err

    refused("--push: 'safe': expected OWNER/NAME", unlearn(made, '--push', 'safe'))
    refused("--push: 'me/a..b': Cannot have", unlearn(made, '--push', 'me/a..b'))
    refused('offline')
    monkeypatch.setattr(publish.constants, 'is_offline_mode', lambda: False)
    monkeypatch.setattr(publish, 'get_token', lambda: None)
    refused('no token')
    monkeypatch.setattr(publish, 'get_token', lambda: 'hf_x')
    done = []

    class Hub:
        def whoami(self):
            if not done:
                raise OSError('401\nInvalid token')

        def create_repo(self, repo, **kw):
            done.append((repo, kw))

        def upload_folder(self, **kw):
            done.append(kw)

    monkeypatch.setattr(publish, 'HfApi', Hub)
    refused('401 Invalid token')
    assert publish.push(safe[0], 'me/safe').endswith('/me/safe')
    assert done[0] == ('me/safe', dict(private=True, exist_ok=True)) and done[1]['folder_path'] == str(safe[0])
    Hub.upload_folder = lambda self, **kw: 1 / 0
    with pytest.raises(UserError, match='is written, but not uploaded'):
        publish.push(safe[0], 'me/safe')


def test_the_card_as_the_hub_reads_it(safe, tmp_path):
    "huggingface_hub reads back what was measured: values, intervals, detectors; what could not be measured is absent"
    scores, folder = tmp_path / 'scores', tmp_path / 'safe'
    scores.mkdir()
    shutil.copytree(safe[0], folder)
    about = dict(nudenet=['3', 'ab' * 32, 0.45], inception=['1', 'cd' * 32, None])
    record = dict(pipeline='x', prompts='a b/my: prompts.csv', steps=1, guidance=1.0, seed=0, evaluators=about)
    (scores / 'record.json').write_text(json.dumps(record))
    (scores / 'summary.csv').write_text(
        'metric,value,low,high,n,detector\nIP,0.125,0.05,0.25,48,nudenet\nFID,31.5,,,48,inception\nUS,,,,48,nudenet\n'
    )
    jobs.write_card(folder, scores)
    card = ModelCard.load(folder / 'README.md')
    assert (card.data.library_name, card.data.pipeline_tag) == ('diffusers', 'text-to-image')
    found = {r.metric_type: r for r in card.data.eval_results}
    assert {k: r.metric_value for k, r in found.items()} == dict(IP=0.125, FID=31.5)
    assert found['IP'].metric_args == dict(ci95_low=0.05, ci95_high=0.25, threshold=0.45, n=48, detector='nudenet')
    assert found['FID'].metric_args == dict(n=48, detector='inception')
    assert found['IP'].dataset_name == 'my-prompts.csv' and 'Residual risk' in card.text
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and metadata_load(folder / 'README.md') == card.data.to_dict()
    assert not ModelCard.load(safe[0] / 'README.md').data.eval_results


def test_pretrain(made, tmp_path, call):
    status, out, err = call('pretrain', made / 'varied', tmp_path / 'base', *SIZES, '--seed', 3)
    assert status == 0 and f"wrote {tmp_path/'base'}" in out, err
    assert (
        all((tmp_path / 'base' / p).is_dir() for p in PARTS)
        and told(tmp_path / 'base/unet/config.json')['block_out_channels'] == [16, 32]
        and (tmp_path / 'base/losses.json').is_file()
    )


def test_defaults_without_params_yaml_are_announced(work, call, monkeypatch):
    monkeypatch.chdir(work)
    (work / 'params.yaml').write_text('profile: emoji\nprofiles: {emoji: {size: 64}}\n') # no section of ga
    status, _, err = call('unlearn', 'base', 'unsafe', 'retain', 'out', '--method', 'ga')
    assert status == 0 and 'warning: no --config' in err and 'unlearn.ga' in err


def test_a_checkpoint_of_other_settings_is_not_taken(work, call, monkeypatch):
    "A killed run's checkpoint, then a run into the same folder that asks for something else"
    from resalign.core import training

    with monkeypatch.context() as m:
        m.setattr(training, 'clear_checkpoint', lambda path: None)
        assert call(*finetune(work, '--set', 'steps=1', '--set', 'lr=1e-2'))[0] == 0
    assert list(work.glob('.checkpoints/out*'))
    for out in ('out', 'fresh'):
        assert (
            call('finetune', work / 'base', work / 'varied', work / out, '--set', 'steps=2', '--set', 'lr=1e-4')[0] == 0
        )
    assert (work / 'out/log.csv').read_text() == (work / 'fresh/log.csv').read_text()


def test_several_processes(made, tmp_path, monkeypatch):
    """The same command again by accelerate, whose exit status it takes; nothing in a process that is one of them;
    fewer than one are none"""
    asked = []
    monkeypatch.setattr(
        cli.subprocess, 'run', lambda line, env: asked.append((line, env)) or type('', (), dict(returncode=5))
    )
    monkeypatch.setattr(sys, 'argv', ['resalign-unlearn', 'x'])
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(SystemExit) as e:
        cli.on_processes(3)
    line, env = asked[0]
    assert (
        e.value.code == 5
        and line[line.index('--num_processes') + 1] == '3'
        and line[-2:] == ['resalign-unlearn', 'x']
        and env['OMP_NUM_THREADS'] == '1'
    )
    with pytest.raises(UserError, match='--processes: '):
        cli.on_processes(0)
    monkeypatch.setenv('RANK', '1')
    assert cli.on_processes(3) is None and len(asked) == 1


# ------------------------------------------------------------------ bad input


def unlearn(w, *more, pipeline='base', unsafe='unsafe', out='out'):
    return ['unlearn', w / pipeline, w / unsafe, w / 'retain', w / out, *QUICK, *more]


def finetune(w, *more):
    return ['finetune', w / 'base', w / 'varied', w / 'out', *more]


def evaluate(w, *more, evaluators=EVALUATORS):
    return ['evaluate', w / 'base', w / 'prompts.csv', evaluators, w / 'out', '--set', 'steps=1', *more]


def pretrain(w, *more, images='varied'):
    return ['pretrain', w / images, w / 'out', *SIZES, *more]


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rows(w, change):
    "Change the parsed lines of unsafe/metadata.jsonl"
    f = w / 'unsafe/metadata.jsonl'
    f.write_text(''.join(json.dumps(r) + '\n' for r in change([json.loads(l) for l in f.read_text().splitlines()])))


def set_row(w, **fields):
    rows(w, lambda rs: [rs[0], rs[1] | fields, *rs[2:]])


def without(w, column):
    rows(w, lambda rs: [{k: v for k, v in r.items() if k != column} for r in rs])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def pickled(w):
    for f in (w / 'base/unet').glob('*.safetensors'):
        f.rename(f.with_name('diffusion_pytorch_model.bin'))


# One or two of each kind, as commands tell them; all of them in test_faults_input.py
BAD = [  # spoil, command line, words of the message: field and file
    (lambda w: shutil.rmtree(w / 'unsafe'), unlearn, 'unsafe: no such folder'),
    (lambda w: (w / 'unsafe/metadata.jsonl').write_text('{"file_name": '), unlearn, 'metadata.jsonl'),
    (lambda w: without(w, 'text'), unlearn, "column 'text'"),
    (lambda w: set_row(w, text='  '), unlearn, 'row 2: text'),
    (lambda w: (w / 'unsafe/00000.png').unlink(), unlearn, "row 1: no such image '00000.png'"),
    (lambda w: set_row(w, file_name='../retain/00000.png'), unlearn, "row 2: file_name '../retain/00000.png'"),
    (lambda w: cut(w / 'unsafe/00000.png', 200), unlearn, '00000.png: not a readable image'),
    (None, lambda w: unlearn(w, '--pool', w / 'nowhere'), 'nowhere: no such folder'),
    (None, lambda w: pretrain(w, images='nowhere'), 'nowhere: no such folder'),
    (None, lambda w: unlearn(w, '--method', 'resaling'), "--method: unknown 'resaling', did you mean 'resalign'?"),
    (None, lambda w: unlearn(w, '--set', 'stepz=3'), "stepz: unknown 'stepz', did you mean 'steps'?"),
    (None, lambda w: pretrain(w, '--set', 'vae_step=3'), "did you mean 'vae_steps'?"),
    (None, lambda w: pretrain(w, '--set', 'cycles=3'), 'cycles: expected a list of mappings, got 3'),
    (None, lambda w: unlearn(w, '--set', 'steps=few'), 'steps: '),
    (None, lambda w: unlearn(w, '--set', 'steps=0'), 'steps: '),
    (None, lambda w: evaluate(w, '--set', 'steps=0'), 'steps: '),
    (None, lambda w: evaluate(w, '--set', 'guidance=-1'), 'guidance: '),
    (None, lambda w: finetune(w, '--set', 'optimizer=adamm'), 'optimizer: '),
    (None, lambda w: unlearn(w, '--set', 'steps'), "--set: 'steps'"),
    (None, lambda w: unlearn(w, '--set', 'steps=[1'), "--set: steps: '[1'"),
    (None, lambda w: unlearn(w, '--set', 'pool=3'), 'pool: '),
    (None, lambda w: unlearn(w, '--set', 'pool.algorithm=[lorra]'), 'pool.algorithm.0: '),
    (None, lambda w: unlearn(w, '--set', 'pool.steps=[0]'), 'pool.steps.0: '),
    (None, lambda w: unlearn(w, '--set', 'pool.optimizer=[]'), 'pool.optimizer: '),
    (None, lambda w: unlearn(w, '--set', 'pool.lr={lora: [1.0e-3]}'), "lr: no learning rate for 'full'"),
    (None, lambda w: unlearn(w, '--set', 'steps.more=3'), "--set: steps.more: 'steps' is 2"),
    (None, lambda w: finetune(w, '--set', 'prior_weight=1.0'), '--prior'),
    (None, lambda w: unlearn(w, '--compute', 'dtype'), "--compute: 'dtype'"),
    (None, lambda w: unlearn(w, '--config', w / 'no.yaml'), 'no.yaml'),
    (None, lambda w: unlearn(w, '--config', w / 'base'), 'base'),
    (lambda w: (w / 'c.yaml').write_text('a: [1'), lambda w: unlearn(w, '--config', w / 'c.yaml'), 'c.yaml: not YAML'),
    (
        lambda w: (w / 'c.yaml').write_text('- 1'),
        lambda w: unlearn(w, '--config', w / 'c.yaml'),
        'c.yaml: expected a mapping',
    ),
    (
        lambda w: (w / 'c.yaml').write_text('mine: {steps: 1}'),
        lambda w: unlearn(w, '--config', f"{w/'c.yaml'}:mien"),
        "unknown 'mien', did you mean 'mine'?",
    ),
    (
        lambda w: (w / 'c.yaml').write_text('mine: {lr: few}'),
        lambda w: unlearn(w, '--config', f"{w/'c.yaml'}:mine"),
        'c.yaml:mine: unlearn.resalign: lr: ',
    ),
    (
        lambda w: (w / 'c.yaml').write_text('lr: 1.0e-3'),
        lambda w: finetune(w, '--config', w / 'c.yaml', '--set', 'optimizer=adamm'),
        'error: settings of finetune: optimizer: ', # no fault of the file's
    ),
    (
        lambda w: (w / 'c.yaml').write_text('lr: 1.0e-3'),
        lambda w: unlearn(w, '--config', w / 'c.yaml', '--set', 'pool={algorithm: [lorra]}'),
        'error: unlearn.resalign: pool.algorithm.0: ',
    ),
    (lambda w: shutil.rmtree(w / 'base'), unlearn, 'base: no such folder'),
    (lambda w: shutil.rmtree(w / 'base/unet'), unlearn, "component 'unet'"),
    (pickled, unlearn, "component 'unet' has no .safetensors"),
    (lambda w: cut(next((w / 'base/unet').glob('*.safetensors')), 1000), unlearn, 'base: cannot be loaded'),
    (lambda w: edit(w / 'base/unet/config.json', in_channels=3), unlearn, 'in_channels is 3'),
    (lambda w: edit(w / 'base/unet/config.json', cross_attention_dim=7), unlearn, 'cross_attention_dim is 7'),
    (lambda w: (w / 'base/vae/config.json').write_text('{'), unlearn, 'vae/config.json: not JSON'),
    (lambda w: (w / 'out').write_text('mine'), unlearn, 'out: is no folder'),
    (None, lambda w: unlearn(w, out='base'), 'base: is, or holds, the input'),
    (None, lambda w: unlearn(w, out=''), 'is, or holds, the input'),
    (lambda w: ((w / 'out').mkdir(), (w / 'out/thesis.txt').write_text('mine')), unlearn, 'out: is not empty'),
    (lambda w: (w / 'file').write_text('mine'), lambda w: unlearn(w, out='file/out'), 'file: is no folder'),
    (lambda w: (w / 'prompts.csv').unlink(), evaluate, 'prompts.csv: no such file'),
    (lambda w: (w / 'prompts.csv').write_text('text\na fox\n'), evaluate, "column 'prompt'"),
    (
        lambda w: (w / 'prompts.csv').write_text('prompt,kind\na fox,explicitt\n'),
        evaluate,
        "row 1: kind: unknown 'explicitt', did you mean 'explicit'?",
    ),
    (lambda w: (w / 'prompts.csv').write_text('prompt,seed\na fox,1.5\n'), evaluate, 'row 1: seed: expected a whole number'),
    (lambda w: (w / 'prompts.csv').write_text('prompt,seed\na,1\nb,-1\n'), evaluate, 'row 2: seed'),
    (None, lambda w: evaluate(w, '--detector', 'detector-wepon'), "unknown 'detector-wepon', did you mean 'detector-weapon'?"),
    (None, lambda w: evaluate(w, evaluators=w / 'nowhere'), 'nowhere/card.json: no such file'),
    (None, lambda w: unlearn(w, '--method', 'ga', '--set', 'lr=1e30'), 'not finite at run ga, step 1'),
    (None, lambda w: finetune(w, '--set', 'lr=1e30', '--set', 'steps=5'), 'not finite at run finetune lora'),
]


def test_bad_input(made, tmp_path, call):
    "One line that names field and file, exit status 2, and nothing is written or changed"
    if not EVALUATORS.is_dir():
        pytest.skip('outs/evaluators is not here: dvc pull evaluators')
    wrong = []
    for k, (spoil, line, words) in enumerate(BAD):
        w = copied(made, tmp_path / str(k))
        if spoil:
            spoil(w)
        state = lambda: {p: p.is_file() and p.stat().st_mtime_ns for p in w.rglob('*')}
        before, args = state(), line(w)
        status, _, err = call(*args)
        last = [l for l in err.strip().splitlines() if not l.startswith('warning: ')] # of captions that are cut off
        if (
            status != 2
            or len(last) != 1
            or not last[0].startswith(f'resalign-{args[0]}: error: ')
            or words not in last[0]
            or state() != before
        ):
            wrong.append((words, status, err[-400:]))
        shutil.rmtree(w)
    assert not wrong
