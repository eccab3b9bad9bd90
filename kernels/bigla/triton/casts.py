"""Weights and gradients in half precision, in Triton: what a block casts takes one launch or none, its factors none."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, kernel
from .primitives import ceil_div

SIZE, WARPS = 1024, 4  # numbers a program casts


@triton.jit
def cast_piece(i, sources, targets, sizes, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The i-th piece, SIZE numbers or fewer, of COUNT tensors, each in pieces of its own."""
    for n in tl.static_range(COUNT):
        pieces = tl.cdiv(sizes[n], SIZE)
        if (i >= 0) & (i < pieces):
            at = i * SIZE + tl.arange(0, SIZE)
            some = tl.load(sources[n] + at, mask=at < sizes[n])
            tl.store(targets[n] + at, some.to(targets[n].dtype.element_ty), mask=at < sizes[n])
        i -= pieces


@kernel
def cast_kernel(sources, targets, sizes, COUNT: tl.constexpr, SIZE: tl.constexpr):
    begin(True)
    cast_piece(tl.program_id(0), sources, targets, sizes, COUNT, SIZE)


@kernel(do_not_specialize=('N',))
def scale_kernel(x, scale, y, N, SIZE: tl.constexpr):
    """y = scale x, with a factor for N numbers each."""
    begin(False)
    programs = tl.cdiv(N, SIZE)
    sample = tl.program_id(0) // programs
    i = tl.program_id(0) % programs * SIZE + tl.arange(0, SIZE)
    at = sample.to(tl.int64) * N + i
    some = tl.load(x + at, mask=i < N).to(tl.float32) * tl.load(scale + sample).to(tl.float32)
    tl.store(y + at, some.to(y.dtype.element_ty), mask=i < N)


class Casts(NamedTuple):
    """What is to be cast: dense tensors, to others of their sizes."""

    sources: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @property
    def pieces(self) -> int:
        return sum(ceil_div(size, SIZE) for size in self.sizes)


def to_cast(dtype: torch.dtype, *matrices: Sequence[Tensor]) -> tuple[Casts | None, tuple[Tensor, ...]]:
    """What is to be cast, if anything, and each sequence of tensors as one of `dtype`, dense, there when that is done.

    The tensors of a sequence differ in the first dimension alone.
    """
    if all(x.dtype == dtype for parts in matrices for x in parts):
        return None, tuple((parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous() for parts in matrices)
    whole = tuple(
        parts[0].new_empty(sum(len(x) for x in parts), *parts[0].shape[1:], dtype=dtype) for parts in matrices
    )
    sources = tuple(x.contiguous() for parts in matrices for x in parts)
    targets = tuple(
        y for x, parts in zip(whole, matrices) for y in (x.split([len(p) for p in parts]) if len(parts) > 1 else [x])
    )
    return Casts(sources, targets, tuple(x.numel() for x in sources)), whole


def cast(dtype: torch.dtype, *matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that `to_cast` returns, cast by a kernel of its own."""
    casts, whole = to_cast(dtype, *matrices)
    if casts and casts.pieces:
        cast_kernel[casts.pieces,](*casts, COUNT=len(casts.sizes), SIZE=SIZE, num_warps=WARPS)
    return whole


def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x` (B, ..., C), contiguous, times its sample's factor, of `dtype`; scale (B,)."""
    if scale is None:
        return x.to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        N = x.numel() // x.shape[0]
        scale_kernel[ceil_div(N, SIZE) * x.shape[0],](x, scale.contiguous(), y, N, SIZE=SIZE, num_warps=WARPS)
    return y
