"""How ViT-Adapter's pyramid and the plain backbone's tokens tell each other what they know (arXiv 2205.08534, 3.4).

Shapes: the backbone's tokens are a grid (B, h, w, C); the pyramid's are (B, L, C), those of its `grids` one after
another.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.ops import StochasticDepth

from .deformable_attention import DeformableAttention, Grid

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Injector(nn.Module):
    """x <- x + gamma * attention(norm(x), norm(pyramid)), with gamma = 0 at initialisation: x is what it was.

    Args:
        dims: channels C.
        attention: makes a `DeformableAttention` for a number of value grids.
        num_levels: grids of the pyramid.
    """

    def __init__(self, dims: int, attention: partial[DeformableAttention], num_levels: int) -> None:
        super().__init__()
        self.query_norm = LayerNorm(dims)
        self.value_norm = LayerNorm(dims)
        self.attention = attention(num_levels=num_levels)
        self.gamma = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor, pyramid: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Maps (B, h, w, C) and (B, L, C) to (B, h, w, C)."""
        query = self.query_norm(x).flatten(1, 2)  # (B, h * w, C)
        injected = self.attention(query, self.value_norm(pyramid), [x.shape[1:3]], grids)
        return x + self.gamma * injected.view_as(x)


class Extractor(nn.Module):
    """pyramid <- pyramid + attention(norm(pyramid), norm(x)), then pyramid <- pyramid + ffn(norm(pyramid)).

    Args:
        dims: channels C.
        attention: makes a `DeformableAttention` for a number of value grids.
        hidden_dims: width inside the feed-forward network.
        drop_path: chance in [0, 1) that training skips the feed-forward network for a sample.
    """

    def __init__(self, dims: int, attention: partial[DeformableAttention], hidden_dims: int, drop_path: float) -> None:
        super().__init__()
        self.query_norm = LayerNorm(dims)
        self.value_norm = LayerNorm(dims)
        self.attention = attention(num_levels=1)
        self.ffn_norm = LayerNorm(dims)
        self.ffn = ConvFFN(dims, hidden_dims)
        self.drop_path = StochasticDepth(drop_path, mode='row')

    def forward(self, pyramid: Tensor, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Maps (B, L, C) and (B, h, w, C) to (B, L, C)."""
        values = self.value_norm(x).flatten(1, 2)  # (B, h * w, C)
        pyramid = pyramid + self.attention(self.query_norm(pyramid), values, grids, [x.shape[1:3]])
        return pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), grids))


class ConvFFN(nn.Module):
    """W2 GELU(conv(W1 x)), with a depthwise 3x3 convolution on each grid.

    Args:
        dims: channels C of input and output.
        hidden_dims: channels of the convolution.
    """

    def __init__(self, dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.conv = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, dims)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Maps (B, L, C) to (B, L, C)."""
        convolved = []
        for tokens, grid in zip(self.fc1(x).split([h * w for h, w in grids], dim=1), grids, strict=True):
            tokens = self.conv(tokens.unflatten(1, grid).permute(0, 3, 1, 2))  # (B, hidden, h, w)
            convolved.append(tokens.permute(0, 2, 3, 1).flatten(1, 2))
        return self.fc2(self.act(torch.cat(convolved, dim=1)))
