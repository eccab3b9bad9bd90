"""The residual block of both backbones."""

from collections.abc import Callable

import torch.nn as nn
from torch import Tensor
from torchvision.ops import StochasticDepth

from .gated_mlp import GatedMLP
from .mixer import BiGLAMixer
from .norm import LayerNorm, RMSNorm


class Block(nn.Module):
    """x <- x + mixer(norm(x)), then x <- x + mlp(norm(x)) (paper section 3.4).

    The norms, and the convolution and linear layers inside mixer and mlp, hold parameters for fused functions: what is
    put in their place, or hooked to them, is not called.

    Args:
        dims: channels C.
        num_heads: heads of the mixer.
        norm_layer: makes a norm of `mmvig.models.layers.norm` from its width.
        mlp_multiple: the hidden width of the MLP is rounded up to a multiple of this.
        act: use the SiLUs of the mixer.
        drop_path: chance in [0, 1) that training skips a branch for a sample.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        norm_layer: Callable[[int], LayerNorm | RMSNorm],
        mlp_multiple: int,
        act: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dims)
        self.mixer = BiGLAMixer(dims, num_heads, act)
        self.norm2 = norm_layer(dims)
        self.mlp = GatedMLP(dims, mlp_multiple)
        self.drop_path = StochasticDepth(drop_path, mode='row')

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, H, W, C)."""
        branch = self.drop_path(self.mixer(x, self.norm1))
        dropped = self.drop_path(x.new_ones(x.shape[0])) if self.training and self.drop_path.p > 0 else None  # (B,)
        return self.mlp(x, branch, self.norm2, dropped)
