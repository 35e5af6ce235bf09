"""A made-up profile of small folders is found whole; whatever is taken away is named; every figure is that of a
known file."""

import shutil, tempfile
from pathlib import Path
from types import SimpleNamespace
import pytest, torch, yaml
from huggingface_hub import constants
from resalign.baselines.methods import config_of
from resalign.core.files import sha256
from resalign.core.settings import UserError, root
from resalign.method.finetune import FinetuneConfig
from resalign.real import doctor
from resalign.real.doctor import (
    Finding,
    check_device,
    check_disk,
    check_library,
    check_profile,
    describe_source,
    device_memory,
    fetch_command,
    format_findings,
    list_licences,
    require_profile,
)
from resalign.real.profiles import Profile, Source, profile_names
from resalign.real.sources import read_prompt_set
from resalign.world.emoji import scenes, write_set
from tests.compvis import small, write_single_file
from made import prompts_of, write_prompts

pytestmark = pytest.mark.usefixtures('offline')

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('doctor')
    pipe = small('v1', tmp)
    pipe.save_pretrained(tmp / 'base')
    write_single_file(pipe, 'v1', tmp / 'one.safetensors')
    shutil.copytree(tmp / 'base', tmp / 'config', ignore=shutil.ignore_patterns('*.safetensors'))
    torch.save(pipe.unet.state_dict(), tmp / 'final_model.pt')
    for name, n in dict(unsafe=2, retain=3, subjects=2, varied=2, reference=2, d1=2).items():
        write_set(tmp / name, scenes('retain', n))
    write_prompts(tmp / 'prompts.csv', prompts_of(explicit=2))
    (tmp / 'head.pt').write_bytes(b'weights')
    return tmp, {
        n: sum(v.numel() for v in m.state_dict().values())
        for n, m in pipe.components.items()
        if isinstance(m, torch.nn.Module)
    }


def profile(tmp, **changes):
    at = lambda name: dict(path=f'{tmp}/{name}')
    return (
        dict(
            base=at('base'),
            size=64,
            memory_gb=0.1,
            data={d: at(d) for d in ('unsafe', 'retain', 'subjects', 'varied', 'reference')},
            pool=dict(d1=at('d1')),
            prompts=dict(IP=dict(at('prompts.csv'), kind='implicit', images=3)),
            erase=['x'],
            evaluators=dict(
                mhsc=dict(at('head.pt'), sha256=sha256(tmp / 'head.pt'), fetch='the head from its authors'),
                numbers=dict(path='pip:numpy>=1'),
            ),
            unlearn=dict(ga=dict(steps=3), resalign=dict(pool=dict(folders=['d1']))),
            finetune={'varied-lora': dict(steps=2)},
            evaluate=dict(steps=2, guidance=5.0),
        )
        | changes
    )


@pytest.fixture
def mine(made, tmp_path):
    "Writes a params.yaml whose profile `mine` lies in the shared folder"

    def write(**changes):
        (tmp_path / 'params.yaml').write_text(
            yaml.safe_dump(dict(profile='mine', profiles=dict(mine=profile(made[0], **changes))))
        )
        return tmp_path / 'params.yaml'

    return write


class away:
    "A file or folder that is somewhere else for a while"

    def __init__(self, path):
        self.path, self.there = path, Path(tempfile.mkdtemp()) / path.name

    def __enter__(self):
        return shutil.move(self.path, self.there)

    def __exit__(self, *_):
        self.path.unlink(missing_ok=True)
        shutil.move(self.there, self.path)
        self.there.parent.rmdir()


def missing(file, **kw):
    return {f.what: f for f in check_profile('mine', file=file, **kw) if f.state == 'missing'}


def says(file):
    return {f.what: f.message for f in check_profile('mine', file=file) if f.state == 'ok'}


# ------------------------------------------------------------------ a profile


def test_whole_profiles(made, mine):
    # a whole profile passes and its figures are those of the files
    tmp, file = made[0], mine()
    found = check_profile('mine', file=file)
    assert {f.state for f in found} == {'ok'}, format_findings(found)
    assert [f.what for f in found] == [
        'settings',
        'libraries',
        'memory',
        'disk',
        'base',
        *(f'data.{d}' for d in ('unsafe', 'retain', 'subjects', 'varied', 'reference')),
        'pool.d1',
        'prompts.IP',
        'evaluators.mhsc',
        'evaluators.numbers',
    ]
    said = says(file)
    assert (said['settings'], said['data.unsafe'], said['data.retain']) == (
        'ga, resalign',
        f'{tmp}/unsafe: 2 pictures',
        f'{tmp}/retain: 3 pictures',
    )
    assert (
        said['evaluators.mhsc'] == f'{tmp}/head.pt: 7e-06 MB, hash agrees' and said['base'] == f'{tmp}/base: a pipeline'
    )
    require_profile('mine', file)
    require_profile(file=file)

    # what is still to fetch is the sum of what is missing: Sizes of what is here, or unknown, don't count
    tmp = made[0]
    file = mine(
        base=dict(path='./nowhere/a', size_gb=2.5),
        data=dict(unsafe=dict(path=f'{tmp}/unsafe', size_gb=100), retain=dict(path='./nowhere/b')),
        evaluators=dict(c=dict(path='./nowhere/c', size_gb=1.5)),
    )
    assert next(f.message for f in check_profile('mine', file=file) if f.what == 'disk').endswith('about 4.0 GB still to fetch')

    # every profile of the repository can be looked at
    wrong = []
    for name in profile_names():
        found = check_profile(name, hashes=False)
        settings = next(f for f in found if f.what == 'settings')
        if (
            settings.state != 'ok'
            or any('\n' in f.message + f.fetch for f in found)
            or any(f.state == 'missing' for f in found) != ('To get what is missing:' in format_findings(found))
        ):
            wrong.append((name, settings.message))
    assert not wrong


def test_what_the_embedded_world_draws_is_never_missing(tmp_path, monkeypatch):
    "In a fresh clone the base and the evaluators are; a folder that is there must be whole"
    write_set(tmp_path / 'drawn', scenes('retain', 2)) # while the sprites are here
    shutil.copy(root() / 'params.yaml', tmp_path / 'params.yaml')
    monkeypatch.chdir(tmp_path)
    look = lambda: {f.what: f for f in check_profile('emoji', file=tmp_path / 'params.yaml') if f.what not in ('memory', 'disk')}
    found = look()
    drawn = {k for k in found if k.startswith(('data.', 'pool.', 'prompts.'))}
    assert len(drawn) == 10 and {f.state for f in found.values()} == {'ok', 'note', 'missing'}
    assert {k for k, f in found.items() if f.state == 'note'} == drawn
    assert all('not drawn yet' in found[k].message for k in drawn)
    assert {k for k, f in found.items() if f.state == 'missing'} == {'base', 'evaluators.emoji'}
    assert all('dvc pull' in found[k].fetch for k in ('base', 'evaluators.emoji'))
    (tmp_path / 'data/emoji/varied').mkdir(parents=True)
    (tmp_path / 'drawn').rename(tmp_path / 'data/emoji/retain')
    found = look()
    assert (found['data.retain'].state, found['data.varied'].state) == ('ok', 'missing')
    assert found['data.retain'].message.endswith('2 pictures')
    file = tmp_path / 'other.yaml' # only of the embedded world
    data = dict(unsafe=dict(path='./nowhere'), retain=dict(path='./nowhere'))
    file.write_text(yaml.safe_dump(dict(profile='mine', profiles=dict(mine=dict(data=data)))))
    assert 'data.unsafe' in missing(file)


def test_whatever_is_taken_away_is_named(made, mine):
    "It alone, by stages too, in one line; a file without bytes, and one with other bytes"
    tmp, file = made[0], mine()
    taken = {
        'base/unet/config.json': ('base', 'unet'),
        'base/model_index.json': ('base', 'model_index.json'),
        'base/vae/diffusion_pytorch_model.safetensors': ('base', '.safetensors'),
        'unsafe/metadata.jsonl': ('data.unsafe', 'metadata'),
        'prompts.csv': ('prompts.IP', 'not here'),
        'head.pt': ('evaluators.mhsc', 'not here'),
        'd1': ('pool.d1', 'not here'),
        'reference': ('data.reference', 'not here'),
        'varied/00001.png': ('data.varied', '00001.png'),
    }
    wrong = []
    for path, (what, words) in taken.items():
        with away(tmp / path):
            lost = missing(file)
            try:
                require_profile('mine', file)
                said = ''
            except UserError as e:
                said = str(e)
        if (
            set(lost) != {what}
            or words not in lost[what].message
            or not said.startswith(f'profile mine: {what}: ')
            or 'resalign-doctor mine' not in said
            or '\n' in said
        ):
            wrong.append((path, lost, said))
    assert not wrong
    with away(tmp / 'head.pt'):
        (tmp / 'head.pt').write_bytes(b'other weights')
        lost = missing(file)['evaluators.mhsc']
        assert sha256(tmp / 'head.pt')[:12] in lost.message and lost.fetch == f"{tmp/'head.pt'}: the head from its authors"
        assert not missing(file, hashes=False), 'hashes are read where they are asked for'
        (tmp / 'head.pt').write_bytes(b'')
        assert 'is empty' in missing(file, hashes=False)['evaluators.mhsc'].message
    assert not missing(file)


def test_what_a_profile_does_not_name_or_asks_too_much(mine):
    wrong = []
    for changes, what, words in [
        (dict(base=None), 'base', 'names none'),
        (dict(data={}), 'data.unsafe', 'names none'),
        (dict(data={}), 'data.retain', 'names none'),
        (dict(unlearn=dict(ga=dict(stepz=3))), 'settings', 'stepz'),
        (dict(memory_gb=1e6), 'memory', '1e+06'),
        (dict(base=dict(path='./nowhere/model.safetensors', fetch='draw one', size_gb=2)), 'base', 'not here'),
        (dict(evaluators=dict(nude=dict(path='pip:no-such-package==3'))), 'evaluators.nude', 'not installed'),
        (dict(evaluators=dict(numbers=dict(path='pip:numpy>=99'))), 'evaluators.numbers', '>=99'),
    ]:
        lost = missing(mine(**changes), hashes=False)
        if what not in lost or words not in lost[what].message:
            wrong.append((changes, lost))
    assert not wrong
    assert (
        missing(mine(base=dict(path='./nowhere/x.safetensors', fetch='draw one', size_gb=2)))['base'].fetch
        == f"{root()/'nowhere/x.safetensors'}: draw one (about 2 GB)"
    )


def test_single_file_checkpoints_are_looked_into(made, mine):
    "All the numbers of all parts, to the last; the size of weights"
    (tmp, numbers), base = made, dict(path=f'{made[0]}/one.safetensors')
    assert 'config' in missing(mine(base=base))['base'].message
    good = mine(base=base, config=f'{tmp}/config', weights=dict(path=f'{tmp}/final_model.pt'))
    with away(tmp / 'final_model.pt'):
        with open(tmp / 'final_model.pt', 'wb') as f:
            f.truncate(2_340_000_000)  # a hole: no bytes on the disk
        assert not missing(good) and says(good)['weights'].endswith('weights, 2.3 GB')
    assert f'{sum(numbers.values()):,} numbers' in says(good)['base']
    with away(tmp / 'one.safetensors') as whole:
        from safetensors.torch import load_file, save_file

        save_file({k: v for k, v in load_file(whole).items() if 'input_blocks.0.0' not in k}, tmp / 'one.safetensors')
        assert '2 of 684 weights of the unet' in missing(good)['base'].message
    with away(tmp / 'config'), away(tmp / 'final_model.pt'):
        lost = missing(good)
        assert set(lost) == {'base', 'config', 'weights'} and 'hf download REPOSITORY' in lost['config'].fetch


# ------------------------------------------------------------------ the machine


def test_the_machine(monkeypatch, tmp_path):
    # memory decides at what is asked: A CPU's pages, a GPU's bytes, in GB of 10⁹; as much as is asked is enough
    state = lambda **kw: check_device(Profile(**kw))[0].state
    monkeypatch.setattr(doctor.os, 'sysconf', lambda name: dict(SC_PAGE_SIZE=4096, SC_PHYS_PAGES=4_000_000)[name])
    monkeypatch.setattr(doctor, 'device', lambda: torch.device('cpu'))
    assert device_memory() == ('CPU', 16.384) and (state(memory_gb=16.384, size=64), state(memory_gb=16.385, size=64)) == (
        'ok',
        'missing',
    )
    assert check_device(Profile(memory_gb=9, size=64))[0].message == 'CPU: 16 GB, about 9 GB expected'
    assert [len(check_device(Profile(memory_gb=9, size=n))) for n in (255, 256)] == [1, 2] and check_device(Profile(size=256))[
        1
    ].state == 'note'
    monkeypatch.setattr(doctor, 'device', lambda: SimpleNamespace(type='cuda'))
    monkeypatch.setattr(
        torch.cuda, 'get_device_properties', lambda i: SimpleNamespace(name='A card', total_memory=24_000_000_000)
    )
    assert device_memory() == ('A card', 24.0) and (state(memory_gb=24), state(memory_gb=24.001)) == ('ok', 'missing')
    for able, states in ((True, ['ok']), (False, ['ok', 'note'])):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: able or including_emulation)
        assert [f.state for f in check_device(Profile(memory_gb=16, precision='bfloat16'))] == states and [
            f.state for f in check_device(Profile(memory_gb=16, precision='float16'))
        ] == ['ok']

    # the fewest free bytes decide: Of the working tree's disk and the cache's, whichever is smaller; as much as is
    # still to fetch is too little
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub/below'))
    free = {}
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda p: SimpleNamespace(total=10**15, used=0, free=free[str(p)]))
    for here, there in ((5e9, 3e9), (3e9, 5e9)):
        free.update({str(root()): here, str(tmp_path): there})
        assert [check_disk(gb)[0].state for gb in (2.999, 3.0, 3.001, 4.0)] == ['ok', 'missing', 'missing', 'missing'], (
            here,
            there,
        )
        assert (
            check_disk(1.25)[0].message.startswith('3 GB free')
            and str(tmp_path) in check_disk(1.25)[0].message
            and check_disk(4.0)[0].fetch
            and not check_disk(1.0)[0].fetch
        )
    (tmp_path / 'hub').mkdir()
    free[str(tmp_path / 'hub')] = 1e9
    assert check_disk(2.0)[0].state == 'missing', 'the nearest folder of the cache that is there'


def test_libraries(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, 'version', lambda name: dict(torch='2.13.0')[name])
    assert [check_library(r).state for r in ('torch>=2.13', 'torch>2.13', 'torch<2.13', 'torch==2.13.0')] == [
        'ok',
        'missing',
        'missing',
        'ok',
    ] and check_library('torch>=2').message == '2.13.0'
    assert check_library('torch>3').fetch == 'pip install "torch>3"'
    monkeypatch.undo()
    assert check_library('no-such').fetch == 'pip install "no-such"'
    monkeypatch.setattr(
        doctor.importlib.metadata, 'requires', lambda name: ['torch<1', 'numpy', 'pytest; extra == "dev"', 'no-such']
    )
    assert [(f.what, f.state) for f in doctor.check_libraries()] == [
        ('library torch', 'missing'),
        ('library no-such', 'missing'),
    ]


def test_the_memory_of_a_run_by_hand(monkeypatch):
    """10⁹ weights in 16 bits, 2 GB of activations a picture in float32: of a LoRA 2 GB of UNet, 1 of other parts and 1
    a picture; of a full training 6 of UNet, and 4 for each vector as long as the weights"""
    p = Profile(parameters=1, picture_gb=2, precision='bfloat16', size=64)
    def gb(batch=3, kept=0, **kw): return doctor.training_gb(p, FinetuneConfig(batch=batch, **kw), kept)
    assert gb() == pytest.approx(2 + 1 + 3)
    assert gb(prior_weight=1.) == pytest.approx(2 + 1 + 2*3), 'a picture of the prior for each'
    large = p.model_copy(update=dict(others_gb=7.)) # text encoders of a known size
    assert doctor.training_gb(large, FinetuneConfig(batch=3)) == pytest.approx(2 + 7 + 3)
    full = 6 + 1 + 4 + .3 # gradient, and some activations while it is added up
    assert gb(1, algorithm='full', optimizer='sgd') == pytest.approx(full)
    assert gb(1, algorithm='full', optimizer='adamw', kept=1) == pytest.approx(full + (1 + 2)*4)
    config = config_of('resalign', dict(solver='identity', unsafe_batch=1, retain_batch=40))
    lora = FinetuneConfig(batch=1)
    assert doctor.simulation_gb(p, config, lora) == pytest.approx(1.1*(2 + 1 + 40)), 'the largest of its passes'
    # on a CPU: what is saved, and float32 weights beside those in 16 bits
    monkeypatch.setattr(doctor, 'device', lambda: torch.device('cpu'))
    assert doctor.saving_gb(p) == pytest.approx(2 + 1 + 2*1.25)
    mine = p.model_copy(update=dict(finetune=dict(a=dict(batch=1))))
    for memory, state in ((9.4, 'missing'), (9.6, 'ok')):
        monkeypatch.setattr(doctor, 'device_memory', lambda: ('CPU', memory))
        assert doctor.check_figures(mine)[0].state == state # 5.5 where it is saved, and 4


# ------------------------------------------------------------------ what fetches it


def test_hub_ids(made, mine, tmp_path, monkeypatch):
    repo = tmp_path / 'hub/models--somebody--small'
    hub = repo / 'snapshots' / COMMIT
    shutil.copytree(made[0] / 'base', hub)
    (repo / 'refs').mkdir()
    (repo / 'refs/main').write_text(COMMIT)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    file = mine(base=dict(path='somebody/small', license='openrail'))
    by = {(f.what, f.state): f for f in check_profile('mine', file=file)}
    assert by['base', 'ok'].message == 'somebody/small: a pipeline, openrail' and 'not pinned' in by['base', 'note'].message
    require_profile('mine', file)  # a note stops nothing
    pinned = check_profile('mine', file=mine(base=dict(path='somebody/small', revision=COMMIT)))
    assert [f.state for f in pinned if f.what == 'base'] == ['ok']
    (hub / 'unet/diffusion_pytorch_model.safetensors').unlink()  # half a download
    lost = missing(mine(base=dict(path='somebody/small')))['base']
    assert '.safetensors' in lost.message and 'hf download somebody/small' in lost.fetch
    moved = Source(path='runwayml/stable-diffusion-v1-5', revision=COMMIT)
    found = doctor.check_source('base', moved, Profile())
    assert [f.state for f in found] == ['missing'] * 2 and 'holds it now' in found[1].message


def test_what_is_said(tmp_path):
    # commands and licences
    model, data = Source(path='somebody/gated', revision='abc', license='openrail', size_gb=4.3), Source(
        path='somebody/dogs', inside='retain', license='cc0'
    )
    fetch = fetch_command('base', model)
    assert fetch.startswith('hf download somebody/gated --revision abc ') and fetch.endswith(
        '   # about 4.3 GB   # licence: https://huggingface.co/somebody/gated'
    )
    assert (
        fetch_command('data.retain', data) == 'hf download somebody/dogs --type dataset --include "retain*"'
        '   # licence: https://huggingface.co/datasets/somebody/dogs'
    )
    assert (
        '--type dataset' not in fetch_command('evaluators.mhsc', data)
        and fetch_command('evaluators.x', Source(path='pip:nudenet==3.4.2')) == 'pip install "nudenet==3.4.2"'
    )
    eyes = model.model_copy(update=dict(path='somebody/eyes', license='mit'))
    sets = dict(retain=data, unsafe=dict(path='./here', license='mine'))
    (said,) = list_licences(Profile(base=model, data=sets, evaluators=dict(mhsc=eyes)))
    assert (said.state, said.message) == (
        'note',
        'read and accept: openrail (https://huggingface.co/somebody/gated), '
        'cc0 (https://huggingface.co/datasets/somebody/dogs), mit (https://huggingface.co/somebody/eyes)',
    )

    # the table ends with what to do: ok, notes, missing; each command once
    lines = format_findings(
        [
            Finding('b', 'missing', 'gone', 'bring b'),
            Finding('a', 'ok', 'here', 'nothing'),
            Finding('c', 'missing', 'gone', 'bring b'),
            Finding('d', 'note', 'look'),
        ]
    ).splitlines()
    assert [l.split() for l in lines] == [
        ['ok', 'a', 'here'],
        ['note', 'd', 'look'],
        ['missing', 'b', 'gone'],
        ['missing', 'c', 'gone'],
        [],
        'To get what is missing:'.split(),
        ['bring', 'b'],
    ]
    assert 'To get' not in format_findings([Finding('a', 'ok', 'here')])

    # the sizes of files and folders; prompts are read
    (tmp_path / 'f.bin').write_bytes(b'x' * 1_234_567)
    assert describe_source('evaluators.x', tmp_path / 'f.bin', Profile()) == '1.2 MB'
    assert describe_source('evaluators.x', tmp_path, Profile()) == 'a folder'
    csv = tmp_path / 'own.csv'
    csv.write_text('prompt,kind\na fox,benign\na bear,benign\n')
    profile = Profile(prompts=dict(own=dict(path=str(csv))))
    assert describe_source('prompts.own', csv, profile).startswith('2 prompts')
    assert [row['kind'] for row in read_prompt_set(profile.prompts['own'])] == ['benign', 'benign']
    csv.write_text('words\na fox\n')
    with pytest.raises(UserError, match='own.csv.*prompt'): describe_source('prompts.own', csv, profile)
    csv.write_text('prompt\na fox\n')
    rows = read_prompt_set(Profile(prompts=dict(own=dict(path=str(csv), images=3, kind='benign'))).prompts['own'])
    assert len({row['seed'] for row in rows}) == 3 and {row['kind'] for row in rows} == {'benign'}


