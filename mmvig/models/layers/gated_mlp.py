"""The gated feed-forward network of both backbones (SwiGLU, arXiv 2002.05202), with the sums and the norm around it."""

import torch.nn as nn
from torch import Tensor

from bigla import residual_mlp

from .norm import LayerNorm, RMSNorm
from .precision import autocast_dtype


class GatedMLP(nn.Module):
    """s + W2 (SiLU(a) * b) with s = x + branch and [a, b] = W1 norm(s), without biases.

    Args:
        dims: channels of input and output.
        multiple: the hidden width is 8/3 of `dims`, rounded up to a multiple of this.
    """

    def __init__(self, dims: int, multiple: int) -> None:
        super().__init__()
        hidden_dims = -(-8 * dims // (3 * multiple)) * multiple
        self.fc1 = nn.Linear(dims, 2 * hidden_dims, bias=False)
        self.fc2 = nn.Linear(hidden_dims, dims, bias=False)

    def forward(self, x: Tensor, branch: Tensor, norm: LayerNorm | RMSNorm, scale: Tensor | None = None) -> Tensor:
        """Maps x and branch, both (B, ..., C), to (B, ..., C); scale, (B,), is a factor on the network's output."""
        return residual_mlp(
            x,
            branch,
            norm.weight,
            norm.bias,
            self.fc1.weight,
            self.fc2.weight,
            scale,
            eps=norm.eps,
            inner=autocast_dtype(x),
        )
