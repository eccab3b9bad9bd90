"""The pinned requirements and the Makefile."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / 'Makefile').read_text()
TARGETS = re.search(r'^\.PHONY: (.*) FORCE$', MAKEFILE, re.MULTILINE).group(1).split()

# What the pins leave unmet on purpose: requirements/runtime.txt and onedl.txt say why.
UNMET = {('mmengine', 'opencv-python'), ('mmcv-lite', 'opencv-python'), ('torch', 'setuptools')} | {
    *(('onedl-mmcv', 'opencv-python'), ('onedl-mmsegmentation', 'opencv-python'), ('imaug', 'opencv-python')),
    *(('imaug', 'opencv-python-headless'), ('imaug', 'imagecorruptions-imaug')),
}


def pins(python: str) -> dict[str, Requirement]:
    """The requirements that hold for this version of Python on Linux, by name."""
    found = {}
    for path in (ROOT / 'requirements').glob('*.txt'):
        for line in path.read_text().splitlines():
            if line and not line.startswith(('#', '--')):
                requirement = Requirement(line)
                environment = {'python_version': python, 'platform_system': 'Linux'}
                if requirement.marker is None or requirement.marker.evaluate(environment):
                    name = canonicalize_name(requirement.name)
                    assert name not in found, f'{name} is pinned twice for Python {python}'
                    found[name] = requirement
    return found


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12', '3.13'])
def test_every_requirement_is_pinned(python):
    for requirement in pins(python).values():
        assert re.fullmatch(r'==[\w.]+', str(requirement.specifier)), requirement


def test_documents_have_pins_of_their_own():
    """Not in requirements/, by which the environments of the project and of .ci/run are named."""
    lines = (ROOT / 'docs' / 'requirements.txt').read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith(('#', '--'))]
    assert 'mkdocs' in {requirement.name for requirement in wanted}
    assert all(re.fullmatch(r'==[\w.]+', str(requirement.specifier)) for requirement in wanted)
    assert 'docs/requirements.txt' not in re.search(r'^KEY := .*$', MAKEFILE, re.MULTILINE).group()


def test_pins_are_complete():
    """Installed with --no-deps, they must hold whatever the packages of this environment ask for."""
    here = pins('.'.join(map(str, sys.version_info[:2])))
    version = {name: Version(str(requirement.specifier)[2:]) for name, requirement in here.items()}
    missing, checked = [], 0
    for name in here:
        try:
            package = distribution(name)
        except PackageNotFoundError:  # an environment of other packages, such as torch without CUDA
            continue
        if Version(package.version).public != version[name].public:
            continue
        checked += 1
        for line in package.requires or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({'extra': ''}):
                other = canonicalize_name(wanted.name)
                if other not in version or version[other] not in wanted.specifier:
                    missing.append((name, other))
    assert checked > len(here) // 2
    assert set(missing) <= UNMET


def make(*args: str, **environment: str) -> subprocess.CompletedProcess:
    if shutil.which('make') is None:
        pytest.skip('make is not installed')
    # a `make test` hands its own variables to the tests
    variables = ('MAKE', 'MFLAGS', 'ENV', 'ONEDL_ENV', 'PYTHON', 'STACK', 'TORCH_INDEX', 'BEGAN')
    clean = {key: value for key, value in os.environ.items() if not key.startswith(variables)}
    return subprocess.run(['make', *args], cwd=ROOT, env=clean | environment, capture_output=True, text=True)


@pytest.mark.parametrize('target', TARGETS)
def test_target_is_there(target, tmp_path):
    """`make -n` resolves the whole target: its prerequisites and variables."""
    done = make('-n', target, f'ENV={tmp_path / "env"}', f'PYTHON={sys.executable}')
    assert done.returncode == 0 and done.stdout, done.stderr


def test_quickstart_uses_files_that_exist(tmp_path):
    done = make('-n', 'quickstart', f'ENV={tmp_path / "env"}', f'PYTHON={sys.executable}')
    files = set(re.findall(r'\b(?:tools|configs|requirements)/[\w/.-]+\.(?:py|txt)\b', done.stdout))
    assert 'tools/quickstart.py' in files and len(files) >= 5
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_help_names_the_targets_of_users():
    words = make().stdout.split()
    assert set(TARGETS) - {'help', 'python', 'quickstart-short'} <= set(words)


def test_python_that_will_not_do_is_named(tmp_path):
    old = tmp_path / 'python3.9'
    old.write_text('#!/bin/sh\nexit 1\n')
    old.chmod(0o755)
    done = make('env', f'ENV={tmp_path / "env"}', f'PYTHON={old}')
    assert done.returncode != 0 and f'PYTHON={old}' in done.stdout and '3.10 to 3.13' in done.stdout
    assert not (tmp_path / 'env').exists()


def test_no_python_is_said_so(tmp_path):
    done = make('env', f'ENV={tmp_path / "env"}', 'PYTHON=')
    assert done.returncode != 0 and 'There is no Python 3.10 to 3.13' in done.stdout


def test_a_folder_that_is_no_environment_is_kept(tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    done = make('env', f'ENV={tmp_path}', f'PYTHON={sys.executable}')
    assert done.returncode != 0 and str(tmp_path) in done.stdout
    assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


def test_environment_remembers_its_python_index_and_stack(tmp_path):
    """Named once, for instance with the first `make quickstart`: `make test` must not build another one."""
    (tmp_path / 'python').write_text(f'{sys.executable}\n')
    (tmp_path / 'torch-index').write_text('https://example.org/cpu\n')
    (tmp_path / 'stack').write_text('onedl\n')
    plan = make('-n', 'env', f'ENV={tmp_path}').stdout
    assert 'requirements/onedl.txt' in plan and 'requirements/openmmlab.txt' not in plan
    assert f'{sys.executable} -m venv' in plan and '--index-url https://example.org/cpu' in plan
    assert 'requirements/cuda.txt' not in plan


def test_forks_have_an_environment_of_their_own(tmp_path):
    (tmp_path / 'torch-index').write_text('https://example.org/cpu\n')
    (tmp_path / 'python').write_text(f'{sys.executable}\n')
    forks = tmp_path / 'forks'
    plan = make('-n', 'test-onedl', ENV=str(tmp_path), ONEDL_ENV=str(forks)).stdout
    assert f'{sys.executable} -m venv --clear {forks}' in plan and f'{forks}/bin/python -m pytest' in plan
    assert '--index-url https://example.org/cpu' in plan  # the torch of the other one
    assert 'requirements/onedl.txt' in plan and 'requirements/openmmlab.txt' not in plan


def test_sources_are_built_whatever_the_other_lists_say():
    """pip lets a later `--only-binary :all:` take back an earlier `--no-binary`."""
    (install,) = re.findall(r'-r requirements/.*\$\(STACK\).*$', MAKEFILE, re.MULTILINE)
    assert install.endswith('-r requirements/$(STACK).txt')
    lines = (ROOT / 'requirements' / 'onedl.txt').read_text().splitlines()
    assert lines.index('--only-binary :all:') < [line.startswith('--no-binary') for line in lines].index(True)


def test_ci_script():
    script = ROOT / '.ci' / 'run'
    assert os.access(script, os.X_OK)
    subprocess.run(['bash', '-n', script], check=True)
    (targets,) = re.findall(r'^for target in (.*); do$', script.read_text(), re.MULTILINE)
    assert {'lint', 'test', 'quickstart-short'} <= set(targets.split()) <= set(TARGETS)


def test_a_run_in_which_nothing_passes_fails(tmp_path):
    shutil.copy2(ROOT / 'tests' / 'conftest.py', tmp_path)
    for name, outcome, status in (('skips', 'pytest.skip()', 5), ('passes', 'pass', 0)):
        test = tmp_path / f'test_{name}.py'
        test.write_text(f'import pytest\ndef test_it():\n    {outcome}\n')
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--rootdir', tmp_path, test]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
