"""The gated feed-forward network of both backbones (SwiGLU, arXiv 2002.05202)."""

import torch.nn as nn
from torch import Tensor

from bigla import gated_mlp

from .precision import autocast_dtype


class GatedMLP(nn.Module):
    """W2 (SiLU(a) * b) with [a, b] = W1 x, without biases.

    Args:
        dims: channels of input and output.
        multiple: the hidden width is 8/3 of `dims`, rounded up to a multiple of this.
    """

    def __init__(self, dims: int, multiple: int) -> None:
        super().__init__()
        hidden_dims = -(-8 * dims // (3 * multiple)) * multiple
        self.fc1 = nn.Linear(dims, 2 * hidden_dims, bias=False)
        self.fc2 = nn.Linear(hidden_dims, dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to (..., C)."""
        return gated_mlp(x.to(autocast_dtype(x)), self.fc1.weight, self.fc2.weight)
