"A made-up profile of small folders is found whole; whatever is taken away is named."
import copy, os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch, yaml
from huggingface_hub import constants
from resalign import cli, doctor
from resalign.core import UserError, sha256
from resalign.doctor import check, library, require, table
from resalign.pipelines import load_pipeline, save_pipeline
from resalign.world import prompts, scenes, write_prompts, write_set
from tests.compvis import small, write_single_file

COMMIT = '0123456789abcdef0123456789abcdef01234567'

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('doctor')
    pipe = small('v1', tmp); pipe.save_pretrained(tmp/'base')
    write_single_file(pipe, 'v1', tmp/'one.safetensors')
    shutil.copytree(tmp/'base', tmp/'config', ignore=shutil.ignore_patterns('*.safetensors'))
    torch.save(pipe.unet.state_dict(), tmp/'final_model.pt')
    for name in ('unsafe', 'retain', 'subjects', 'varied', 'reference', 'd1'): write_set(tmp/name, scenes('retain', 2))
    write_prompts(tmp/'prompts.csv', prompts('explicit', 2, 0)); (tmp/'head.pt').write_bytes(b'weights')
    return tmp

def profile(tmp, **changes):
    at = lambda name: dict(path=f'{tmp}/{name}')
    return dict(base=at('base'), size=64, memory_gb=.1, data={d: at(d) for d in ('unsafe', 'retain', 'subjects', 'varied', 'reference')}, pool=dict(d1=at('d1')), prompts=dict(IP=dict(at('prompts.csv'), kind='implicit', images=3)),
                evaluators=dict(mhsc=dict(at('head.pt'), sha256=sha256(tmp/'head.pt'), fetch='the head from its authors'), numbers=dict(path='pip:numpy>=1')), erase=['x'],
                unlearn=dict(ga=dict(steps=3), resalign=dict(pool=dict(folders=['d1']))), finetune={'varied-lora': dict(steps=2)}, evaluate=dict(steps=2, guidance=5.)) | changes

@pytest.fixture
def work(made, tmp_path):
    "A copy to spoil, and its params.yaml"
    for p in made.iterdir(): (shutil.copytree if p.is_dir() else shutil.copy)(p, tmp_path/p.name)
    write(tmp_path)
    return tmp_path

def write(tmp, **changes):
    (tmp/'params.yaml').write_text(yaml.safe_dump(dict(profile='mine', profiles=dict(mine=profile(tmp, **changes)))))
    return tmp/'params.yaml'

def missing(file, **kw): return {f.what: f for f in check('mine', file=file, **kw) if f.state == 'missing'}

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "Whoever asks the network fails"
    import socket
    def no(*a, **kw): raise AssertionError('asked the network')
    monkeypatch.setattr(socket.socket, 'connect', no); monkeypatch.setattr(socket, 'getaddrinfo', no); monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)

def test_a_whole_profile_passes(work):
    found = check('mine', file=work/'params.yaml')
    assert {f.state for f in found} == {'ok'}, table(found)
    assert {'settings', 'libraries', 'memory', 'disk', 'base', 'data.unsafe', 'pool.d1', 'prompts.IP', 'evaluators.mhsc', 'evaluators.numbers'} <= {f.what for f in found}
    assert '2 pictures' in table(found) and 'hash agrees' in table(found) and 'To get' not in table(found)
    require('mine', work/'params.yaml'); require(file=work/'params.yaml')

TAKEN = {'base/unet/config.json': ('base', "component 'unet' is missing"), 'base/model_index.json': ('base', 'model_index.json is missing'), 'base/vae/diffusion_pytorch_model.safetensors': ('base', 'no .safetensors weights'),
         'unsafe/metadata.jsonl': ('data.unsafe', 'metadata'), 'prompts.csv': ('prompts.IP', 'not here'), 'head.pt': ('evaluators.mhsc', 'not here'), 'd1': ('pool.d1', 'not here'), 'reference': ('data.reference', 'not here')}

@pytest.mark.parametrize('path', TAKEN)
def test_what_is_taken_away_is_named(work, path):
    what, says = TAKEN[path]
    (shutil.rmtree if (work/path).is_dir() else Path.unlink)(work/path)
    lost = missing(work/'params.yaml')
    assert set(lost) == {what} and says in lost[what].says
    with pytest.raises(UserError, match=f'profile mine: {what}: .*resalign-doctor mine') as e: require('mine', work/'params.yaml')
    assert '\n' not in str(e.value)

def test_a_picture_that_a_caption_names(work):
    next((work/'varied').glob('*.png')).unlink()
    assert 'no such image' in missing(work/'params.yaml')['data.varied'].says

def test_a_file_that_is_another(work):
    (work/'head.pt').write_bytes(b'other weights')
    lost = missing(work/'params.yaml')
    assert set(lost) == {'evaluators.mhsc'} and 'SHA-256' in lost['evaluators.mhsc'].says and lost['evaluators.mhsc'].fetch == f"{work/'head.pt'}: the head from its authors"
    assert not missing(work/'params.yaml', hashes=False)
    (work/'head.pt').write_bytes(b''); assert 'is empty' in missing(work/'params.yaml', hashes=False)['evaluators.mhsc'].says

@pytest.mark.parametrize('changes, what, says', [
    (dict(base=None), 'base', 'names none'), (dict(data={}), 'data.unsafe', 'names none'), (dict(unlearn=dict(ga=dict(stepz=3))), 'settings', 'stepz'), (dict(memory_gb=1e6), 'memory', '1e+06 GB expected'),
    (dict(base=dict(path='./nowhere/model.safetensors', fetch='draw one', size_gb=2)), 'base', 'not here'), (dict(evaluators=dict(nude=dict(path='pip:no-such-package==3'))), 'evaluators.nude', 'not installed'),
    (dict(evaluators=dict(numbers=dict(path='pip:numpy>=99'))), 'evaluators.numbers', 'expected >=99'), (dict(evaluators=dict(huge=dict(path='./nowhere/huge', size_gb=1e9))), 'disk', 'still to fetch')])
def test_what_a_profile_asks_too_much(work, changes, what, says):
    lost = missing(write(work, **changes))
    assert what in lost and says in lost[what].says, lost

def test_single_file_checkpoints_are_looked_into(work):
    base = dict(path=f'{work}/one.safetensors')
    assert 'needs `config`' in missing(write(work, base=base))['base'].says
    good = write(work, base=base, config=f'{work}/config', weights=dict(path=f'{work}/final_model.pt'))
    assert not missing(good) and any('numbers' in f.says for f in check('mine', file=good) if f.what == 'base')
    from safetensors.torch import load_file, save_file
    save_file({k: v for k, v in load_file(work/'one.safetensors').items() if 'input_blocks.0.0' not in k}, work/'one.safetensors')
    assert '2 of 684 weights of the unet are missing' in missing(good)['base'].says
    shutil.rmtree(work/'config'); lost = missing(good)
    assert 'no such folder' in lost['base'].says and 'hf download REPOSITORY' in lost['config'].fetch
    (work/'final_model.pt').unlink(); assert 'weights' in missing(good)

@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    "A hub cache with one model at one commit"
    repo = tmp_path/'hub/models--somebody--small'
    shutil.copytree(made/'base', repo/'snapshots'/COMMIT); (repo/'refs').mkdir(); (repo/'refs/main').write_text(COMMIT)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    return repo/'snapshots'/COMMIT

def test_hub_ids(work, hub):
    file = write(work, base=dict(path='somebody/small', license='openrail'))
    by = {(f.what, f.state): f for f in check('mine', file=file)}
    assert 'a pipeline, openrail' in by['base', 'ok'].says and 'not pinned' in by['base', 'note'].says
    require('mine', file)                                          # a note stops nothing
    assert by['licences', 'note'].says == 'read and accept: openrail (https://huggingface.co/somebody/small)'
    pinned = check('mine', file=write(work, base=dict(path='somebody/small', revision=COMMIT)))
    assert [f.state for f in pinned if f.what == 'base'] == ['ok']
    (hub/'unet/diffusion_pytorch_model.safetensors').unlink()      # half a download
    lost = missing(file)['base']; assert 'no .safetensors weights' in lost.says and 'hf download somebody/small' in lost.fetch
    gone = missing(write(work, base=dict(path='somebody/gated', revision='abc', license='openrail', size_gb=4.3), data=dict(unsafe=dict(path=f'{work}/unsafe'), retain=dict(path='somebody/dogs', inside='retain'))))
    for words in ('hf download somebody/gated --revision abc', 'about 4.3 GB', 'licence: https://huggingface.co/somebody/gated'): assert words in gone['base'].fetch
    assert 'openrail' in gone['base'].says and 'hf download somebody/dogs --type dataset --include "retain*"' in gone['data.retain'].fetch

def test_libraries(monkeypatch):
    assert library('torch>=2').state == 'ok' and library('torch<1').state == 'missing' and library('no-such').fetch == 'pip install "no-such"'
    monkeypatch.setattr(doctor.importlib.metadata, 'requires', lambda name: ['torch<1', 'numpy', 'pytest; extra == "dev"', 'no-such'])
    assert [(f.what, f.state) for f in doctor.libraries()] == [('library torch', 'missing'), ('library no-such', 'missing')]

def test_memory_of_a_gpu(monkeypatch):
    from types import SimpleNamespace
    from resalign.profiles import Profile
    monkeypatch.setattr(doctor, 'device', lambda: SimpleNamespace(type='cuda'))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda i: SimpleNamespace(name='A card', total_memory=24e9)); monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: False)
    assert [f.state for f in doctor.machine(Profile(memory_gb=16))] == ['ok'] and doctor.machine(Profile(memory_gb=56))[0].state == 'missing'
    assert 'no bfloat16' in doctor.machine(Profile(memory_gb=16, precision='bfloat16'))[1].says

def test_every_profile_of_the_repository_can_be_looked_at():
    from resalign.profiles import names
    for name in names():
        found = check(name, hashes=False)
        assert next(f for f in found if f.what == 'settings').state == 'ok'
        for f in found: assert '\n' not in f.says + f.fetch
        if any(f.state == 'missing' for f in found): assert 'To get what is missing:' in table(found)


# ------------------------------------------------------------------ the command

@pytest.fixture
def call(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['/somewhere/resalign-doctor', *map(str, args)])
        capsys.readouterr(); status = 0
        try: cli.doctor()
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return run

def test_the_command(work, call, monkeypatch):
    (work/'settings.ini').write_text(''); monkeypatch.chdir(work)
    status, out, _ = call('mine'); assert status == 0 and 'data.unsafe' in out
    (work/'head.pt').unlink()
    status, out, _ = call('mine', '--quick'); assert status == 1 and 'missing evaluators.mhsc' in out and 'the head from its authors' in out
    status, out, err = call('yours'); assert status == 2 and "unknown 'yours'" in err and err.count('\n') == 1

def test_help_teaches(call):
    status, out, _ = call('--help')
    assert status == 0 and 'In:  ' in out and 'Out: ' in out and 'Example:\n  resalign-doctor ' in out and 'sd14-paper' in out

def test_it_is_a_console_script():
    from configparser import ConfigParser
    ini = ConfigParser(); ini.read(Path(__file__).resolve().parent.parent/'settings.ini')
    assert 'resalign-doctor=resalign.cli:doctor' in ini['DEFAULT']['console_scripts'].split()
