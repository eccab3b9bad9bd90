"""The gated feed-forward network of both backbones (SwiGLU, arXiv 2002.05202), with the sums and the norm around it."""

import torch.nn as nn


class GatedMLP(nn.Module):
    """The parameters of s + W2 (SiLU(a) * b) with s = x + branch and [a, b] = W1 norm(s), without biases.

    `bigla.residual_mlp` computes it, a part of `Block`'s one function.

    Args:
        dims: channels of input and output.
        multiple: the hidden width is 8/3 of `dims`, rounded up to a multiple of this.
    """

    def __init__(self, dims: int, multiple: int) -> None:
        super().__init__()
        hidden_dims = -(-8 * dims // (3 * multiple)) * multiple
        self.fc1 = nn.Linear(dims, 2 * hidden_dims, bias=False)
        self.fc2 = nn.Linear(hidden_dims, dims, bias=False)
