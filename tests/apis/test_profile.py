"""Profiles: which operator a kernel belongs to, its category, and floors from shapes."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmvig  # noqa: F401
from mmvig.apis.profile import by_category, category, kernels_of_trace, profile
from mmvig.apis.timing import Limits

ROOT = Path(__file__).parents[2]
LIMITS = Limits(copy=1e9, matmul=1e12)


def operator(key, name, start, duration, *arguments):
    """An operator's event; tensors are (type, shape), everything else is a string or nothing."""
    kinds, dims, strides, values = [], [], [], []
    for argument in arguments:
        is_tensor = isinstance(argument, tuple)
        kinds.append(argument[0] if is_tensor else 'Scalar' if argument else '')
        dims.append(list(argument[1]) if is_tensor else [])
        strides.append(list(torch.empty(argument[1]).stride()) if is_tensor else [])
        values.append('' if is_tensor else argument)
    args = {'Input type': kinds, 'Input Dims': dims, 'Input Strides': strides, 'Concrete Inputs': values}
    return dict(cat='cpu_op', name=name, ts=start, dur=duration, tid=1, args={'External id': key, **args})


def kernel(name, key, duration, cat='kernel'):
    return dict(cat=cat, name=name, ts=0, dur=duration, args={} if key is None else {'External id': key})


def test_kernels_of_a_gpu():
    image, weight = ('float', (2, 3, 16, 16)), ('float', (8, 3, 3, 3))
    half = ('c10::BFloat16', (64, 64))
    events = [
        operator(
            1, 'aten::convolution', 0, 10, image, weight, '', '[2, 2]', '[1, 1]', '[1, 1]', 'False', '[0, 0]', '1'
        ),
        operator(2, 'aten::cudnn_convolution', 1, 8, image, weight, '[1, 1]', '[2, 2]', '[1, 1]', '1', '', '', ''),
        operator(3, 'triton_poi_fused_gelu_0', 20, 2, half, half, '4096'),
        operator(4, 'aten::gelu', 30, 2, half, ''),
        operator(5, 'aten::mm', 40, 2, half, half),
        operator(6, 'aten::mm', 50, 2, half, half, half),  # the last is `out`
        operator(7, 'aten::copy_', 60, 2, half, half, 'False'),
        operator(8, 'aten::add_', 70, 2, half, half, '1'),
        kernel('implicit_convolve', 2, 3),
        kernel('transform', 2, 1),
        kernel('triton_poi_fused_gelu_0', 3, 4),
        kernel('vectorized', 4, 5),
        kernel('nvjet', 5, 6),
        kernel('nvjet', 6, 6),
        kernel('vectorized', 7, 7),
        kernel('vectorized', 8, 8),
        kernel('Memcpy HtoD', None, 9, 'gpu_memcpy'),
    ]
    found = {(k.operator, k.name): k for k in kernels_of_trace(events, 2, LIMITS)}
    assert sum(k.share for k in found.values()) == pytest.approx(1)
    bytes_ = {key: k.floor_ms * 1e6 * 2 for key, k in found.items() if k.floor_ms is not None}  # over both steps
    convolution = 4 * (2 * 3 * 256 + 8 * 27 + 2 * 8 * 64)
    matrix = 2 * 64 * 64
    assert bytes_ == pytest.approx(
        {
            ('aten::cudnn_convolution', 'implicit_convolve'): convolution * 3 / 4,  # by time, of one operator
            ('aten::cudnn_convolution', 'transform'): convolution / 4,
            ('triton_poi_fused_gelu_0', 'triton_poi_fused_gelu_0'): 2 * matrix,
            ('aten::gelu', 'vectorized'): 2 * matrix,
            ('aten::mm', 'nvjet'): 2 * 3 * matrix,
            ('aten::copy_', 'vectorized'): 2 * matrix,
            ('aten::add_', 'vectorized'): 3 * matrix,
        }
    )
    assert found['(other)', 'Memcpy HtoD'].floor_ms is None
    assert found['aten::mm', 'nvjet'].calls == 1 and found['aten::mm', 'nvjet'].ms == pytest.approx(0.006)
    sums = {k.category: k for k in by_category(list(found.values()))}
    assert sums['copy'].ms == pytest.approx((7 + 9) / 2e3) and sums['convolution'].calls == 1


def test_arithmetic_is_a_floor_too():
    square = ('c10::BFloat16', (512, 512))
    events = [operator(1, 'aten::mm', 0, 1, square, square), kernel('gemm', 1, 1)]
    (product,) = kernels_of_trace(events, 1, Limits(copy=1e12, matmul=1e12))
    assert product.floor_ms == pytest.approx(2 * 512**3 / 1e12 * 1e3)


@pytest.mark.parametrize(
    'name, operator, expected',
    [
        ('_forward_kernel', 'bigla::forward', 'bigla'),
        ('residual_mlp_kernel', 'bigla_residual_mlp', 'gated MLP'),
        ('pytorch_flash::flash_fwd_kernel', 'aten::_flash_attention_forward', 'attention'),
        ('vectorized_layer_norm_kernel', 'aten::native_layer_norm', 'norm'),
        ('nvjet_tst_128x64', 'aten::addmm', 'matrix product'),
        ('triton_poi_fused_silu_3', 'triton_poi_fused_silu_3', 'elementwise'),
        ('conv_depthwise2d_forward_kernel', 'aten::_conv_depthwise2d', 'convolution'),
    ],
)
def test_category(name, operator, expected):
    assert category(name, operator) == expected


def test_operators_of_a_cpu():
    layer, x = torch.nn.Linear(32, 16, bias=False), torch.rand(8, 32)
    steps = []
    subject = SimpleNamespace(
        device=torch.device('cpu'), reset=lambda: None, step=lambda compiled: steps.append(layer(x).relu())
    )
    found = {k.name: k for k in profile(subject, False, LIMITS, steps=4)}
    assert len(steps) == 3 + 4
    assert found['aten::mm'].calls == found['aten::relu'].calls == 1
    assert found['aten::linear'].floor_ms == 0 == found['aten::t'].floor_ms  # its work is that of mm; a view
    assert found['aten::mm'].floor_ms == pytest.approx(4 * (8 * 32 + 32 * 16 + 8 * 16) / 1e9 * 1e3)
    assert sum(k.share for k in found.values()) == pytest.approx(1)


def test_tool(tmp_path):
    out = tmp_path / 'profile.csv'
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/profile.py'), 'resnet-50', '--size', '32']
    run = subprocess.run(
        [*command, '--steps', '1', '--device', 'cpu', '--out', str(out)], check=True, capture_output=True, text=True
    )
    assert 'time / floor' in run.stdout and 'convolution' in run.stdout
    rows = list(csv.DictReader(out.open()))
    assert {row['model'] for row in rows} == {'resnet-50'} and sum(float(row['share']) for row in rows) > 0.99


def test_the_tool_does_not_take_the_place_of_the_standard_library():
    code = 'import cProfile, profile; print(profile.Profile)'
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT / 'tools', check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "<class 'profile.Profile'>"
