import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name('kill_and_resume.py')


@pytest.mark.parametrize(
    ('kills', 'epochs'), [(2, 3), pytest.param(20, 16, marks=pytest.mark.slow)], ids=['short', 'long']
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(kills, epochs):
    command = [sys.executable, SCRIPT, '--kills', str(kills), '--epochs', str(epochs), '--seed', '1']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'{kills} kills' in done.stdout
