"""A strided convolution and a LayerNorm over channels: the step by which the stems and the stages shrink the grid."""

import torch
import torch.nn as nn
from torch import Tensor

from bigla import conv_norm

from .precision import autocast_dtype


class ConvNorm(nn.Module):
    """LN(conv(x)) on a channels-last grid, with padding 1 and a bias in the convolution (paper section 4.1).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the square kernel.
        stride: step of the convolution; a side of n pixels becomes `floor((n + 2 - kernel_size) / stride) + 1`.
        act: 'silu' or 'gelu' behind the norm, or '' for none. What an activation returns is meant for a product, and
            of the type that autocast, where it is on, would take there.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 2, act: str = ''
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=1)
        self.norm = nn.LayerNorm(out_channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C), of any strides, to (B, H', W', C')."""
        inner = autocast_dtype(x)
        return conv_norm(
            x,
            self.conv.weight,
            self.conv.bias,
            self.norm.weight,
            self.norm.bias,
            stride=self.conv.stride[0],
            eps=self.norm.eps,
            act=self.act,
            inner=inner,
            dtype=inner if self.act else torch.promote_types(inner, self.norm.weight.dtype),
        )
