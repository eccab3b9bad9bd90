"""ViTDet's simple feature pyramid (arXiv 2203.16527, section 3): four scales from one map."""

from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor
from torchvision.models.convnext import LayerNorm2d

from mmvig.registry import MODELS


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """Strides 4, 8, 16 and 32 out of the last map of a plain backbone, and coarser ones by subsampling, as FPN has.

    The stride-16 map is enlarged by transposed convolutions or halved by max pooling; each scale then has a 1x1 and a
    3x3 convolution of its own, with a LayerNorm over channels after each. Weights start as PyTorch's layers do.

    Args:
        in_channels: channels C of the map; of a list, as other necks take it, the last.
        out_channels: channels of every output.
        num_outs: number of outputs, 4 or more.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: fewer than 4 outputs, or a map of another width.

    Example:
        >>> [tuple(x.shape[2:]) for x in SimpleFPN(192, 256, num_outs=5)((torch.rand(1, 192, 14, 21),))]
        [(56, 84), (28, 42), (14, 21), (7, 11), (4, 6)]
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int,
        num_outs: int,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if num_outs < 4:
            raise ValueError(f'num_outs={num_outs} must be 4 (strides 4 to 32) or more')
        super().__init__(init_cfg)
        self.in_channels = dims = in_channels if isinstance(in_channels, int) else in_channels[-1]
        self.num_outs = num_outs

        def enlarge(ins: int, outs: int) -> nn.Module:
            return nn.ConvTranspose2d(ins, outs, kernel_size=2, stride=2)

        half, quarter = dims // 2, dims // 4
        scales = [
            (quarter, nn.Sequential(enlarge(dims, half), LayerNorm2d(half), nn.GELU(), enlarge(half, quarter))),
            (half, enlarge(dims, half)),
            (dims, nn.Identity()),
            (dims, nn.MaxPool2d(2, ceil_mode=True)),  # an odd map, or one of a single row, keeps its last row
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for width, scale in scales
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps the last of `inputs`, (B, C, h, w), to (B, out_channels, ...) with 4h, 2h, h, ceil(h/2), ... rows."""
        x = inputs[-1]
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f'in_channels={self.in_channels}, but the last map has {x.shape[1]} channels: {tuple(x.shape)}'
            )
        outs = [level(x) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)
