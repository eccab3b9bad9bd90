"""The benchmarks' picture, and what is to be tuned."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

PLOT = Path(__file__).parents[2] / 'kernels/benchmarks/plot_bigla.py'
COLUMNS = ['date', 'gpu', 'torch', 'triton', 'B', 'nh', 'L', 'K', 'V', 'dtype', 'impl', 'mode', 'launch', 'p50_us']


def plot(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, PLOT, *args], capture_output=True, text=True)


def test_picture(tmp_path):
    with (tmp_path / 'results.csv').open('w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for L in (196, 4096):
            for impl, launch, us in (
                ('bigla', 'graph', 50),
                ('bigla', 'eager', 90),
                ('fla', 'eager', 700),
                ('copy', 'graph', 9),
            ):
                rows.writerow(['2026-01-01', 'a GPU', '2', '3', 8, 3, L, 32, 64, 'bfloat16', impl, 'fwd', launch, us])
    done = plot(tmp_path / 'results.csv', '--out', tmp_path / 'bigla.png')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'bigla.png').stat().st_size > 10_000


def test_nothing_to_draw(tmp_path):
    done = plot(tmp_path / 'none.csv')
    assert done.returncode == 2 and 'bench_bigla.py writes it' in done.stderr


def test_settings_exist(monkeypatch):
    """What `tune.py` sets is there to be set, and has as many forms as it says."""
    pytest.importorskip('triton')
    monkeypatch.syspath_prepend(PLOT.parent)
    import tune

    for name, target in tune.TARGETS.items():
        labels = [', '.join(map(tune.described, setting.items())) for setting in target.settings]
        assert len(set(labels)) == len(labels) > 1, name
        for setting in target.settings:
            before = {key: getattr(target.module, key) for key in setting}
            with tune.setting_of(target, setting):
                assert all(getattr(target.module, key) is value for key, value in setting.items())
            assert all(getattr(target.module, key) is value for key, value in before.items())
