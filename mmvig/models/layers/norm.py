"""Norms over channels that take the residual sum before them along."""

import torch
import torch.nn as nn
from torch import Tensor

from bigla import add_norm


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm over the last axis of width `dims`, of x or of a residual sum."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps (..., C) to its norm; with a branch, (..., C), to x + branch and the norm of that.

        The norm is of `dtype`, or x's; the sum keeps the wider type of its terms.
        """
        total, y = add_norm(x, branch, self.weight, self.bias, eps=self.eps, dtype=dtype)
        return y if branch is None else (total, y)


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm over the last axis of width `dims`, of x or of a residual sum."""

    def __init__(self, dims: int, eps: float = 1e-6) -> None:
        super().__init__(dims, eps)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `LayerNorm.forward`."""
        total, y = add_norm(x, branch, self.weight, eps=self.eps, dtype=dtype)
        return y if branch is None else (total, y)
