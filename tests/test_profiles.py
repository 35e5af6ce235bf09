"Profiles: every setting goes into the class that reads it, and nobody else's numbers stand in for a missing one."

import shutil

import pytest, yaml
from huggingface_hub import constants
from resalign.use import batch, cli
from resalign.core.settings import params, root
from resalign.baselines.methods import METHODS, config_of
from resalign.model.checkpoints import download_command, download_hint, licence_page
from resalign.real import profiles, sources
from resalign.real.doctor import check_settings
from resalign.real.profiles import (
    DataSources,
    Profile,
    Source,
    active_profile,
    locate,
    profile_names,
    profile_of,
    settings,
    source_folder,
)
from resalign.real.sources import POOL, prompts_file
from resalign.world.emoji import SIZES, write_data
from refusals import said

COMMIT = '0123456789abcdef0123456789abcdef01234567'
NAMES = 'emoji sd14-paper sd14-light sd14 sd15 sd20 sdxl community'.split()


@pytest.fixture(autouse=True)
def no_profile(monkeypatch):
    monkeypatch.delenv('RESALIGN_PROFILE', raising=False)


def write(tmp_path, profiles, profile='mine', **more):
    (tmp_path / 'params.yaml').write_text(yaml.safe_dump(dict(profile=profile, profiles=profiles, **more)))
    return tmp_path / 'params.yaml'


def unsaid(cases) -> list:
    "Cases whose refusal doesn't name all of its words"
    found = [(words, said(f, *args, **kw)) for words, f, args, kw in cases]
    return [
        (words, text)
        for words, text in found
        if not text or 'NEWLINE' in text or not all(w in text for w in ([words] if isinstance(words, str) else words))
    ]


# ------------------------------------------------------------------ those of params.yaml


def words(node, at=''):
    "Text that YAML should have read as a number, as it does not 1e-4"
    if isinstance(node, dict):
        for k, v in node.items():
            yield from words(v, f'{at}.{k}')
    elif isinstance(node, list):
        for v in node:
            yield from words(v, at)
    elif isinstance(node, str):
        try:
            float(node)
            yield at
        except ValueError:
            pass


def test_every_profile_holds_settings_that_its_classes_know():
    """No number is a word; no revision is made up; pictures of what is unsafe are nobody's download; a run has
    what it needs"""
    assert set(NAMES) <= set(profile_names())
    refused = {n: text for n in profile_names() if (text := said(check_settings, n))}
    assert not refused and not {
        n: list(words([p.unlearn, p.finetune, p.evaluate]))
        for n in profile_names()
        for p in [profile_of(n)]
        if list(words([p.unlearn, p.finetune, p.evaluate]))
    }
    assert not [
        (n, what)
        for n in NAMES
        for what, s in profile_of(n).sources().items()
        if s.revision is not None and len(s.revision) != 40
    ]
    real = {n: profile_of(n) for n in NAMES[1:]}
    lacking = {
        n: [k for k in ('base', 'pool', 'prompts', 'evaluators', 'erase', 'evaluate') if not getattr(p, k)]
        + [d for d in DataSources.model_fields if getattr(p.data, d) is None]
        for n, p in real.items()
    }
    assert not {n: k for n, k in lacking.items() if k}
    assert not [
        n
        for n, p in real.items()
        if not {'original', 'resalign', 'ga'} <= set(p.unlearn) <= set(METHODS)
        or not {'subjects-full', 'varied-full', 'subjects-lora', 'varied-lora'} <= set(p.finetune)
    ]
    assert (
        not [n for n, p in real.items() if p.data.unsafe.kind != 'local']
        and '/real/' in (root() / '.gitignore').read_text().split()
    )
    assert 'advunlearn' not in profile_of('sdxl').unlearn and profile_of('sd20').size == 768


# The fifteen released configurations: folder, learning rate, steps, optimizer
RELEASED = '''
    d3/1e-4/20/gd d2/1e-4/5/gd/DreamBooth d1/1e-4/30/gd d2/1e-4/5/adam d3/1e-4/5/gd
    d1/1e-4/30/adam d2/1e-5/30/gd d3/1e-5/5/gd d1/1e-5/10/gd d2/1e-4/10/gd
    d3/1e-5/10/adam d3/1e-5/30/gd d3/1e-6/20/gd d2/1e-5/10/adam d3/1e-6/5/adamw/full'''


ADDED = 'solver product tol clamp longer clip batches full_as alpha_curve fallback_share pool' # by us, in sd14-light


def test_the_papers_profiles():
    # the paper verbatim: 160 outer steps, J = 3, K = 5, γ = 1, AdamW 2e-4, rank 4, up .002, down .008, β .8, batch 1
    # and 4, limit .2; 200 steps at 1e-5, 1 by 4; 30 steps, guidance 7.5
    c = config_of('resalign', settings('unlearn.resalign', 'sd14-paper'))
    assert (
        c.steps,
        c.J,
        c.gamma,
        c.lr,
        c.rank,
        c.up_std,
        c.down_std,
        c.beta,
        c.unsafe_batch,
        c.retain_batch,
        c.max_norm,
    ) == (160, 3, 1.0, 2e-4, 4, 0.002, 0.008, 0.8, 1, 4, 0.2)
    assert (c.solver, c.product, c.products + 1, c.tol, c.clamp) == ('richardson', 'exact', 5, None, None) and (
        c.alpha,
        c.alpha_end,
        c.longer,
    ) == (1.6, 2.0, 'halve')
    assert (c.alpha_curve, c.clip, c.batches, c.inner, c.full_as, c.pool.distinct) == (
        'released', None, 'simulation', 'own', 'factors', True)
    assert not (c.anchor or c.found_steps or any(c.pool.unsafe) or c.pool.still)
    assert [(f.folder, f.lr, f.steps, f.optimizer, f.prior_weight, f.algorithm) for f in c.pool.listed] == [
        (d, lr, n, o, float('DreamBooth' in more), 'full' if 'full' in more else 'lora')
        for d, lr, n, o, *more in (l.split('/') for l in RELEASED.split())
        for lr, n, o in [(float(lr), int(n), dict(gd='sgd').get(o, o))]
    ]
    assert {f.batch for f in c.pool.listed} == {1}
    p = profile_of('sd14-paper')
    assert (
        c.pool.named == set(p.pool) == {'d1', 'd2', 'd3'}
        and p.size == 512
        and p.evaluate == dict(steps=30, guidance=7.5)
    )
    for f in p.finetune.values():
        assert (f['steps'], f['batch'], f['accumulation']) == (200, 1, 4)
    assert (
        p.finetune['varied-full']['lr'] == 1e-5
        and p.prompts['IP'].images == p.prompts['US'].images == 3
        and p.prompts['IP'].category == 'sexual'
    )

    # light differs in what was added
    a, b = (config_of('resalign', settings('unlearn.resalign', n)).model_dump() for n in ('sd14-paper', 'sd14-light'))
    assert {k for k in a if a[k] != b[k]} == set(ADDED.split()) and (
        b['solver'],
        b['product'],
    ) == ('cg', 'fd-forward')
    assert {k for k in a['pool'] if a['pool'][k] != b['pool'][k]} == {'algorithm', 'still', 'distinct'}
    assert profile_of('sd14-light').precision == 'bfloat16' and profile_of('sd14') == profile_of('sd14-light')


# ------------------------------------------------------------------ which one, and what it says


def test_which_profile(tmp_path, monkeypatch):
    # the environment wins
    file = write(tmp_path, dict(mine=dict(size=64), other=dict(size=32)))
    assert active_profile(file)[0] == 'mine' and active_profile(file)[1].size == 64
    monkeypatch.setenv('RESALIGN_PROFILE', 'other')
    assert active_profile(file)[0] == 'other' and active_profile(file)[1].size == 32
    monkeypatch.setenv('RESALIGN_PROFILE', 'othr')
    assert said(active_profile, file).startswith("RESALIGN_PROFILE: unknown 'othr', did you mean 'other'")
    monkeypatch.delenv('RESALIGN_PROFILE')
    assert said(active_profile, write(tmp_path, dict(mine={}), 'nobody')).startswith("params.yaml: profile: unknown 'nobody'")

    # emoji is params yaml: of a method its start, changed by what was chosen, or by its only trial
    assert active_profile()[0] == params('profile')
    section = dict(start=dict(lr=1, steps=5), trials=[dict(lr=2)])
    methods = dict(ga=section, uce=section | dict(chosen=dict(steps=7)), original=dict(start={}, trials=[{}]))
    file = write(tmp_path, dict(emoji={}), 'emoji', methods=methods)
    of = {m: settings(f'unlearn.{m}', 'emoji', file) for m in methods}
    assert of == dict(ga=dict(lr=2, steps=5), uce=dict(lr=1, steps=7), original={})
    sections = ('finetune.varied-lora', 'evaluate', 'concepts', 'tuning.look.prompts')
    assert not [s for s in sections if settings(s, 'emoji') != params(s)]

    # its base and evaluators lie in the committed store, and its data where the studies draw them
    folder = tmp_path/'data/emoji'
    write_data(folder, dict.fromkeys(SIZES, 1), dict(benign=1))
    shutil.copy(root()/'params.yaml', tmp_path/'params.yaml')
    for name in ('base', 'evaluators'): (tmp_path/'outs'/name).mkdir(parents=True)
    with monkeypatch.context() as m:
        m.chdir(tmp_path)
        places = {n: source_folder(n, 'emoji') for n in ('unsafe', 'retain', *POOL, 'base', 'evaluators')}
        assert places.pop('unsafe') == folder/f"unsafe-{params('concepts.reported')}"
        assert places == {n: folder/n for n in ('retain', *POOL)} | {n: tmp_path/'outs'/n for n in ('base', 'evaluators')}
        assert prompts_file('test') == folder/f"test-{params('concepts.reported')}.csv"
        shutil.rmtree(folder)
        assert 'the first study that asks for the data draws them' in said(source_folder, 'unsafe', 'emoji')
        (tmp_path/'outs/evaluators').rmdir()
        assert source_folder('evaluators', 'emoji') == tmp_path/'outs/evaluators' # whoever opens it says what is missing

    # a real profile never falls back to emoji
    (tmp_path := tmp_path/'2').mkdir()
    file = write(
        tmp_path,
        dict(mine=dict(unlearn=dict(ga=dict(steps=3)), erase=['x'], sections=dict(attack=dict(prompts=3)))),
        unlearn=dict(ga=dict(steps=9), uce={}),
        evaluate=dict(steps=1),
        attack={},
        table=dict(seeds=[0]),
    )
    assert (
        settings('unlearn.ga', file=file) == dict(steps=3)
        and settings('erase', file=file) == ['x']
        and settings('attack.prompts', file=file) == 3
    )
    assert not unsaid(
        (f'profile mine: params.yaml has no profiles.mine.{s}', settings, (s,), dict(file=file))
        for s in ('unlearn.uce', 'evaluate', 'table', 'unlearn.ga.steps.more', 'table.seeds')
    )


def test_commands_take_the_settings_of_the_active_profile(monkeypatch, capsys):
    of = lambda section: cli.settings_for(section, None, ())[0]
    assert of('finetune.varied-lora')['lr'] == params('finetune.varied-lora')['lr']
    monkeypatch.setenv('RESALIGN_PROFILE', 'sd14')
    assert (
        of('finetune.varied-lora')['lr'] == 1e-4 and of('unlearn.resalign')['rank'] == 4 and not capsys.readouterr().err
    )
    assert of('unlearn.pgu') == {} and 'unlearn.pgu' in capsys.readouterr().err, 'a quick trial, with a warning'


def test_a_slip_is_named_by_its_field(tmp_path):
    slips = [
        (dict(precison='float16'), "precison: unknown 'precison', did you mean 'precision'"),
        (dict(precision='float8'), 'precision'),
        (dict(memory_gb='much'), 'memory_gb'),
        (dict(memory_gb=0), 'memory_gb'),
        (dict(size=7), 'size'),
        (dict(base=dict(revision='x')), 'base.path'),
        (dict(base=dict(path='a/b', sha256='zz')), 'base.sha256'),
        (dict(base=dict(path='a/b', size_gb=0)), 'base.size_gb'),
        (dict(data=dict(unsave=dict(path='a/b'))), 'data.unsave'),
        (dict(prompts=dict(a=dict(path='a/b', kind='bad'))), 'prompts.a.kind'),
        (dict(prompts=dict(a=dict(path='a/b', images=0))), 'prompts.a.images'),
        (dict(optimizer='lion'), "optimizer: unknown 'lion'"),
    ]
    sections = [
        (dict(unlearn=dict(ga=dict(stepz=3))), "unlearn.ga: stepz: unknown 'stepz', did you mean 'steps'"),
        (dict(unlearn=dict(gaga={})), "unknown 'gaga'"),
        (dict(unlearn=dict(resalign=dict(beta=0.0))), 'unlearn.resalign: beta'),
        (
            dict(unlearn=dict(resalign=dict(pool=dict(folders=['d9'])))),
            ('unlearn.resalign', "pool.folders: unknown 'd9'"),
        ),
        (dict(finetune=dict(a=dict(lr='1e-4 or so'))), 'finetune.a: lr'),
        (dict(evaluate=dict(stps=3)), 'evaluate: stps'),
    ]

    def check(change):
        check_settings('mine', write(tmp_path, dict(mine=change)))

    assert not unsaid(
        [
            (
                ('profiles.mine' if 'gaga' not in str(w) else '', *([w] if isinstance(w, str) else w)),
                check,
                (change,),
                {},
            )
            for change, w in slips + sections
        ]
    )
    assert not [o for o in ('adamw', 'adamw8bit', 'adam8bit', 'sgd') if said(check, dict(optimizer=o))]
    assert 'expected a mapping' in said(
        profile_of, 'mine', write(tmp_path, dict(mine=3))
    ) and "profile: unknown 'yours'" in said(profile_of, 'yours', write(tmp_path, dict(mine={})))


# ------------------------------------------------------------------ where things lie


def test_sources():
    # kinds of source
    kinds = {
        'CompVis/stable-diffusion-v1-4': 'hub',
        './real/unsafe': 'local',
        '/mnt/x': 'local',
        '~/x': 'local',
        '../x': 'local',
        'a/b/c': 'local',
        'model.safetensors': 'local',
        'pip:nudenet==3.4.2': 'package',
    }
    assert {p: Source(path=p).kind for p in kinds} == kinds
    assert (
        str(Source(path='a/b', inside='c', revision=COMMIT)) == f'a/b/c@{COMMIT[:8]}'
        and Source(path='/mnt/x', inside='y').local.as_posix() == '/mnt/x/y'
    )

    # every source has a name
    at = lambda p: Source(path=p)
    p = Profile(
        base=at('a'),
        weights=at('w'),
        data=dict(varied=at('v')),
        pool={7: at('d')},
        prompts=dict(IP=dict(path='p')),
        evaluators=dict(nude=at('e')),
    )
    assert {k: s.path for k, s in p.sources().items()} == {
        'base': 'a',
        'weights': 'w',
        'data.varied': 'v',
        'pool.7': 'd',
        'prompts.IP': 'p',
        'evaluators.nude': 'e',
    }

    # the command that fetches it
    assert (
        download_command('a/b', 'abc', 'dataset', 'down1')
        == 'hf download a/b --type dataset --revision abc --include "down1*"'
        and download_command('a/b', kind='dataset') == 'hf download a/b --type dataset'
    )
    assert (
        download_command('a/b') == 'hf download a/b --include "*.json" --include "*.txt" --include "*/*.safetensors"'
        ' --exclude "safety_checker/*" --exclude "*fp16*" --exclude "*non_ema*"'
    )
    assert (licence_page('a/b'), licence_page('a/b', 'dataset')) == (
        'https://huggingface.co/a/b',
        'https://huggingface.co/datasets/a/b',
    )
    text = download_hint('a/b', 'abc', 4.3, 'dataset', 'x')
    assert all(
        w in text
        for w in (
            licence_page('a/b', 'dataset'),
            download_command('a/b', 'abc', 'dataset', 'x'),
            'about 4.3 GB',
            'hf auth login',
            str(constants.HF_HUB_CACHE),
        )
    )


def test_where_sources_lie(offline, tmp_path, monkeypatch):
    # local paths never ask the network
    (tmp_path / 'dogs/inner').mkdir(parents=True)
    (tmp_path / 'ev').mkdir()
    (tmp_path / 'head.pt').touch()
    at = lambda name, **kw: dict(path=f'{tmp_path}/{name}', **kw)
    file = write(
        tmp_path,
        dict(
            mine=dict(
                data=dict(
                    unsafe=at('dogs'),
                    retain=at('dogs', inside='inner'),
                    varied=dict(path='./nowhere/cats', fetch='bring cats'),
                ),
                pool=dict(d1=at('dogs')),
                evaluators=dict(e=at('ev')),
            ),
            heads=dict(evaluators=dict(n=dict(path='pip:numpy'), a=at('head.pt'), b=at('other.pt'))),
            none=dict(evaluators=dict(n=dict(path='pip:numpy'))),
        ),
    )
    assert (
        source_folder('unsafe', file=file) == tmp_path / 'dogs' == source_folder('d1', file=file)
        and source_folder('retain', file=file) == tmp_path / 'dogs/inner'
    )
    assert source_folder('evaluators', 'mine', file) == tmp_path / 'ev' and source_folder('evaluators', 'heads', file) == tmp_path
    assert not unsaid(
        [
            (('nowhere/cats', 'bring cats'), source_folder, ('varied',), dict(file=file)),
            (("no source 'subjects'", 'unsafe, retain, varied, d1'), source_folder, ('subjects',), dict(file=file)),
            ('profiles.none.evaluators', source_folder, ('evaluators', 'none', file), {}),
        ]
    )

    # a hub id in the cache
    (tmp_path := tmp_path/'1').mkdir()
    repo = tmp_path / 'hub/datasets--somebody--dogs'
    hub = repo / 'snapshots' / COMMIT
    (hub / 'down1').mkdir(parents=True)
    (hub / 'down1/a.png').write_bytes(b'x')
    (repo / 'refs').mkdir()
    (repo / 'refs/main').write_text(COMMIT)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    at = lambda **kw: locate(Source(**kw), fetch=False)
    assert (
        at(path='somebody/dogs') == hub and at(path='somebody/dogs', revision=COMMIT, inside='down1') == hub / 'down1'
    )
    assert not unsaid(
        [
            (
                ('down2', 'hf download somebody/dogs --type dataset --include "down2'),
                at,
                (),
                dict(path='somebody/dogs', inside='down2'),
            ),
            ('package', at, (), dict(path='pip:numpy')),
            (
                (
                    'https://huggingface.co/datasets/somebody/cats',
                    'hf download somebody/cats --type dataset --revision abc',
                ),
                at,
                (),
                dict(path='somebody/cats', revision='abc'),
            ),
        ]
    )
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert locate(Source(path='somebody/dogs')) == hub

    # a hub id is fetched at its revision and no more than it
    (tmp_path := tmp_path/'2').mkdir()
    asked = []

    def snapshot(repo, **kw):
        asked.append((repo, kw))
        (tmp_path / 'down1').mkdir(exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(profiles, 'snapshot_download', snapshot)
    assert (
        locate(Source(path='somebody/dogs', revision='abc', inside='down1')) == tmp_path / 'down1'
        and locate(Source(path='a/b'), 'model') == tmp_path
    )
    assert asked == [
        (
            'somebody/dogs',
            dict(repo_type='dataset', revision='abc', allow_patterns=['down1', 'down1/*'], local_files_only=False),
        ),
        ('a/b', dict(repo_type='model', revision=None, allow_patterns=None, local_files_only=False)),
    ]


def test_which_folder_a_name_means(tmp_path, monkeypatch):
    """The base is a model of the hub, all else data; a set of prompts has no folder; one file of evaluators lies in
    theirs; the home folder is found"""
    (tmp_path / 'dogs').mkdir()
    (tmp_path / 'head.pt').touch()
    dogs, hub = dict(path=str(tmp_path / 'dogs')), dict(path='somebody/small')
    mine = dict(base=hub, data=dict(retain=hub), pool=dict(d1=dogs), prompts=dict(d1=dict(path='./nowhere.csv')),
                evaluators=dict(head=dict(path='~/head.pt')))
    file = write(tmp_path, dict(mine=mine))
    monkeypatch.setenv('HOME', str(tmp_path))
    assert source_folder('d1', file=file) == tmp_path / 'dogs'
    assert source_folder('evaluators', file=file) == tmp_path
    asked = []
    def snapshot(repo, repo_type, **kw): return asked.append(repo_type) or tmp_path
    monkeypatch.setattr(profiles, 'snapshot_download', snapshot)
    assert source_folder('base', file=file) == source_folder('retain', file=file) == tmp_path
    assert asked == ['model', 'dataset']


def test_how_the_active_profile_computes(tmp_path, monkeypatch):
    "Its precision, and moments in 8 bits of either Adam; sampling leaves the precision to the device"
    mine = {name: dict(optimizer=name, precision='float16') for name in ('adamw8bit', 'adam8bit', 'adamw')}
    write(tmp_path, mine, 'adamw')
    monkeypatch.chdir(tmp_path)
    for name in mine:
        with sources.use_profile(name):
            settings = dict(dtype='float16', gradient_checkpointing=False, eight_bit_adam=name != 'adamw')
            assert sources.compute_settings() == settings and sources.compute_settings(sampling=True) == {}
    monkeypatch.setenv('RESALIGN_PROFILE', 'adam8bit')
    with sources.use_profile('adamw8bit'): assert active_profile()[0] == 'adamw8bit'
    assert active_profile()[0] == 'adam8bit', 'the one before is active again'


# ------------------------------------------------------------------ stages


def studies_with_stages():
    stages = yaml.safe_load((root() / 'dvc.yaml').read_text())['stages']
    return [stage for stage in stages if stage != 'code']


def test_stages_under_a_real_profile(monkeypatch):
    # a drawn study refuses a real profile: Before anything is read or written
    monkeypatch.setenv('RESALIGN_PROFILE', 'sd14')
    drawn = [study for study in studies_with_stages() if study not in batch.OF_REAL_PROFILES]
    assert len(drawn) > 10
    for ask in batch.run_study_cells, batch.run_page_of_study:
        assert not unsaid(((f"{study}: profile 'sd14'", 'drawn'), ask, (study,), {}) for study in drawn)

    # the doctor comes first: Of a real profile every stage stops at the first thing that is missing, and leaves the
    # profile as it was
    monkeypatch.setenv('RESALIGN_PROFILE', 'sd14')
    words = 'profile sd14: ', 'resalign-doctor sd14'
    assert not unsaid((words, batch.run_study_and_page, (study,), {}) for study in batch.OF_REAL_PROFILES)
    assert active_profile()[0] == 'sd14'


