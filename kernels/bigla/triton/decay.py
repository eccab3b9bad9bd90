"""Gradients of the low-rank decay, from those of the gate logits, in Triton.

With x = W low + b for every token::

    dlow = W^T dx      dW = sum dx low^T      db = sum dx

In half precision, and where a program can hold all channels, one pass over dx makes all three. Sums over tokens are
made program by program and then over the programs, so that results are the same bits on every run.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import begin, kernel
from .primitives import block, ceil_div
from .products import product
from .sums import Sums

WIDEST, HIGHEST = 384, 32  # channels, and ranks, that a program can hold
# Tiles so low that no product goes by Hopper's wgmma, in which ptxas would let no two run at a time; programs that an
# H200 has room for.
TOKENS, CHANNELS, WARPS, PROGRAMS = 32, 32, 4, 396


@kernel(do_not_specialize=('M',))
def decay_grad_kernel(
    dx, low, weight, dlow, parts, low_s, dlow_s, M,
    C: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dlow of every so-many-th tile of BM tokens, and the sums of dW (C, R) and of db (C) over these."""
    begin(False)
    N: tl.constexpr = (C + BC - 1) // BC
    c = tl.arange(0, BC)
    r = tl.arange(0, BR)
    weights = ()
    products = ()
    totals = ()
    for n in tl.static_range(N):
        here = n * BC + c
        inside = (here < C)[:, None] & (r < R)[None, :]
        w = tl.load(weight + here[:, None] * R + r[None, :], mask=inside, other=0.0)
        weights = weights + (w.to(dx.dtype.element_ty),)
        products = products + (tl.zeros([BC, BR], tl.float32),)
        totals = totals + (tl.zeros([BC, BR], tl.float32),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):
        m = tile * BM + tl.arange(0, BM)
        inside = (m < M)[:, None] & (r < R)[None, :]
        some = tl.load(low + m.to(tl.int64)[:, None] * low_s + r[None, :], mask=inside, other=0.0)
        ones = tl.full([BM, BR], 1.0, some.dtype)  # sums by products: threads need not meet
        acc = tl.zeros([BM, BR], tl.float32)
        more = ()
        more_totals = ()
        for n in tl.static_range(N):
            here = n * BC + c
            at = dx + m.to(tl.int64)[:, None] * C + here[None, :]
            d = tl.load(at, mask=(m < M)[:, None] & (here < C)[None, :], other=0.0)
            acc = tl.dot(d, weights[n], acc)
            more = more + (tl.dot(tl.trans(d), some, products[n]),)
            more_totals = more_totals + (tl.dot(tl.trans(d), ones, totals[n]),)
        products = more
        totals = more_totals
        tl.store(dlow + m.to(tl.int64)[:, None] * dlow_s + r[None, :], acc.to(dlow.dtype.element_ty), mask=inside)
    parts += tl.program_id(0) * (C * (R + 1))
    for n in tl.static_range(N):
        here = n * BC + c
        at = parts + here[:, None] * R + r[None, :]
        tl.store(at, products[n], mask=(here < C)[:, None] & (r < R)[None, :])
        tl.store(parts + C * R + here, tl.max(totals[n], 1), mask=here < C)  # columns are all the same


def launch_decay_grad(sums: Sums, dx: Tensor, low: Tensor, weight: Tensor, dlow: Tensor) -> tuple[Tensor, Tensor]:
    """dlow, written, and dW (C, R) and db (C), of `sums`.

    dx (M, C) and weight (C, R) are dense, rows of low and dlow (M, R), too.
    """
    M, C = dx.shape
    R = weight.shape[1]
    if M == 0 or C > WIDEST or R > HIGHEST or dx.dtype == torch.float32:
        torch.mm(dx, weight.to(dx.dtype), out=dlow)
        return product(dx.t(), low), *sums.add((dx, 1))
    parts = dx.new_empty(min(PROGRAMS, ceil_div(M, TOKENS)), C * (R + 1), dtype=torch.float32)
    decay_grad_kernel[len(parts),](
        dx, low, weight, dlow, parts, low.stride(0), dlow.stride(0), M,
        C=C, R=R, BM=TOKENS, BC=CHANNELS, BR=block(R), num_warps=WARPS,
    )  # fmt: skip
    (total,) = sums.add((parts, 1))
    dweight, dbias = total.split([C * R, C])
    return dweight.view(C, R), dbias
