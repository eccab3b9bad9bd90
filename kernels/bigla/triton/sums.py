"""Sums over the rows of a tall matrix, such as a bias's gradient over the tokens, in Triton."""

import torch
import triton.language as tl
from torch import Tensor

from .launch import kernel
from .primitives import ceil_div

ROWS, COLUMNS = 128, 32  # a program adds up so many at a time
PARTS = 128  # programs that share the rows, at most
SHORT = 5 * ROWS  # rows that take one program no longer than a second launch does


@kernel(do_not_specialize=('M', 'rows'))
def sum_kernel(x, left, right, x_s, M, rows, C, HALF, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row i of left and right: the sum over the i-th `rows` rows of x, its first HALF columns and the others."""
    i = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m = i * rows + tl.arange(0, ROWS)
    first = i * rows
    end = tl.minimum(first + rows, M)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    while first < end:
        at = x + m.to(tl.int64)[:, None] * x_s + c[None, :]
        total += tl.load(at, mask=(m < end)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        m += ROWS
        first += ROWS
    total = tl.sum(total, 0)
    tl.store(left + i * HALF + c, total, mask=c < HALF)
    tl.store(right + i * (C - HALF) + c - HALF, total, mask=(c >= HALF) & (c < C))


def sum_rows(x: Tensor, pieces: int = 1) -> tuple[Tensor, ...]:
    """The sum in float32 of x (M, C), whose rows are dense, in one or two tensors (C / pieces); the same every time."""
    M, C = x.shape
    if M == 0:
        return tuple(x.new_zeros(C // pieces, dtype=torch.float32) for _ in range(pieces))
    sums = tuple(x.new_empty(C // pieces, dtype=torch.float32) for _ in range(pieces))
    if M > SHORT:
        rows = ceil_div(ceil_div(M, min(PARTS, ceil_div(M, ROWS))), ROWS) * ROWS
        parts = x.new_empty(ceil_div(M, rows), C, dtype=torch.float32)
        _launch(x, rows, parts, parts)
        x = parts
    _launch(x, x.shape[0], sums[0], sums[-1])
    return sums


def _launch(x: Tensor, rows: int, left: Tensor, right: Tensor) -> None:
    M, C = x.shape
    sum_kernel[ceil_div(M, rows), ceil_div(C, COLUMNS)](
        x, left, right, x.stride(0), M, rows, C, left.shape[-1], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
