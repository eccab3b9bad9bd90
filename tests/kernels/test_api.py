"""The public function: what it refuses and how it says so, what it chooses, what importing it loads."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import bigla
from bigla import api

IMPLS = ('chunked', 'reference')


def good(B=1, L=3, nh=2, K=4, V=6, dtype=torch.float32):
    q, k, v = (torch.randn(B, L, nh, width).to(dtype) for width in (K, K, V))
    return {'q': q, 'k': k, 'v': v, 'g_fwd': -q.abs(), 'g_bwd': -k.abs()}


@pytest.mark.parametrize(
    'change, error, message',
    [
        ({'q': None}, TypeError, r'q must be a torch\.Tensor, got NoneType'),
        ({'k': torch.zeros(3, 2, 4)}, ValueError, r'k must have 4 dimensions \(B, L, nh, K\), got shape \(3, 2, 4\)'),
        ({'v': torch.zeros(3, 2, 6)}, ValueError, r'v must have 4 dimensions \(B, L, nh, V\)'),
        ({'k': torch.zeros(1, 3, 2, 5)}, ValueError, r"k must have q's shape .* \(1, 3, 2, 4\), got \(1, 3, 2, 5\)"),
        ({'g_fwd': torch.zeros(1, 2, 3, 4)}, ValueError, r"g_fwd must have q's shape"),
        ({'g_bwd': torch.zeros(1, 1, 2, 4)}, ValueError, r"g_bwd must have q's shape"),
        ({'v': torch.zeros(1, 4, 2, 6)}, ValueError, r"v must share q's B, L, nh = \(1, 3, 2\), got shape"),
        ({'v': torch.zeros(1, 3, 2, 0)}, ValueError, r'v must have nh and width of at least 1'),
        (good(nh=0), ValueError, r'q must have nh and width of at least 1, got shape \(1, 3, 0, 4\)'),
        ({'q': torch.zeros(1, 3, 2, 4).long()}, TypeError, r'q must be float16, .*, got torch\.int64'),
        ({'v': torch.zeros(1, 3, 2, 6).cfloat()}, TypeError, r'v must be float16, .*, got torch\.complex64'),
        ({'k': torch.zeros(1, 3, 2, 4).half()}, TypeError, r"k must have q's dtype torch\.float32, got torch\.float16"),
        ({'v': torch.zeros(1, 3, 2, 6).double()}, TypeError, r"v must have q's dtype torch\.float32, got"),
        ({'g_fwd': torch.zeros(1, 3, 2, 4).half()}, TypeError, r"g_fwd must have q's dtype .*, float32 or float64"),
        ({'g_bwd': torch.zeros(1, 3, 2, 4).double()}, TypeError, r"g_bwd must have g_fwd's dtype torch\.float32, got"),
        ({'v': torch.zeros(1, 3, 2, 6, device='meta')}, ValueError, r'v is on meta, but q is on cpu'),
        ({'scale': 'auto'}, TypeError, r'scale must be None or a number, got str'),
        ({'impl': 'fast'}, ValueError, r"impl must be None or one of \('triton', .*'reference'\), got 'fast'"),
        ({'impl': 'triton'}, ValueError, r"impl='triton' cannot serve .*: .*; impl='chunked' can"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        bigla.bigla(**{**good(), **change})


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('dtype', api._DTYPES)
def test_output(impl, dtype):
    """Shape and dtype of v; gates of q's dtype, float32 or float64; nothing is written."""
    for gate_dtype in {dtype, torch.float32, torch.float64}:
        inputs = good(dtype=dtype)
        inputs |= {name: inputs[name].to(gate_dtype) for name in ('g_fwd', 'g_bwd')}
        before = {name: x.clone() for name, x in inputs.items()}
        out = bigla.bigla(**inputs, impl=impl)
        assert (out.shape, out.dtype) == (inputs['v'].shape, dtype)
        assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('B, L', [(0, 3), (2, 0), (0, 0)])
def test_empty(B, L, impl):
    inputs = {name: x.requires_grad_() for name, x in good(B, L).items()}
    out = bigla.bigla(**inputs, impl=impl)
    out.sum().backward()
    assert out.shape == (B, L, 2, 6)
    assert all(x.grad.shape == x.shape for x in inputs.values())


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_gate_logits(dtype, impl):
    """The log decays are computed in float32 or wider, whatever the logits' dtype."""
    inputs = good(dtype=dtype)
    wide = {name: -3 * inputs[name].to(torch.promote_types(dtype, torch.float32)) for name in ('g_fwd', 'g_bwd')}
    got = bigla.bigla(**inputs | {name: x.to(dtype) for name, x in wide.items()}, gate_logits=True, impl=impl)
    outside = {name: F.logsigmoid(x.to(dtype).to(x.dtype)) / 16 for name, x in wide.items()}
    assert got.equal(bigla.bigla(**inputs | outside, impl=impl))


@pytest.mark.parametrize('impl', IMPLS)
def test_scale(impl):
    inputs = good()
    expected = bigla.bigla(**inputs, impl=impl)
    torch.testing.assert_close(bigla.bigla(**inputs, impl=impl, scale=4**-0.5), expected, rtol=0, atol=0)
    torch.testing.assert_close(bigla.bigla(**inputs, impl=impl, scale=2), 4 * expected)


def test_choice(monkeypatch):
    """A named implementation runs, no other; left open it is the chunked one on a CPU."""
    for name in IMPLS:
        monkeypatch.setattr(getattr(api, name), 'bigla', lambda *args, name=name: name)
    assert bigla.bigla(**good()) == 'chunked'
    assert [bigla.bigla(**good(), impl=name) for name in IMPLS] == list(IMPLS)


@pytest.mark.parametrize('name', ['g_fwd', 'g_bwd'])
@pytest.mark.parametrize('value', [0.125, torch.nan, torch.inf])
def test_debug(name, value):
    inputs = good()
    inputs[name][0, 2, 1, 3] = value
    bigla.bigla(**inputs)  # unchecked: the values of a gate cost a pass over it
    with bigla.debug(), pytest.raises(ValueError, match=rf'{name} must be .* 1 of 24 .* {value} .*\(0, 2, 1, 3\)'):
        bigla.bigla(**inputs)
    bigla.bigla(**inputs)  # and unchecked again, though the block was left by an error
    with bigla.debug(), bigla.debug(False):
        bigla.bigla(**inputs)


def test_debug_of_logits():
    inputs = good()
    inputs['g_bwd'][0, 2, 1, 3] = torch.nan
    with bigla.debug(), pytest.raises(ValueError, match=r'g_bwd must be a gate logit, .* 1 of 24'):
        bigla.bigla(**inputs | {'g_fwd': 3 * inputs['q'].abs()}, gate_logits=True)


def test_debug_accepts_the_whole_range():
    inputs = good()
    inputs['g_fwd'][0, 0, 0] = torch.tensor([0.0, -0.0, -50.0, -torch.inf])
    with bigla.debug():
        bigla.bigla(**inputs)


def python(code: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], env=os.environ | environ, capture_output=True, text=True
    )


def test_fresh_process():
    """Without triton installed the operator imports and runs; it imports neither triton nor the OpenMMLab side."""
    done = python(
        'import sys\n'
        "sys.modules['triton'] = None\n"
        'import torch\n'
        'before = set(sys.modules)\n'
        'from bigla import bigla\n'
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert tops.isdisjoint({'triton', 'mmvig', 'mmengine', 'mmcv'}), tops\n"
        'x = torch.zeros(1, 40, 2, 4)\n'
        "for impl in (None, 'chunked', 'reference'):\n"
        '    assert bigla(x, x, x, x, x, impl=impl).shape == x.shape\n'
    )
    assert done.returncode == 0, done.stderr


def test_debug_variable():
    code = 'import torch, bigla; x = torch.ones(1, 1, 1, 1); bigla.bigla(x, x, x, x, x)'
    assert python(code, BIGLA_DEBUG='0').returncode == 0
    done = python(code, BIGLA_DEBUG='1')
    assert done.returncode == 1
    assert 'ValueError: g_fwd must be a log decay' in done.stderr
