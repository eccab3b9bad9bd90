"""The gated feed-forward network in Triton: the first product with its SwiGLU, so that only u is written.

With [a, b] = W1 x, u = SiLU(a) b and y = W2 u::

    du = W2^T dy      db = du SiLU(a)      da = du b SiLU'(a)      dx = W1^T [da, db]

The backward computes a and b again: of all that is wider than x nothing is kept.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .activations import sigmoid
from .primitives import ceil_div, plain_precision

TOKENS, HIDDEN, CHANNELS, WARPS, STAGES = 128, 64, 64, 8, 3  # a program's part of u, channels at a time


@triton.jit(do_not_specialize=['M'])
def swiglu_kernel(
    x, weight, u, du, dh, x_s, M, C, H,
    BM: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, GRAD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """u (M, H); GRAD: u, and dh = [da, db] (M, 2 H) from du.

    Columns 2 j and 2 j + 1 of a program's product are a and b of hidden channel j: a thread holds both.
    """
    across = tl.cdiv(H, BH)
    m = tl.program_id(0) // across * BM + tl.arange(0, BM)
    h0 = tl.program_id(0) % across * BH
    n = tl.arange(0, 2 * BH)
    row = h0 + n // 2
    c = tl.arange(0, BC)
    at_x = x + m.to(tl.int64)[:, None] * x_s + c[None, :]
    at_w = weight + (row + n % 2 * H)[None, :] * C + c[:, None]
    acc = tl.zeros([BM, 2 * BH], tl.float32)
    for c0 in tl.range(0, C, BC):
        inside = c0 + c < C
        some = tl.load(at_x + c0, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(
            some, tl.load(at_w + c0, mask=inside[:, None] & (row < H)[None, :], other=0.0), acc, input_precision=PREC
        )
    a, b = tl.split(tl.reshape(acc, [BM, BH, 2]))
    h = h0 + tl.arange(0, BH)
    inside = (m < M)[:, None] & (h < H)[None, :]
    at_u = m.to(tl.int64)[:, None] * H + h[None, :]
    s = sigmoid(a)
    tl.store(u + at_u, (a * s * b).to(u.dtype.element_ty), mask=inside)
    if GRAD:
        d = tl.load(du + at_u, mask=inside, other=0.0).to(tl.float32)
        at_h = dh + m.to(tl.int64)[:, None] * (2 * H) + h[None, :]
        tl.store(at_h, (d * b * s * (1 + a * (1 - s))).to(dh.dtype.element_ty), mask=inside)
        tl.store(at_h + H, (d * a * s).to(dh.dtype.element_ty), mask=inside)


def launch_swiglu(x: Tensor, weight: Tensor, du: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """u (M, H) of x (M, C) and W1 (2 H, C), contiguous, and dh (M, 2 H) from du (M, H), empty where that is None."""
    M, C = x.shape
    H = weight.shape[0] // 2
    u = x.new_empty(M, H)
    half = x.dtype != torch.float32
    dh = x.new_empty(0 if du is None else M, 2 * H)
    if M:
        swiglu_kernel[ceil_div(M, TOKENS) * ceil_div(H, HIDDEN),](
            x, weight, u, u if du is None else du, dh, x.stride(0), M, C, H,
            BM=TOKENS, BH=HIDDEN, BC=CHANNELS if half and C % CHANNELS == 0 else 32, GRAD=du is not None,
            PREC=plain_precision(x.dtype), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return u, dh


def launch_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """y (M, C) of x (M, C), W1 (2 H, C) and W2 (C, H), all of one dtype and contiguous."""
    return F.linear(launch_swiglu(x, fc1)[0], fc2)


def launch_mlp_grad(dy: Tensor, x: Tensor, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, W1 and W2."""
    u, dh = launch_swiglu(x, fc1, dy @ fc2)
    return dh @ fc1, dh.t() @ x, dy.t() @ u
