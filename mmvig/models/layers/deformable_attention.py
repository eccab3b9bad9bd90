"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1) between grids of tokens."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

Grid = tuple[int, int]  # height and width in tokens


class DeformableAttention(nn.Module):
    """Every query reads the value grids bilinearly at a few places around its own, and sums what it finds.

    For a query z at p in the unit square, with places m in each of the levels l:

        y = Wo concat_heads( sum_lm softmax_lm(A z + a)_lm V_l(p + (B z + b)_lm / size_l) ),   V = Wv values + v

    Places, weights and sums are float32 (float64 for such tokens) whatever the tokens are: half precision cannot tell
    the pixels of a large map apart. mmcv's own module computes them in the tokens' type, hence not that one; the
    sampling is mmcv's: its kernel on CUDA, or what stands in for it, and its PyTorch form elsewhere.

    Args:
        dims: channels C of queries, values and output.
        num_heads: heads nh.
        num_levels: value grids.
        num_points: places that a head reads in each level.
        value_ratio: width of the value projection, as a part of C; a head's share of it is one integer.
    """

    def __init__(self, dims: int, num_heads: int, num_levels: int, num_points: int, value_ratio: float) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        places, value_dims = num_heads * num_levels * num_points, int(dims * value_ratio)
        self.offsets = nn.Linear(dims, 2 * places)
        self.weights = nn.Linear(dims, places)
        self.value = nn.Linear(dims, value_dims)
        self.proj = nn.Linear(value_dims, dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads look in evenly spread directions, point m at m + 1 tokens' distance, all with the same weight."""
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.value, self.proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.weights, self.value, self.proj):
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # (nh, 2), to the edge of a square
        steps = torch.arange(1, self.num_points + 1)[:, None] * directions[:, None, None]  # (nh, 1, points, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(steps.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(
        self, query: Tensor, values: Tensor, query_grids: Sequence[Grid], value_grids: Sequence[Grid]
    ) -> Tensor:
        """Maps queries (B, Q, C) and values (B, L, C), the tokens of their grids one after another, to (B, Q, C)."""
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        dtype = torch.promote_types(query.dtype, torch.float32)
        weights = self.weights(query).to(dtype).unflatten(-1, (heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (levels, points))  # (B, Q, nh, levels, points)
        offsets = self.offsets(query).to(dtype).unflatten(-1, (heads, levels, points, 2))
        # Not new_tensor: it would write the sizes of the traced image into a graph for any.
        sizes = torch.stack([offsets.new_full((), side) for grid in value_grids for side in reversed(grid)])
        centres = torch.cat([token_centres(grid, offsets) for grid in query_grids])  # (Q, 2)
        places = centres[:, None, None, None] + offsets / sizes.view(levels, 1, 2)  # (B, Q, nh, levels, points, 2)
        values = self.value(values).to(dtype).unflatten(-1, (heads, -1))  # (B, L, nh, V)
        return self.proj(sample(values, value_grids, places, weights).to(query.dtype))


def token_centres(grid: Grid, like: Tensor) -> Tensor:
    """The centres (h * w, 2) of a grid's tokens, x and y from 0 to 1, row by row; dtype and device of `like`."""
    y, x = ((torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side for side in grid)
    return torch.cartesian_prod(y, x).flip(1)


def sample(values: Tensor, grids: Sequence[Grid], places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (B, Q, nh * V) of values (B, L, nh, V), read at `places` (B, Q, nh, levels, points, 2)."""
    # Here, since mmcv.ops loads compiled operators, which a broken installation lacks and other models do without.
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    if not values.is_cuda:
        return multi_scale_deformable_attn_pytorch(values, grids, places, weights)
    sizes = torch.tensor(grids, device=values.device)
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    return MultiScaleDeformableAttnFunction.apply(values, sizes, starts, places, weights, len(values))
