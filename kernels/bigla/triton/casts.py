"""Weights and gradients in half precision, in Triton: what a block casts takes one launch, and its factors none."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import ceil_div

SIZE, WARPS = 1024, 4  # numbers a program casts


@triton.jit(do_not_specialize=['M', 'N'])
def cast_kernel(x, y, x_cast, y_cast, M, N, SIZE: tl.constexpr):
    """Casts the M numbers of x and the N of y."""
    i = tl.program_id(0)
    of_x = tl.cdiv(M, SIZE)
    if i < of_x:
        at = i * SIZE + tl.arange(0, SIZE)
        tl.store(x_cast + at, tl.load(x + at, mask=at < M).to(x_cast.dtype.element_ty), mask=at < M)
    else:
        at = (i - of_x) * SIZE + tl.arange(0, SIZE)
        tl.store(y_cast + at, tl.load(y + at, mask=at < N).to(y_cast.dtype.element_ty), mask=at < N)


@triton.jit(do_not_specialize=['N'])
def scale_kernel(x, scale, y, N, SIZE: tl.constexpr):
    """y = scale x, with a factor for N numbers each."""
    programs = tl.cdiv(N, SIZE)
    sample = tl.program_id(0) // programs
    i = tl.program_id(0) % programs * SIZE + tl.arange(0, SIZE)
    at = sample.to(tl.int64) * N + i
    some = tl.load(x + at, mask=i < N).to(tl.float32) * tl.load(scale + sample).to(tl.float32)
    tl.store(y + at, some.to(y.dtype.element_ty), mask=i < N)


def cast(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both dense and of `dtype`, by one kernel."""
    x, y = x.contiguous(), y.contiguous()
    if x.dtype == y.dtype == dtype:
        return x, y
    casts = torch.empty_like(x, dtype=dtype), torch.empty_like(y, dtype=dtype)
    M, N = x.numel(), y.numel()
    if M + N:
        cast_kernel[ceil_div(M, SIZE) + ceil_div(N, SIZE),](x, y, *casts, M, N, SIZE=SIZE, num_warps=WARPS)
    return casts


def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x` (B, ..., C), contiguous, times its sample's factor, of `dtype`; scale (B,)."""
    if scale is None:
        return x.to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        N = x.numel() // x.shape[0]
        scale_kernel[ceil_div(N, SIZE) * x.shape[0],](x, scale.contiguous(), y, N, SIZE=SIZE, num_warps=WARPS)
    return y
