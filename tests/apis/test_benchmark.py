"""Timing: every setting a row, ratios to the fastest baseline, and models that fail without taking others along."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmvig  # noqa: F401
from mmvig.apis.benchmark import _compared, _Lost, _Measuring, _rows, benchmark, best_rows
from mmvig.apis.resolution_figure import draw, read_accuracies, series
from mmvig.apis.setting_figure import draw_settings
from mmvig.apis.subjects import Setting, Subject
from mmvig.apis.timing import Limits, percentiles, sample

ROOT = Path(__file__).parents[2]
CPU = torch.device('cpu')
SETTING = Setting(32, 48, 2, 'forward', 'fp32')
LIMITS = Limits(copy=1e9, matmul=1e12)
FACTS = dict(flops=4_000_000, traffic=1000, compile_seconds=3.0)


def rows(model, setting=SETTING, facts=FACTS, peak=50e6, **times):
    """A row a launch, of these milliseconds; words in their place are the status."""
    timed = {}
    for launch, ms in times.items():
        ok = dict(status='ok', times=[ms] * 5, peak=peak) if isinstance(ms, (int, float)) else dict(status=ms)
        timed[launch] = [ok]
    return _rows(model, setting, facts, timed, LIMITS)


def test_row():
    row, failed = rows('a', eager=2.0, compiled='out of memory')
    assert (row.p20, row.p50, row.p80, row.samples, row.images_per_second) == (2, 2, 2, 5, 1000)
    assert (row.peak_mb, row.gflops, row.copy_gbs, row.matmul_tflops) == (50, 0.004, 1, 1)
    assert row.limit == 'compute' and row.share == pytest.approx(2 * 4e6 / 1e12 / 2e-3)
    assert failed.status == 'out of memory' and failed.p50 is None and failed.gflops == 0.004
    (row,) = rows('a', facts={**FACTS, 'traffic': 100_000}, compiled=2.0)
    assert row.limit == 'bandwidth' and row.share == pytest.approx(4e5 / 1e9 / 2e-3) and row.compile_seconds == 3


def test_the_fastest_launch_counts_on_either_side():
    ours = rows('ours', eager=2.0, compiled=1.0, peak=25e6)
    slow, fast = rows('slow', eager=9.0, compiled=8.0), rows('fast', eager=4.0, compiled=6.0)
    compared = _compared([*ours, *slow, *fast], ['slow', 'fast'])
    assert [row.speed for row in compared] == pytest.approx([2, 4, 4 / 9, 1 / 2, 1, 2 / 3])
    assert [row.memory for row in compared] == [0.5, 0.5, 1, 1, 1, 1]
    assert [(row.model, row.launch) for row in best_rows(compared)] == [
        ('ours', 'compiled'), ('slow', 'compiled'), ('fast', 'eager'),
    ]  # fmt: skip


def test_without_a_baseline_that_ran():
    compared = _compared([*rows('ours', eager=2.0), *rows('base', eager='out of memory')], ['base'])
    assert [row.speed for row in compared] == [None, None]
    assert [row.status for row in best_rows(compared)] == ['ok', 'out of memory']


def test_a_lost_process_is_in_all_rows():
    lost = _rows('a', SETTING, _Lost('why'), dict(eager=[_Lost('why')], compiled=[_Lost('why')]), LIMITS)
    assert [row.status for row in lost] == ['crashed: why'] * 2
    half = _rows(
        'a', SETTING, FACTS, dict(eager=[dict(status='ok', times=[1.0] * 5, peak=None)], x=[_Lost('y')]), LIMITS
    )
    assert [row.status for row in half] == ['ok', 'crashed: y']
    assert _rows('a', SETTING, FACTS, dict(graph=[None]), LIMITS) == []  # not for this device


def test_sample():
    calls = []
    times = sample(lambda: calls.append('step'), 1e-9, CPU, reset=lambda: calls.append('reset'))
    assert len(times) == 5 and calls == ['reset', 'step'] * 6
    assert len(sample(lambda: None, 10, CPU)) == 1000
    assert percentiles([1.0, 2, 3, 4, 5, 6]) == (2, 3.5, 5)


def test_training_step_of_a_backbone():
    from mmpretrain.utils import register_all_modules

    register_all_modules()
    subject = Subject('resnet-50', replace(SETTING, mode='train'), CPU)
    weight, found = subject.backbone.conv1.weight, []
    for _ in range(2):
        subject.step()
        found.append(weight.grad.clone())
        subject.reset()
        assert weight.grad is None
    torch.manual_seed(0)
    other = Subject('resnet-50', replace(SETTING, mode='train'), CPU)
    outs = other.backbone(other._step.args[0])
    assert [g.stride() for g in subject._grads] == [out.stride() for out in outs] and len(outs) == 4
    (expected,) = torch.autograd.grad(outs, other.backbone.conv1.weight, subject._grads)
    assert expected.abs().max() > 0
    for gradient in found:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize('mode', ['forward', 'train'])
def test_step_of_a_config(mode):
    config = str(ROOT / 'configs/mmdet/digits/mask-rcnn_vigh-gla-nano_fpn_quickstart_digits.py')
    subject = Subject(config, Setting(64, 96, 1, mode, 'fp32'), CPU)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    subject.step()
    moved = [name for name, value in subject.model.named_parameters() if not value.equal(before[name])]
    assert any('mask_head' in name for name in moved) == any('backbone' in name for name in moved) == (mode == 'train')


def test_an_error_is_a_status():
    measuring = _Measuring('resnet-50', CPU)
    measuring.prepare(replace(SETTING, height=0), ['eager', 'graph'])
    assert measuring.sample('graph', 0.1) is None
    status = measuring.sample('eager', 0.1)['status']
    assert status.startswith('failed: RuntimeError')


@pytest.mark.parametrize(
    'models, setting, launches, baselines, words',
    [
        (['vgg'], SETTING, ['eager'], [], "'vgg' is neither a config nor one of.*resnet-50"),
        (['resnet-50'], SETTING, ['eager'], ['swin-tiny'], 'swin-tiny.*not among the models'),
        (['resnet-50'], replace(SETTING, mode='export'), ['eager'], [], 'modes.*export.*forward'),
        (['resnet-50'], replace(SETTING, precision='fp8'), ['eager'], [], 'precisions.*fp8.*bf16'),
        (['resnet-50'], SETTING, ['lazy'], [], 'launches.*lazy.*compiled'),
    ],
)
def test_bad_settings(models, setting, launches, baselines, words):
    with pytest.raises(ValueError, match=words):
        next(benchmark(models, [setting], launches, baselines, CPU))


def sweep():
    found = []
    for side in (64, 128, 256):
        setting = replace(SETTING, height=side, width=side)
        found += _compared([*rows('a', setting, eager=side / 64), *rows('b', setting, eager='out of memory')], ['a'])
    return [*found, *rows('a', replace(SETTING, mode='train'), eager=1.0)]


def test_series_are_of_the_setting_with_most_sizes():
    key, models = series(sweep())
    assert key == (2, 'forward', 'fp32')
    assert [row.p50 for row in models['a']] == [1, 2, 4]


def test_figure(tmp_path):
    accuracies = tmp_path / 'accuracies.csv'
    accuracies.write_text('model,size,accuracy\na,128,0.5\na,64,0.25\n')
    assert read_accuracies(accuracies) == {'a': [(64, 0.25), (128, 0.5)]}
    widths = []
    for given in (None, read_accuracies(accuracies)):
        draw(sweep(), tmp_path / 'figure.png', given, 'a machine')
        widths.append(int.from_bytes((tmp_path / 'figure.png').read_bytes()[16:20], 'big'))
    assert widths[1] == pytest.approx(widths[0] * 4 / 3, rel=0.01)  # a fourth panel
    accuracies.write_text('model,side\n')
    with pytest.raises(ValueError, match='must have the columns model, size and accuracy'):
        read_accuracies(accuracies)


def test_figure_of_settings(tmp_path):
    """Wider with every setting; what did not run leaves a gap."""
    widths = []
    for kept in (sweep()[:4], sweep()):
        draw_settings(kept, tmp_path / 'figure.png', 'a machine')
        widths.append(int.from_bytes((tmp_path / 'figure.png').read_bytes()[16:20], 'big'))
    assert widths[1] > widths[0]


def test_tool(tmp_path):
    """A process that ends in the middle costs its own rows alone; files are written, and drawn again."""
    fatal = tmp_path / 'fatal.py'
    fatal.write_text('__import__("os")._exit(3)\n')
    out = tmp_path / 'deep' / 'rows.csv'

    def run(*arguments):
        command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/benchmark.py'), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    options = ['--baseline', 'resnet-50', '--sizes', '32x48', '--seconds', '0.01', '--rounds', '2']
    options += ['--device', 'cpu', '--threads', '1', '--out', out]
    said = run('--models', fatal, 'resnet-50', *options)
    assert 'its process ended with status 3' in said and 'left)' in said and 'TF32' in said
    crashed, row = csv.DictReader(out.open())
    assert crashed['status'].startswith('crashed')
    assert row['model'] == 'resnet-50' and float(row['speed']) == 1 and row['samples'] == '10'
    assert float(row['gflops']) == pytest.approx(4.1 * 32 * 48 / 224**2, rel=0.1) and 'torch' in row['environment']
    assert json.loads(out.with_suffix('.json').read_text())['rows'][1]['p50'] == float(row['p50'])
    os.remove(out.with_suffix('.png'))
    run('--from', out, '--out', out)
    assert out.with_suffix('.png').exists()
