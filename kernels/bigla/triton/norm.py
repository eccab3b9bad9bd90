"""The residual sum and the norm that follows it, row by row in one pass, in Triton.

Per row, with s = x + f branch, where f is a factor of the sample or 1, or s = x + shift, m = mean s (0 in an RMSNorm),
u = s - m and r = (mean u^2 + eps)^-1/2::

    z = w u r + b      y = SiLU(z), GELU(z) or z      dz = dy y'(z)
    ds += r (w dz - [mean(w dz)] - u r mean(w dz u r))      dw = sum dz u r      db = sum dz

with the bracket in a LayerNorm alone; dx = ds, dbranch = f ds. Means, r and z are computed again in the backward.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .launch import begin, kernel
from .primitives import block, ceil_div
from .sums import Sums


class Norm(NamedTuple):
    """The vectors (C) of a norm, dense."""

    weight: Tensor
    bias: Tensor | None  # in a LayerNorm alone


TILE, WARPS = 1024, 4  # elements a program holds of each tensor
# The same of the gradient, whose programs take WALK tiles one after the other, for one row of partial sums, and read
# AHEAD - 1 of them before they are needed.
GRAD_TILE, GRAD_WARPS, WALK, AHEAD = 1024, 2, 16, 3


@triton.jit
def standardize(s, inside, C: tl.constexpr, eps, CENTER: tl.constexpr):
    """u r and r of rows `s`; of those that are not all outside `inside`, entries there are 0."""
    if CENTER:
        s = tl.where(inside, s - tl.sum(s, 1)[:, None] / C, 0.0)
    r = tl.rsqrt(tl.sum(s * s, 1) / C + eps)[:, None]
    return s * r, r


@triton.jit
def load_factor(factors, n, N, L):
    """That of the sample of each row n, one for L rows.  (ROWS, 1)"""
    return tl.load(factors + n // L, mask=n < N, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_branch(branch, factors, at, n, inside, N, L, SCALED: tl.constexpr):
    """Rows n of f branch."""
    z = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        z = z * load_factor(factors, n, N, L)
    return z


@kernel(do_not_specialize=('N', 'L'))
def norm_kernel(
    x, branch, factors, shift, weight, bias, total, y, N, L, eps,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, SHIFT: tl.constexpr, KEEP: tl.constexpr,
    CENTER: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y, of the sum with ADD; KEEP: writes the sum, too, or without one x, cast.

    SHARED: the branch is one sample's, L rows, for all.
    """
    begin(True)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BC)
    inside = (n < N)[:, None] & (c < C)[None, :]
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at_branch = (n % L).to(tl.int64)[:, None] * C + c[None, :] if SHARED else at
        s = s + load_branch(branch, factors, at_branch, n, inside, N, L, SCALED)
    if SHIFT:
        s = s + tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        kept = s.to(total.dtype.element_ty)
        tl.store(total + at, kept, mask=inside)
        if ADD:  # y is of what the backward finds
            s = kept.to(tl.float32)
    s, r = standardize(s, inside, C, eps, CENTER)
    s = s * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if CENTER:
        s = s + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, activate(s, ACT, y.dtype.element_ty).to(y.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=('N', 'L'))
def norm_grad_kernel(
    dtotal, dy, total, branch, factors, shift, weight, bias, dx, dbranch, parts, N, L, eps,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, WALK: tl.constexpr, AHEAD: tl.constexpr,
    ADD: tl.constexpr, SUM: tl.constexpr, SCALED: tl.constexpr, SHIFT: tl.constexpr, BRANCH: tl.constexpr,
    CENTER: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dx, with `dtotal` in it if ADD, with BRANCH dbranch too, and this program's sums of dw and db over WALK tiles.

    SUM: `total` lacks the branch; SHIFT: it lacks that.
    """
    begin(False)
    c = tl.arange(0, BC)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BC], tl.float32)  # summed up at the end: over rows, threads have to meet
    db = tl.zeros([ROWS, BC], tl.float32)
    for j in tl.range(0, WALK, num_stages=AHEAD):
        n = (tl.program_id(0) * WALK + j) * ROWS + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (c < C)[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        s = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        if SUM:
            s = s + load_branch(branch, factors, at, n, inside, N, L, SCALED)
        if SHIFT:
            s = s + tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        u, r = standardize(s, inside, C, eps, CENTER)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if ACT != '':
            z = u * w
            if CENTER:
                z = z + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
            g = activate_grad(g, z, ACT, dy.dtype.element_ty)
        dw += g * u
        if CENTER:
            db += g
        g = g * w
        d = g - u * (tl.sum(g * u, 1)[:, None] / C)
        if CENTER:
            d = d - tl.sum(g, 1)[:, None] / C
        d = d * r
        if ADD:
            d = d + tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
        if BRANCH:
            if SCALED:
                d = d * load_factor(factors, n, N, L)
            tl.store(dbranch + at, d.to(dbranch.dtype.element_ty), mask=inside)
    at_part = parts + tl.program_id(0).to(tl.int64) * (2 * C) + c
    tl.store(at_part, tl.sum(dw, 0), mask=c < C)
    tl.store(at_part + C, tl.sum(db, 0), mask=c < C)


def tiles(C: int, elements: int, warps: int) -> dict[str, int]:
    BC = block(C)
    return dict(C=C, BC=BC, ROWS=max(1, elements // BC), num_warps=8 if elements < BC else warps)


def rows_a_sample(x: Tensor) -> int:
    return x.numel() // (x.shape[0] * x.shape[-1])


def launch_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    act: str = '', keep: bool = True, factors: Tensor | None = None, shift: Tensor | None = None,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum, of `sum_dtype` or the wider dtype of x and branch, and y of `dtype`.

    Where the sum is not to be kept, it is x itself. The branch is of x's shape, or (1, ..., C) for all samples.
    `factors` (B,), dense, are those of the branch (B, ..., C); `shift` (C), dense, is added to every row before the
    norm, not in the sum.
    """
    center = bias is not None
    C = x.shape[-1]
    N = x.numel() // C
    weight, bias = weight.contiguous(), weight if bias is None else bias.contiguous()
    if sum_dtype is None:
        sum_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    keep = keep and (branch is not None or sum_dtype != x.dtype)
    total = torch.empty_like(x, dtype=sum_dtype) if keep else x
    y = torch.empty_like(x, dtype=dtype)
    tile = tiles(C, TILE, WARPS)
    if N:
        norm_kernel[ceil_div(N, tile['ROWS']),](
            x, x if branch is None else branch, *(weight if v is None else v for v in (factors, shift)), weight, bias,
            total, y, N, rows_a_sample(x), eps,
            ADD=branch is not None, SHARED=branch is not None and branch.shape != x.shape, SCALED=factors is not None,
            SHIFT=shift is not None, KEEP=keep, CENTER=center, ACT=act, **tile,
        )  # fmt: skip
    return total, y


def launch_norm_grad(
    sums: Sums, dtotal: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    x_dtype: torch.dtype, branch_dtype: torch.dtype | None, act: str = '', branch: Tensor | None = None,
    factors: Tensor | None = None, shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbranch (dx itself where it would be the same), and of `sums` dw and db (C).

    Args:
        branch: what `total` lacks of the sum; None: nothing.
        factors, shift: As `launch_norm` got them; `total` lacks the shift.
    """
    C = total.shape[-1]
    N = total.numel() // C
    center = bias is not None
    weight, bias = weight.contiguous(), weight if bias is None else bias.contiguous()
    dx = torch.empty_like(total, dtype=x_dtype)
    same = branch_dtype is None or (branch_dtype == x_dtype and factors is None)
    dbranch = dx if same else torch.empty_like(total, dtype=branch_dtype)
    tile = tiles(C, GRAD_TILE, GRAD_WARPS)
    programs = ceil_div(N, tile['ROWS'] * WALK)
    parts = total.new_empty(programs, 2 * C, dtype=torch.float32)
    if N:
        norm_grad_kernel[programs,](
            dy if dtotal is None else dtotal, dy, total, total if branch is None else branch,
            *(weight if v is None else v for v in (factors, shift)), weight, bias, dx, dbranch, parts,
            N, rows_a_sample(total), eps, WALK=WALK, AHEAD=AHEAD,
            ADD=dtotal is not None, SUM=branch is not None, SCALED=factors is not None, SHIFT=shift is not None,
            BRANCH=not same, CENTER=center, ACT=act, **tile,
        )  # fmt: skip
    return dx, dbranch, *sums.add((parts, 2))
