"""Depthwise 3x3 convolution on a channels-last grid, with an optional SiLU, in Triton.

With x zero outside the grid, p = conv(x), y = SiLU(p) or p, and dp = dy SiLU'(p) or dy::

    p[h, w]  = sum_ij weight[i, j] x[h + i - 1, w + j - 1]
    dx[h, w] = sum_ij weight[i, j] dp[h - i + 1, w - j + 1]
    dweight[i, j] = sum_hw x[h, w] dp[h - i + 1, w - j + 1]

The gradients of x and of the weights look at the same nine neighbours of dp: one pass makes both. p is computed again
where dp needs it, not kept. Weights' gradients are summed program by program and then over the programs, so that
results are the same bits on every run. What the products behind the convolution need cast, its launch casts beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .casts import SIZE, Casts, cast_piece
from .launch import begin, kernel
from .primitives import ceil_div
from .sums import Sums

# A program's outputs: ROWS x COLUMNS tokens, at most CHANNELS wide, of dp fewer rows. Rows share what they load. A
# program of the gradients takes WALK such tiles, one below the other, before it adds up what it has of the weights'.
ROWS, COLUMNS, CHANNELS, WARPS, WALK = 8, 8, 32, 2, 4
DP_ROWS = 4


@triton.jit
def place(H, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """First row of a program's tile, its columns and channels, and the sample."""
    down, across = (H + ROWS - 1) // ROWS, (W + COLUMNS - 1) // COLUMNS
    i = tl.program_id(0)
    w = i % across * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return i // across % down * ROWS, w[:, None], c[None, :], i // across // down


@triton.jit
def load_tokens(x, x_s, b, h, w, c, H, W, C):
    """x[b, h, w, c] in float32, 0 outside the grid.  (COLUMNS, CHANNELS)"""
    p = x + b.to(tl.int64) * x_s[0] + h.to(tl.int64) * x_s[1] + w * x_s[2] + c
    return tl.load(p, mask=(h >= 0) & (h < H) & (w >= 0) & (w < W) & (c < C), other=0.0).to(tl.float32)


@triton.jit
def store_tokens(x, x_s, value, b, h, w, c, H, W, C):
    p = x + b.to(tl.int64) * x_s[0] + h.to(tl.int64) * x_s[1] + w * x_s[2] + c
    tl.store(p, value.to(x.dtype.element_ty), mask=(h < H) & (w < W) & (c < C))


@triton.jit
def load_taps(weight, c, C):
    """The nine weights of channels c, row by row, in float32.  9 times (1, CHANNELS)"""
    k = ()
    for j in tl.static_range(9):
        k = k + (tl.load(weight + c * 9 + j, mask=c < C, other=0.0).to(tl.float32),)
    return k


@triton.jit
def convolve(x, x_s, weight, b, h, w, c, H, W, C, ROWS: tl.constexpr):
    """The convolution in float32, ROWS times (COLUMNS, CHANNELS)."""
    k = load_taps(weight, c, C)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([w.shape[0], c.shape[1]], tl.float32),)
    for i in tl.static_range(ROWS + 2):
        for j in tl.static_range(3):
            t = load_tokens(x, x_s, b, h + i - 1, w + j - 1, c, H, W, C)
            added = ()
            for o in tl.static_range(ROWS):
                if i - o >= 0 and i - o < 3:
                    added = added + (sums[o] + t * k[(i - o) * 3 + j],)
                else:
                    added = added + (sums[o],)
            sums = added
    return sums


@triton.jit
def convolve_tile(
    x, weight, dy, out, x_s, dy_s, out_s, H, W, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ACT: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    h, w, c, b = place(H, W, ROWS, COLUMNS, CHANNELS)
    sums = convolve(x, x_s, weight, b, h, w, c, H, W, C, ROWS)
    for o in tl.static_range(ROWS):
        p = sums[o]
        if ACT:
            if GRAD:
                p = activate_grad(load_tokens(dy, dy_s, b, h + o, w, c, H, W, C), p, 'silu', out.dtype.element_ty)
            else:
                p = activate(p, 'silu', out.dtype.element_ty)
        store_tokens(out, out_s, p, b, h + o, w, c, H, W, C)


@kernel(do_not_specialize=('H', 'W', 'N'))
def conv_kernel(
    x, weight, dy, out, sources, targets, sizes, x_s, dy_s, out_s, H, W, C, N,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ACT: tl.constexpr, GRAD: tl.constexpr,
    COUNT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """y; GRAD: dp of a convolution with SiLU. From the N-th program on, COUNT other tensors are cast."""
    begin(not GRAD)
    if tl.program_id(0) < N:
        convolve_tile(x, weight, dy, out, x_s, dy_s, out_s, H, W, C, ROWS, COLUMNS, CHANNELS, ACT, GRAD)
    else:
        i = (tl.program_id(0) - N) * tl.num_programs(1) + tl.program_id(1)
        cast_piece(i, sources, targets, sizes, COUNT, SIZE)


@kernel(do_not_specialize=('H', 'W'))
def conv_grad_kernel(
    x, weight, dp, dx, parts, x_s, dp_s, dx_s, H, W, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part of dweight."""
    begin(False)
    top, w, c, b = place(H, W, ROWS * WALK, COLUMNS, CHANNELS)
    k = load_taps(weight, c, C)
    part = ()
    for _ in tl.static_range(9):
        part = part + (tl.zeros([COLUMNS, CHANNELS], tl.float32),)
    for step in tl.range(WALK):
        h = top + step * ROWS
        sums = ()
        xs = ()
        for o in tl.static_range(ROWS):
            sums = sums + (tl.zeros([COLUMNS, CHANNELS], tl.float32),)
            xs = xs + (load_tokens(x, x_s, b, h + o, w, c, H, W, C),)
        for i in tl.static_range(ROWS + 2):
            for j in tl.static_range(3):
                t = load_tokens(dp, dp_s, b, h + i - 1, w + j - 1, c, H, W, C)
                added = ()
                for o in tl.static_range(ROWS):
                    if i - o >= 0 and i - o < 3:
                        added = added + (sums[o] + t * k[8 - (i - o) * 3 - j],)
                    else:
                        added = added + (sums[o],)
                sums = added
                more = ()
                for n in tl.static_range(9):
                    if (8 - n) % 3 == j and i - (8 - n) // 3 >= 0 and i - (8 - n) // 3 < ROWS:
                        more = more + (part[n] + t * xs[i - (8 - n) // 3],)
                    else:
                        more = more + (part[n],)
                part = more
        for o in tl.static_range(ROWS):
            store_tokens(dx, dx_s, sums[o], b, h + o, w, c, H, W, C)
    for n in tl.static_range(9):
        at = parts + (tl.program_id(0).to(tl.int64) * 9 + n) * C
        tl.store(at + c, tl.sum(part[n], 0)[None, :], mask=c < C)


def dense(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def grid(B: int, H: int, W: int, C: int, rows: int) -> tuple[int, int]:
    return B * ceil_div(H, rows) * ceil_div(W, COLUMNS), ceil_div(C, CHANNELS)


TILE = dict(COLUMNS=COLUMNS, CHANNELS=CHANNELS, num_warps=WARPS)


def launch_conv(x: Tensor, weight: Tensor, act: bool, casts: Casts | None = None) -> Tensor:
    """y (B, H, W, C), contiguous, of x (B, H, W, C) and weight (C, 1, 3, 3), contiguous.

    Programs behind those of y do the `casts`, if there is an x.
    """
    B, H, W, C = x.shape
    x = dense(x)
    y = x.new_empty(B, H, W, C)
    if y.numel():
        N, across = grid(B, H, W, C, ROWS)
        more = 0 if casts is None else ceil_div(casts.pieces, across)
        sources, targets, sizes = casts or Casts((x,), (y,), (0,))
        strides = x.stride()[:3], y.stride()[:3], y.stride()[:3]
        conv_kernel[N + more, across](
            x, weight, y, y, sources, targets, sizes, *strides, H, W, C, N,
            ROWS=ROWS, ACT=act, GRAD=False, COUNT=len(sizes) if more else 0, SIZE=SIZE, **TILE,
        )  # fmt: skip
    return y


def launch_conv_grad(sums: Sums, dy: Tensor, x: Tensor, weight: Tensor, act: bool) -> tuple[Tensor, Tensor]:
    """dx (B, H, W, C), and of `sums` dweight (C, 9), from dy (B, H, W, C)."""
    B, H, W, C = x.shape
    x, dp = dense(x), dense(dy)
    dx = x.new_empty(B, H, W, C)
    if dx.numel() == 0:
        return dx, x.new_zeros(C, 9, dtype=torch.float32)
    if act:
        dy, dp = dp, torch.empty_like(dx)
        strides = x.stride()[:3], dy.stride()[:3], dp.stride()[:3]
        programs = grid(B, H, W, C, DP_ROWS)
        conv_kernel[programs](
            x, weight, dy, dp, (x,), (x,), (0,), *strides, H, W, C, programs[0],
            ROWS=DP_ROWS, ACT=True, GRAD=True, COUNT=0, SIZE=SIZE, **TILE,
        )  # fmt: skip
    programs = grid(B, H, W, C, ROWS * WALK)
    parts = x.new_empty(programs[0], 9 * C, dtype=torch.float32)
    strides = x.stride()[:3], dp.stride()[:3], dx.stride()[:3]
    conv_grad_kernel[programs](x, weight, dp, dx, parts, *strides, H, W, C, ROWS=ROWS, WALK=WALK, **TILE)
    (taps,) = sums.add((parts, 1))
    return dx, taps.view(9, C).t()
