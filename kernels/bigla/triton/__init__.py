"""BiGLA in Triton: the two operators `bigla::forward` and `bigla::backward` and the function that calls them."""

import torch
from torch import Tensor

from .backward import launch_backward
from .forward import buffers, launch_forward
from .primitives import INTERPRETED, chunk_size

__all__ = ['bigla', 'unsupported']


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
    if INTERPRETED:
        if q.device.type != 'cpu':
            return f'q must be on the CPU under TRITON_INTERPRET=1, got {q.device}'
    elif q.device.type != 'cuda' or torch.version.hip is not None:
        return f'q must be on an NVIDIA GPU, got {q.device}'
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        return f'q must be on a GPU of compute capability 8.0 or later, got {torch.cuda.get_device_name(q.device)}'
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'q must be float32, float16 or bfloat16, got {q.dtype}'
    if g_fwd.dtype not in (q.dtype, torch.float32):
        return f"g_fwd must be float32 or of q's dtype {q.dtype}, got {g_fwd.dtype}"
    for name, x in (('q', q), ('v', v)):
        if x.shape[-1] > 256:
            return f'{name} must be at most 256 wide in its last dimension, got shape {tuple(x.shape)}'
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
        return launch_backward(do, q, k, v, g_fwd, g_bwd, state, total, hard, scale, gate_logits, C, one)


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


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_refuse)
