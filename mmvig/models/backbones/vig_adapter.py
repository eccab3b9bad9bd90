"""ViG with ViT-Adapter (arXiv 2205.08534): strides 4, 8, 16 and 32 from the plain backbone and its weights."""

from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor

from mmvig.models.checkpoints import resize_pos_embed
from mmvig.models.layers import ConvFFN, DeformableAttention, Extractor, Injector, SpatialPrior
from mmvig.registry import MODELS

from .base import init_linears, resolve_arch, resolve_out_indices
from .vig import ViG

SYNC_BN = dict(type='SyncBN')
NUM_INTERACTIONS = 4  # each with a quarter of the blocks
NUM_LEVELS = 3  # grids of the pyramid that interacts: strides 8, 16 and 32


@MODELS.register_module()
class ViGAdapter(ViG):
    """ViG-T/S/B with maps of stride 4, 8, 16 and 32, for images of any size that ViG takes.

    A convolutional pyramid accompanies ViG's blocks. Before each quarter of them its content is added to their tokens,
    with a factor that starts at 0, and after it the pyramid reads the tokens. The image is padded inside, at the right
    and at the bottom, to multiples of 32, and the outputs are cut to what the image covers: (ceil(H/s), ceil(W/s)).

    A checkpoint of ViG, published or of this package, fills the blocks, the stem and the position embedding; ViG's own
    output norm has no place here and is listed as unexpected, the adapter's parameters as missing.

    Args:
        arch: 'tiny' ('t'), 'small' ('s'), 'base' ('b'), or a dict with the keys of `arch_table`, `depth` being a
            multiple of 4. Beside ViG's they are: `conv_dims`, the channels of the pyramid's convolutions at stride 4;
            `deform_heads`, `deform_points` and `deform_ratio`, the heads, the places read a head and level, and the
            width of the values as a part of `embed_dims` in deformable attention; `ffn_ratio`, the width of the
            pyramid's feed-forward networks as a part of `embed_dims`. Drop path rates are those of Vision-RWKV's
            detectors (arXiv 2403.02308).
        in_channels: channels of the image.
        img_size: as in `ViG`.
        out_indices: the maps, from -4 to 3, that are returned, finest first, each through a norm of its own.
        drop_path_rate: as in `ViG`; the pyramid's networks are skipped with the last block's chance. None takes the
            arch's.
        frozen_stages: -1 trains everything; 0 freezes the stem and the position embedding; n also the first n blocks.
            The adapter trains in any case.
        norm_eval: keep the adapter's batch norms in eval mode while training.
        with_cp: recompute each block and interaction in the backward pass instead of keeping its activations.
        norm_cfg: norm of the pyramid's convolutions and of the outputs. 'SyncBN' is plain batch norm unless several
            processes train; 'BN' stays so, also for processes without GPUs, where torch cannot synchronise it. Either
            needs more than one value a channel in training: two images, or one larger than 32 x 32.
        pretrained: deprecated, as in `ViG`.
        init_cfg: as in `ViG`.

    Raises:
        ValueError: an argument that cannot work; the message names it and what would.

    Example:
        >>> [tuple(x.shape) for x in ViGAdapter('tiny', out_indices=(0, 3)).eval()(torch.rand(1, 3, 75, 117))]
        [(1, 192, 19, 30), (1, 192, 3, 4)]
    """

    arch_table = {
        name: ViG.arch_table[name] | dict(conv_dims=64, deform_points=4, ffn_ratio=0.25) | settings
        for name, settings in {
            'tiny': dict(drop_path_rate=0.1, deform_heads=6, deform_ratio=1.0),
            'small': dict(drop_path_rate=0.2, deform_heads=6, deform_ratio=1.0),
            'base': dict(drop_path_rate=0.3, deform_heads=12, deform_ratio=0.5),
        }.items()
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        img_size: int | tuple[int, int] = 224,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_cfg: dict = SYNC_BN,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = resolve_arch(arch, self.arch_table, str(self.arch_table['tiny']))
        dims, depth, heads = arch['embed_dims'], arch['depth'], arch['deform_heads']
        if depth % NUM_INTERACTIONS:
            raise ValueError(f'arch: depth={depth} must be a multiple of {NUM_INTERACTIONS}, the interactions')
        if int(dims * arch['deform_ratio']) % heads:
            raise ValueError(
                f'arch: deform_ratio * embed_dims = {int(dims * arch["deform_ratio"])} must be a multiple of '
                f'deform_heads={heads}'
            )
        out_indices = resolve_out_indices(out_indices, 4, 'maps')
        drop_path_rate = arch['drop_path_rate'] if drop_path_rate is None else drop_path_rate
        super().__init__(
            arch, in_channels, img_size, -1, drop_path_rate, frozen_stages, norm_eval, with_cp, pretrained, init_cfg
        )
        delattr(self, f'norm{depth - 1}')  # the outputs have norms of their own
        self.out_indices = out_indices
        self.out_channels = (dims,) * len(out_indices)
        self.out_strides = tuple(4 * 2**i for i in out_indices)

        self.spatial_prior = SpatialPrior(in_channels, arch['conv_dims'], dims, norm_cfg, 0 in out_indices)
        self.level_embed = nn.Parameter(torch.randn(NUM_LEVELS, dims))
        attention = partial(
            DeformableAttention,
            dims,
            heads,
            num_points=arch['deform_points'],
            value_ratio=arch['deform_ratio'],
        )
        hidden_dims = int(dims * arch['ffn_ratio'])
        self.injectors = nn.ModuleList(Injector(dims, attention, NUM_LEVELS) for _ in range(NUM_INTERACTIONS))
        self.extractors = nn.ModuleList(
            nn.ModuleList(Extractor(dims, attention, hidden_dims, drop_path_rate) for _ in range(count))
            for count in (*[1] * (NUM_INTERACTIONS - 1), 3)  # the last tokens are read three times
        )
        self.upsample = nn.ConvTranspose2d(dims, dims, 2, 2) if 0 in out_indices else nn.Identity()
        for i in out_indices:
            self.add_module(f'out_norm{i}', build_norm_layer(norm_cfg, dims)[1])  # norm{i} is ViG's after a block
        self.reset_adapter()
        self.train()

    def reset_adapter(self) -> None:
        """Draws fresh weights for the adapter as ViT-Adapter does; deformable attention has drawn its own."""
        for layer in chain(self.spatial_prior.modules(), self.extractors.modules(), [self.upsample]):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1] // layer.groups
                nn.init.normal_(layer.weight, std=(2 / fan_out) ** 0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, ConvFFN):
                init_linears(layer, partial(nn.init.trunc_normal_, std=0.02))

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        if self.frozen_stages < 0:
            return []
        return [self.stem, self.pos_embed, *self.blocks[: self.frozen_stages]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one (B, C, ceil(H/s), ceil(W/s)) per output, s = 4, 8, 16, 32."""
        x = self.tokens(x)
        height, width = x.shape[1:3]
        # Not -side % 32: from this form exporters see that all grids are multiples of one number, and are quicker.
        below, right = ((side + 31) // 32 * 32 - side for side in (height, width))
        x = F.pad(x, (0, 0, 0, right, 0, below)).contiguous()  # channels last, for the convolutions
        finest, *maps = self.spatial_prior(x.permute(0, 3, 1, 2))
        grids = [tuple(level.shape[2:]) for level in maps]
        pyramid = torch.cat([level.flatten(2).mT + embed for level, embed in zip(maps, self.level_embed)], dim=1)

        x = self.stem(x)  # (B, h, w, C)
        x = x + resize_pos_embed(self.pos_embed, x.shape[1:3])
        span = len(self.blocks) // NUM_INTERACTIONS
        for i, (injector, extractors) in enumerate(zip(self.injectors, self.extractors, strict=True)):
            x = self.run(injector, x, pyramid, grids)
            for y in self.run_in_turn(self.blocks[i * span : (i + 1) * span], x):
                x = y
            for extractor in extractors:
                pyramid = self.run(extractor, pyramid, x, grids)

        levels = pyramid.split([h * w for h, w in grids], dim=1)
        maps = [level.unflatten(1, grid).permute(0, 3, 1, 2) for level, grid in zip(levels, grids, strict=True)]
        if 0 in self.out_indices:
            finest = finest + self.upsample(maps[0])
        return tuple(
            self.finish(i, (finest, *maps)[i], x.permute(0, 3, 1, 2), (height, width)) for i in self.out_indices
        )

    def finish(self, i: int, level: Tensor, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Output i from its level of the pyramid and the last tokens, (B, C, h, w) each, for an image of `size`."""
        level = level + F.interpolate(tokens, level.shape[2:], mode='bilinear', align_corners=False)
        stride = 2 ** (i + 2)
        height, width = ((side + stride - 1) // stride for side in size)  # not -(-side // stride): ONNX rounds to 0
        return getattr(self, f'out_norm{i}')(cut(level, height, width))


def cut(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left corner (B, C, height, width) of maps that are no smaller."""
    if isinstance(height, torch.SymInt):  # in graphs for any size: the sides of a slice would be data-dependent
        rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[:, :, :height, :width]
