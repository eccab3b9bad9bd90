"""ViG's token mixer in Triton: from the packed projection to the gated output, and as a whole.

Programs make their gate logits of the low-rank decay, and finish their outputs as `merge` describes. The gradients go
straight into one packed tensor, which the projection's backward reads as it is. Kept for the backward are o and what
BiGLA keeps; gate logits, norms and gates are computed again.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..composed import MixerTensors
from .backward import launch_backward
from .casts import Casts
from .conv import launch_conv, launch_conv_grad
from .decay import launch_decay_grad
from .forward import launch_forward
from .merge import Merge, launch_merge_grad
from .norm import launch_norm, launch_norm_grad
from .primitives import Gates
from .products import product
from .sums import Sums


def split(projected: Tensor, dims: int) -> tuple[Tensor, ...]:
    """q, k, v, gate and the low-rank decay of the packed projection (B, L, 3 C + rank)."""
    return projected.split([dims // 2, dims // 2, dims, dims, projected.shape[-1] - 3 * dims], -1)


def token_rows(x: Tensor) -> Tensor:
    """`x` (B, L, width) itself where all tokens lie at one distance and are dense, otherwise a copy."""
    B, L, _ = x.shape
    return x if x.stride(-1) == 1 and (B == 1 or x.stride(0) == L * x.stride(1)) else x.contiguous()


def heads(x: Tensor, num_heads: int) -> Tensor:
    B, L, width = x.shape
    return x.view(B, L, num_heads, width // num_heads)


def decays(low: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Gates:
    low = low.unsqueeze(2).expand(-1, -1, num_heads, -1)
    return Gates(low, low, True, weight.contiguous(), bias.contiguous())


def launch_mixer(
    projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor, norm: Tensor,
    local_norm: Tensor, num_heads: int, eps: float, act: bool, C: int, one: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, L, dims), and for the backward o, if it is to be kept, and what `launch_forward` returns besides it."""
    *qkv, gate, low = split(projected, local.shape[-1])
    y = torch.empty_like(local)
    q, k, v, gate, near, out = (heads(x, num_heads) for x in (*qkv, gate, local, y))
    vectors = (x.contiguous() for x in (gate_bias, norm, local_norm))
    o, *saved = launch_forward(
        q, k, v, decays(low, decay_weight, decay_bias, num_heads), q.shape[-1] ** -0.5, C, one, keep,
        Merge(near, gate, *vectors, out, eps, act),
    )  # fmt: skip
    return y, o if keep else o.new_empty(0, 0, 0, 0), *saved


def launch_mixer_grad(
    sums: Sums, dy: Tensor, projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor,
    gate_bias: Tensor, norm: Tensor, local_norm: Tensor, o: Tensor, state: Tensor, total: Tensor, hard: Tensor,
    num_heads: int, eps: float, act: bool, C: int, one: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the seven tensors that `launch_mixer` got, in their order; those of the parameters in float32.

    Those of the decay, biases and norms are of `sums`.
    """
    dims = local.shape[-1]
    q, k, v, gate, low = split(projected, dims)
    gates = decays(low, decay_weight, decay_bias, num_heads)
    dprojected, dlogits = projected.new_empty(projected.shape), local.new_empty(local.shape)
    dq, dk, dv, dgate, dlow = split(dprojected, dims)
    do, dlocal, *of_merge = launch_merge_grad(sums, dy, o, local, gate, gate_bias, norm, local_norm, dgate, eps, act)
    into = [heads(x, num_heads) for x in (dq, dk, dv, *dlogits.chunk(2, -1))]
    q, k, v = (heads(x, num_heads) for x in (q, k, v))
    launch_backward(do, q, k, v, gates, state, total, hard, q.shape[-1] ** -0.5, C, one, into)
    dlogits, low, dlow = (x.flatten(0, 1) for x in (dlogits, low, dlow))
    of_decay = launch_decay_grad(sums, dlogits, low, decay_weight.contiguous(), dlow)
    return dprojected, dlocal, *of_decay, *of_merge


def launch_token_mixer(
    t: MixerTensors, packed: Tensor, num_heads: int, act: bool, eps: float, head_eps: float, C: int, one: bool,
    keep: bool, normed: Tensor | None = None, casts: Casts | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """z (B, L, dims), whose product with the projection is the branch, and for the backward what was convolved and its
    packed projection, both (B, L, ..), and what `launch_mixer` returns besides z: six empty tensors unless `keep`.

    `packed` are the weights of q, k, v, gate and low rank, dense and of the dtype of all these, like the norm of x,
    which is made unless it is there. `casts` are done before `packed` is looked at.
    """
    if normed is None:
        normed = launch_norm(t.x, None, t.norm_weight, t.norm_bias, eps, packed.dtype)[1]
    local = launch_conv(normed, t.conv_weight.contiguous(), act, casts).flatten(1, 2)
    del normed  # one that is its own is gone before the projection is there
    projected = F.linear(local, packed)
    z, *saved = launch_mixer(projected, local, *t.of_heads, num_heads, head_eps, act, C, one, keep)
    return z, *((local, projected, *saved) if keep else (z.new_empty(0) for _ in range(6)))


def launch_token_mixer_grad(
    sums: Sums, dbranch: Tensor, dx: Tensor | None, t: MixerTensors, packed: Tensor, proj: Tensor, z: Tensor,
    local: Tensor, projected: Tensor, saved: Sequence[Tensor], num_heads: int, act: bool, eps: float, head_eps: float,
    C: int, one: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all of `t`, that of x added to `dx`; those of the parameters in float32.

    Those of vectors and of the convolution are of `sums`. `saved` is what `launch_mixer` returned besides z.
    """
    dims = t.x.shape[-1]
    dbranch = dbranch.view(-1, dims)
    dz = (dbranch @ proj).view(z.shape)
    dproj = product(dbranch.t(), z.flatten(0, 1))
    dprojected, dlocal, *of_heads = launch_mixer_grad(
        sums, dz, projected, local, *t.of_heads, *saved, num_heads, head_eps, act, C, one
    )
    dprojected = dprojected.flatten(0, 1)
    dlocal.flatten(0, 1).addmm_(dprojected, packed)
    dpacked = product(dprojected.t(), local.flatten(0, 1)).split([len(weight) for weight in t.packed])
    n = launch_norm(t.x, None, t.norm_weight, t.norm_bias, eps, proj.dtype)[1]
    dn, dtaps = launch_conv_grad(sums, dlocal.view(t.x.shape), n, t.conv_weight.contiguous(), act)
    dx, _, dweight, dbias = launch_norm_grad(sums, dx, dn, t.x, t.norm_weight, t.norm_bias, eps, t.x.dtype, None)
    return dx, dweight, dbias, dtaps, *dpacked, *of_heads, dproj
