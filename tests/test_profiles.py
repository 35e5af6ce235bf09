"Profiles: every setting goes into the class that reads it, and nobody else's numbers stand in for a missing one."
import importlib, inspect, os, shutil, sys
from pathlib import Path
import pytest, yaml
from huggingface_hub import constants
from resalign.core import UserError, params, root
from resalign.methods import METHODS, config_of
from resalign.profiles import Data, Profile, Source, active, check_settings, download_command, folder, located, names, profile_of, settings

COMMIT = '0123456789abcdef0123456789abcdef01234567'
NAMES = 'tiny sd14-paper sd14-light sd14 sd15 sd20 sdxl community'.split()

@pytest.fixture(autouse=True)
def no_profile(monkeypatch): monkeypatch.delenv('RESALIGN_PROFILE', raising=False)

@pytest.fixture
def offline(monkeypatch):
    "Whoever asks the network fails"
    import socket
    def no(*a, **kw): raise AssertionError('asked the network')
    monkeypatch.setattr(socket.socket, 'connect', no); monkeypatch.setattr(socket, 'getaddrinfo', no)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)

def write(tmp_path, profiles, profile='mine', **more):
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(dict(profile=profile, profiles=profiles, **more)))
    return tmp_path/'params.yaml'

def refused(match, f, *args, **kw):
    with pytest.raises(UserError, match=match) as e: f(*args, **kw)
    assert '\n' not in str(e.value)


# ------------------------------------------------------------------ those of params.yaml

def test_these_profiles_stand(): assert set(NAMES) <= set(names())

@pytest.mark.parametrize('name', names())
def test_every_setting_is_one_that_its_class_knows(name): check_settings(name)

@pytest.mark.parametrize('name', names())
def test_no_number_is_text(name):
    "YAML reads 1e-4 as a word"
    def words(node, at=''):
        if isinstance(node, dict):
            for k, v in node.items(): yield from words(v, f'{at}.{k}')
        elif isinstance(node, list):
            for v in node: yield from words(v, at)
        elif isinstance(node, str):
            try: float(node); yield at
            except ValueError: pass
    p = profile_of(name)
    assert not list(words([p.unlearn, p.finetune, p.evaluate]))

# The fifteen released configurations: folder, learning rate, steps, optimizer
RELEASED = '''d3/1e-4/20/gd d2/1e-4/5/gd/DreamBooth d1/1e-4/30/gd d2/1e-4/5/adam d3/1e-4/5/gd d1/1e-4/30/adam d2/1e-5/30/gd d3/1e-5/5/gd d1/1e-5/10/gd d2/1e-4/10/gd d3/1e-5/10/adam
              d3/1e-5/30/gd d3/1e-6/20/gd d2/1e-5/10/adam d3/1e-6/5/adam/full'''

def test_the_paper_verbatim():
    "160 outer steps, J = 3, K = 5, γ = 1, AdamW 2e-4, rank 4, up .002, down .008, β .8, batch 1 and 4, limit .2; 200 steps at 1e-5, 1 by 4; 30 steps, guidance 7.5"
    c = config_of('resalign', settings('unlearn.resalign', 'sd14-paper'))
    assert (c.steps, c.J, c.gamma, c.lr, c.rank, c.up_std, c.down_std, c.beta, c.unsafe_batch, c.retain_batch, c.max_norm) == (160, 3, 1., 2e-4, 4, .002, .008, .8, 1, 4, .2)
    assert (c.solver, c.product, c.products + 1, c.tol, c.clamp) == ('richardson', 'exact', 5, None, None) and (c.alpha, c.alpha_end, c.longer) == (1.6, 2., 'skip')
    assert [(f.folder, f.lr, f.steps, f.optimizer, f.prior_weight, f.algorithm) for f in c.pool.listed] == [
        (d, lr, n, o, float('DreamBooth' in more), 'full' if 'full' in more else 'lora') for d, lr, n, o, *more in (l.split('/') for l in RELEASED.split()) for lr, n, o in [(float(lr), int(n), dict(gd='sgd').get(o, o))]]
    assert {f.batch for f in c.pool.listed} == {1}
    p = profile_of('sd14-paper')
    assert c.pool.named == set(p.pool) == {'d1', 'd2', 'd3'} and p.size == 512 and p.evaluate == dict(steps=30, guidance=7.5)
    for f in p.finetune.values(): assert (f['steps'], f['batch'], f['accumulation']) == (200, 1, 4)
    assert p.finetune['varied-full']['lr'] == 1e-5 and p.prompts['IP'].images == p.prompts['US'].images == 3 and p.prompts['IP'].category == 'sexual'

def test_light_differs_in_solver_pool_and_precision_alone():
    a, b = (config_of('resalign', settings('unlearn.resalign', n)).model_dump() for n in ('sd14-paper', 'sd14-light'))
    assert {k for k in a if a[k] != b[k]} == {'solver', 'product', 'tol', 'clamp', 'fallback_share', 'pool'} and (b['solver'], b['product']) == ('cg', 'fd-forward')
    assert {k for k in a['pool'] if a['pool'][k] != b['pool'][k]} == {'algorithm', 'still'}
    assert profile_of('sd14-light').precision == 'bfloat16' and profile_of('sd14') == profile_of('sd14-light')

def test_real_profiles_have_what_a_run_needs():
    for name in NAMES[1:]:
        p = profile_of(name)
        assert p.base and p.data.unsafe and p.data.retain and p.data.subjects and p.data.varied and p.data.reference and p.pool and p.prompts and p.evaluators and p.erase and p.evaluate
        assert {'original', 'resalign', 'ga'} <= set(p.unlearn) <= set(METHODS) and {'subjects-full', 'varied-full', 'subjects-lora', 'varied-lora'} <= set(p.finetune)
    assert 'advunlearn' not in profile_of('sdxl').unlearn and profile_of('sd20').size == 768

def test_no_revision_is_made_up():
    for name in NAMES:
        for what, s in profile_of(name).sources().items(): assert s.revision is None or len(s.revision) == 40, (name, what)

def test_unsafe_pictures_are_nobodys_download():
    for name in NAMES[1:]: assert profile_of(name).data.unsafe.kind == 'local'
    assert any(l.strip() == '/real/' for l in (root()/'.gitignore').read_text().splitlines())


# ------------------------------------------------------------------ which one, and what it says

def test_the_environment_wins(tmp_path, monkeypatch):
    file = write(tmp_path, dict(mine=dict(size=64), other=dict(size=32)))
    assert active(file)[0] == 'mine' and active(file)[1].size == 64
    monkeypatch.setenv('RESALIGN_PROFILE', 'other'); assert active(file)[0] == 'other'
    monkeypatch.setenv('RESALIGN_PROFILE', 'othr'); refused("RESALIGN_PROFILE: unknown 'othr', did you mean 'other'", active, file)
    monkeypatch.delenv('RESALIGN_PROFILE'); refused("params.yaml: profile: unknown 'nobody'", active, write(tmp_path, dict(mine={}), 'nobody'))

def test_tiny_is_params_yaml(monkeypatch):
    assert active()[0] == params('profile')
    for section in ('unlearn.resalign', 'finetune.varied-lora', 'evaluate', 'erase', 'studies.resurgence.looks'): assert settings(section, 'tiny') == params(section)
    assert folder('unsafe', 'tiny') == root()/'data/unsafe' and folder('pool-things', 'tiny') == root()/'data/pool-things' and folder('blueprint', 'tiny') == root()/'data/blueprint'
    assert folder('base', 'tiny') == root()/'outs/base' and folder('evaluators', 'tiny') == root()/'outs/evaluators'

def test_a_real_profile_never_falls_back_to_tiny(tmp_path):
    file = write(tmp_path, dict(mine=dict(unlearn=dict(ga=dict(steps=3)), erase=['x'], sections=dict(attack=dict(prompts=3)))), unlearn=dict(ga=dict(steps=9), uce={}), evaluate=dict(steps=1), attack={}, table=dict(seeds=[0]))
    assert settings('unlearn.ga', file=file) == dict(steps=3) and settings('erase', file=file) == ['x'] and settings('attack.prompts', file=file) == 3
    for section in ('unlearn.uce', 'evaluate', 'table', 'unlearn.ga.steps.more', 'table.seeds'): refused(f'profile mine: params.yaml has no profiles.mine.{section}', settings, section, file=file)

@pytest.mark.parametrize('change, match', [
    (dict(precison='float16'), r"profiles.mine: precison: unknown 'precison', did you mean 'precision'"), (dict(precision='float8'), 'profiles.mine: precision'), (dict(memory_gb='much'), 'profiles.mine: memory_gb'),
    (dict(base=dict(revision='x')), 'profiles.mine: base.path'), (dict(base=dict(path='a/b', sha256='zz')), 'profiles.mine: base.sha256'), (dict(data=dict(unsave=dict(path='a/b'))), 'profiles.mine: data.unsave'),
    (dict(prompts=dict(a=dict(path='a/b', kind='bad'))), 'profiles.mine: prompts.a.kind'), (dict(unlearn=dict(ga=dict(stepz=3))), "profiles.mine.unlearn.ga: stepz: unknown 'stepz', did you mean 'steps'"),
    (dict(unlearn=dict(gaga={})), "unknown 'gaga'"), (dict(unlearn=dict(resalign=dict(beta=0.))), 'profiles.mine.unlearn.resalign: beta'), (dict(unlearn=dict(resalign=dict(pool=dict(folders=['d9'])))), "pool.folders: unknown 'd9'"),
    (dict(finetune=dict(a=dict(lr='1e-4 or so'))), 'profiles.mine.finetune.a: lr'), (dict(evaluate=dict(stps=3)), "profiles.mine.evaluate: stps"), (dict(optimizer='lion'), "profiles.mine: optimizer: unknown 'lion'")])
def test_a_slip_is_named(change, match, tmp_path): refused(match, check_settings, 'mine', write(tmp_path, dict(mine=change)))

def test_what_is_no_profile(tmp_path):
    refused('expected a mapping', profile_of, 'mine', write(tmp_path, dict(mine=3)))
    refused("profile: unknown 'yours'", profile_of, 'yours', write(tmp_path, dict(mine={})))


# ------------------------------------------------------------------ where things lie

@pytest.mark.parametrize('path, kind', [('CompVis/stable-diffusion-v1-4', 'hub'), ('./real/unsafe', 'local'), ('/mnt/x', 'local'), ('~/x', 'local'), ('../x', 'local'), ('a/b/c', 'local'), ('model.safetensors', 'local'), ('pip:nudenet==3.4.2', 'package')])
def test_kinds_of_source(path, kind): assert Source(path=path).kind == kind

def test_local_paths_never_ask_the_network(offline, tmp_path):
    (tmp_path/'dogs/inner').mkdir(parents=True)
    file = write(tmp_path, dict(mine=dict(data=dict(unsafe=dict(path=f'{tmp_path}/dogs'), retain=dict(path=f'{tmp_path}/dogs', inside='inner'), varied=dict(path='./nowhere/cats', fetch='bring cats')), pool=dict(d1=dict(path=f'{tmp_path}/dogs')))))
    assert folder('unsafe', file=file) == tmp_path/'dogs' == folder('d1', file=file) and folder('retain', file=file) == tmp_path/'dogs/inner'
    refused('nowhere/cats: no such file or folder; bring cats', folder, 'varied', file=file)
    refused("profile mine: no source 'subjects', expected one of unsafe, retain, varied, d1", folder, 'subjects', file=file)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    repo = tmp_path/'hub/datasets--somebody--dogs'
    (repo/'snapshots'/COMMIT/'down1').mkdir(parents=True); (repo/'snapshots'/COMMIT/'down1/a.png').write_bytes(b'x')
    (repo/'refs').mkdir(); (repo/'refs/main').write_text(COMMIT)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    return repo/'snapshots'/COMMIT

def test_a_hub_id_in_the_cache(hub, offline, monkeypatch):
    assert located(Source(path='somebody/dogs'), fetch=False) == hub and located(Source(path='somebody/dogs', revision=COMMIT, inside='down1'), fetch=False) == hub/'down1'
    refused('down2 is not in the cache: .*hf download somebody/dogs --type dataset --include "down2', located, Source(path='somebody/dogs', inside='down2'), fetch=False)
    refused('not here .*https://huggingface.co/datasets/somebody/cats.*hf download somebody/cats --type dataset --revision abc', located, Source(path='somebody/cats', revision='abc'), fetch=False)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True); assert located(Source(path='somebody/dogs')) == hub
    refused('is a package', located, Source(path='pip:numpy'))

def test_a_hub_id_is_fetched_at_its_revision_and_no_more_than_it(monkeypatch, tmp_path):
    from resalign import profiles
    asked = []
    def snapshot(repo, **kw): asked.append((repo, kw)); (tmp_path/'down1').mkdir(exist_ok=True); return str(tmp_path)
    monkeypatch.setattr(profiles, 'snapshot_download', snapshot)
    assert located(Source(path='somebody/dogs', revision='abc', inside='down1')) == tmp_path/'down1'
    assert asked == [('somebody/dogs', dict(repo_type='dataset', revision='abc', allow_patterns=['down1', 'down1/*'], local_files_only=False))]
    assert download_command('a/b', 'abc', 'dataset', 'down1') == 'hf download a/b --type dataset --revision abc --include "down1*"'

DRAWN = dict(studies='study_stage ablation_train_stage ablation_stage', attacks='attack_run_stage bell_stage bell_run_stage', landscape='landscape_stage', bench='moreau_stage bench_stage', scaling='scaling_stage',
             stages='phenomenon_stage solver_runs_stage trials_stage', pictures='pictures_stage portrait_stage')

@pytest.mark.parametrize('module, stage', [(m, s) for m, names in DRAWN.items() for s in names.split()])
def test_a_drawn_experiment_refuses_a_real_profile(module, stage, monkeypatch):
    "Before anything is read or written"
    monkeypatch.setenv('RESALIGN_PROFILE', 'sd14')
    f = getattr(importlib.import_module(f'resalign.{module}'), stage)
    given = dict(study='resurgence', method='ga', seed=0, variant='full', smoke=False)
    with pytest.raises(UserError, match=f"{stage}: profile 'sd14': its pictures are drawn"): f(**{k: given[k] for k in inspect.signature(f).parameters})

@pytest.mark.parametrize('stage', 'base_stage evaluators_stage unlearn_stage finetune_stage evaluate_stage'.split())
def test_the_doctor_comes_first(stage):
    "Of a real profile every stage stops at the first thing that is missing, and leaves the profile as it was"
    f, given = getattr(importlib.import_module('resalign.stages'), stage), dict(method='resalign', seed=0, smoke=False, profile='sd14')
    with pytest.raises(UserError, match='profile sd14: .*`resalign-doctor sd14` lists everything'): f(**{k: given[k] for k in inspect.signature(f).parameters if k in given})
    assert active()[0] == 'tiny'
