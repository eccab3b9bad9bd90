"""ViG: the plain backbone, one stride-16 map of constant width (arXiv 2405.18425, section 3.4)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from mmvig.models.checkpoints import resize_pos_embed
from mmvig.models.layers import Block, ConvNorm, RMSNorm
from mmvig.registry import MODELS

from .base import LinearBackbone, check_heads, init_linears, resolve_arch, resolve_out_indices


class ViGBlock(Block):
    """`Block` with RMSNorm (eps 1e-6) and an MLP width that is a multiple of 256."""

    def __init__(self, dims: int, num_heads: int, act: bool, drop_path: float) -> None:
        super().__init__(dims, num_heads, RMSNorm, 256, act, drop_path)


@MODELS.register_module()
class ViG(LinearBackbone):
    """ViG-T/S/B with one stride-16 map per chosen block, for any image of at least 7 x 7 pixels.

    Args:
        arch: 'tiny' ('t'), 'small' ('s'), 'base' ('b'), or a dict with the keys of `arch_table`.
        in_channels: channels of the image.
        img_size: side, or height and width, in pixels of the images that the position embedding is made for. Images
            and checkpoints of another size have it resized.
        out_indices: the blocks, from -depth to depth - 1, whose outputs are returned, each through a norm of its own
            (`norm{i}`). Blocks after the last one are not built.
        drop_path_rate: chance that training skips the last block's branches for a sample, growing linearly from 0 at
            the first block; None takes the arch's.
        frozen_stages: -1 trains everything; 0 freezes the stem and the position embedding; n also the first n blocks
            and the norms of outputs among them.
        norm_eval: keep batch norms in eval mode while training. ViG has none of its own, so this changes nothing
            until one is put in.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        pretrained: deprecated, as elsewhere in OpenMMLab: `init_cfg=dict(type='Pretrained', checkpoint=pretrained)`.
        init_cfg: MMEngine's initialisation config. `Pretrained` takes this package's files and the published ones.

    Raises:
        ValueError: an argument that cannot work; the message names it and what would.

    Example:
        >>> ViG('tiny', out_indices=(5, 11))(torch.rand(1, 3, 224, 320))[1].shape
        torch.Size([1, 192, 14, 20])
    """

    arch_table = {
        'tiny': dict(embed_dims=192, depth=12, num_heads=3, act=True, drop_path_rate=0.0),
        'small': dict(embed_dims=384, depth=12, num_heads=6, act=False, drop_path_rate=0.2),
        'base': dict(embed_dims=768, depth=12, num_heads=12, act=False, drop_path_rate=0.5),
    }
    min_size = 7

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        img_size: int | tuple[int, int] = 224,
        out_indices: int | Sequence[int] = -1,
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = resolve_arch(
            arch, self.arch_table, 'dict(embed_dims=96, depth=6, num_heads=3, act=True, drop_path_rate=0.)'
        )
        dims, depth = arch['embed_dims'], arch['depth']
        check_heads(dims, arch['num_heads'])
        out_indices = resolve_out_indices(out_indices, depth, 'blocks')
        if not -1 <= frozen_stages <= depth:
            raise ValueError(f'frozen_stages={frozen_stages} must be from -1 (nothing) to {depth} (all blocks)')
        super().__init__(out_indices, frozen_stages, norm_eval, with_cp, pretrained, init_cfg)

        self.stem = nn.Sequential(
            ConvNorm(in_channels, dims // 2, kernel_size=9, stride=8, act='silu'),
            nn.Identity(),  # so that parameters keep the names that they had with the activation here
            ConvNorm(dims // 2, dims),
        )
        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid(img_size), dims))
        drop_path_rate = arch['drop_path_rate'] if drop_path_rate is None else drop_path_rate
        rates = np.linspace(0, drop_path_rate, depth)[: out_indices[-1] + 1].tolist()
        self.blocks = nn.ModuleList(ViGBlock(dims, arch['num_heads'], arch['act'], rate) for rate in rates)
        for i in out_indices:
            self.add_module(f'norm{i}', RMSNorm(dims))
        self.out_channels = (dims,) * len(out_indices)
        self.out_strides = (16,) * len(out_indices)
        self.reset_parameters()
        self.train()

    @staticmethod
    def grid(img_size: int | tuple[int, int]) -> tuple[int, int]:
        """The map size (h, w) that the stem makes of an image size in pixels."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < ViG.min_size:
            raise ValueError(f'img_size={img_size!r} must be at least {ViG.min_size} pixels a side')
        return tuple(((side - 7) // 8 + 2) // 2 for side in (height, width))  # ceil(floor((side + 1) / 8) / 2)

    def reset_parameters(self) -> None:
        """Draws fresh weights as the published code does (SiLU and norms have none to draw)."""
        init_linears(self.blocks, partial(nn.init.normal_, std=0.02))
        for block in self.blocks:
            mixer = block.mixer
            for layer in (mixer.conv, mixer.qkv, *mixer.decay, mixer.gate, mixer.proj):
                nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        if self.frozen_stages < 0:
            return []
        norms = [getattr(self, f'norm{i}') for i in self.out_indices if i < self.frozen_stages]
        return [self.stem, self.pos_embed, *self.blocks[: self.frozen_stages], *norms]

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """The layer, from 0 at the stem, that a parameter counts to for layer-wise decay, and the number of layers."""
        num_layers = len(self.blocks) + 2
        name = param_name.removeprefix(prefix)
        if name.startswith(('stem.', 'pos_embed')):
            return 0, num_layers
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1, num_layers
        return num_layers - 1, num_layers

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps images (B, H, W, in_channels) to what the first block gets (B, h, w, C), and its norm or None."""
        x = self.stem(x)
        pos_embed = resize_pos_embed(self.pos_embed, x.shape[1:3])
        first = self.blocks[0]
        return first.add_pos_embed(x, pos_embed) if self.takes_norms(first) else (x + pos_embed, None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one (B, C, h, w) per output, h and w as `grid` gives them."""
        outs = []
        for i, y in enumerate(self.run_in_turn(self.blocks, *self.embed(self.tokens(x)))):
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(y).permute(0, 3, 1, 2))
        return tuple(outs)
