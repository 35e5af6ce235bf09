"""The package by itself: a wheel in an environment that has the libraries and no clone."""
import json, os, shutil, subprocess, sys, sysconfig, venv
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = 'setup.py settings.ini pyproject.toml params.yaml README.md LICENSE MANIFEST.in'.split()


def lines_of(*command, cwd, fine=(0,)):
    "What a command prints, with nothing of this clone on its way"
    keep = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'RESALIGN', 'VIRTUAL'))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=keep | dict(HF_HUB_OFFLINE='1'), capture_output=True, text=True)
    assert done.returncode in fine, done.stdout + done.stderr
    return done.stdout + (done.stderr if done.returncode else '')


# each program as its file has it, all in one process
HELP = '''
import contextlib, io, json, runpy, sys
said = {}
for path in sys.argv[1:]:
    sys.argv, status = [path, '--help'], None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: runpy.run_path(path, run_name='__main__')
        except SystemExit as e: status = e.code
    said[path] = status, out.getvalue().lstrip()
print(json.dumps(said))
'''


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "An environment in which the wheel is installed; its folder of programs"
    there = tmp_path_factory.mktemp('wheel')
    shutil.copytree(ROOT/'resalign', there/'source/resalign', ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCES: shutil.copy(ROOT/name, there/'source')
    build = (sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', there/'dist', there/'source')
    lines_of(*build, cwd=there)
    venv.create(there/'env', with_pip=False)
    libraries = next((there/'env/lib').glob('python*'))/'site-packages'
    (libraries/'libraries.pth').write_text(sysconfig.get_path('purelib')) # its own .pth files, this clone's too, don't count
    wheel, = (there/'dist').glob('*.whl')
    target = ('--prefix', there/'env', '--no-deps', '--no-index', '--quiet')
    lines_of(there/'env/bin/python', '-m', 'pip', 'install', *target, wheel, cwd=there)
    return there/'env/bin'


def test_the_wheel(installed, tmp_path):
    # the wheel is not this clone
    place = lines_of(installed/'python', '-c', 'import resalign; print(resalign.__file__)', cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)

    # every command helps
    settings = ConfigParser()
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    commands = [c.partition('=')[0] for c in settings['DEFAULT']['console_scripts'].split()]
    assert len(commands) == 7
    said = json.loads(lines_of(installed/'python', '-c', HELP, *(installed/c for c in commands), cwd=tmp_path))
    wrong = [c for c, (status, text) in said.items() if status or not text.startswith('usage:')]
    assert len(said) == 7 and not wrong, said

    # methods and profiles travel with it: The doctor knows SD v1.4 and says what is missing; a method's published
    # settings are found
    said = lines_of(installed/'resalign-doctor', 'sd14', cwd=tmp_path, fine=(1,))
    assert 'CompVis/stable-diffusion-v1-4' in said and 'Traceback' not in said
    code = 'from resalign.real.profiles import settings; print(settings("unlearn.resalign", "sd14-paper")["steps"])'
    assert int(lines_of(installed/'python', '-c', code, cwd=tmp_path)) > 2


def test_the_wheel_and_a_clone(installed, tmp_path):
    # a clones parameters come first
    text = (ROOT/'params.yaml').read_text()
    assert '\nprofile: emoji' in text
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text()) # by which a clone is known
    (tmp_path/'params.yaml').write_text(text.replace('\nprofile: emoji', '\nprofile: sdxl'))
    code = 'from resalign.real.profiles import active_profile; print(active_profile()[0])'
    assert lines_of(installed/'python', '-c', code, cwd=tmp_path).strip() == 'sdxl'

    # a study needs a clone
    (tmp_path := tmp_path/'1').mkdir()
    said = lines_of(installed/'resalign-batch', 'table', '--dry', cwd=tmp_path, fine=(1, 2))
    assert said.count('\n') == 1 and 'clone' in said, said


