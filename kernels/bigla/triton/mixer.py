"""ViG's token mixer from the packed projection to the gated output, in Triton: the kernels around BiGLA, and the order.

Per head, with o = BiGLA(q, k, v, gates), l the local tokens, r(x) = (mean x^2 + eps)^-1/2 and G = sigmoid(gate + c)::

    z = G n + (1 - G) m     n = w_n o r(o)     m = w_m l r(l)     y = SiLU(z) or z

and back, with dz = dy SiLU'(z) or dy::

    d gate = dz (n - m) G (1 - G)       dn = dz G       dm = dz (1 - G)
    do = r(o) (w_n dn - o r(o) mean(o r(o) w_n dn))     and the same with m, l and w_m

The gradients go straight into one packed tensor, which the projection's backward reads as it is. Kept for the backward
are o and what BiGLA keeps; gate logits, norms and gates are computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad, sigmoid
from .backward import launch_backward
from .forward import launch_forward
from .primitives import block, ceil_div
from .sums import sum_rows

ROWS = tl.constexpr(32)  # heads of tokens that a program merges


@triton.jit
def normalized(x, V: tl.constexpr, eps):
    """x r(x), and r(x), row by row."""
    r = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
    return x * r, r


@triton.jit
def norm_grad(dn, w, x, r, V: tl.constexpr):
    """Gradient of what `normalized` got, from that of w x r(x)."""
    g = dn * w
    return r * (g - x * (tl.sum(g * x, 1) / V)[:, None])


@triton.jit(do_not_specialize=['N'])
def merge_kernel(
    o, local, gate, bias, norm, local_norm, y, dy, do, dlocal, dgate, parts, local_s, gate_s, eps, N, H,
    V: tl.constexpr, BV: tl.constexpr, ACT: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """y of ROWS heads of tokens; GRAD: do, dlocal and dgate, and the sums of dw_n and dw_m over them."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v = tl.arange(0, BV)
    m = (n < N)[:, None] & (v < V)[None, :]
    t, h = (n // H).to(tl.int64), n % H
    flat = n.to(tl.int64)[:, None] * V + v[None, :]
    column = h[:, None] * V + v[None, :]
    at_gate = t[:, None] * gate_s + column
    at_local = t[:, None] * local_s + column
    w = tl.load(norm + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    u = tl.load(local_norm + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    x, r = normalized(tl.load(o + flat, mask=m, other=0.0).to(tl.float32), V, eps)
    near, s = normalized(tl.load(local + at_local, mask=m, other=0.0).to(tl.float32), V, eps)
    g = tl.load(gate + at_gate, mask=m, other=0.0).to(tl.float32)
    g = sigmoid(g + tl.load(bias + column, mask=m, other=0.0).to(tl.float32))
    z = g * (x * w) + (1 - g) * (near * u)
    if not GRAD:
        if ACT:
            z = activate(z, 'silu')
        tl.store(y + flat, z.to(y.dtype.element_ty), mask=m)
    else:
        dz = tl.load(dy + flat, mask=m, other=0.0).to(tl.float32)
        if ACT:
            dz = activate_grad(dz, z, 'silu')
        dn, dm = dz * g, dz * (1 - g)
        tl.store(do + flat, norm_grad(dn, w, x, r, V).to(do.dtype.element_ty), mask=m)
        tl.store(dlocal + flat, norm_grad(dm, u, near, s, V).to(dlocal.dtype.element_ty), mask=m)
        tl.store(dgate + at_gate, (dz * (x * w - near * u) * g * (1 - g)).to(dgate.dtype.element_ty), mask=m)
        at_part = parts + tl.program_id(0).to(tl.int64) * (2 * V) + v
        tl.store(at_part, tl.sum(dn * x, 0), mask=v < V)
        tl.store(at_part + V, tl.sum(dm * near, 0), mask=v < V)


def split(projected: Tensor, dims: int) -> tuple[Tensor, ...]:
    """q, k, v, gate and the low-rank decay of the packed projection (B, L, 3 C + rank)."""
    return projected.split([dims // 2, dims // 2, dims, dims, projected.shape[-1] - 3 * dims], -1)


def heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def expand(low: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gate logits (B, L, C), by a product of matrices: to one of a view, `F.linear` adds the bias afterwards."""
    return torch.addmm(bias, low.flatten(0, 1), weight.t()).unflatten(0, low.shape[:2])


def launch_merge(
    o: Tensor, local: Tensor, gate: Tensor, bias: Tensor, norm: Tensor, local_norm: Tensor, eps: float, act: bool
) -> Tensor:
    """y (B, L, C) from o (B, L, nh, V), local and gate (B, L, C), whose tokens lie at one distance each."""
    B, L, H, V = o.shape
    bias, norm, local_norm = bias.contiguous(), norm.contiguous(), local_norm.contiguous()
    y = local.new_empty(B, L, H * V)
    N = B * L * H
    if N:
        merge_kernel[ceil_div(N, ROWS.value),](
            o, local, gate, bias, norm, local_norm, y, y, y, y, y, y, local.stride(1), gate.stride(1), eps, N, H,
            V=V, BV=block(V), ACT=act, GRAD=False, num_warps=4,
        )  # fmt: skip
    return y


def launch_merge_grad(
    dy: Tensor, o: Tensor, local: Tensor, gate: Tensor, bias: Tensor, norm: Tensor, local_norm: Tensor, dgate: Tensor,
    eps: float, act: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """do, dlocal, and the gradients (V) of both norms in float32; `dgate`, laid out like the gate, gets its own."""
    B, L, H, V = o.shape
    bias, norm, local_norm = bias.contiguous(), norm.contiguous(), local_norm.contiguous()
    N = B * L * H
    do, dlocal = torch.empty_like(o), local.new_empty(B, L, H * V)
    parts = o.new_empty(ceil_div(N, ROWS.value), 2 * V, dtype=torch.float32)
    if N:
        merge_kernel[ceil_div(N, ROWS.value),](
            o, local, gate, bias, norm, local_norm, dy, dy, do, dlocal, dgate, parts,
            local.stride(1), gate.stride(1), eps, N, H, V=V, BV=block(V), ACT=act, GRAD=True, num_warps=4,
        )  # fmt: skip
    return do, dlocal, *sum_rows(parts, 2)


def launch_mixer(
    projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor, norm: Tensor,
    local_norm: Tensor, num_heads: int, eps: float, act: bool, C: int, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, L, dims), and for the backward o and what `launch_forward` returns besides it."""
    dims = local.shape[-1]
    q, k, v, gate, low = split(projected, dims)
    logits = expand(low, decay_weight, decay_bias)
    q, k, v, *logits = (heads(x, num_heads) for x in (q, k, v, *logits.chunk(2, -1)))
    o, *saved = launch_forward(q, k, v, *logits, q.shape[-1] ** -0.5, True, C, one)
    return launch_merge(o, local, gate, gate_bias, norm, local_norm, eps, act), o, *saved


def launch_mixer_grad(
    dy: Tensor, projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor, gate_bias: Tensor,
    norm: Tensor, local_norm: Tensor, o: Tensor, state: Tensor, total: Tensor, hard: Tensor,
    num_heads: int, eps: float, act: bool, C: int, one: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the seven tensors that `launch_mixer` got, in their order; those of the parameters in float32."""
    dims = local.shape[-1]
    q, k, v, gate, low = split(projected, dims)
    logits = expand(low, decay_weight, decay_bias)
    dprojected, dlogits = torch.empty_like(projected), torch.empty_like(logits)
    dq, dk, dv, dgate, dlow = split(dprojected, dims)
    do, dlocal, dnorm, dlocal_norm = launch_merge_grad(dy, o, local, gate, gate_bias, norm, local_norm, dgate, eps, act)
    into = [heads(x, num_heads) for x in (dq, dk, dv, *dlogits.chunk(2, -1))]
    q, k, v, *logits = (heads(x, num_heads) for x in (q, k, v, *logits.chunk(2, -1)))
    launch_backward(do, q, k, v, *logits, state, total, hard, q.shape[-1] ** -0.5, True, C, one, into)
    torch.mm(dlogits.flatten(0, 1), decay_weight, out=dlow.flatten(0, 1))
    ddecay_weight = dlogits.flatten(0, 1).t() @ low.flatten(0, 1)
    sums = (sum_rows(x.flatten(0, 1))[0] for x in (dlogits, dgate))
    return dprojected, dlocal, ddecay_weight.float(), *sums, dnorm, dlocal_norm
