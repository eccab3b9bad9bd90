"""The spatial prior module of ViT-Adapter (arXiv 2205.08534, section 3.3): a small convolutional pyramid."""

import torch.nn as nn
from mmcv.cnn import build_norm_layer
from torch import Tensor


class SpatialPrior(nn.Module):
    """Maps of equal width at strides 8, 16 and 32, and 4 if asked for, from convolutions on the image.

    Args:
        in_channels: channels of the image.
        conv_dims: channels of the convolutions at stride 4; they double twice, at strides 8 and 16.
        dims: channels C of each map.
        norm_cfg: norm of the convolutions, as mmcv builds it.
        with_stride4: give the map of stride 4 too.
    """

    def __init__(self, in_channels: int, conv_dims: int, dims: int, norm_cfg: dict, with_stride4: bool) -> None:
        super().__init__()

        def conv(ins: int, outs: int, stride: int) -> list[nn.Module]:
            layer = nn.Conv2d(ins, outs, 3, stride, padding=1, bias=False)
            return [layer, build_norm_layer(norm_cfg, outs)[1], nn.ReLU(inplace=True)]

        widths = (conv_dims, 2 * conv_dims, 4 * conv_dims, 4 * conv_dims)
        stem = conv(in_channels, conv_dims, 2) + conv(conv_dims, conv_dims, 1) + conv(conv_dims, conv_dims, 1)
        self.stages = nn.ModuleList([nn.Sequential(*stem, nn.MaxPool2d(3, 2, padding=1))])
        self.stages.extend(nn.Sequential(*conv(ins, outs, 2)) for ins, outs in zip(widths, widths[1:]))
        self.projs = nn.ModuleList(nn.Conv2d(width, dims, 1) for width in widths)
        if not with_stride4:
            self.projs[0] = nn.Identity()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps (B, in_channels, H, W), sides multiples of 32, to (B, C, H/s, W/s), s = 4, 8, 16, 32.

        Without `with_stride4` the first is the bare stage's, (B, conv_dims, H/4, W/4).
        """
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return [proj(x) for proj, x in zip(self.projs, maps, strict=True)]
