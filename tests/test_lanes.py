"Stages side by side: in an order in which each finds what it needs, and a failure stops only what needs it."
import subprocess, sys
from pathlib import Path

import pytest, yaml

LANES = Path(__file__).resolve().parent.parent/'tools'/'lanes.py'
PIN = 'export OMP_NUM_THREADS=1'


@pytest.fixture
def project(tmp_path):
    def git(*args):
        subprocess.run([*args], cwd=tmp_path, check=True, capture_output=True)

    git('git', 'init', '-q')
    git(sys.executable, '-m', 'dvc', 'init', '-q')
    stage = lambda out, *deps, pin=True, cmd='cat {deps} /dev/null > {out}; echo {out} >> order': dict(
        cmd=f'{PIN}; '*pin + cmd.format(out=out, deps=' '.join(deps)), deps=list(deps), outs=[out])
    stages = dict(base=stage('base.txt', pin=False), left=stage('left.txt', 'base.txt'),
                  right=stage('right.txt', 'base.txt'), bad=stage('bad.txt', 'base.txt', cmd='exit 3'),
                  after_bad=stage('after_bad.txt', 'bad.txt'), end=stage('end.txt', 'left.txt', 'right.txt'))
    (tmp_path/'dvc.yaml').write_text(
        yaml.safe_dump(dict(stages={
            k: {
                a: b
                for a, b in v.items() if b
            }
            for k, v in stages.items()
        })))
    return tmp_path


def lanes(project, *args):
    return subprocess.run([sys.executable, LANES, *args], cwd=project, capture_output=True, text=True)


def test_two_lanes(project):
    done = lanes(project, '--lanes', '2')
    order = (project/'order').read_text().split()
    assert done.returncode == 1 and 'bad: failed' in done.stdout and 'after_bad: left out' in done.stdout
    assert ' 6/6 ' in done.stdout, 'what is left out counts, too'
    assert set(done.stdout.splitlines()[-1].partition(';')[0].split(', ')) == {'4 run', '1 failed',
                                                                               '1 left out'}, done.stdout
    assert sorted(order) == ['base.txt', 'end.txt', 'left.txt', 'right.txt'
                             ] and order[0] == 'base.txt' and order[-1] == 'end.txt'
    again = lanes(project, '--lanes', '2', 'end')
    assert again.returncode == 0 and (project/'order').read_text().split() == order, 'what has not changed ran again'
    assert again.stdout.splitlines()[-1].startswith('4 unchanged; '), again.stdout
    (project/'left.txt').unlink()
    third = lanes(project, '--lanes', '2', 'end')
    assert third.returncode == 0 and (project/'left.txt').is_file(), third.stdout + third.stderr
    assert set(third.stdout.splitlines()[-1].partition(';')[0].split(', ')) == {
        '1 run', '3 unchanged'
    }, f'what follows it was not looked at: {third.stdout}'


def test_an_unknown_stage_is_refused(project):
    done = lanes(project, 'nonsense')
    assert done.returncode and done.stderr.strip() == 'lanes: unknown stage: nonsense' and not (project/
                                                                                                'order').exists()
