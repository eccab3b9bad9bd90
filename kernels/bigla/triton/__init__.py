"""What Triton computes, as operators of PyTorch: BiGLA, ViG's mixer around it, and the rest of its blocks and stem.

Each has an operator for graphs (`torch.ops.bigla.*`, by which torch.compile and torch.export know it) and an autograd
function for eager mode, which spares the dispatcher: with gradients, an operator written in Python takes 190 us on a
CPU core where the function takes 40, as long as several kernels run. Both run the same launchers.
"""

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..composed import MixerTensors
from .backward import launch_backward
from .casts import cast, to_cast
from .conv import launch_conv, launch_conv_grad
from .forward import buffers, launch_forward
from .mixer import launch_mixer, launch_mixer_grad, launch_token_mixer, launch_token_mixer_grad, token_rows
from .mlp import (
    Half,
    launch_mlp,
    launch_mlp_grad,
    launch_projected_mlp,
    launch_residual_mlp,
    launch_residual_mlp_grad,
)
from .norm import Norm, launch_norm, launch_norm_grad
from .primitives import INTERPRETED, Gates, chunk_size, kept_chunk
from .stem import launch_conv_norm, launch_conv_norm_grad, out_side
from .sums import Sums

__all__ = [
    'add_norm',
    'add_pos_embed',
    'bigla',
    'bigla_mixer',
    'block',
    'conv_norm',
    'depthwise_conv',
    'gated_mlp',
    'norm_depthwise_conv',
    'residual_mlp',
    'token_mixer',
    'unsupported',
    'unsupported_tensor',
]

# Inductor pads the rows of wide products, and copies them for operators that want the strides of the traced tensors.
ANY_STRIDES = (torch.Tag.flexible_layout,)
NOT_KEPT = '{} was traced without gradients, and kept nothing for them: trace it with gradients'


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
    tensors = q, k, v, g_fwd, g_bwd
    return _bigla(*tensors, scale, gate_logits, *_chunks(q.shape[1], q.shape[-1], q.dtype, tensors))


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
    tensors = projected, local, decay_weight, decay_bias, gate_bias, norm_weight, local_norm_weight
    K = local.shape[-1] // (2 * num_heads)
    return _mixer(*tensors, num_heads, eps, act, *_chunks(local.shape[1], K, projected.dtype, tensors))


def depthwise_conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    """`api.depthwise_conv` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    return _conv(x, weight, act)


def norm_depthwise_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, act: bool, eps: float, inner: torch.dtype
) -> Tensor:
    """`api.norm_depthwise_conv` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    return _norm_conv(x, norm_weight, norm_bias, weight, act, eps, inner)


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`api.add_norm` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    if branch is not None:
        total, y = _add_norm(x, branch, weight, bias, eps, dtype, x.dtype, branch.dtype)
        return total.to(sum_dtype), y
    if sum_dtype == x.dtype:
        return x, _norm(x, weight, bias, eps, dtype)
    return _cast_norm(x, weight, bias, eps, dtype, sum_dtype)


def add_pos_embed(
    x: Tensor, pos_embed: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, inner: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`api.add_pos_embed` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against.

    Both vectors require no gradient.
    """
    wide = torch.promote_types(x.dtype, pos_embed.dtype)
    return _add_pos_embed(x.to(wide), pos_embed.to(wide), norm_weight, norm_bias, eps, inner)


def conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, eps: float, act: str,
    inner: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.conv_norm` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    return _conv_norm(x, weight, bias, norm_weight, norm_bias, stride, eps, act, inner, dtype)


def gated_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """`api.gated_mlp` with the first product by a Triton kernel, for an x that :func:`unsupported_tensor` takes."""
    return _gated_mlp(x, fc1, fc2)


def residual_mlp(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale: Tensor | None, branch_scale: Tensor | None, eps: float, inner: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.residual_mlp` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    return _residual_mlp(x, branch, norm_weight, norm_bias, fc1, fc2, scale, branch_scale, eps, inner)


def block(
    t: MixerTensors, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor, scale: Tensor | None,
    branch_scale: Tensor | None, normed: Tensor | None, next_weight: Tensor | None, next_bias: Tensor | None,
    num_heads: int, act: bool, eps: float, head_eps: float, inner: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`api.block` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against.

    Behind y the norm of y, or nothing without a `next_weight`; `normed` and both vectors require no gradient.
    """
    _, H, W, dims = t.x.shape
    tensors = *t, norm_weight, norm_bias, fc1, fc2
    chunks = _chunks(H * W, dims // (2 * num_heads), inner, tensors)
    more = scale, branch_scale, normed, next_weight, next_bias
    return _block(*tensors, *more, num_heads, act, eps, head_eps, inner, *chunks)


def token_mixer(t: MixerTensors, num_heads: int, act: bool, eps: float, head_eps: float, inner: torch.dtype) -> Tensor:
    """`api.token_mixer` by Triton kernels, for an x that :func:`unsupported_tensor` has nothing against."""
    _, H, W, dims = t.x.shape
    return _token_mixer(*t, num_heads, act, eps, head_eps, inner, *_chunks(H * W, dims // (2 * num_heads), inner, t))


def _chunks(L: int, K: int, dtype: torch.dtype, tensors: Iterable[Tensor | None]) -> tuple[int, bool, bool]:
    """Tokens a chunk, whether there is but one, and whether something is to be kept for the gradients of `tensors`."""
    C = chunk_size(L, K, dtype)
    one = isinstance(L, int) and L <= C  # a symbolic length is not asked: the answer would specialise the graph
    return C, one, torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)


def _differentiable(
    forward: Callable,
    fake: Callable,
    backward: Callable,
    fake_backward: Callable | None,
    results: int = 1,
    besides: int = 0,
    keep: Callable[[tuple, tuple], tuple] | None = None,
    first_on_demand: bool = False,
) -> Callable:
    """Make operators of `forward`, called bigla::<its name>, and `backward`, the latter for the former's gradients.

    Args:
        forward: Takes tensors (some may be None), then options; returns a tensor, or a tuple of results and of what
            the backward needs.
        fake: The same for shapes alone.
        backward: Takes the results' gradients, what is kept, and forward's options; returns the gradients of the
            tensors, anything for those that are None.
        fake_backward: The same for shapes alone. None: `backward` is of PyTorch's own operators, and stays as it is.
        results: How many of the returned tensors are results, with gradients.
        besides: How many behind these are results without.
        keep: Chooses what to keep for the backward from forward's tensors and the returned ones. By default these are
            the tensors and what was returned behind the results.
        first_on_demand: `backward` takes, last, whether the first tensor's gradient is wanted.

    Returns:
        A function of forward's arguments that returns its result, or a tuple of its results, both kinds of them.
    """
    name = forward.__name__.removeprefix('_run_')

    @wraps(backward)
    def apart(*args) -> tuple[Tensor, ...]:
        """`backward`, but no two of its results share memory, which those of an operator may not."""
        grads, seen = [], set()
        for g in backward(*args):
            memory = g.untyped_storage().data_ptr()
            grads.append(g.clone() if memory in seen else g)
            seen.add(memory)
        return tuple(grads)

    def operator_of(fn: Callable, name: str, fake: Callable) -> torch.library.CustomOpDef:
        operator = torch.library.custom_op(
            f'bigla::{name}', fn, mutates_args=(), device_types=('cpu', 'cuda'), tags=ANY_STRIDES
        )
        operator.register_fake(_declared(name, fake))
        return operator

    count = sum(parameter.annotation in (Tensor, Tensor | None) for parameter in signature(forward).parameters.values())
    keep = keep or (lambda tensors, outputs: (*tensors, *outputs[results:]))

    def tuple_of(output: Any) -> tuple[Tensor, ...]:
        return output if isinstance(output, tuple) else (output,)

    def chosen(outputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return outputs[0] if results + besides == 1 else outputs[: results + besides]

    def save(ctx, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(results > 1)
        ctx.options = inputs[count:]
        ctx.save_for_backward(*keep(inputs[:count], outputs))

    def setup_context(ctx, inputs: tuple, output: Any) -> None:
        save(ctx, inputs, tuple_of(output))
        ctx.mark_non_differentiable(*tuple_of(output)[results:])

    def with_gradient(ctx, grads: tuple, gradient: Callable) -> tuple:
        wanted = ctx.needs_input_grad[:count]
        if grads[0] is None:
            grads = [None] * count
        else:
            options = *ctx.options, *wanted[: int(first_on_demand)]
            grads = gradient(*grads[:results], *ctx.saved_tensors, *options)
        return *(g if want else None for g, want in zip(grads, wanted)), *(None for _ in ctx.options)

    def differentiate(ctx, *grads):
        return with_gradient(ctx, grads, gradient)

    def refuse(ctx, *_):
        raise NotImplementedError(
            "bigla's Triton kernels have no second derivative: use impl='chunked' or impl='reference'"
        )

    operator, gradient = operator_of(forward, name, fake), backward
    operator.register_autograd(differentiate, setup_context=setup_context)
    if fake_backward is not None:
        gradient = operator_of(apart, f'{name}_backward', fake_backward)
        gradient.register_autograd(refuse)

    def run(ctx, *inputs):
        outputs = tuple_of(forward(*inputs))
        save(ctx, inputs, outputs)
        ctx.mark_non_differentiable(*outputs[results : results + besides])
        return chosen(outputs)

    def run_backward(ctx, *grads):
        # The operator where a graph of the gradients is wanted: it refuses their gradients.
        return with_gradient(ctx, grads, gradient if torch.is_grad_enabled() else backward)

    function = type(
        f'bigla_{name}',
        (torch.autograd.Function,),
        {'forward': staticmethod(run), 'backward': staticmethod(run_backward)},
    )

    def call(*inputs) -> Tensor | tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return chosen(tuple_of(operator(*inputs)))
        if torch.is_grad_enabled():
            return function.apply(*inputs)
        return chosen(tuple_of(forward(*inputs)))

    return call


def _declared(name: str, fake: Callable) -> Callable:
    """`fake`, which also tells Inductor, where that is at work, that operator `name` has no lowering of its own.

    Of an operator that it meets for the first time Inductor 2.11 writes a message, into a log that is off, with the
    origins of its arguments spelled out. Each residual block triples that: behind the twelfth it takes hours.
    """

    @wraps(fake)
    def declare(*args):
        lowering = sys.modules.get('torch._inductor.lowering')
        operator = getattr(torch.ops.bigla, name).default
        if operator not in getattr(lowering, 'lowerings', {operator}) and hasattr(lowering, 'make_fallback'):
            lowering.make_fallback(operator, warn=False)
        return fake(*args)

    return declare


def _as_dense(grads: Iterable[Tensor], tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients in the dtypes and shapes of their tensors and dense, as fake operators promise.

    That of a bias that is None, which nobody reads, becomes one of its weight, the tensor before it.
    """
    like = []
    for x in tensors:
        like.append(like[-1] if x is None else x)
    return tuple(g.to(x.dtype).contiguous().view(x.shape) for g, x in zip(grads, like, strict=True))


def _run_bigla(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, gate_logits: bool, C: int, one: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, Gates(g_fwd, g_bwd, gate_logits), scale, C, one, keep)


def _fake_bigla(q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one, keep):
    return v.new_empty(v.shape), *_fake_buffers(q, v, Gates(g_fwd, g_bwd, gate_logits), C, one, keep)


def _fake_buffers(q: Tensor, v: Tensor, gates: Gates, C: int, one: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`buffers` as `launch_forward` returns them, for L that may be symbolic."""
    with torch.cuda.device_of(q):
        C = kept_chunk(C, q, v, gates) if keep else C
    return buffers(q, v, (q.shape[1] + C - 1) // C, one, keep)


def _run_bigla_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor,
    state: Tensor, total: Tensor, hard: Tensor, scale: float, gate_logits: bool, C: int, one: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not keep:
        raise RuntimeError(NOT_KEPT.format('bigla'))
    with torch.cuda.device_of(q):
        saved = (x.contiguous() for x in (state, total, hard))
        return tuple(launch_backward(do, q, k, v, Gates(g_fwd, g_bwd, gate_logits), *saved, scale, C, one))


def _fake_bigla_backward(do, q, k, v, g_fwd, g_bwd, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))


def _run_mixer(
    projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor, norm_weight: Tensor,
    local_norm_weight: Tensor, num_heads: int, eps: float, act: bool, C: int, one: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(projected), torch.autocast(projected.device.type, enabled=False):
        return launch_mixer(
            token_rows(projected), local.contiguous(), decay_weight, decay_bias, gate_bias, norm_weight,
            local_norm_weight, num_heads, eps, act, C, one, keep,
        )  # fmt: skip


def _fake_mixer(projected, local, dw, db, gb, nw, lw, num_heads, eps, act, C, one, keep):
    B, L, dims = local.shape
    K, V = dims // (2 * num_heads), dims // num_heads
    q, v = projected.new_empty(B, L, num_heads, K), projected.new_empty(B, L, num_heads, V)
    o = v if keep else v.new_empty(0, 0, 0, 0)
    return local.new_empty(B, L, dims), o, *_fake_buffers(q, v, Gates(q, q, True, dw, db), C, one, keep)


def _run_mixer_backward(
    dy: Tensor, projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor,
    norm_weight: Tensor, local_norm_weight: Tensor, o: Tensor, state: Tensor, total: Tensor, hard: Tensor,
    num_heads: int, eps: float, act: bool, C: int, one: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not keep:
        raise RuntimeError(NOT_KEPT.format('bigla_mixer'))
    parameters = decay_weight, decay_bias, gate_bias, norm_weight, local_norm_weight
    saved = (x.contiguous() for x in (o, state, total, hard))
    with torch.cuda.device_of(projected), torch.autocast(projected.device.type, enabled=False), Sums() as sums:
        dprojected, dlocal, *grads = launch_mixer_grad(
            sums, dy.contiguous(), token_rows(projected), local.contiguous(), decay_weight, decay_bias, gate_bias,
            norm_weight, local_norm_weight, *saved, num_heads, eps, act, C, one,
        )  # fmt: skip
    return dprojected, dlocal, *_as_dense(grads, parameters)


def _fake_mixer_backward(
    dy, projected, local, dw, db, gb, nw, lw, o, state, total, hard, num_heads, eps, act, C, one, keep
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (projected, local, dw, db, gb, nw, lw))


def _run_token_mixer(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, conv_weight: Tensor, qkv_weight: Tensor,
    gate_weight: Tensor, low_weight: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor,
    out_norm_weight: Tensor, local_norm_weight: Tensor, proj_weight: Tensor, num_heads: int, act: bool, eps: float,
    head_eps: float, inner: torch.dtype, C: int, one: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    t = MixerTensors(
        x.contiguous(), norm_weight, norm_bias, conv_weight, qkv_weight, gate_weight, low_weight, decay_weight,
        decay_bias, gate_bias, out_norm_weight, local_norm_weight, proj_weight,
    )  # fmt: skip
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        casts, (packed, proj) = to_cast(inner, t.packed, [proj_weight])
        z, *kept = launch_token_mixer(t, packed, num_heads, act, eps, head_eps, C, one, keep, casts=casts)
        branch = F.linear(z, proj).view(x.shape)
    return branch, z if keep else z.new_empty(0), *kept


def _fake_token_mixer(
    x, nw, nb, cw, qkv, gw, low, dw, db, gb, ow, lw, pw, num_heads, act, eps, head_eps, inner, C, one, keep
):  # fmt: skip
    B, H, W, dims = x.shape
    branch = x.new_empty(x.shape, dtype=inner)
    if not keep:
        return branch, *(branch.new_empty(0) for _ in range(7))
    z, local = (branch.new_empty(B, H * W, dims) for _ in range(2))
    projected = branch.new_empty(B, H * W, 3 * dims + low.shape[0])
    saved = _fake_mixer(projected, local, dw, db, gb, ow, lw, num_heads, eps, act, C, one, keep)[1:]
    return branch, z, local, projected, *saved


def _run_token_mixer_backward(
    dbranch: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, conv_weight: Tensor, qkv_weight: Tensor,
    gate_weight: Tensor, low_weight: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor,
    out_norm_weight: Tensor, local_norm_weight: Tensor, proj_weight: Tensor, z: Tensor, local: Tensor,
    projected: Tensor, o: Tensor, state: Tensor, total: Tensor, hard: Tensor, num_heads: int, act: bool, eps: float,
    head_eps: float, inner: torch.dtype, C: int, one: bool, keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    if not keep:
        raise RuntimeError(NOT_KEPT.format('token_mixer'))
    t = MixerTensors(
        x.contiguous(), norm_weight, norm_bias, conv_weight, qkv_weight, gate_weight, low_weight, decay_weight,
        decay_bias, gate_bias, out_norm_weight, local_norm_weight, proj_weight,
    )  # fmt: skip
    z, local, projected, *saved = (kept.contiguous() for kept in (z, local, projected, o, state, total, hard))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False), Sums() as sums:
        weights = cast(inner, t.packed, [proj_weight])
        grads = launch_token_mixer_grad(
            sums, dbranch.contiguous(), None, t, *weights, z, local, projected, saved,
            num_heads, act, eps, head_eps, C, one,
        )  # fmt: skip
    return _as_dense(grads, t)


def _fake_token_mixer_backward(dbranch, x, nw, nb, cw, qkv, gw, low, dw, db, gb, ow, lw, pw, *_):
    tensors = x, nw, nw if nb is None else nb, cw, qkv, gw, low, dw, db, gb, ow, lw, pw
    return tuple(t.new_empty(t.shape) for t in tensors)


def _run_depthwise_conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    with torch.cuda.device_of(x):
        return launch_conv(x, weight.contiguous(), act)


def _fake_conv(x, weight, act):
    return x.new_empty(x.shape)


def _run_conv_backward(dy: Tensor, x: Tensor, weight: Tensor, act: bool) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x), Sums() as sums:
        dx, dweight = launch_conv_grad(sums, dy, x, weight.contiguous(), act)
    return dx, *_as_dense([dweight], [weight])


def _fake_conv_backward(dy, x, weight, act):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _run_norm_depthwise_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, act: bool, eps: float, inner: torch.dtype
) -> Tensor:
    with torch.cuda.device_of(x):
        n = launch_norm(x.contiguous(), None, norm_weight, norm_bias, eps, inner)[1]
        return launch_conv(n, weight.contiguous(), act)


def _fake_norm_conv(x, norm_weight, norm_bias, weight, act, eps, inner):
    return x.new_empty(x.shape, dtype=inner)


def _run_norm_conv_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, act: bool, eps: float,
    inner: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = x.contiguous()
    with torch.cuda.device_of(x), Sums() as sums:
        n = launch_norm(x, None, norm_weight, norm_bias, eps, inner)[1]
        dn, dweight = launch_conv_grad(sums, dy, n, weight.contiguous(), act)
        dx, _, dw, db = launch_norm_grad(sums, None, dn, x, norm_weight, norm_bias, eps, x.dtype, None)
    return dx, *_as_dense([dw, db, dweight], [norm_weight, norm_bias, weight])


def _fake_norm_conv_backward(dy, x, norm_weight, norm_bias, weight, act, eps, inner):
    bias = norm_weight if norm_bias is None else norm_bias
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, norm_weight, bias, weight))


def _run_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    with torch.cuda.device_of(x):
        return launch_norm(x.contiguous(), None, weight, bias, eps, dtype)[1]


def _fake_norm(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _run_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_backward(None, dy, x, weight, bias, eps)


def _norm_backward(dtotal, dy, x, weight, bias, eps):
    """Gradients of x, that of x itself added, weight and bias."""
    with torch.cuda.device_of(x), Sums() as sums:
        dx, _, *grads = launch_norm_grad(
            sums, dtotal, dy.contiguous(), x.contiguous(), weight, bias, eps, x.dtype, None
        )
    return dx, *_as_dense(grads, [weight, bias])


def _fake_norm_backward(dy, x, weight, bias, eps, dtype):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, weight if bias is None else bias))


def _run_cast_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return launch_norm(x.contiguous(), None, weight, bias, eps, dtype, sum_dtype=sum_dtype)


def _fake_cast_norm(x, weight, bias, eps, dtype, sum_dtype):
    return x.new_empty(x.shape, dtype=sum_dtype), x.new_empty(x.shape, dtype=dtype)


def _run_cast_norm_backward(
    dtotal: Tensor, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _norm_backward(dtotal.contiguous(), dy, x, weight, bias, eps)


def _fake_cast_norm_backward(dtotal, dy, x, weight, bias, eps, dtype, sum_dtype):
    return _fake_norm_backward(dy, x, weight, bias, eps, dtype)


def _run_add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    x_dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        return launch_norm(x.contiguous(), branch.contiguous(), weight, bias, eps, dtype)


def _fake_add_norm(x, branch, weight, bias, eps, dtype, x_dtype, branch_dtype):
    total = torch.promote_types(x_dtype, branch_dtype)
    return x.new_empty(x.shape, dtype=total), x.new_empty(x.shape, dtype=dtype)


def _run_add_norm_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    x_dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(total), Sums() as sums:
        dx, dbranch, *grads = launch_norm_grad(
            sums, dtotal.contiguous(), dy.contiguous(), total.contiguous(), weight, bias, eps, x_dtype, branch_dtype
        )
    return dx, dbranch, *_as_dense(grads, [weight, bias])


def _fake_add_norm_backward(dtotal, dy, total, weight, bias, eps, dtype, x_dtype, branch_dtype):
    return (
        *(total.new_empty(total.shape, dtype=dtype) for dtype in (x_dtype, branch_dtype)),
        *(tensor.new_empty(tensor.shape) for tensor in (weight, weight if bias is None else bias)),
    )


def _run_add_pos_embed(
    x: Tensor, pos_embed: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, inner: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return launch_norm(x.contiguous(), pos_embed.contiguous(), norm_weight, norm_bias, eps, inner)


def _fake_add_pos_embed(x, pos_embed, norm_weight, norm_bias, eps, inner):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=inner)


def _add_pos_embed_backward(dtotal, eps, inner):
    return dtotal, dtotal.sum(0, keepdim=True), None, None


def _run_conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, eps: float, act: str,
    inner: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        return launch_conv_norm(x, weight, bias, norm_weight, norm_bias, stride, eps, act, inner, dtype)


def _fake_conv_norm(x, weight, bias, norm_weight, norm_bias, stride, eps, act, inner, dtype):
    H, W = (out_side(side, weight.shape[-1], stride) for side in x.shape[1:3])
    return x.new_empty(x.shape[0], H, W, weight.shape[0], dtype=dtype)


def _run_conv_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int,
    eps: float, act: str, inner: torch.dtype, dtype: torch.dtype, needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parameters = weight, bias, norm_weight, norm_bias
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False), Sums() as sums:
        dx, *grads = launch_conv_norm_grad(sums, dy, x, *parameters, stride, eps, act, inner, needs_dx)
    dx = x.new_empty(0) if dx is None else dx.contiguous()
    return dx, *_as_dense(grads, parameters)


def _fake_conv_norm_backward(
    dy, x, weight, bias, norm_weight, norm_bias, stride, eps, act, inner, dtype, needs_dx
):  # fmt: skip
    dx = x.new_empty(x.shape if needs_dx else 0)
    return dx, *(parameter.new_empty(parameter.shape) for parameter in (weight, bias, norm_weight, norm_bias))


def _run_gated_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        y = launch_mlp(x.contiguous().view(-1, x.shape[-1]), *cast(x.dtype, [fc1], [fc2]))
    return y.view(x.shape)


def _fake_gated_mlp(x, fc1, fc2):
    return x.new_empty(x.shape)


def _run_gated_mlp_backward(dy: Tensor, x: Tensor, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = (tensor.contiguous().view(-1, x.shape[-1]) for tensor in (dy, x))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        dx, *grads = launch_mlp_grad(*rows, *cast(x.dtype, [fc1], [fc2]))
    return dx.view(x.shape), *(g.to(weight.dtype) for g, weight in zip(grads, (fc1, fc2), strict=True))


def _fake_gated_mlp_backward(dy, x, fc1, fc2):
    return x.new_empty(x.shape), fc1.new_empty(fc1.shape), fc2.new_empty(fc2.shape)


def _run_residual_mlp(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale: Tensor | None, branch_scale: Tensor | None, eps: float, inner: torch.dtype,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        weights = cast(inner, [fc1], [fc2])
        return launch_residual_mlp(_half(x, branch, norm_weight, norm_bias, *weights, scale, branch_scale), eps)


def _fake_residual_mlp(x, branch, norm_weight, norm_bias, fc1, fc2, scale, branch_scale, eps, inner):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))


def _run_residual_mlp_backward(
    dy: Tensor, x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale: Tensor | None, branch_scale: Tensor | None, eps: float, inner: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False), Sums() as sums:
        weights = cast(inner, [fc1], [fc2])
        half = _half(x, branch, norm_weight, norm_bias, *weights, scale, branch_scale)
        dx, dbranch, *grads = launch_residual_mlp_grad(sums, dy.contiguous(), half, eps)
    return (
        dx,
        dbranch,
        *_as_dense(grads, [norm_weight, norm_bias, fc1, fc2]),
        dx.new_empty(0),
        dx.new_empty(0),
    )  # of the factors there is none


def _fake_residual_mlp_backward(dy, x, branch, norm_weight, norm_bias, fc1, fc2, *_):
    bias = norm_weight if norm_bias is None else norm_bias
    grads = (tensor.new_empty(tensor.shape) for tensor in (x, branch, norm_weight, bias, fc1, fc2))
    return *grads, x.new_empty(0), x.new_empty(0)


def _half(x, branch, norm_weight, norm_bias, fc1, fc2, scale, branch_scale) -> Half:
    """The tensors of a residual MLP as its launchers take them; W1 and W2 are."""
    branch, norm_weight, norm_bias, scale, branch_scale = (
        None if v is None else v.contiguous() for v in (branch, norm_weight, norm_bias, scale, branch_scale)
    )
    return Half(x.contiguous(), branch, norm_weight, norm_bias, fc1, fc2, scale, branch_scale)


def _run_block(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, conv_weight: Tensor, qkv_weight: Tensor,
    gate_weight: Tensor, low_weight: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor,
    out_norm_weight: Tensor, local_norm_weight: Tensor, proj_weight: Tensor, mlp_norm_weight: Tensor,
    mlp_norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor, scale: Tensor | None, branch_scale: Tensor | None,
    normed: Tensor | None, next_weight: Tensor | None, next_bias: Tensor | None,
    num_heads: int, act: bool, eps: float, head_eps: float, inner: torch.dtype, C: int, one: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    t = MixerTensors(
        x.contiguous(), norm_weight, norm_bias, conv_weight, qkv_weight, gate_weight, low_weight, decay_weight,
        decay_bias, gate_bias, out_norm_weight, local_norm_weight, proj_weight,
    )  # fmt: skip
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        casts, (packed, proj, *weights) = to_cast(inner, t.packed, [proj_weight], [fc1], [fc2])
        if normed is not None:
            normed = normed.contiguous()
        z, *kept = launch_token_mixer(t, packed, num_heads, act, eps, head_eps, C, one, keep, normed, casts)
        half = _half(t.x, None, mlp_norm_weight, mlp_norm_bias, *weights, scale, branch_scale)
        following = None
        if next_weight is not None:
            following = Norm(next_weight.contiguous(), None if next_bias is None else next_bias.contiguous())
        y, next_normed = launch_projected_mlp(z, proj, half, eps, following)
    return y, z.new_empty(0) if next_normed is None else next_normed, z if keep else z.new_empty(0), *kept


def _fake_block(
    x, nw, nb, cw, qkv, gw, low, dw, db, gb, ow, lw, pw, mw, mb, fc1, fc2, scale, branch_scale, normed, next_weight,
    next_bias, num_heads, act, eps, head_eps, inner, C, one, keep,
):  # fmt: skip
    kept = _fake_token_mixer(
        x, nw, nb, cw, qkv, gw, low, dw, db, gb, ow, lw, pw, num_heads, act, eps, head_eps, inner, C, one, keep
    )[1:]
    next_normed = x.new_empty(0 if next_weight is None else x.shape, dtype=inner)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, inner)), next_normed, *kept


def _run_block_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, conv_weight: Tensor, qkv_weight: Tensor,
    gate_weight: Tensor, low_weight: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor,
    out_norm_weight: Tensor, local_norm_weight: Tensor, proj_weight: Tensor, mlp_norm_weight: Tensor,
    mlp_norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor, scale: Tensor | None, branch_scale: Tensor | None,
    z: Tensor, local: Tensor, projected: Tensor, o: Tensor, state: Tensor, total: Tensor, hard: Tensor, num_heads: int,
    act: bool, eps: float, head_eps: float, inner: torch.dtype, C: int, one: bool, keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    if not keep:
        raise RuntimeError(NOT_KEPT.format('block'))
    t = MixerTensors(
        x.contiguous(), norm_weight, norm_bias, conv_weight, qkv_weight, gate_weight, low_weight, decay_weight,
        decay_bias, gate_bias, out_norm_weight, local_norm_weight, proj_weight,
    )  # fmt: skip
    z, local, projected, *saved = (kept.contiguous() for kept in (z, local, projected, o, state, total, hard))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False), Sums() as sums:
        packed, proj, *weights = cast(inner, t.packed, [proj_weight], [fc1], [fc2])
        branch = F.linear(z, proj).view(x.shape)  # rounded, where the forward may have added it as it was accumulated
        half = _half(t.x, branch, mlp_norm_weight, mlp_norm_bias, *weights, scale, branch_scale)
        dx, dbranch, *of_mlp = launch_residual_mlp_grad(sums, dy.contiguous(), half, eps)
        grads = launch_token_mixer_grad(
            sums, dbranch, dx, t, packed, proj, z, local, projected, saved, num_heads, act, eps, head_eps, C, one
        )
    grads = _as_dense((*grads, *of_mlp), (*t, mlp_norm_weight, mlp_norm_bias, fc1, fc2))
    return *grads, *(dx.new_empty(0) for _ in range(5))  # of factors and of what is normed there is none


def _fake_block_backward(
    dy, x, nw, nb, cw, qkv, gw, low, dw, db, gb, ow, lw, pw, mw, mb, fc1, fc2, *_
):  # fmt: skip
    nb, mb = nw if nb is None else nb, mw if mb is None else mb
    tensors = x, nw, nb, cw, qkv, gw, low, dw, db, gb, ow, lw, pw, mw, mb, fc1, fc2
    return *(t.new_empty(t.shape) for t in tensors), *(x.new_empty(0) for _ in range(5))


_bigla = _differentiable(_run_bigla, _fake_bigla, _run_bigla_backward, _fake_bigla_backward)
_mixer = _differentiable(_run_mixer, _fake_mixer, _run_mixer_backward, _fake_mixer_backward)
_token_mixer = _differentiable(
    _run_token_mixer, _fake_token_mixer, _run_token_mixer_backward, _fake_token_mixer_backward
)
_conv = _differentiable(_run_depthwise_conv, _fake_conv, _run_conv_backward, _fake_conv_backward)
_norm_conv = _differentiable(
    _run_norm_depthwise_conv, _fake_norm_conv, _run_norm_conv_backward, _fake_norm_conv_backward
)
_norm = _differentiable(_run_norm, _fake_norm, _run_norm_backward, _fake_norm_backward)
_cast_norm = _differentiable(
    _run_cast_norm, _fake_cast_norm, _run_cast_norm_backward, _fake_cast_norm_backward, results=2
)
_add_norm = _differentiable(
    _run_add_norm,
    _fake_add_norm,
    _run_add_norm_backward,
    _fake_add_norm_backward,
    results=2,
    keep=lambda tensors, outputs: (outputs[0], *tensors[2:]),
)
_add_pos_embed = _differentiable(
    _run_add_pos_embed, _fake_add_pos_embed, _add_pos_embed_backward, None, besides=1, keep=lambda tensors, outputs: ()
)
_conv_norm = _differentiable(
    _run_conv_norm, _fake_conv_norm, _run_conv_norm_backward, _fake_conv_norm_backward, first_on_demand=True
)
_gated_mlp = _differentiable(_run_gated_mlp, _fake_gated_mlp, _run_gated_mlp_backward, _fake_gated_mlp_backward)
_residual_mlp = _differentiable(
    _run_residual_mlp, _fake_residual_mlp, _run_residual_mlp_backward, _fake_residual_mlp_backward
)
_block = _differentiable(
    _run_block,
    _fake_block,
    _run_block_backward,
    _fake_block_backward,
    besides=1,
    keep=lambda tensors, outputs: (*tensors[:-3], *outputs[2:]),  # not what is normed, which is made again
)
