"""What Triton computes, as operators of PyTorch: BiGLA, ViG's mixer around it, and the depthwise convolution.

Each has an operator for graphs (`torch.ops.bigla.*`, by which torch.compile and torch.export know it) and an autograd
function for eager mode, which spares the dispatcher: with gradients, an operator written in Python takes 190 us on a
CPU core where the function takes 40, as long as several kernels run. Both run the same launchers.
"""

from collections.abc import Callable
from typing import Any

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
    return _bigla(q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one)


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
    )


def depthwise_conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    """`api.depthwise_conv` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    return _conv(x, weight, act)


def _differentiable(forward: Callable, fake: Callable, backward: Callable, fake_backward: Callable) -> Callable:
    """Make operators of `forward`, called bigla::<its name>, and `backward`, the latter for the former's gradients.

    Args:
        forward: Takes tensors, then options; returns a tensor, or a tuple of the result and what the backward needs.
        fake: The same for shapes alone.
        backward: Takes the result's gradient, forward's tensors, what it returned for the backward, and its options;
            returns the gradients of the tensors.
        fake_backward: The same for shapes alone.

    Returns:
        A function of forward's arguments that returns its result.
    """
    name = forward.__name__.removeprefix('_run_')
    operator, gradient = (
        torch.library.custom_op(f'bigla::{n}', fn, mutates_args=(), device_types=('cpu', 'cuda'))
        for n, fn in ((name, forward), (f'{name}_backward', backward))
    )

    def tuple_of(output: Any) -> tuple[Tensor, ...]:
        return output if isinstance(output, tuple) else (output,)

    def save(ctx, inputs: tuple, kept: tuple[Tensor, ...]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) :]
        ctx.save_for_backward(*tensors, *kept)

    def setup_context(ctx, inputs: tuple, output: Any) -> None:
        save(ctx, inputs, tuple_of(output)[1:])
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(*tuple_of(output)[1:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dy: Tensor | None, *_):
        if dy is None:
            return (None,) * ctx.inputs
        return *gradient(dy, *ctx.saved_tensors, *ctx.options), *(None for _ in ctx.options)

    def refuse(ctx, *_):
        raise NotImplementedError(
            "bigla's Triton kernels have no second derivative: use impl='chunked' or impl='reference'"
        )

    operator.register_fake(fake)
    gradient.register_fake(fake_backward)
    operator.register_autograd(differentiate, setup_context=setup_context)
    gradient.register_autograd(refuse)

    def run(ctx, *inputs):
        y, *kept = tuple_of(forward(*inputs))
        save(ctx, inputs, tuple(kept))
        return y

    def run_backward(ctx, dy: Tensor):
        # The operator where a graph of the gradients is wanted: it refuses their gradients.
        grads = (gradient if torch.is_grad_enabled() else backward)(dy, *ctx.saved_tensors, *ctx.options)
        return *grads, *(None for _ in ctx.options)

    function = type(
        f'bigla_{name}',
        (torch.autograd.Function,),
        {'forward': staticmethod(run), 'backward': staticmethod(run_backward)},
    )

    def call(*inputs) -> Tensor:
        if torch.compiler.is_compiling():
            return tuple_of(operator(*inputs))[0]
        if torch.is_grad_enabled():
            return function.apply(*inputs)
        return tuple_of(forward(*inputs))[0]

    return call


def _run_bigla(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, gate_logits: bool, C: int, one: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one)


def _fake_bigla(q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one):
    B, L, nh, _ = q.shape
    NT = (L + C - 1) // C
    return v.new_empty(B, L, nh, v.shape[-1]), *buffers(q, v, NT, one)


def _run_bigla_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor,
    state: Tensor, total: Tensor, hard: Tensor, scale: float, gate_logits: bool, C: int, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return tuple(launch_backward(do, q, k, v, g_fwd, g_bwd, state, total, hard, scale, gate_logits, C, one))


def _fake_bigla_backward(do, q, k, v, g_fwd, g_bwd, state, total, hard, scale, gate_logits, C, one):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))


def _run_mixer(
    projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor, norm_weight: Tensor,
    local_norm_weight: Tensor, num_heads: int, eps: float, act: bool, C: int, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(projected), torch.autocast(projected.device.type, enabled=False):
        return launch_mixer(
            projected.contiguous(), local.contiguous(), decay_weight.to(projected.dtype),
            decay_bias.to(projected.dtype), gate_bias, norm_weight, local_norm_weight, num_heads, eps, act, C, one,
        )  # fmt: skip


def _fake_mixer(projected, local, dw, db, gb, nw, lw, num_heads, eps, act, C, one):
    B, L, dims = local.shape
    K, V = dims // (2 * num_heads), dims // num_heads
    q, v = projected.new_empty(B, L, num_heads, K), projected.new_empty(B, L, num_heads, V)
    return local.new_empty(B, L, dims), v, *buffers(q, v, (L + C - 1) // C, one)


def _run_mixer_backward(
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


def _fake_mixer_backward(
    dy, projected, local, dw, db, gb, nw, lw, o, state, total, hard, num_heads, eps, act, C, one
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (projected, local, dw, db, gb, nw, lw))


def _run_depthwise_conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    with torch.cuda.device_of(x):
        return launch_conv(x, weight.contiguous(), act)


def _fake_conv(x, weight, act):
    return x.new_empty(x.shape)


def _run_conv_backward(dy: Tensor, x: Tensor, weight: Tensor, act: bool) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return launch_conv_grad(dy, x, weight.contiguous(), act)


def _fake_conv_backward(dy, x, weight, act):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_bigla = _differentiable(_run_bigla, _fake_bigla, _run_bigla_backward, _fake_bigla_backward)
_mixer = _differentiable(_run_mixer, _fake_mixer, _run_mixer_backward, _fake_mixer_backward)
_conv = _differentiable(_run_depthwise_conv, _fake_conv, _run_conv_backward, _fake_conv_backward)
