"""What surrounds the mixer: the norm with its residual sum, the gated MLP, the strided convolution with its norm."""

import pytest
import torch
import torch.nn.functional as F

from bigla import (
    add_norm,
    add_pos_embed,
    block,
    composed,
    conv_norm,
    depthwise_conv,
    gated_mlp,
    norm_depthwise_conv,
    residual_mlp,
    token_mixer,
)


def double(tensors):
    return [x if x is None else x.double() for x in tensors]


def test_forms_agree(part, derive):
    fn, tensors = part
    want = derive(lambda *x: fn(*x, impl='reference'), double(tensors))
    for a, b in zip(derive(fn, double(tensors)), want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(derive(fn, tensors), want, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 5e-6 * b.norm()


@pytest.mark.parametrize('impl', ['chunked', 'reference'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(part, dtype, impl):
    """Parameters may stay in float32; autocast changes nothing."""
    fn, tensors = part
    half = [x if x is None or i > 1 or x.ndim < 2 else x.to(dtype) for i, x in enumerate(tensors)]
    got, want = fn(*half, impl=impl), fn(*tensors)
    for a, b in zip(got, want):
        assert a.dtype == dtype and (a.float() - b).norm() < 0.02 * b.norm()
    with torch.autocast('cpu', torch.bfloat16):
        assert all(a.equal(b) for a, b in zip(fn(*half, impl=impl), got))


def test_norms_are_the_modules():
    x, branch, weight, bias = *torch.randn(2, 4, 5, 6).double(), *torch.randn(2, 6).double()
    total, y = add_norm(x, branch, weight, bias, eps=1e-3)
    torch.testing.assert_close((total, y), (x + branch, F.layer_norm(x + branch, (6,), weight, bias, 1e-3)))
    same, y = add_norm(x, None, weight, eps=1e-3)
    torch.testing.assert_close(y, F.rms_norm(x, (6,), weight, 1e-3))
    assert same is x


def test_the_sum_keeps_the_wider_type():
    total, y = add_norm(torch.randn(3, 8), torch.randn(3, 8).bfloat16(), torch.ones(8), dtype=torch.bfloat16)
    assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    y = conv_norm(*(torch.randn(s) for s in ((1, 4, 4, 2), (3, 2, 3, 3), (3,), (3,), (3,))), inner=torch.bfloat16)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize('impl', ['chunked', 'reference'])
def test_a_sum_of_another_type(impl, casts):
    casts(impl, 'cpu')


@pytest.mark.parametrize('impl', ['chunked', 'reference'])
def test_half_a_block_is_its_parts(impl, half_block):
    """In bfloat16 inside a float32 stream, with a sample that stochastic depth drops."""
    x, branch, *parameters, scale = half_block(3, 4, 5, 16, H=24, bias=True, scale=True)
    scale[1] = 0
    total, y = add_norm(x, branch.bfloat16(), *parameters[:2], eps=1e-3, dtype=torch.bfloat16, impl=impl)
    z = gated_mlp(y, *parameters[2:], impl=impl)
    options = dict(eps=1e-3, inner=torch.bfloat16, impl=impl)
    got = residual_mlp(x, branch.bfloat16(), *parameters, scale, **options)
    torch.testing.assert_close(got, total + z * scale[:, None, None, None], atol=0.03, rtol=0)
    assert got.dtype == torch.float32 and got[1].equal(total[1])
    assert residual_mlp(x, branch.bfloat16(), *parameters, **options)[1].ne(total[1]).any()


@pytest.mark.parametrize('impl', ['chunked', 'reference'])
def test_a_block_is_its_halves(impl, whole_block):
    """In bfloat16 inside a float32 stream, with samples that stochastic depth drops, of either branch."""
    x, *parameters = whole_block(3, 4, 5, 16, num_heads=2, rank=3, H=24, bias=True)
    scale, branch_scale = torch.tensor([2.0, 0.0, 2.0]), torch.tensor([2.0, 2.0, 0.0])
    options = dict(inner=torch.bfloat16, impl=impl)
    branch = token_mixer(x, *parameters[:12], num_heads=2, act=True, eps=1e-3, head_eps=1e-4, **options)
    want = residual_mlp(x, branch, *parameters[12:], scale, branch_scale, eps=1e-3, **options)
    same = residual_mlp(x, branch * branch_scale[:, None, None, None], *parameters[12:], scale, eps=1e-3, **options)
    got = block(x, *parameters, scale, branch_scale, num_heads=2, act=True, eps=1e-3, head_eps=1e-4, **options)
    assert branch.dtype == torch.bfloat16 and got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.05, rtol=0)
    torch.testing.assert_close(want, same, atol=0.05, rtol=0)
    handed = dict(normed=torch.zeros_like(x).bfloat16(), next_norm_weight=x[0, 0, 0])  # made again, and not made
    options |= dict(num_heads=2, act=True, eps=1e-3, head_eps=1e-4)
    y, normed = block(x, *parameters, scale, branch_scale, **handed, **options)
    assert y.equal(got) and normed is None
    none = block(x, *parameters, 0 * scale, 0 * branch_scale, **options)
    assert none.equal(x) and got[2].ne(x[2]).any() and got[1].ne(x[1]).any()


@pytest.mark.parametrize('impl', ['chunked', 'reference'])
def test_a_position_embedding_is_added_alone(impl):
    """The norm is left to the block."""
    x, pos_embed = torch.randn(2, 3, 4, 8).bfloat16(), torch.randn(1, 3, 4, 8)
    total, normed = add_pos_embed(x, pos_embed, torch.ones(8), inner=torch.bfloat16, impl=impl)
    assert total.equal(x + pos_embed) and normed is None


@pytest.mark.parametrize('impl', ['chunked', 'reference'])
def test_a_normed_convolution_is_its_parts(impl):
    x, weight, bias, taps = torch.randn(2, 4, 5, 6), *torch.randn(2, 6), torch.randn(6, 1, 3, 3)
    y = add_norm(x, None, weight, bias, eps=1e-3, dtype=torch.bfloat16, impl=impl)[1]
    got = norm_depthwise_conv(x, weight, bias, taps, act=True, eps=1e-3, inner=torch.bfloat16, impl=impl)
    want = depthwise_conv(y, taps, act=True, impl=impl)
    assert got.dtype == torch.bfloat16 and (got.float() - want.float()).norm() < 0.01 * want.float().norm()


def changed_block(whole_block, num_heads: int = 2, impl: str | None = None, **changes) -> None:
    """Calls `block` with one tensor after another as `changes` have them, by name."""
    names = [*composed.MixerTensors._fields, 'mlp_norm_weight', 'mlp_norm_bias', 'fc1_weight', 'fc2_weight']
    tensors = whole_block(2, 3, 4, 8, num_heads=2, rank=5, H=6, bias=True)
    block(**dict(zip(names, tensors, strict=True)) | changes, num_heads=num_heads, impl=impl)


@pytest.mark.parametrize(
    'changes, error, words',
    [
        (dict(x=torch.zeros(2, 12, 8)), ValueError, r'x must have shape \(B, H, W, C\), C a multiple of 2 .* = 4, got'),
        (dict(num_heads=3), ValueError, 'C a multiple of 2 . num_heads = 6, got'),
        (dict(num_heads=0), ValueError, 'C a multiple of 2 . num_heads = 0, got'),
        (dict(low_weight=torch.zeros(8)), ValueError, r'low_weight must have shape \(R, 8\), got \(8,\)'),
        (dict(low_weight=torch.zeros(4, 8)), ValueError, r'decay_weight must have shape \(8, 4\), got \(8, 5\)'),
        (dict(qkv_weight=torch.zeros(24, 8)), ValueError, r'qkv_weight must have shape \(16, 8\), got \(24, 8\)'),
        (dict(out_norm_weight=torch.zeros(8)), ValueError, r'out_norm_weight must have shape \(4,\), got \(8,\)'),
        (dict(mlp_norm_bias=torch.zeros(4)), ValueError, r'mlp_norm_bias must have shape \(8,\), got \(4,\)'),
        (dict(fc2_weight=torch.zeros(8, 5)), ValueError, r'fc2_weight must have shape \(8, 6\), got \(8, 5\)'),
        (dict(branch_scale=torch.ones(3)), ValueError, r'branch_scale must have shape \(2,\), got \(3,\)'),
        (dict(scale=torch.ones(2, requires_grad=True)), ValueError, 'scale must not require a gradient'),
        (dict(gate_bias=None), TypeError, 'gate_bias must be a torch.Tensor, got NoneType'),
        (dict(proj_weight=torch.zeros(8, 8, device='meta')), ValueError, 'proj_weight is on meta, but x is on cpu'),
        (dict(impl='triton'), ValueError, "impl='triton' cannot serve these arguments: x must be on an NVIDIA GPU"),
        (dict(inner=torch.int8), TypeError, 'inner must be float16'),
        (dict(normed=torch.zeros(2, 12, 8)), ValueError, r'normed must have shape \(2, 3, 4, 8\), got \(2, 12, 8\)'),
        (dict(normed=torch.zeros(2, 3, 4, 8).half()), TypeError, 'normed must have dtype inner torch.float32, got'),
        (dict(next_norm_weight=torch.zeros(4)), ValueError, r'next_norm_weight must have shape \(8,\), got \(4,\)'),
        (dict(next_norm_bias=torch.zeros(8)), ValueError, 'next_norm_bias needs next_norm_weight, which is None'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_blocks(changes, error, words, whole_block):
    with pytest.raises(error, match=words):
        changed_block(whole_block, **changes)


@pytest.mark.parametrize('shape', [(0, 3, 4, 8), (2, 0, 4, 8)])
def test_no_tokens(shape, whole_block):
    """Nothing comes of nothing, in the right type, and every tensor has a gradient of 0."""
    tensors = [t.requires_grad_() for t in whole_block(*shape, num_heads=2, rank=5, H=6, bias=True)]
    y = block(*tensors, num_heads=2, inner=torch.bfloat16)
    z = token_mixer(*tensors[:13], num_heads=2, inner=torch.bfloat16)
    assert y.shape == z.shape == shape and (y.dtype, z.dtype) == (torch.float32, torch.bfloat16)
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum() + z.sum(), tensors))


@pytest.mark.parametrize('act', ['', 'silu', 'gelu'])
def test_conv_is_the_modules(act):
    conv, norm = torch.nn.Conv2d(3, 6, 3, 2, 1).double(), torch.nn.LayerNorm(6).double()
    image = torch.randn(2, 3, 9, 12).double()
    want = norm(conv(image).permute(0, 2, 3, 1))
    want = {'': want, 'silu': F.silu(want), 'gelu': F.gelu(want)}[act]
    got = conv_norm(image.permute(0, 2, 3, 1), conv.weight, conv.bias, norm.weight, norm.bias, stride=2, act=act)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('empty', ['x', 'row'])
def test_nothing(empty):
    x = torch.zeros((0, 4, 8) if empty == 'x' else (2, 0, 8), requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    fc1, fc2 = torch.ones(6, 8, requires_grad=True), torch.ones(8, 3, requires_grad=True)
    total, y = add_norm(x, x, weight)
    z = gated_mlp(y, fc1, fc2)
    assert residual_mlp(x, x, weight, None, fc1, fc2).shape == x.shape
    assert total.shape == z.shape == x.shape
    for D in (4, 200):
        grid = torch.zeros(0, 5, 6, 2, requires_grad=True)
        y = conv_norm(grid, torch.ones(D, 2, 3, 3), *torch.ones(3, D), stride=2)
        assert y.shape == (0, 3, 3, D) and torch.autograd.grad(y.sum(), grid)[0].shape == grid.shape
    assert all((g == 0).all() for g in torch.autograd.grad(z.sum(), (x, weight, fc1, fc2)))


X, W = torch.zeros(2, 3, 8), torch.zeros(8)
MLP = torch.zeros(6, 8), torch.zeros(8, 3)
GRID, TAPS = torch.zeros(1, 5, 5, 2), torch.zeros(4, 2, 3, 3)


@pytest.mark.parametrize(
    'call, error, words',
    [
        (lambda: add_norm(X, X[:1], W), ValueError, r"branch must have x's shape \(2, 3, 8\), got \(1, 3, 8\)"),
        (lambda: add_norm(X, None, W[:4]), ValueError, r'weight must have shape \(8,\), got \(4,\)'),
        (lambda: add_norm(X, None, W, W[:4]), ValueError, r'bias must have shape \(8,\)'),
        (lambda: add_norm(X, None, None), TypeError, 'weight must be a torch.Tensor, got NoneType'),
        (lambda: add_norm(X.int(), None, W), TypeError, 'x must be float16'),
        (lambda: add_norm(X, None, W, dtype=torch.int8), TypeError, 'dtype must be float16, .* got torch.int8'),
        (lambda: add_norm(X, X.to('meta'), W), ValueError, 'branch is on meta, but x is on cpu'),
        (lambda: add_norm(torch.zeros(()), None, W), ValueError, 'x must have a last dimension'),
        (lambda: add_norm(X, None, W, impl='triton'), ValueError, 'x must be on an NVIDIA GPU'),
        (lambda: add_pos_embed(X, X, W), ValueError, r'pos_embed must have shape \(1, 3, 8\), got \(2, 3, 8\)'),
        (lambda: add_pos_embed(X, X[:1], W[:4]), ValueError, r'norm_weight must have shape \(8,\), got \(4,\)'),
        (lambda: add_pos_embed(X, X[:1], None), TypeError, 'norm_weight must be a torch.Tensor, got NoneType'),
        (lambda: add_pos_embed(X, X[:1], W, inner=torch.int8), TypeError, 'inner must be float16'),
        (lambda: add_pos_embed(W, W[:1], W), ValueError, r'x must have shape \(B, ..., C\)'),
        (lambda: add_pos_embed(X, X[:1], W, impl='triton'), ValueError, 'x must be on an NVIDIA GPU'),
        (lambda: gated_mlp(X, torch.zeros(5, 8), torch.zeros(8, 2)), ValueError, r'fc1_weight .* \(2 H, 8\), got'),
        (lambda: gated_mlp(X, torch.zeros(6, 8), torch.zeros(8, 2)), ValueError, r'fc2_weight .* \(8, 3\), got'),
        (lambda: gated_mlp(X, torch.zeros(6, 8), torch.zeros(8, 3), impl='fast'), ValueError, 'impl must be'),
        (lambda: norm_depthwise_conv(X, W, None, TAPS), ValueError, 'x must have 4 dimensions'),
        (lambda: norm_depthwise_conv(GRID, W[:2], None, TAPS), ValueError, r'weight must have shape \(2, 1, 3, 3\)'),
        (lambda: norm_depthwise_conv(GRID, W, None, TAPS[:2, :1]), ValueError, r'norm_weight must have shape \(2,\)'),
        (
            lambda: norm_depthwise_conv(GRID[..., :0], W[:0], None, TAPS[:0, :1]),
            ValueError,
            'last dimension of at least 1',
        ),
        (lambda: norm_depthwise_conv(GRID, None, None, TAPS[:2, :1]), TypeError, 'norm_weight must be a torch.Tensor'),
        (lambda: residual_mlp(X, X[:1], W, None, *MLP), ValueError, r'branch must have shape \(2, 3, 8\), got \(1,'),
        (lambda: residual_mlp(X, X, W, W[:4], *MLP), ValueError, r'norm_bias must have shape \(8,\), got \(4,\)'),
        (lambda: residual_mlp(X, X, W, None, *MLP, torch.ones(3)), ValueError, r'scale must have shape \(2,\), got'),
        (
            lambda: residual_mlp(X, X, W, None, *MLP, torch.ones(2, requires_grad=True)),
            ValueError,
            'scale must not require a gradient',
        ),
        (lambda: residual_mlp(X, X, W, None, MLP[0], W), ValueError, r'fc2_weight must have shape \(8, 3\)'),
        (lambda: residual_mlp(W, W, W, None, *MLP), ValueError, r'x must have shape \(B, ..., C\)'),
        (lambda: residual_mlp(X, X, W, None, *MLP, inner=torch.int8), TypeError, 'inner must be float16'),
        (lambda: residual_mlp(X, None, W, None, *MLP), TypeError, 'branch must be a torch.Tensor, got NoneType'),
        (lambda: conv_norm(X, TAPS, *[W[:4]] * 3), ValueError, 'x must have 4 dimensions'),
        (lambda: conv_norm(GRID, TAPS[:, :1], *[W[:4]] * 3), ValueError, r'weight must have shape \(D, 2, n, n\)'),
        (lambda: conv_norm(GRID, TAPS, W, *[W[:4]] * 2), ValueError, r'bias must have shape \(4,\), got \(8,\)'),
        (lambda: conv_norm(GRID, TAPS, *[W[:4]] * 3, act='relu'), ValueError, "act must be '', 'silu' or 'gelu'"),
        (lambda: conv_norm(GRID, TAPS, *[W[:4]] * 3, stride=0), ValueError, 'stride must be an integer'),
        (lambda: conv_norm(GRID, TAPS, *[W[:4]] * 3, inner=torch.int8), TypeError, 'inner must be float16'),
        (lambda: conv_norm(GRID[:, :2], torch.zeros(4, 2, 9, 9), *[W[:4]] * 3), ValueError, 'x must be at least 7'),
    ],
)
def test_what_is_wrong_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
