"""Writes a published or otherwise nested checkpoint in this package's names."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmvig.compat.checkpoint_loading import load_checkpoint_file
from mmvig.models import ViG, ViGH
from mmvig.models.checkpoints import normalise_checkpoint


@dataclass(frozen=True)
class Conversion:
    """What was found in a file and written from it.

    Attributes:
        model: name of the backbone's class, 'ViG' or 'ViGH'.
        arch: its `arch`, or None if the widths and depths are of no published size.
        parameters: number of values written.
        head: whether a classifier head is among them.
        missing: names of the backbone that the file lacks; output norms other than the last are not counted.
    """

    model: str
    arch: str | None
    parameters: int
    head: bool
    missing: tuple[str, ...]


def convert_checkpoint(source: str | os.PathLike, target: str | os.PathLike) -> Conversion:
    """Reads `source` without running code from it and writes `{'state_dict', 'meta'}` to `target`.

    The names written are `backbone.*` and, if there is a classifier, `head.fc.*`, as mmpretrain's classifier has them.

    Raises:
        CheckpointError: `source` is damaged, no checkpoint, or holds more than data.
        ValueError: `source` holds no ViG or ViG-H weights, or lacks some of a published size.
    """
    checkpoint = load_checkpoint_file(source)
    weights = normalise_checkpoint(checkpoint).get('state_dict') if isinstance(checkpoint, dict) else None
    backbone = {
        name.removeprefix('backbone.'): value for name, value in (weights or {}).items() if name.startswith('backbone.')
    }
    if not any(name.endswith('mixer.qkv.weight') for name in backbone):
        raise ValueError(f'{source} holds no ViG or ViG-H weights: none of its names are theirs, published or ours')
    model, arch, missing = _identify(backbone)
    if missing:
        raise ValueError(f'{source} is not a whole {model} arch={arch!r}: it lacks {list(missing)}')

    kept = {name: value for name, value in weights.items() if name.startswith(('backbone.', 'head.'))}
    part = Path(f'{target}.part')
    torch.save({'state_dict': kept, 'meta': {'converted_from': Path(source).name, 'model': model, 'arch': arch}}, part)
    part.replace(target)
    return Conversion(model, arch, sum(v.numel() for v in kept.values()), 'head.fc.weight' in kept, missing)


def _identify(backbone: dict[str, Tensor]) -> tuple[str, str | None, tuple[str, ...]]:
    """The class and arch whose shapes these are, and the names of it that are not there."""
    cls = ViG if 'pos_embed' in backbone else ViGH
    for arch in cls.arch_table:
        with torch.device('meta'):
            own = cls(arch, out_indices=-1).state_dict()
        given = {name: value.shape for name, value in backbone.items() if name in own and name != 'pos_embed'}
        if given and all(own[name].shape == shape for name, shape in given.items()):
            deeper = {name for name in backbone if not name.startswith('norm')} - own.keys()
            if not deeper:
                return cls.__name__, arch, tuple(name for name in own if name not in backbone)
    return cls.__name__, None, ()
