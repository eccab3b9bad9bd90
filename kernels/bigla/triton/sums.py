"""Sums over the rows of a tall matrix, such as a bias's gradient over the tokens, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import ceil_div

ROWS, COLUMNS = 128, 32  # a program adds up so many at a time
PARTS = 128  # programs that share the rows, at most
SHORT = 5 * ROWS  # rows that take one program no longer than a second launch does


@triton.jit(do_not_specialize=['M', 'rows'])
def sum_kernel(x, parts, x_s, M, rows, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """parts[i, c]: the sum over the i-th `rows` rows of x."""
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(0) * rows + tl.arange(0, ROWS)
    end = tl.minimum((tl.program_id(0) + 1) * rows, M)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(0) * rows
    while first < end:
        at = x + m.to(tl.int64)[:, None] * x_s + c[None, :]
        total += tl.load(at, mask=(m < end)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        m += ROWS
        first += ROWS
    tl.store(parts + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit(do_not_specialize=['P'])
def finish_kernel(parts, left, right, part_s, P, C, HALF, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of all P parts: the first HALF columns to `left`, the others to `right`."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = 0
    while first < P:
        at = parts + (first + p).to(tl.int64)[:, None] * part_s + c[None, :]
        total += tl.load(at, mask=(first + p < P)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        first += ROWS
    total = tl.sum(total, 0)
    tl.store(left + c, total, mask=c < HALF)
    tl.store(right + c - HALF, total, mask=(c >= HALF) & (c < C))


def sum_rows(x: Tensor, pieces: int = 1) -> tuple[Tensor, ...]:
    """The sum in float32 of x (M, C), whose rows are dense, in one or two tensors (C / pieces); the same every time."""
    M, C = x.shape
    if M == 0:
        return tuple(x.new_zeros(C // pieces, dtype=torch.float32) for _ in range(pieces))
    sums = tuple(x.new_empty(C // pieces, dtype=torch.float32) for _ in range(pieces))
    parts = x
    if M > SHORT:
        programs = min(PARTS, ceil_div(M, ROWS))
        rows = ceil_div(ceil_div(M, programs), ROWS) * ROWS
        programs = ceil_div(M, rows)
        parts = x.new_empty(programs, C, dtype=torch.float32)
        sum_kernel[programs, ceil_div(C, COLUMNS)](
            x, parts, x.stride(0), M, rows, C, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
        )
    finish_kernel[ceil_div(C, COLUMNS),](
        parts, sums[0], sums[-1], parts.stride(0), parts.shape[0], C, C // pieces,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return sums
