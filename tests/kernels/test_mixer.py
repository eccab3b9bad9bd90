"""The functions around the operator: the mixer from the packed projection, and the depthwise convolution."""

import pytest
import torch
import torch.nn.functional as F

from bigla import bigla, bigla_mixer, depthwise_conv


@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('impl', [None, 'chunked', 'reference'])
def test_conv_is_the_module(impl, act):
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    conv = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False).double()
    want = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    got = depthwise_conv(x, conv.weight, act=act, impl=impl)
    torch.testing.assert_close(got, F.silu(want) if act else want)


@pytest.mark.parametrize('act', [False, True])
def test_conv_reference_gradients(act):
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: depthwise_conv(*a, act=act, impl='reference'), (x, weight))


@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('impl', [None, 'reference'])
def test_mixer_is_its_equations(impl, act, make_mixer):
    args = make_mixer(dtype=torch.float64)
    projected, local, weight, bias, gate_bias, norm, local_norm = args
    q, k, v, gate, low = projected.split([12, 12, 24, 24, 3], -1)
    q, k, v, near, gate, c = (x.unflatten(-1, (2, -1)) for x in (q, k, v, local, gate, gate_bias))
    x_fwd, x_bwd = (low @ weight.t() + bias).unflatten(-1, (2, 2, -1)).unbind(-3)
    o = bigla(q, k, v, x_fwd, x_bwd, gate_logits=True, impl='reference')

    def normalize(x, w):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w

    G = 1 / (1 + (-gate - c).exp())
    y = (normalize(o, norm) * G + normalize(near, local_norm) * (1 - G)).flatten(2)
    y = y * torch.sigmoid(y) if act else y
    torch.testing.assert_close(bigla_mixer(*args, num_heads=2, act=act, impl=impl), y)


@pytest.mark.parametrize('impl', ['chunked', 'reference'])
def test_mixer_gradients(impl, make_mixer):
    args = make_mixer(B=1, L=3, dims=8, num_heads=2, rank=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: bigla_mixer(*x, num_heads=2, act=True, impl=impl), args)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixer_in_half_precision(dtype, make_mixer):
    """Parameters may stay in float32; autocast changes nothing."""
    args = make_mixer(dtype=torch.float32)
    half = [x.to(dtype) for x in args[:2]] + args[2:]
    got = bigla_mixer(*half, num_heads=2)
    assert got.dtype == dtype
    want = bigla_mixer(*args, num_heads=2)
    assert (got.float() - want).norm() < 0.02 * want.norm()
    with torch.autocast('cpu', torch.bfloat16):
        assert bigla_mixer(*half, num_heads=2).equal(got)


@pytest.mark.parametrize('shape', [(0, 5), (2, 0)])
def test_mixer_of_nothing(shape, make_mixer):
    args = make_mixer(*shape)
    y = bigla_mixer(*args, num_heads=2)
    assert y.shape == (*shape, 24)
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(y.sum(), args), args))


@pytest.mark.parametrize(
    'change, error, words',
    [
        (dict(local=torch.zeros(2, 4, 24)), ValueError, r'share B and L, got shapes \(2, 5, 75\) and \(2, 4, 24\)'),
        (dict(local=torch.zeros(2, 5, 24).double()), TypeError, "projected's dtype torch.float32"),
        (dict(projected=torch.zeros(2, 5, 72)), ValueError, 'wider than 3 C = 72'),
        (dict(num_heads=5), ValueError, r'multiple of 2 \* num_heads = 10 channels, got 24'),
        (dict(decay_weight=torch.zeros(24, 4)), ValueError, r'decay_weight must have shape \(24, 3\)'),
        (dict(norm_weight=torch.zeros(24)), ValueError, r'norm_weight must have shape \(12,\), got \(24,\)'),
        (dict(gate_bias=3.0), TypeError, 'gate_bias must be a torch.Tensor, got float'),
        (dict(gate_bias=torch.zeros(24, dtype=torch.int64)), TypeError, 'gate_bias must be float16'),
        (dict(gate_bias=torch.zeros(24, device='meta')), ValueError, 'gate_bias is on meta, but projected is on cpu'),
        (dict(impl='fast'), ValueError, "impl must be None or one of .* got 'fast'"),
        (dict(impl='triton'), ValueError, "impl='triton' cannot serve these arguments: projected must be on an NVIDIA"),
    ],
)
def test_mixer_names_what_is_wrong(change, error, words, make_mixer):
    names = 'projected', 'local', 'decay_weight', 'decay_bias', 'gate_bias', 'norm_weight', 'local_norm_weight'
    with pytest.raises(error, match=words):
        bigla_mixer(**dict(zip(names, make_mixer())) | dict(num_heads=2) | change)


@pytest.mark.parametrize(
    'x, weight, error, words',
    [
        (torch.zeros(2, 3, 4), torch.zeros(4, 1, 3, 3), ValueError, r'x must have 4 dimensions \(B, H, W, C\)'),
        (torch.zeros(2, 3, 3, 4), torch.zeros(4, 4, 3, 3), ValueError, r'weight must have shape \(4, 1, 3, 3\)'),
        (torch.zeros(2, 3, 3, 4).int(), torch.zeros(4, 1, 3, 3), TypeError, 'x must be float16'),
    ],
)
def test_conv_names_what_is_wrong(x, weight, error, words):
    with pytest.raises(error, match=words):
        depthwise_conv(x, weight)
