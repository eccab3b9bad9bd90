"""The timing table: every setting once, the baseline at ratio 1, errors that name what is wrong."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmvig  # noqa: F401
from mmvig.apis.benchmark import benchmark

ROOT = Path(__file__).parents[2]


def test_rows():
    from mmpretrain.utils import register_all_modules

    register_all_modules()
    ticks = []
    rows = list(
        benchmark(
            ['vigh-gla-tiny', 'resnet-50'], [64], 1, ['forward', 'train'], 'resnet-50', 2, tick=lambda: ticks.append(1)
        )
    )
    assert [(r.model, r.mode) for r in rows] == [
        (m, mode) for mode in ('forward', 'train') for m in ('vigh-gla-tiny', 'resnet-50')
    ]
    assert len(ticks) == 6
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.model != 'resnet-50' or row.ratio == 1
    assert rows[0].ratio == pytest.approx(rows[1].p50 / rows[0].p50)


@pytest.mark.parametrize(
    'models, modes, baseline, words',
    [
        (['vgg'], ['train'], 'vgg', "'vgg' is unknown"),
        (['resnet-50'], ['train'], 'swin-tiny', "'swin-tiny'.*not measured"),
        (['resnet-50'], ['export'], 'resnet-50', 'export'),
    ],
)
def test_bad_settings(models, modes, baseline, words):
    with pytest.raises(ValueError, match=words):
        next(benchmark(models, [64], 1, modes, baseline, 2))


def test_tool_writes_csv(tmp_path):
    out = tmp_path / 'deep' / 'rows.csv'
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/benchmark.py'), '--models', 'resnet-50']
    command += ['--baseline', 'resnet-50', '--sizes', '32', '--modes', 'forward', '--rounds', '2', '--out', str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    (row,) = csv.DictReader(out.open())
    assert row['model'] == 'resnet-50' and float(row['ratio']) == 1 and 'torch' in row['environment']
