"""Sums over the rows of tall matrices, such as biases' gradients over the tokens, in Triton; many by one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, kernel
from .primitives import ceil_div

ROWS, COLUMNS = 128, 32  # a program adds up so many at a time
PARTS = 128  # programs that share the rows of a matrix, at most
SHORT = 5 * ROWS  # rows that take one program no longer than a second launch does
TOGETHER = 6  # matrices a launch, at most: a block of ViG has six


@triton.jit
def sum_rows_of(x, left, right, x_s, i, c0, M, rows, C, HALF, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns c0.. of row i of left and right: the sum over the i-th `rows` of M rows of x, its first HALF columns and
    the others.
    """
    c = c0 + tl.arange(0, COLUMNS)
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


@kernel(do_not_specialize=('M0', 'M1', 'M2', 'M3', 'M4', 'M5', 'R0', 'R1', 'R2', 'R3', 'R4', 'R5'))
def sum_kernel(
    x, left, right, x_s, C, HALF, M0, M1, M2, M3, M4, M5, R0, R1, R2, R3, R4, R5,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each of COUNT matrices x[n] (M, C) by programs of its own, R rows each.

    Their heights come one by one: in a tuple, Triton would compile a kernel for each that is divisible by 16.
    """
    begin(False)
    M = (M0, M1, M2, M3, M4, M5)
    R = (R0, R1, R2, R3, R4, R5)
    i = tl.program_id(0)
    for n in tl.static_range(COUNT):
        across = tl.cdiv(C[n], COLUMNS)
        programs = tl.cdiv(M[n], R[n]) * across
        if (i >= 0) & (i < programs):
            at = i % across * COLUMNS
            sum_rows_of(x[n], left[n], right[n], x_s[n], i // across, at, M[n], R[n], C[n], HALF[n], ROWS, COLUMNS)
        i -= programs


class Sums:
    """Sums in float32 over the rows of matrices, the same every time, that are there at the end of its context.

    A tall matrix takes two launches, the first of them when it comes; the second is the same for all.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def add(self, *matrices: tuple[Tensor, int]) -> list[Tensor]:
        """Of each (M, C), whose rows are dense, and a number of pieces, 1 or 2: the tensors (C / pieces) to be."""
        sums, tall = [], []
        for x, pieces in matrices:
            M, C = x.shape
            make = x.new_empty if M else x.new_zeros
            into = [make(C // pieces, dtype=torch.float32) for _ in range(pieces)]
            sums += into
            if M == 0:
                continue
            if M > SHORT:
                rows = ceil_div(ceil_div(M, min(PARTS, ceil_div(M, ROWS))), ROWS) * ROWS
                parts = x.new_empty(ceil_div(M, rows), C, dtype=torch.float32)
                tall.append((x, parts, parts, rows))
                x = parts
            self.waiting.append((x, into[0], into[-1], len(x)))
        _launch(tall)
        return sums

    def __enter__(self) -> 'Sums':
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if error is None:
            for first in range(0, len(self.waiting), TOGETHER):
                _launch(self.waiting[first : first + TOGETHER])


def _launch(matrices: list[tuple[Tensor, Tensor, Tensor, int]]) -> None:
    """Of each matrix: where its sums go, the first columns and the others, and how many rows one of them takes."""
    programs = sum(ceil_div(len(x), rows) * ceil_div(x.shape[1], COLUMNS) for x, _, _, rows in matrices)
    if programs == 0:
        return
    x, left, right, rows = zip(*matrices)
    none = (1,) * (TOGETHER - len(x))
    sum_kernel[programs,](
        x, left, right, tuple(t.stride(0) for t in x), tuple(t.shape[1] for t in x),
        tuple(t.shape[-1] for t in left), *(len(t) for t in x), *none, *rows, *none,
        COUNT=len(x), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
