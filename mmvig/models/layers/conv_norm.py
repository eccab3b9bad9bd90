"""A strided convolution and a LayerNorm over channels: the step by which the stems and the stages shrink the grid."""

import torch.nn as nn
from torch import Tensor


class ConvNorm(nn.Module):
    """LN(conv(x)) on a channels-last grid, with padding 1 and a bias in the convolution (paper section 4.1).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the square kernel.
        stride: step of the convolution; a side of n pixels becomes `floor((n + 2 - kernel_size) / stride) + 1`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=1)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, H', W', C')."""
        x = self.conv(x.permute(0, 3, 1, 2))  # (B, C', H', W') with channels-last strides
        return self.norm(x.permute(0, 2, 3, 1))
