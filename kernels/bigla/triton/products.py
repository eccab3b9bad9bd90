"""Products and sums by PyTorch where half precision meets a float32 stream, without kernels that change types."""

import torch
from torch import Tensor


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y in float32, as it was accumulated."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return (x @ y).float()  # a CPU knows no product of another type


def add_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`total` (.., C) with x y added, in place."""
    flat = total.view(-1, total.shape[-1])
    if total.dtype == x.dtype:
        flat.addmm_(x, y)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(flat, x, y, out_dtype=torch.float32, out=flat)
    else:
        flat.add_(x @ y)
    return total
