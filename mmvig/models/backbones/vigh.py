"""ViG-H: the hierarchical backbone, strides 4, 8, 16 and 32 (arXiv 2405.18425, section 3.4)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch.nn as nn
from torch import Tensor

from mmvig.models.layers import Block, ConvNorm, LayerNorm
from mmvig.registry import MODELS

from .base import LinearBackbone, check_heads, init_linears, resolve_arch, resolve_out_indices


class ViGHBlock(Block):
    """`Block` with LayerNorm (eps 1e-5), no SiLUs in the mixer and an MLP width that is a multiple of 32."""

    def __init__(self, dims: int, num_heads: int, drop_path: float) -> None:
        super().__init__(dims, num_heads, LayerNorm, 32, drop_path=drop_path)


class ViGHStage(nn.Module):
    """Halves the grid, unless it is the first stage (`in_dims` None), then runs one block per drop path rate."""

    def __init__(self, in_dims: int | None, dims: int, num_heads: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if in_dims is None else ConvNorm(in_dims, dims)
        self.blocks = nn.ModuleList(ViGHBlock(dims, num_heads, rate) for rate in drop_paths)


@MODELS.register_module()
class ViGH(LinearBackbone):
    """ViG-H-T/S/B with maps of stride 4, 8, 16 and 32, for images of any size; sides are rounded up when halved.

    Args:
        arch: 'tiny' ('t'), 'small' ('s'), 'base' ('b'), or a dict with the keys of `arch_table`.
        in_channels: channels of the image.
        out_indices: the stages, from -4 to 3, whose outputs are returned, each through a norm of its own (`norm{i}`).
            Stages after the last one are not built.
        drop_path_rate: chance that training skips the last block's branches for a sample, growing linearly from 0 at
            the first block; None takes the arch's.
        frozen_stages: -1 trains everything; 0 freezes the stem; n also the first n stages and their output norms.
        norm_eval: keep batch norms in eval mode while training. ViG-H has none of its own, so this changes nothing
            until one is put in.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        pretrained: deprecated, as elsewhere in OpenMMLab: `init_cfg=dict(type='Pretrained', checkpoint=pretrained)`.
        init_cfg: MMEngine's initialisation config. `Pretrained` takes this package's files and the published ones.

    Raises:
        ValueError: an argument that cannot work; the message names it and what would.

    Example:
        >>> [tuple(x.shape) for x in ViGH('tiny', out_indices=(0, 3))(torch.rand(1, 3, 75, 117))]
        [(1, 96, 19, 30), (1, 768, 3, 4)]
    """

    arch_table = {
        'tiny': dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 5, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
        'small': dict(
            embed_dims=(96, 192, 384, 768), depths=(2, 2, 17, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3
        ),
        'base': dict(
            embed_dims=(128, 256, 512, 1024), depths=(2, 2, 17, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.6
        ),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        example = 'dict(embed_dims=(32, 64, 128, 256), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.)'
        arch = resolve_arch(arch, self.arch_table, example)
        embed_dims, depths, num_heads = arch['embed_dims'], arch['depths'], arch['num_heads']
        if {len(embed_dims), len(depths), len(num_heads)} != {4} or len(set(embed_dims)) != 4:
            raise ValueError(
                f'arch={arch!r} needs four values each of embed_dims (all different), depths and num_heads'
            )
        for dims, heads in zip(embed_dims, num_heads, strict=True):
            check_heads(dims, heads)
        out_indices = resolve_out_indices(out_indices, 4, 'stages')
        if not -1 <= frozen_stages <= 4:
            raise ValueError(f'frozen_stages={frozen_stages} must be from -1 (nothing) to 4 (all stages)')
        super().__init__(out_indices, frozen_stages, norm_eval, with_cp, pretrained, init_cfg)

        self.stem = nn.Sequential(
            ConvNorm(in_channels, embed_dims[0] // 2, act='gelu'),
            nn.Identity(),  # so that parameters keep the names that they had with the activation here
            ConvNorm(embed_dims[0] // 2, embed_dims[0]),
        )
        drop_path_rate = arch['drop_path_rate'] if drop_path_rate is None else drop_path_rate
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            ViGHStage(
                embed_dims[i - 1] if i else None, embed_dims[i], num_heads[i], [next(rates) for _ in range(depths[i])]
            )
            for i in range(out_indices[-1] + 1)
        )
        for i in out_indices:
            self.add_module(f'norm{i}', LayerNorm(embed_dims[i]))
        self.out_channels = tuple(embed_dims[i] for i in out_indices)
        self.out_strides = tuple(4 * 2**i for i in out_indices)
        self.reset_parameters()
        self.train()

    def reset_parameters(self) -> None:
        """Draws fresh weights as the published code does; the strided convolutions keep PyTorch's own."""
        init_linears(self.stages, partial(nn.init.trunc_normal_, std=0.02))
        for stage in self.stages:
            for block in stage.blocks:
                nn.init.xavier_uniform_(block.mixer.conv.weight, gain=2**-2.5)

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        if self.frozen_stages < 0:
            return []
        norms = [getattr(self, f'norm{i}') for i in self.out_indices if i < self.frozen_stages]
        return [self.stem, *self.stages[: self.frozen_stages], *norms]

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """The layer, from 0 at the stem, that a parameter counts to for layer-wise decay, and the number of layers.

        A stage's downsampling counts to the stage's first block.
        """
        depths = [len(stage.blocks) for stage in self.stages]
        num_layers = sum(depths) + 2
        name = param_name.removeprefix(prefix).split('.')
        if name[0] == 'stem':
            return 0, num_layers
        if name[0] == 'stages':
            block = int(name[3]) if name[2] == 'blocks' else 0
            return sum(depths[: int(name[1])]) + block + 1, num_layers
        return num_layers - 1, num_layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one (B, C_i, ~H/s_i, ~W/s_i) per output, strides s = 4, 8, 16, 32."""
        x = self.stem(self.tokens(x))  # (B, H/4, W/4, C1)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage.downsample(x)
            for y in self.run_in_turn(stage.blocks, x):
                x = y
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}')
                x, out = norm.beside(x) if i + 1 < len(self.stages) else (x, norm(x))
                outs.append(out.permute(0, 3, 1, 2))
        return tuple(outs)
