"""The public functions: contract, validation, choice of an implementation.

Shapes are written in one alphabet, here and in every implementation: `B` batch, `L` tokens in row-major image order,
`nh` heads, `K` key width and `V` value width of one head. Tensors are token-major, `(B, L, nh, K)`.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked, composed, reference

__all__ = [
    'add_norm',
    'add_pos_embed',
    'bigla',
    'bigla_mixer',
    'block',
    'conv_norm',
    'debug',
    'depthwise_conv',
    'gated_mlp',
    'norm_depthwise_conv',
    'residual_mlp',
    'token_mixer',
]

# What a function may be given as None.
_OPTIONAL = (
    'norm_bias', 'mlp_norm_bias', 'scale', 'branch_scale', 'normed', 'next_norm_weight', 'next_norm_bias',
)  # fmt: skip
_IMPLS = ('triton', 'chunked', 'reference')
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_debug = os.environ.get('BIGLA_DEBUG', '0') == '1'


def bigla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    *,
    scale: float | None = None,
    gate_logits: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Bidirectional gated linear attention (arXiv 2405.18425, section 3.2), per sample and head::

        S_t = diag(exp g_fwd_t) S_{t-1} + k_t v_t^T      S_0     = 0
        R_t = diag(exp g_bwd_t) R_{t+1} + k_t v_t^T      R_{L+1} = 0
        o_t = scale / 2 * (q_t S_t + q_t R_t)

    The current token enters both states undecayed. Inputs may have any strides and are never written. Sums are
    accumulated in float32, or in float64 where an input is float64, whatever autocast says.

    Args:
        q: Queries (B, L, nh, K); float16, bfloat16, float32 or float64. nh, K and V are at least 1; B and L may be 0.
        k: Keys (B, L, nh, K), of q's dtype.
        v: Values (B, L, nh, V), of q's dtype.
        g_fwd: Log decays of the forward direction (B, L, nh, K), every entry in [-inf, 0]; q's dtype, float32 or
            float64. A positive or NaN entry is an error under :func:`debug` and undefined otherwise.
        g_bwd: Log decays of the backward direction, like g_fwd and of its dtype.
        scale: Factor on the scores; ``K ** -0.5`` when None.
        gate_logits: g_fwd and g_bwd are ViG's gate logits x, any finite number, and the log decays are
            ``logsigmoid(x) / 16`` in float32 or wider.
        impl: ``'triton'`` (NVIDIA GPUs from Ampere on, float32 and narrower, K and V up to 256), ``'chunked'`` (matrix
            products over chunks, any device), ``'reference'`` (one token a step, the oracle) or None, which takes the
            first of these that serves the arguments. One that is named is used or raises.

    Returns:
        o (B, L, nh, V), of v's dtype.

    Raises:
        TypeError: An argument is no tensor, scale no number, or dtypes do not go together.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments, or (under
            :func:`debug`) a gate is out of range.

    Warns:
        UserWarning: Once, where impl is None and a GPU runs ``'chunked'`` because ``'triton'`` does not serve it.
    """
    _validate(q, k, v, g_fwd, g_bwd, scale)
    _validate_impl(impl)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if _debug:
        _check_gates(gate_logits, g_fwd=g_fwd, g_bwd=g_bwd)
    if q.shape[1] == 0:
        return v * sum(x.sum() for x in (q, k, g_fwd, g_bwd)).to(v.dtype)  # empty, and differentiable in all five
    impl = _choose(impl, q, lambda triton: triton.unsupported(q, k, v, g_fwd, g_bwd))
    if impl == 'triton':
        from . import triton

        return triton.bigla(q, k, v, g_fwd, g_bwd, scale, gate_logits=gate_logits)
    if gate_logits:
        dtype = torch.promote_types(g_fwd.dtype, torch.float32)
        g_fwd, g_bwd = (F.logsigmoid(x.to(dtype)) / 16 for x in (g_fwd, g_bwd))
    return (chunked if impl == 'chunked' else reference).bigla(q, k, v, g_fwd, g_bwd, scale)


def bigla_mixer(
    projected: Tensor,
    local: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    norm_weight: Tensor,
    local_norm_weight: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
    act: bool = False,
    impl: str | None = None,
) -> Tensor:
    """ViG's token mixer from one packed projection to the gated output (arXiv 2405.18425, sections 3.2 and 3.3)::

        q, k, v, gate, low = projected              x_fwd, x_bwd = decay_weight low + decay_bias
        o = norm(bigla(q, k, v, x_fwd, x_bwd, gate_logits=True))         G = sigmoid(gate + gate_bias)
        y = o G + local_norm(local) (1 - G)         and SiLU of that, if `act`

    where the norms are RMSNorms over the channels of a head. The gradient of `projected` comes as one packed tensor;
    the gate logits, norms and gates are not kept for the backward.

    Args:
        projected: q and k (C / 2 channels each), v and gate (C each) and the low-rank decay (R) side by side,
            (B, L, 3 C + R); float16, bfloat16, float32 or float64. Heads own contiguous channels of each.
        local: Tokens (B, L, C) of projected's dtype, with which the output is mixed.
        decay_weight: (C, R); with its bias it makes the gate logits, forward's half first. Parameters may have another
            dtype than projected.
        decay_bias: (C,).
        gate_bias: (C,).
        norm_weight: (V,) with V = C / num_heads.
        local_norm_weight: (V,).
        num_heads: Heads nh; C is a multiple of 2 nh.
        eps: Added to the mean squares in the norms.
        act: Put a SiLU behind.
        impl: As in :func:`bigla`.

    Returns:
        y (B, L, C), of local's dtype.

    Raises:
        TypeError: An argument is no tensor, or dtypes do not go together.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments.
    """
    tensors = {'projected': projected, 'local': local}
    parameters = {
        'decay_weight': decay_weight,
        'decay_bias': decay_bias,
        'gate_bias': gate_bias,
        'norm_weight': norm_weight,
        'local_norm_weight': local_norm_weight,
    }
    _validate_tensors(tensors | parameters)
    _validate_impl(impl)
    if local.ndim != 3 or projected.ndim != 3 or projected.shape[:2] != local.shape[:2]:
        raise ValueError(
            'projected (B, L, 3 C + R) and local (B, L, C) must have three dimensions and share B and L, got shapes '
            f'{tuple(projected.shape)} and {tuple(local.shape)}'
        )
    if local.dtype != projected.dtype:
        raise TypeError(f"local must have projected's dtype {projected.dtype}, got {local.dtype}: cast it")
    dims = local.shape[-1]
    rank = projected.shape[-1] - 3 * dims
    if rank < 1:
        raise ValueError(f'projected must be wider than 3 C = {3 * dims}, got shape {tuple(projected.shape)}')
    if num_heads < 1 or dims < 1 or dims % (2 * num_heads):
        raise ValueError(f'local must have a multiple of 2 * num_heads = {2 * num_heads} channels, got {dims}')
    wanted = dict(zip(parameters, [(dims, rank), (dims,), (dims,), (dims // num_heads,), (dims // num_heads,)]))
    for name, shape in wanted.items():
        if parameters[name].shape != shape:
            raise ValueError(f'{name} must have shape {shape}, got {tuple(parameters[name].shape)}')
    if local.shape[1] == 0:  # empty, and differentiable in all seven
        return local * sum(x.sum() for x in (projected, *parameters.values())).to(local.dtype)
    args = *tensors.values(), *parameters.values(), num_heads, eps, act
    width = dims // num_heads

    def unsupported(triton: ModuleType) -> str | None:
        too_wide = f'heads must be at most 256 wide, got {width}' if width > 256 else None
        return triton.unsupported_tensor(projected, 'projected') or too_wide

    if _choose(impl, projected, unsupported) == 'triton':
        from . import triton

        return triton.bigla_mixer(*args)
    return composed.mixer((reference if impl == 'reference' else chunked).bigla, *args)


def depthwise_conv(x: Tensor, weight: Tensor, *, act: bool = False, impl: str | None = None) -> Tensor:
    """Depthwise 3x3 convolution of a channels-last grid, zero outside, and SiLU of that if `act`.

    Args:
        x: (B, H, W, C), dense in the last dimension or copied once; float16, bfloat16, float32 or float64.
        weight: (C, 1, 3, 3), as `torch.nn.Conv2d` has it; any of these dtypes.
        act: Put a SiLU behind.
        impl: As in :func:`bigla`; ``'chunked'`` is the convolution that PyTorch has for the device.

    Returns:
        y (B, H, W, C), of x's dtype; sums are accumulated in float32 or wider by all but ``'chunked'``.

    Raises:
        TypeError: An argument is no tensor, or its dtype is none of these.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments.
    """
    _validate_tensors({'x': x, 'weight': weight})
    _validate_impl(impl)
    _validate_depthwise(x, weight)
    chosen = _choose(impl, x, lambda triton: triton.unsupported_tensor(x, 'x'))
    return _module(chosen).depthwise_conv(x, weight, act)


def norm_depthwise_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    *,
    act: bool = False,
    eps: float = 1e-6,
    inner: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """The norm of :func:`add_norm` and the convolution of :func:`depthwise_conv`: ``y = conv(norm(x))``.

    ``'triton'`` keeps x alone for the backward, which makes the norm again.

    Args:
        x: (B, H, W, C); float16, bfloat16, float32 or float64.
        norm_weight: (C,), of the norm; any of these dtypes.
        norm_bias: (C,) for LayerNorm, None for RMSNorm.
        weight: (C, 1, 3, 3), of the convolution.
        act: SiLU of the convolution.
        eps: Added to the mean square.
        inner: The dtype of the norm, which is convolved, x's when None; ``'reference'`` has float32 or wider.
        impl: As in :func:`bigla`.

    Returns:
        y (B, H, W, C), of dtype inner.

    Raises:
        TypeError: An argument is no tensor, or a dtype is none of these.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments.
    """
    tensors = {'x': x, 'norm_weight': norm_weight, 'norm_bias': norm_bias, 'weight': weight}
    given, inner = _given(tensors, inner, impl)
    _validate_depthwise(x, weight)
    if x.shape[-1] < 1:
        raise ValueError(f'x must have a last dimension of at least 1, got shape {tuple(x.shape)}')
    _validate_shapes(given, norm_weight=x.shape[-1:], norm_bias=x.shape[-1:])
    args = *tensors.values(), act, eps, inner
    chosen = _choose(impl, x, _no_float64(x, given, inner=inner))
    return _module(chosen).norm_depthwise_conv(*args)


def token_mixer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    qkv_weight: Tensor,
    gate_weight: Tensor,
    low_weight: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    out_norm_weight: Tensor,
    local_norm_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_heads: int,
    act: bool = False,
    eps: float = 1e-6,
    head_eps: float = 1e-6,
    inner: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """The first half of a block, but for the residual sum: :func:`bigla_mixer` of all that comes before it::

        l = conv(norm(x))      p = [Wqkv; Wgate; Wlow] l      z = Wproj bigla_mixer(p, l)

    with :func:`norm_depthwise_conv`'s norm and convolution. ``'triton'`` keeps x, l, p, the mixer's result and what the
    operator keeps for the backward.

    Args:
        x: (B, H, W, C); float16, bfloat16, float32 or float64.
        norm_weight: (C,), of the first norm; parameters may have any of these dtypes.
        norm_bias: (C,) for LayerNorm, None for RMSNorm.
        conv_weight: (C, 1, 3, 3).
        qkv_weight: (2 C, C): queries and keys (C / 2 each), then values.
        gate_weight: (C, C), of the 2D gate.
        low_weight: (R, C), of the low rank that the gate logits come from.
        decay_weight, decay_bias, gate_bias: (C, R), (C,) and (C,), as in :func:`bigla_mixer`.
        out_norm_weight, local_norm_weight: (V,) each, its norms.
        proj_weight: (C, C).
        num_heads: Heads nh; C is a multiple of 2 nh.
        act: Put a SiLU behind the convolution, and one before the last product.
        eps: Added to the mean square in the first norm.
        head_eps: The same in the norms over a head.
        inner: The dtype of everything from the norm on, x's when None; ``'reference'`` has float32 or wider.
        impl: As in :func:`bigla`.

    Returns:
        z (B, H, W, C), of dtype inner.

    Raises:
        TypeError: An argument is no tensor, or a dtype is none of these.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments.
    """
    tensors = composed.MixerTensors(
        x, norm_weight, norm_bias, conv_weight, qkv_weight, gate_weight, low_weight, decay_weight, decay_bias,
        gate_bias, out_norm_weight, local_norm_weight, proj_weight,
    )  # fmt: skip
    given, inner = _given(tensors._asdict(), inner, impl)
    _validate_mixer(tensors, given, num_heads)
    if x.numel() == 0:
        return _nothing(x, given, inner)
    args = tensors, num_heads, act, eps, head_eps, inner
    chosen = _choose(impl, x, _no_wide_heads(tensors, given, inner, num_heads))
    if chosen == 'chunked':
        return composed.token_mixer(chunked.bigla, *args)
    return _module(chosen).token_mixer(*args)


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual sum and its norm over the last dimension, in one pass::

        s = x + branch      y = weight s / (mean s^2 + eps)^1/2                              without a bias: RMSNorm
                            y = weight (s - m) / (mean (s - m)^2 + eps)^1/2 + bias,  m = mean s       else LayerNorm

    Args:
        x: (..., C); float16, bfloat16, float32 or float64.
        branch: What is added to x, of its shape; None: nothing, and unless it is cast s is x itself.
        weight: (C,); any of these dtypes.
        bias: (C,), or None.
        eps: Added to the mean square.
        dtype: Of y, one of these; x's when None.
        sum_dtype: Of s, one of these; the wider of x's and branch's when None. The norm is that of s before it is cast.
        impl: As in :func:`bigla`.

    Returns:
        s (..., C) and y (..., C). Sums are in float32 or wider.

    Raises:
        TypeError: An argument is no tensor, or its dtype is none of these.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments.
    """
    tensors = {'x': x, 'branch': branch, 'weight': weight, 'bias': bias}
    given = {name: t for name, t in tensors.items() if t is not None or name in ('x', 'weight')}
    _validate_tensors(given)
    _validate_impl(impl)
    dtype = dtype or x.dtype
    sum_dtype = sum_dtype or (x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype))
    _validate_dtypes(dtype=dtype, sum_dtype=sum_dtype)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f'x must have a last dimension of at least 1, got shape {tuple(x.shape)}')
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch must have x's shape {tuple(x.shape)}, got {tuple(branch.shape)}")
    _validate_shapes(given, weight=x.shape[-1:], bias=x.shape[-1:])
    chosen = _choose(impl, x, _no_float64(x, given, dtype=dtype, sum_dtype=sum_dtype))
    args = x, branch, weight, bias, eps, dtype, sum_dtype
    return _module(chosen).add_norm(*args)


def add_pos_embed(
    x: Tensor,
    pos_embed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    inner: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum of tokens and their position embedding, with the norm that the first :func:`block` begins with::

        s = x + pos_embed

    ``'triton'`` makes both by one kernel.

    Args:
        x: (B, ..., C); float16, bfloat16, float32 or float64.
        pos_embed: (1, ..., C), the same for all samples; any of these dtypes.
        norm_weight, norm_bias: Of the norm, as the block gets them, (C,) each.
        eps: Added to the mean square.
        inner: The dtype of the norm, and of what the block multiplies; x's when None.
        impl: As in :func:`bigla`.

    Returns:
        s (B, ..., C), of the wider dtype of x and pos_embed, and for the block's `normed` its norm, which passes no
        gradient on, or None unless it is ``'triton'``.

    Raises:
        TypeError: An argument is no tensor, or a dtype is none of these.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments.
    """
    tensors = {'x': x, 'pos_embed': pos_embed, 'norm_weight': norm_weight, 'norm_bias': norm_bias}
    given, inner = _given(tensors, inner, impl)
    if x.ndim < 2 or x.shape[-1] < 1:
        raise ValueError(f'x must have shape (B, ..., C) with C of at least 1, got {tuple(x.shape)}')
    C = x.shape[-1:]
    _validate_shapes(given, pos_embed=(1, *x.shape[1:]), norm_weight=C, norm_bias=C)
    chosen = _choose(impl, x, _no_float64(x, given, inner=inner))
    if chosen != 'triton':
        return x + pos_embed, None
    constants = (None if t is None else t.detach() for t in (norm_weight, norm_bias))
    return _module(chosen).add_pos_embed(x, pos_embed, *constants, eps, inner)


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int = 1,
    eps: float = 1e-5,
    act: str = '',
    inner: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """A convolution with padding 1 on a channels-last grid, LayerNorm of its channels, and an activation behind.

    Args:
        x: (B, H, W, C), of any strides; float16, bfloat16, float32 or float64. A permuted (B, C, H, W) image costs no
            copy in the forward of ``'triton'`` where D is at most 128.
        weight: (D, C, n, n), as `torch.nn.Conv2d` has it, n at most H + 2 and W + 2.
        bias: (D,). Parameters may have another dtype than x.
        norm_weight: (D,).
        norm_bias: (D,).
        stride: Of the convolution; a side of m becomes ``(m + 2 - n) // stride + 1``.
        eps: Added to the variance.
        act: ``''``, ``'silu'`` or ``'gelu'``.
        inner: The dtype of what is multiplied, x's when None.
        dtype: Of y; inner when None.
        impl: As in :func:`bigla`.

    Returns:
        y (B, H', W', D).

    Raises:
        TypeError: An argument is no tensor, or a dtype is none of these.
        ValueError: Shapes or devices do not agree, act or impl is unknown or impl does not serve the arguments.
    """
    parameters = {'weight': weight, 'bias': bias, 'norm_weight': norm_weight, 'norm_bias': norm_bias}
    _validate_tensors({'x': x} | parameters)
    _validate_impl(impl)
    inner = inner or x.dtype
    dtype = dtype or inner
    _validate_dtypes(inner=inner, dtype=dtype)
    if act not in ('', 'silu', 'gelu'):
        raise ValueError(f"act must be '', 'silu' or 'gelu', got {act!r}")
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f'stride must be an integer of at least 1, got {stride!r}')
    if x.ndim != 4:
        raise ValueError(f'x must have 4 dimensions (B, H, W, C), got shape {tuple(x.shape)}')
    square = weight.ndim == 4 and weight.shape[2] == weight.shape[3]
    if not square or weight.shape[1] != x.shape[-1] or min(weight.shape) < 1:
        raise ValueError(f'weight must have shape (D, {x.shape[-1]}, n, n), got {tuple(weight.shape)}')
    if min(x.shape[1:3]) + 2 < weight.shape[-1]:
        raise ValueError(f'x must be at least {weight.shape[-1] - 2} high and wide, got shape {tuple(x.shape)}')
    _validate_shapes(parameters, **dict.fromkeys(('bias', 'norm_weight', 'norm_bias'), weight.shape[:1]))
    args = x, *parameters.values(), stride, eps, act, inner, dtype
    chosen = _choose(impl, x, _no_float64(x, {}, inner=inner, dtype=dtype))
    return _module(chosen).conv_norm(*args)


def gated_mlp(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, *, impl: str | None = None) -> Tensor:
    """The gated feed-forward network (SwiGLU, arXiv 2002.05202): y = W2 (SiLU(a) * b) with [a, b] = W1 x.

    ``'triton'`` keeps neither [a, b] nor the product for the backward, which computes them again.

    Args:
        x: (..., C); float16, bfloat16, float32 or float64.
        fc1_weight: W1 (2 H, C), of any of these dtypes; products are those of x's.
        fc2_weight: W2 (C, H).
        impl: As in :func:`bigla`; ``'triton'`` fuses the first product with what follows it.

    Returns:
        y (..., C), of x's dtype.

    Raises:
        TypeError: An argument is no tensor, or its dtype is none of these.
        ValueError: Shapes or devices do not agree, impl is unknown or does not serve the arguments.
    """
    _validate_tensors({'x': x, 'fc1_weight': fc1_weight, 'fc2_weight': fc2_weight})
    _validate_impl(impl)
    if x.ndim < 1:
        raise ValueError('x must have at least one dimension')
    _validate_mlp(x.shape[-1], fc1_weight, fc2_weight)
    args = x, fc1_weight, fc2_weight
    chosen = _choose(impl, x, lambda triton: triton.unsupported_tensor(x, 'x'))
    return _module(chosen).gated_mlp(*args)


def residual_mlp(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    scale: Tensor | None = None,
    branch_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    inner: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """The second half of a block: a residual sum, :func:`gated_mlp` of its norm, and the sum with that::

        s = x + branch_scale branch      y = s + scale W2 (SiLU(a) * b)  with [a, b] = W1 norm(s)

    ``'triton'`` keeps x and branch alone for the backward. Where inner is no float32, C at most 256, and the tokens are
    12,288 or more, it does all of this in one kernel.

    Args:
        x: (B, ..., C); float16, bfloat16, float32 or float64.
        branch: What is added to x, of its shape.
        norm_weight: (C,), of the norm, which is :func:`add_norm`'s; any of these dtypes.
        norm_bias: (C,) for LayerNorm, None for RMSNorm.
        fc1_weight: W1 (2 H, C).
        fc2_weight: W2 (C, H).
        scale: (B,), a factor for each sample, such as that of stochastic depth; None: 1. It gets no gradient.
        branch_scale: The same of the branch.
        eps: Added to the mean square.
        inner: The dtype of what is multiplied, x's when None; ``'reference'`` multiplies in float32 or wider.
        impl: As in :func:`bigla`.

    Returns:
        y (B, ..., C), of the wider of x's and branch's dtype.

    Raises:
        TypeError: An argument is no tensor, or a dtype is none of these.
        ValueError: Shapes or devices do not agree, a scale requires a gradient, impl is unknown or does not serve the
            arguments.
    """
    tensors = {
        'x': x,
        'branch': branch,
        'norm_weight': norm_weight,
        'norm_bias': norm_bias,
        'fc1_weight': fc1_weight,
        'fc2_weight': fc2_weight,
        'scale': scale,
        'branch_scale': branch_scale,
    }
    given, inner = _given(tensors, inner, impl)
    if x.ndim < 2 or x.shape[-1] < 1:
        raise ValueError(f'x must have shape (B, ..., C) with C of at least 1, got {tuple(x.shape)}')
    _validate_mlp(x.shape[-1], fc1_weight, fc2_weight)
    C = x.shape[-1:]
    samples = x.shape[:1]
    _validate_shapes(given, branch=x.shape, norm_weight=C, norm_bias=C, scale=samples, branch_scale=samples)
    _validate_scales(scale=scale, branch_scale=branch_scale)
    args = *tensors.values(), eps, inner
    chosen = _choose(impl, x, _no_float64(x, given, inner=inner))
    return _module(chosen).residual_mlp(*args)


def block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    qkv_weight: Tensor,
    gate_weight: Tensor,
    low_weight: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    out_norm_weight: Tensor,
    local_norm_weight: Tensor,
    proj_weight: Tensor,
    mlp_norm_weight: Tensor,
    mlp_norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    scale: Tensor | None = None,
    branch_scale: Tensor | None = None,
    normed: Tensor | None = None,
    next_norm_weight: Tensor | None = None,
    next_norm_bias: Tensor | None = None,
    *,
    num_heads: int,
    act: bool = False,
    eps: float = 1e-6,
    head_eps: float = 1e-6,
    inner: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """A block of ViG (arXiv 2405.18425, section 3.4), :func:`token_mixer` and :func:`residual_mlp`::

        s = x + branch_scale token_mixer(x)      y = s + scale mlp(norm(s))

    One operator sums up the gradients of x where it makes the last of them. The branch between the halves is not kept,
    but made again for the backward; in half precision it may be added unrounded. With the vectors of the norm that the
    next block begins with, ``'triton'`` makes that norm of y while it holds y.

    Args:
        x: (B, H, W, C); float16, bfloat16, float32 or float64.
        norm_weight, norm_bias, conv_weight, qkv_weight, gate_weight, low_weight, decay_weight, decay_bias, gate_bias,
            out_norm_weight, local_norm_weight, proj_weight: Of :func:`token_mixer`.
        mlp_norm_weight, mlp_norm_bias, fc1_weight, fc2_weight, scale, branch_scale: Of :func:`residual_mlp`, there
            norm_weight and norm_bias without `mlp_`.
        normed: What the block before this one, or :func:`add_pos_embed`, returned behind x, (B, H, W, C) of dtype
            inner, in place of x's norm. The gradients are those of the norm all the same. None: it is made here, as it
            is without ``'triton'``.
        next_norm_weight, next_norm_bias: The next block's norm_weight and norm_bias.
        num_heads, act, head_eps: Of :func:`token_mixer`.
        eps: Added to the mean square in the norms of x, s and y.
        inner: The dtype of what is multiplied, and of the branch, x's when None; ``'reference'`` has float32 or wider.
        impl: As in :func:`bigla`.

    Returns:
        y (B, H, W, C), of the wider dtype of x and inner. With next_norm_weight y and, for the next block's `normed`,
        its norm, which passes no gradient on, or None unless it is ``'triton'``. In half precision the norm may be that
        of y unrounded.

    Raises:
        TypeError: An argument is no tensor, or a dtype is none of these; normed is not of inner.
        ValueError: Shapes or devices do not agree, a scale requires a gradient, there is a next_norm_bias without its
            weight, impl is unknown or does not serve the arguments.
    """
    tensors = composed.MixerTensors(
        x, norm_weight, norm_bias, conv_weight, qkv_weight, gate_weight, low_weight, decay_weight, decay_bias,
        gate_bias, out_norm_weight, local_norm_weight, proj_weight,
    )  # fmt: skip
    more = {
        'mlp_norm_weight': mlp_norm_weight,
        'mlp_norm_bias': mlp_norm_bias,
        'fc1_weight': fc1_weight,
        'fc2_weight': fc2_weight,
        'scale': scale,
        'branch_scale': branch_scale,
    }
    handed = {'normed': normed, 'next_norm_weight': next_norm_weight, 'next_norm_bias': next_norm_bias}
    given, inner = _given(tensors._asdict() | more | handed, inner, impl)
    _validate_mixer(tensors, given, num_heads)
    _validate_mlp(x.shape[-1], fc1_weight, fc2_weight)
    C, samples = x.shape[-1:], x.shape[:1]
    _validate_shapes(
        given, mlp_norm_weight=C, mlp_norm_bias=C, scale=samples, branch_scale=samples, normed=x.shape,
        next_norm_weight=C, next_norm_bias=C,
    )  # fmt: skip
    _validate_scales(scale=scale, branch_scale=branch_scale)
    if normed is not None and normed.dtype != inner:
        raise TypeError(f'normed must have dtype inner {inner}, got {normed.dtype}')
    if next_norm_bias is not None and next_norm_weight is None:
        raise ValueError('next_norm_bias needs next_norm_weight, which is None')
    args = num_heads, act, eps, head_eps, inner
    if x.numel() == 0:
        y, n = _nothing(x, given, torch.promote_types(x.dtype, inner)), None
    elif (chosen := _choose(impl, x, _no_wide_heads(tensors, given, inner, num_heads))) == 'triton':
        constants = (None if t is None else t.detach() for t in handed.values())
        y, n = _module(chosen).block(tensors, *more.values(), *constants, *args)
    elif chosen == 'chunked':
        y, n = composed.block(chunked.bigla, tensors, *more.values(), *args), None
    else:
        y, n = reference.block(tensors, *more.values(), *args), None
    return y if next_norm_weight is None else (y, n)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check every gate's value inside the block, or with ``enabled=False`` stop doing so.

    The environment variable ``BIGLA_DEBUG=1``, read at import, has the same effect on a whole process. The check reads
    all gates and waits for the device: it is for finding a fault, not for training.
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def _choose(impl: str | None, x: Tensor, unsupported: Callable[[ModuleType], str | None]) -> str:
    """The implementation for arguments like `x`; `unsupported` asks the Triton package why it does not take them."""
    if impl in ('chunked', 'reference') or (impl is None and not x.is_cuda):
        return impl or 'chunked'
    try:
        from . import triton  # only here, where a GPU asks for it: the import takes a quarter of a second
    except ImportError as error:
        reason = f'Triton cannot be imported ({error})'
    else:
        reason = unsupported(triton)
    if not reason:
        return 'triton'
    if impl == 'triton':
        raise ValueError(f"impl='triton' cannot serve these arguments: {reason}; impl='chunked' can")
    if not torch.compiler.is_compiling():
        _warn_once(reason)
    return 'chunked'


def _no_float64(x: Tensor, given: dict[str, Tensor], **dtypes: torch.dtype) -> Callable[[ModuleType], str | None]:
    """What `_choose` asks for a function whose Triton kernels take no float64, neither a tensor nor a result."""
    every = {name: tensor.dtype for name, tensor in given.items()} | dtypes
    wide = next((name for name, dtype in every.items() if dtype == torch.float64), None)

    def unsupported(triton: ModuleType) -> str | None:
        return triton.unsupported_tensor(x, 'x') or (wide and f'{wide} must be float32, float16 or bfloat16')

    return unsupported


def _module(chosen: str) -> ModuleType:
    """Where the implementation is of what surrounds the operator."""
    if chosen == 'triton':
        from . import triton

        return triton
    return reference if chosen == 'reference' else composed


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f'bigla runs on this GPU without its Triton kernels, slowly: {reason}', stacklevel=4)


def _validate_impl(impl: str | None) -> None:
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f'impl must be None or one of {_IMPLS}, got {impl!r}')


def _given(
    tensors: dict[str, Tensor | None], inner: torch.dtype | None, impl: str | None
) -> tuple[dict[str, Tensor], torch.dtype]:
    """Which of `tensors` are given, all of them valid, and `inner`, the first one's dtype when None; impl is valid."""
    given = {name: t for name, t in tensors.items() if t is not None or name not in _OPTIONAL}
    _validate_tensors(given)
    _validate_impl(impl)
    inner = inner or next(iter(given.values())).dtype
    _validate_dtypes(inner=inner)
    return given, inner


def _validate_tensors(args: dict[str, Tensor]) -> None:
    first = next(iter(args))
    for name, x in args.items():
        if not isinstance(x, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
        if x.dtype not in _DTYPES:
            raise TypeError(f'{name} must be float16, bfloat16, float32 or float64, got {x.dtype}')
        device = args[first].device
        if x.device != device:
            raise ValueError(f'{name} is on {x.device}, but {first} is on {device}: move them to one device')


def _validate_dtypes(**dtypes: torch.dtype) -> None:
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise TypeError(f'{name} must be float16, bfloat16, float32 or float64, got {dtype}')


def _validate_shapes(given: dict[str, Tensor], **shapes: tuple[int, ...]) -> None:
    for name, shape in shapes.items():
        if name in given and given[name].shape != shape:
            raise ValueError(f'{name} must have shape {tuple(shape)}, got {tuple(given[name].shape)}')


def _validate_depthwise(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f'x must have 4 dimensions (B, H, W, C), got shape {tuple(x.shape)}')
    if weight.shape != (x.shape[-1], 1, 3, 3):
        raise ValueError(f'weight must have shape {(x.shape[-1], 1, 3, 3)}, got {tuple(weight.shape)}')


def _validate_mixer(tensors: composed.MixerTensors, given: dict[str, Tensor], num_heads: int) -> None:
    x, low = tensors.x, tensors.low_weight
    if x.ndim != 4 or num_heads < 1 or x.shape[-1] < 1 or x.shape[-1] % (2 * num_heads):
        raise ValueError(
            f'x must have shape (B, H, W, C), C a multiple of 2 * num_heads = {2 * num_heads}, got {tuple(x.shape)}'
        )
    C = x.shape[-1]
    if low.ndim != 2 or len(low) < 1:
        raise ValueError(f'low_weight must have shape (R, {C}), got {tuple(low.shape)}')
    R, V = len(low), C // num_heads
    _validate_shapes(
        given, norm_weight=(C,), norm_bias=(C,), conv_weight=(C, 1, 3, 3), qkv_weight=(2 * C, C), gate_weight=(C, C),
        low_weight=(R, C), decay_weight=(C, R), decay_bias=(C,), gate_bias=(C,), out_norm_weight=(V,),
        local_norm_weight=(V,), proj_weight=(C, C),
    )  # fmt: skip


def _validate_scales(**scales: Tensor | None) -> None:
    for name, scale in scales.items():
        if scale is not None and scale.requires_grad:
            raise ValueError(f'{name} must not require a gradient: it would get none; detach it')


def _nothing(x: Tensor, given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Of an empty x: empty, and differentiable in all that is given."""
    return x.to(dtype) * sum(t.sum() for t in given.values()).to(dtype)


def _no_wide_heads(
    tensors: composed.MixerTensors, given: dict[str, Tensor], inner: torch.dtype, num_heads: int
) -> Callable[[ModuleType], str | None]:
    narrow, V = _no_float64(tensors.x, given, inner=inner), tensors.x.shape[-1] // num_heads
    return lambda triton: narrow(triton) or (f'heads must be at most 256 wide, got {V}' if V > 256 else None)


def _validate_mlp(C: int, fc1: Tensor, fc2: Tensor) -> None:
    if fc1.ndim != 2 or fc1.shape[1] != C or fc1.shape[0] % 2 or min(fc1.shape) < 1:
        raise ValueError(f'fc1_weight must have shape (2 H, {C}), got {tuple(fc1.shape)}')
    if fc2.shape != (C, fc1.shape[0] // 2):
        raise ValueError(f'fc2_weight must have shape {(C, fc1.shape[0] // 2)}, got {tuple(fc2.shape)}')


def _validate(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float | None) -> None:
    args = {'q': q, 'k': k, 'v': v, 'g_fwd': g_fwd, 'g_bwd': g_bwd}
    _validate_tensors(args)
    for name, x in args.items():
        if x.ndim != 4:
            width = 'V' if name == 'v' else 'K'
            raise ValueError(f'{name} must have 4 dimensions (B, L, nh, {width}), got shape {tuple(x.shape)}')
        if name == 'v' and x.shape[:3] != q.shape[:3]:
            raise ValueError(f"v must share q's B, L, nh = {tuple(q.shape[:3])}, got shape {tuple(x.shape)}")
        if name != 'v' and x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape (B, L, nh, K) = {tuple(q.shape)}, got {tuple(x.shape)}")
        if min(x.shape[2:]) < 1:
            raise ValueError(f'{name} must have nh and width of at least 1, got shape {tuple(x.shape)}')
    for name in ('k', 'v'):
        if args[name].dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {args[name].dtype}: cast it")
    if g_fwd.dtype not in (q.dtype, torch.float32, torch.float64):
        raise TypeError(f"g_fwd must have q's dtype {q.dtype}, float32 or float64, got {g_fwd.dtype}: cast it")
    if g_bwd.dtype != g_fwd.dtype:
        raise TypeError(f"g_bwd must have g_fwd's dtype {g_fwd.dtype}, got {g_bwd.dtype}: cast it")
    if scale is not None and not isinstance(scale, Real):
        raise TypeError(f'scale must be None or a number, got {type(scale).__name__}')


def _check_gates(logits: bool, **gates: Tensor) -> None:
    for name, g in gates.items():
        wrong = ~g.isfinite() if logits else ~(g <= 0)  # true for NaN either way
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            wanted = 'a gate logit, every entry finite' if logits else 'a log decay, every entry <= 0'
            cure = '' if logits else '; for gate logits, pass gate_logits=True'
            raise ValueError(
                f'{name} must be {wanted}: {int(wrong.sum())} of {g.numel()} are not, the first '
                f'is {g[at].item()} at (B, L, nh, K) index {at}{cure}'
            )
