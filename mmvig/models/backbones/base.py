"""What both backbones owe the OpenMMLab libraries: outputs, freezing, checkpointing, loading."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmvig.models.checkpoints import adapt_state_dict
from mmvig.models.layers import Block
from mmvig.models.layers.precision import autocast_dtype


def resolve_arch(arch: str | dict, table: dict[str, dict], example: str) -> dict:
    """Looks `arch` up in `table` by its name or first letter, or checks that a dict has exactly the table's keys.

    Raises:
        ValueError: an unknown name, or a dict with missing or unknown keys.
    """
    if isinstance(arch, str):
        for name, settings in table.items():
            if arch in (name, name[0]):
                return settings
        names = ', '.join(f'{name!r} ({name[0]!r})' for name in table)
        raise ValueError(f'arch={arch!r} is unknown; use one of {names}, or a dict such as {example}')
    keys = next(iter(table.values())).keys()
    if missing := sorted(keys - arch.keys()):
        raise ValueError(f'arch={arch!r} lacks {missing}; a dict such as {example} would work')
    if unknown := sorted(arch.keys() - keys):
        raise ValueError(f'arch={arch!r} has unknown keys {unknown}; it takes {list(keys)}')
    return arch


def check_heads(dims: int, num_heads: int) -> None:
    """Raises ValueError unless `dims` channels divide into `num_heads` heads whose keys are half as wide as values."""
    if dims % (2 * num_heads):
        raise ValueError(
            f'arch: embed_dims={dims} must be a multiple of 2 * num_heads = {2 * num_heads}, since each of the '
            f'{num_heads} heads has values {dims}/{num_heads} and keys half as wide'
        )


def resolve_out_indices(out_indices: int | Sequence[int], num: int, what: str) -> tuple[int, ...]:
    """Turns one or more indices in [-num, num) into an ascending tuple of indices in [0, num).

    Raises:
        ValueError: an index out of range, given twice, or none at all.
    """
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    if not indices or any(not -num <= i < num for i in indices) or len({i % num for i in indices}) < len(indices):
        raise ValueError(
            f'out_indices={out_indices!r} must hold distinct indices of the {num} {what}, from {-num} to {num - 1}'
        )
    return tuple(sorted(i % num for i in indices))


class LinearBackbone(BaseModule):
    """Base of `ViG` (and so of `ViGAdapter`) and `ViGH`; see there for the arguments.

    Attributes:
        out_indices: the requested outputs, ascending.
        out_channels: the channels of each output.
        out_strides: the strides of each output.
    """

    min_size = 1  # the shortest side in pixels that the stem can take
    out_channels: tuple[int, ...]
    out_strides: tuple[int, ...]

    def __init__(
        self,
        out_indices: tuple[int, ...],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        pretrained: str | None,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError(
                    f'pretrained={pretrained!r} and init_cfg={init_cfg!r} say the same thing: drop pretrained'
                )
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        super().__init__(init_cfg)
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self._register_load_state_dict_pre_hook(adapt_state_dict, with_module=True)

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        """The modules and parameters that `frozen_stages` covers."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> 'LinearBackbone':
        """As `nn.Module.train`, but the frozen part stays in eval mode and without gradients."""
        super().train(mode)
        for part in self.frozen_modules():
            part.requires_grad_(False)
            if isinstance(part, nn.Module):
                part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @property
    def recomputes(self) -> bool:
        return self.with_cp and torch.is_grad_enabled()

    def run(self, block: nn.Module, *inputs) -> Tensor:
        """`block(*inputs)`, recomputed in the backward pass if `with_cp`."""
        if self.recomputes:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def takes_norms(self, block: nn.Module) -> bool:
        """Whether a norm of x may be handed to `block`: where it is recomputed, that would be kept, beside x."""
        return isinstance(block, Block) and not self.recomputes

    def run_in_turn(self, blocks: nn.ModuleList, x: Tensor, normed: Tensor | None = None) -> Iterator[Tensor]:
        """What each block makes of what the one before it made (B, H, W, C), which that one has normed for it.

        The first has x, and may have its norm.
        """
        given = x, normed
        del normed  # which nobody needs behind the first block
        for block, following in zip(blocks, [*blocks[1:], None]):
            if self.takes_norms(block):
                handed = [None]
                x = block(x, given, following if isinstance(following, Block) else None, handed)
                given = handed.pop()
            else:
                x, given = self.run(block, x), None
            yield x

    def tokens(self, image: Tensor) -> Tensor:
        """Checks (B, C, H, W) and returns it as (B, H, W, C), a view.

        Raises:
            ValueError: not four axes, another number of channels, a side below `min_size`, or without autocast not the
                type of the parameters.
        """
        name, in_channels = type(self).__name__, self.stem[0].conv.in_channels
        if image.dim() != 4 or image.shape[1] != in_channels:
            raise ValueError(f'{name} needs images (B, {in_channels}, H, W), got {tuple(image.shape)}')
        if min(image.shape[2:]) < self.min_size:
            raise ValueError(
                f'{name} needs images of at least {self.min_size} x {self.min_size} pixels, got '
                f'{image.shape[2]} x {image.shape[3]}: its stem has nothing left of them; resize or pad the input'
            )
        weight = self.stem[0].conv.weight
        if autocast_dtype(image) == image.dtype != weight.dtype:
            raise ValueError(
                f'{name} has parameters of {weight.dtype} and needs images of that type, got {image.dtype}: convert '
                'either, or use autocast'
            )
        return image.permute(0, 2, 3, 1)


def init_linears(module: nn.Module, init_weight) -> None:
    """Applies `init_weight` to the weights and 0 to the biases of all linear layers inside `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_weight(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
