import ast
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools/make_digit_scenes.py'


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_writes_once(tmp_path):
    arguments = tmp_path / 'out', '--train', 3, '--test', 2, '--size', 160, '--seed', 5, '--workers', 1
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert 'digit scenes' in first.stdout and '5/5' in first.stdout
    assert f'{tmp_path}/out/\n' in first.stdout and 'crops/{train,test}/0..9' in first.stdout
    assert len(list((tmp_path / 'out/images/train').iterdir())) == 3
    assert len(list((tmp_path / 'out/images/test').iterdir())) == 2

    again = run(*arguments)
    assert again.returncode == 0 and 'left as it is' in again.stdout

    other = run(*arguments, '--seed', 6)
    assert other.returncode == 1
    assert '--seed 5' in other.stderr and '--seed 6' in other.stderr and 'Traceback' not in other.stderr


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--size', 4096], 'size must be from 128 to 2,048, got 4,096'),
        (['--workers', 0], 'workers must be at least 1, got 0'),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    result = run(tmp_path / 'out', *arguments)
    assert result.returncode == 1
    assert message in result.stderr and 'Traceback' not in result.stderr
    assert os.listdir(tmp_path) == []


def test_missing_package(tmp_path, monkeypatch):
    (tmp_path / 'sklearn.py').write_text('raise ModuleNotFoundError("No module named sklearn", name="sklearn")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)
    result = run(tmp_path / 'out')
    assert result.returncode == 1
    assert "sklearn is missing: pip install 'mmvig[digits]'" in result.stderr and 'Traceback' not in result.stderr


def test_the_extra_brings_what_is_imported():
    imported = set()
    for file in (TOOL, *(ROOT / 'mmvig/datasets').glob('*.py')):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition('.')[0] for name in names}
    imported -= sys.stdlib_module_names | {'mmvig', 'numpy', 'rich'}  # mmvig asks for these two always
    found = packages_distributions()
    extra = re.search(r'^digits = \[(.+)\]$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    assert set(re.findall(r"'([\w-]+)'", extra)) == {found[name][0].lower() for name in imported}


@pytest.fixture
def started(tmp_path):
    """A run with two workers in the middle of its work: the process and its workers' ids."""
    command = [
        sys.executable,
        TOOL,
        tmp_path / 'out',
        '--train',
        '5000',
        '--test',
        '1',
        '--size',
        '128',
        '--workers',
        '2',
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob('out.unfinished/images/train/*'))) < 4:
            assert process.poll() is None and time.monotonic() < deadline, 'it did not get to work'
            time.sleep(0.05)
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        yield process, children
    finally:
        process.kill()
        process.communicate()


def is_running(pid: str) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_run(started, tmp_path, number):
    process, children = started
    assert len(children) >= 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, 'workers live on'
        time.sleep(0.05)
    assert not (tmp_path / 'out').exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert 'interrupted: nothing is left' in output and 'Traceback' not in output
        assert os.listdir(tmp_path) == []
