"""Products, sums and casts by PyTorch where half precision meets a float32 stream, few kernels for changes of type."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..composed import by_sample


def cast(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All of them dense and of `dtype`; those of one other type by one kernel together."""
    if all(x.dtype == dtype for x in matrices):
        return [x.contiguous() for x in matrices]
    copies = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in matrices]
    torch._foreach_copy_(copies, list(matrices))
    return copies


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y in float32, as it was accumulated."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return (x @ y).float()  # a CPU knows no product of another type


def add_product(total: Tensor, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    """`total` (B, ..., C) with scale x y added, in place; scale (B,) is a factor for each sample."""
    if scale is not None:
        return total.addcmul_((x @ y).view(total.shape), by_sample(scale, total))
    flat = total.view(-1, total.shape[-1])
    if total.dtype == x.dtype:
        flat.addmm_(x, y)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(flat, x, y, out_dtype=torch.float32, out=flat)
    else:
        flat.add_(x @ y)
    return total


def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x` (B, ..., C) times its sample's factor, of `dtype`."""
    if scale is None:
        return x.to(dtype)
    return torch.mul(x, by_sample(scale, x), out=torch.empty_like(x, dtype=dtype))
