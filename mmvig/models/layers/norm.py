"""Norms over channels that take the residual sum before them along."""

import torch
import torch.nn as nn
from torch import Tensor

from bigla import add_norm

__all__ = ['LayerNorm', 'RMSNorm', 'autocast_dtype']


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm over the last axis, with `add`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to (..., C), of x's type."""
        return add_norm(x, None, self.weight, self.bias, eps=self.eps)[1]

    def add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch, or x where there is no branch, and the norm of that; (..., C) each.

        The norm is what autocast, where it is on, would take into a product: the sum keeps its own type.
        """
        return add_norm(x, branch, self.weight, self.bias, eps=self.eps, dtype=autocast_dtype(x))


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm over the last axis, with `add`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to (..., C), of x's type."""
        return add_norm(x, None, self.weight, eps=self.eps)[1]

    def add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `LayerNorm.add`."""
        return add_norm(x, branch, self.weight, eps=self.eps, dtype=autocast_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast, where it is on, would compute a product of `x`."""
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
