"""The end of ViG's token mixer in Triton: norms, 2D gating with the local tokens, SiLU.

Per head, with o = BiGLA(q, k, v, gates), l the local tokens, r(x) = (mean x^2 + eps)^-1/2 and G = sigmoid(gate + c)::

    z = G n + (1 - G) m     n = w_n o r(o)     m = w_m l r(l)     y = SiLU(z) or z

and back, with dz = dy SiLU'(z) or dy::

    d gate = dz (n - m) G (1 - G)       dn = dz G       dm = dz (1 - G)
    do = r(o) (w_n dn - o r(o) mean(o r(o) w_n dn))     and the same with m, l and w_m

The operator's output kernels have it inside (`finish`) where one program holds the values of a head.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad, sigmoid
from .launch import begin, kernel
from .primitives import block, ceil_div, load_rows, row, store_rows, token_strides
from .sums import Sums

ROWS, WARPS = 32, 4  # heads of tokens that a program merges
# Of the gradient: numbers of a head that a program holds of each tensor. It takes WALK such tiles, one after the other,
# for one row of partial sums, and reads AHEAD - 1 of them before they are needed.
GRAD_TILE, GRAD_WARPS, WALK, AHEAD = 1024, 4, 16, 3


@triton.jit
def normalized(x, V: tl.constexpr, eps):
    """x r(x), and r(x), row by row."""
    r = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
    return x * r, r


@triton.jit
def gated(G, n, m):
    return m + G * (n - m)  # G once: otherwise Triton makes it twice, in the layout of either summand


@triton.jit
def mixed(out, local, gate, c, w, u, eps, V: tl.constexpr, TO: tl.constexpr, ACT: tl.constexpr):
    """y of outputs, local tokens and gate (ROWS, V), with the vectors c, w_n and w_m."""
    z = gated(sigmoid(gate + c, TO), normalized(out, V, eps)[0] * w, normalized(local, V, eps)[0] * u)
    if ACT:
        z = activate(z, 'silu', TO)
    return z


@triton.jit
def norm_grad(dn, w, x, r, V: tl.constexpr):
    """Gradient of what `normalized` got, from that of w x r(x)."""
    g = dn * w
    return r * (g - x * (tl.sum(g * x, 1) / V)[:, None])


class Merge(NamedTuple):
    """What becomes of the operator's output, and where it goes."""

    local: Tensor  # (B, L, nh, V), like the gate a view whose heads lie side by side
    gate: Tensor  # (B, L, nh, V)
    gate_bias: Tensor  # (nh V)
    norm: Tensor  # (V)
    local_norm: Tensor  # (V)
    y: Tensor  # (B, L, nh, V)
    eps: float
    act: bool

    def arguments(self) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...], float, bool]:
        """For kernels with `finish`: pointers, strides, eps, act."""
        return self[:6], tuple(token_strides(x) for x in (self.local, self.gate, self.y)), self.eps, self.act


@triton.jit
def finish(
    out, merge, merge_s, eps, b, left, h, r, m, V: tl.constexpr, BV: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    """Stores y of a chunk's output (C, BV), which is all of V."""
    v = tl.arange(0, BV)
    w = tl.load(merge[3] + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    u = tl.load(merge[4] + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    c = tl.load(merge[2] + h * V + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    local = load_rows(row(merge[0], merge_s[0], b, left, h), merge_s[0][1], r, m, V, BV).to(tl.float32)
    gate = load_rows(row(merge[1], merge_s[1], b, left, h), merge_s[1][1], r, m, V, BV).to(tl.float32)
    z = mixed(out, local, gate, c, w, u, eps, V, merge[5].dtype.element_ty, ACT)
    store_rows(row(merge[5], merge_s[2], b, left, h), merge_s[2][1], z, r, m, V, BV)


@kernel(do_not_specialize=('N',))
def merge_kernel(
    o, local, gate, bias, norm, local_norm, y, local_s, gate_s, eps, N, H,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y of ROWS heads of tokens."""
    begin(True)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v = tl.arange(0, BV)
    m = (n < N)[:, None] & (v < V)[None, :]
    t, h = (n // H).to(tl.int64), n % H
    flat = n.to(tl.int64)[:, None] * V + v[None, :]
    column = h[:, None] * V + v[None, :]
    w = tl.load(norm + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    u = tl.load(local_norm + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    out = tl.load(o + flat, mask=m, other=0.0).to(tl.float32)
    near = tl.load(local + t[:, None] * local_s + column, mask=m, other=0.0).to(tl.float32)
    g = tl.load(gate + t[:, None] * gate_s + column, mask=m, other=0.0).to(tl.float32)
    c = tl.load(bias + column, mask=m, other=0.0).to(tl.float32)
    z = mixed(out, near, g, c, w, u, eps, V, y.dtype.element_ty, ACT)
    tl.store(y + flat, z.to(y.dtype.element_ty), mask=m)


@kernel(do_not_specialize=('N',))
def merge_grad_kernel(
    o, local, gate, bias, norm, local_norm, dy, do, dlocal, dgate, of_norms, of_bias,
    local_s, gate_s, dgate_s, eps, N, H,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, WALK: tl.constexpr, AHEAD: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """do, dlocal and dgate of one head of WALK times ROWS tokens, and the sums of dw_n, dw_m and dc over them."""
    begin(False)
    h, i = tl.program_id(0) % H, tl.program_id(0) // H  # heads of a token at the same time
    v = tl.arange(0, BV)
    w = tl.load(norm + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    u = tl.load(local_norm + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    c = tl.load(bias + h * V + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BV], tl.float32)  # summed up at the end: over rows, threads have to meet
    du = tl.zeros([ROWS, BV], tl.float32)
    dc = tl.zeros([ROWS, BV], tl.float32)
    for j in tl.range(0, WALK, num_stages=AHEAD):
        n = (i * WALK + j) * ROWS + tl.arange(0, ROWS)
        m = (n < N)[:, None] & (v < V)[None, :]
        t = n.to(tl.int64)[:, None]
        column = h * V + v[None, :]
        flat = t * (H * V) + column
        x, r = normalized(tl.load(o + flat, mask=m, other=0.0).to(tl.float32), V, eps)
        near, s = normalized(tl.load(local + t * local_s + column, mask=m, other=0.0).to(tl.float32), V, eps)
        g = sigmoid(tl.load(gate + t * gate_s + column, mask=m, other=0.0).to(tl.float32) + c, do.dtype.element_ty)
        dz = tl.load(dy + flat, mask=m, other=0.0).to(tl.float32)
        if ACT:
            dz = activate_grad(dz, gated(g, x * w, near * u), 'silu', do.dtype.element_ty)
        dn, dm = dz * g, dz * (1 - g)
        tl.store(do + flat, norm_grad(dn, w, x, r, V).to(do.dtype.element_ty), mask=m)
        tl.store(dlocal + flat, norm_grad(dm, u, near, s, V).to(dlocal.dtype.element_ty), mask=m)
        dg = dz * (x * w - near * u) * g * (1 - g)
        tl.store(dgate + t * dgate_s + column, dg.to(dgate.dtype.element_ty), mask=m)
        dw += dn * x
        du += dm * near
        dc += dg
    part = (i * H + h).to(tl.int64) * V  # of_bias has a row for all heads, of_norms one for each
    tl.store(of_bias + part + v, tl.sum(dc, 0), mask=v < V)
    tl.store(of_norms + 2 * part + v, tl.sum(dw, 0), mask=v < V)
    tl.store(of_norms + 2 * part + V + v, tl.sum(du, 0), mask=v < V)


def launch_merge(o: Tensor, merge: Merge) -> None:
    """y from o (B, L, nh, V), by a kernel of its own."""
    B, L, H, V = o.shape
    local, gate, bias, norm, local_norm, y = merge[:6]
    N = B * L * H
    if N:
        merge_kernel[ceil_div(N, ROWS),](
            o, local, gate, bias, norm, local_norm, y, local.stride(1), gate.stride(1), merge.eps, N, H,
            V=V, BV=block(V), ROWS=ROWS, ACT=merge.act, num_warps=WARPS,
        )  # fmt: skip


def launch_merge_grad(
    sums: Sums, dy: Tensor, o: Tensor, local: Tensor, gate: Tensor, bias: Tensor, norm: Tensor, local_norm: Tensor,
    dgate: Tensor, eps: float, act: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """do, dlocal, and of `sums` the gradients of the bias and of both norms; `dgate` (B, L, C) gets its own.

    Of local, gate and dgate the tokens lie at one distance each.
    """
    B, L, H, V = o.shape
    bias, norm, local_norm = bias.contiguous(), norm.contiguous(), local_norm.contiguous()
    N = B * L
    do, dlocal = torch.empty_like(o), local.new_empty(B, L, H * V)
    rows = max(1, GRAD_TILE // block(V))
    programs = ceil_div(N, rows * WALK)
    of_norms = o.new_empty(programs * H, 2 * V, dtype=torch.float32)
    of_bias = o.new_empty(programs, H * V, dtype=torch.float32)
    if N:
        merge_grad_kernel[programs * H,](
            o, local, gate, bias, norm, local_norm, dy, do, dlocal, dgate, of_norms, of_bias,
            local.stride(1), gate.stride(1), dgate.stride(1), eps, N, H,
            V=V, BV=block(V), ROWS=rows, WALK=WALK, AHEAD=AHEAD, ACT=act, num_warps=GRAD_WARPS,
        )  # fmt: skip
    return do, dlocal, *sums.add((of_bias, 1), (of_norms, 2))
