"""Norms over channels by the kernels."""

import torch.nn as nn
from torch import Tensor

from bigla import add_norm

from .precision import autocast_dtype


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm over the last axis of width `dims`."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to its norm, of x's dtype."""
        return add_norm(x, None, self.weight, self.bias, eps=self.eps)[1]

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as autocast gives it to a convolution, which comes next, and its norm: it is read once for both."""
        return add_norm(x, None, self.weight, self.bias, eps=self.eps, sum_dtype=autocast_dtype(x))


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm over the last axis of width `dims`."""

    bias = None  # where a LayerNorm has one

    def __init__(self, dims: int, eps: float = 1e-6) -> None:
        super().__init__(dims, eps)

    def forward(self, x: Tensor) -> Tensor:
        """As `LayerNorm.forward`."""
        return add_norm(x, None, self.weight, eps=self.eps)[1]
