"""What Triton computes, as operators of PyTorch: BiGLA, ViG's mixer around it, and the depthwise convolution."""

import torch
from torch import Tensor

from .backward import launch_backward
from .conv import launch_conv, launch_conv_grad
from .forward import buffers, launch_forward
from .mixer import launch_mixer, launch_mixer_grad
from .primitives import INTERPRETED, chunk_size

__all__ = ['bigla', 'bigla_mixer', 'depthwise_conv', 'unsupported', 'unsupported_tensor']


def bigla(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, *, gate_logits: bool = False
) -> Tensor:
    """`api.bigla` by Triton kernels, for arguments that :func:`unsupported` has nothing against.

    Results are the same bits on every run. Autocast changes nothing. A second derivative raises.

    Args:
        q, k, g_fwd, g_bwd: (B, L, nh, K); g_fwd and g_bwd of q's dtype or float32.
        v: (B, L, nh, V).
        scale: Factor on the scores.
        gate_logits: g_fwd and g_bwd hold ViG's gate logits x, of which the log total are ``logsigmoid(x) / 16``.

    Returns:
        o (B, L, nh, V), of v's dtype.
    """
    L = q.shape[1]
    C = chunk_size(L, q.shape[-1], q.dtype)
    one = isinstance(L, int) and L <= C  # a symbolic length is not asked: the answer would specialise the graph
    return _forward(q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one)[0]


def unsupported(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> str | None:
    """Why these arguments, valid ones of `api.bigla`, cannot be served; None when they can."""
    if reason := unsupported_tensor(q, 'q'):
        return reason
    if g_fwd.dtype not in (q.dtype, torch.float32):
        return f"g_fwd must be float32 or of q's dtype {q.dtype}, got {g_fwd.dtype}"
    for name, x in (('q', q), ('v', v)):
        if x.shape[-1] > 256:
            return f'{name} must be at most 256 wide in its last dimension, got shape {tuple(x.shape)}'
    return None


def unsupported_tensor(x: Tensor, name: str) -> str | None:
    """Why `x`, an argument called `name`, is on a device or of a dtype that cannot be served; None when it can."""
    if INTERPRETED:
        if x.device.type != 'cpu':
            return f'{name} must be on the CPU under TRITON_INTERPRET=1, got {x.device}'
    elif x.device.type != 'cuda' or torch.version.hip is not None:
        return f'{name} must be on an NVIDIA GPU, got {x.device}'
    elif torch.cuda.get_device_capability(x.device) < (8, 0):
        return f'{name} must be on a GPU of compute capability 8.0 or later, got {torch.cuda.get_device_name(x.device)}'
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'{name} must be float32, float16 or bfloat16, got {x.dtype}'
    return None


@torch.library.custom_op('bigla::forward', mutates_args=(), device_types=('cpu', 'cuda'))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, gate_logits: bool, C: int, one: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one)


@_forward.register_fake
def _(q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one):
    B, L, nh, _ = q.shape
    NT = (L + C - 1) // C
    return v.new_empty(B, L, nh, v.shape[-1]), *buffers(q, v, NT, one)


@torch.library.custom_op('bigla::backward', mutates_args=(), device_types=('cpu', 'cuda'))
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor,
    state: Tensor, total: Tensor, hard: Tensor, scale: float, gate_logits: bool, C: int, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return tuple(launch_backward(do, q, k, v, g_fwd, g_bwd, state, total, hard, scale, gate_logits, C, one))


@_backward.register_fake
def _(do, q, k, v, g_fwd, g_bwd, state, total, hard, scale, gate_logits, C, one):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.gate_logits, ctx.C, ctx.one = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, *_):
    if do is None:
        return (None,) * 9
    return *_backward(do, *ctx.saved_tensors, ctx.scale, ctx.gate_logits, ctx.C, ctx.one), None, None, None, None


def _refuse(ctx, *_):
    raise NotImplementedError(
        "bigla's Triton kernels have no second derivative: use impl='chunked' or impl='reference'"
    )


def bigla_mixer(
    projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor, norm_weight: Tensor,
    local_norm_weight: Tensor, num_heads: int, eps: float, act: bool,
) -> Tensor:  # fmt: skip
    """`api.bigla_mixer` by Triton kernels, for arguments that :func:`unsupported_tensor` has nothing against.

    Results are the same bits on every run. Autocast changes nothing. A second derivative raises.
    """
    L = projected.shape[1]
    C = chunk_size(L, local.shape[-1] // (2 * num_heads), projected.dtype)
    one = isinstance(L, int) and L <= C
    return _mixer(
        projected,
        local,
        decay_weight,
        decay_bias,
        gate_bias,
        norm_weight,
        local_norm_weight,
        num_heads,
        eps,
        act,
        C,
        one,
    )[0]


@torch.library.custom_op('bigla::mixer', mutates_args=(), device_types=('cpu', 'cuda'))
def _mixer(
    projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor, norm_weight: Tensor,
    local_norm_weight: Tensor, num_heads: int, eps: float, act: bool, C: int, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(projected), torch.autocast(projected.device.type, enabled=False):
        return launch_mixer(
            projected.contiguous(), local.contiguous(), decay_weight.to(projected.dtype),
            decay_bias.to(projected.dtype), gate_bias, norm_weight, local_norm_weight, num_heads, eps, act, C, one,
        )  # fmt: skip


@_mixer.register_fake
def _(projected, local, dw, db, gb, nw, lw, num_heads, eps, act, C, one):
    B, L, dims = local.shape
    K, V = dims // (2 * num_heads), dims // num_heads
    q, v = projected.new_empty(B, L, num_heads, K), projected.new_empty(B, L, num_heads, V)
    return local.new_empty(B, L, dims), v, *buffers(q, v, (L + C - 1) // C, one)


@torch.library.custom_op('bigla::mixer_backward', mutates_args=(), device_types=('cpu', 'cuda'))
def _mixer_backward(
    dy: Tensor, projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor,
    norm_weight: Tensor, local_norm_weight: Tensor, o: Tensor, state: Tensor, total: Tensor, hard: Tensor,
    num_heads: int, eps: float, act: bool, C: int, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parameters = decay_weight, decay_bias, gate_bias, norm_weight, local_norm_weight
    with torch.cuda.device_of(projected), torch.autocast(projected.device.type, enabled=False):
        dprojected, dlocal, *grads = launch_mixer_grad(
            dy.contiguous(), projected.contiguous(), local.contiguous(), decay_weight.to(projected.dtype),
            decay_bias.to(projected.dtype), gate_bias, norm_weight, local_norm_weight, o, state, total, hard,
            num_heads, eps, act, C, one,
        )  # fmt: skip
    return dprojected, dlocal, *(g.to(x.dtype) for g, x in zip(grads, parameters, strict=True))


@_mixer_backward.register_fake
def _(dy, projected, local, dw, db, gb, nw, lw, o, state, total, hard, num_heads, eps, act, C, one):
    return tuple(x.new_empty(x.shape) for x in (projected, local, dw, db, gb, nw, lw))


def _setup_mixer(ctx, inputs, output) -> None:
    *tensors, ctx.num_heads, ctx.eps, ctx.act, ctx.C, ctx.one = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_mixer(ctx, dy, *_):
    if dy is None:
        return (None,) * 12
    grads = _mixer_backward(dy, *ctx.saved_tensors, ctx.num_heads, ctx.eps, ctx.act, ctx.C, ctx.one)
    return *grads, None, None, None, None, None


def depthwise_conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    """`api.depthwise_conv` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    return _conv(x, weight, act)


@torch.library.custom_op('bigla::depthwise_conv', mutates_args=(), device_types=('cpu', 'cuda'))
def _conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    with torch.cuda.device_of(x):
        return launch_conv(x, weight.contiguous(), act)


@_conv.register_fake
def _(x, weight, act):
    return x.new_empty(x.shape)


@torch.library.custom_op('bigla::depthwise_conv_backward', mutates_args=(), device_types=('cpu', 'cuda'))
def _conv_backward(dy: Tensor, x: Tensor, weight: Tensor, act: bool) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return launch_conv_grad(dy, x, weight.contiguous(), act)


@_conv_backward.register_fake
def _(dy, x, weight, act):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_conv(ctx, inputs, output) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx, dy):
    return *_conv_backward(dy, *ctx.saved_tensors, ctx.act), None


for _operator, _gradient, _setup in (
    (_forward, _differentiate, _setup_context),
    (_mixer, _differentiate_mixer, _setup_mixer),
    (_conv, _differentiate_conv, _setup_conv),
):
    _operator.register_autograd(_gradient, setup_context=_setup)
for _operator in (_backward, _mixer_backward, _conv_backward):
    _operator.register_autograd(_refuse)
