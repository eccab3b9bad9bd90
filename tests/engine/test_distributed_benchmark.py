import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_its_steps_on_a_cpu(tmp_path):
    command = [sys.executable, 'benchmarks/distributed.py', '--device', 'cpu', '--out', tmp_path / 'rows.csv']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / 'rows.csv').open()))
    assert [row['processes'] for row in rows] == ['2', '1', '2', '1', '2']
    assert float(rows[0]['worst_relative_difference']) < 1e-5
    assert all(float(row['images_per_second']) > 0 for row in rows[1:])
