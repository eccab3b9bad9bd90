"""Runs `interpreted_triton.py` where Triton interprets its kernels; no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')


def run(*options: str, **environ: str) -> None:
    tests = Path(__file__).with_name('interpreted_triton.py')
    env = {name: value for name, value in os.environ.items() if not name.startswith(('PYTEST', 'COV_'))}
    env |= {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1', **environ}
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(tests), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.timeout(1800)
def test_interpreted():
    """By two processes: this is the longest of the fast tests, and others may be done before it."""
    run('-n', '2', '--dist', 'worksteal')


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_500_random_cases():
    run('-k', 'random_cases', BIGLA_CASES='500')
