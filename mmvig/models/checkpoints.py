"""Weights of other origin or other image size, brought to the names and shapes of this package.

A *published* file is one of the six that the authors of ViG released: the weights under `model`, with the names of
their code. Here a whole model is named as mmpretrain's classifier names it: `backbone.*` and `head.fc.*`.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

# Published name -> ours, the first pattern that matches at the start of a name. `{last}` is the last block or stage.
RENAMES = [
    (r'(blocks\.\d+)\.attn_norm', r'backbone.\1.norm1'),
    (r'(blocks\.\d+)\.mlp_norm', r'backbone.\1.norm2'),
    (r'(blocks\.\d+)\.attn', r'backbone.\1.mixer'),
    (r'(blocks\.\d+)\.mlp\.gate_proj', r'backbone.\1.mlp.fc1'),
    (r'(blocks\.\d+)\.mlp\.down_proj', r'backbone.\1.mlp.fc2'),
    (r'layers(\.\d+\.blocks\.\d+)\.norm\.', r'backbone.stages\1.norm1.'),
    (r'layers(\.\d+\.blocks\.\d+)\.op', r'backbone.stages\1.mixer'),
    (r'layers(\.\d+\.blocks\.\d+)\.(norm2|mlp)', r'backbone.stages\1.\2'),
    (r'layers\.(\d+)\.downsample\.1', r'backbone.stages.{next}.downsample.conv'),
    (r'layers\.(\d+)\.downsample\.3', r'backbone.stages.{next}.downsample.norm'),
    (r'patch_embed\.proj\.0|patch_embed\.0', r'backbone.stem.0.conv'),
    (r'patch_embed\.proj\.1|patch_embed\.2', r'backbone.stem.0.norm'),
    (r'patch_embed\.proj\.3|patch_embed\.5', r'backbone.stem.2.conv'),
    (r'patch_embed\.proj\.4|patch_embed\.7', r'backbone.stem.2.norm'),
    (r'pos_embed', r'backbone.pos_embed'),
    (r'outnorm(\d)', r'backbone.norm\1'),
    (r'classifier\.norm|norm\.', r'backbone.norm{last}.'),
    (r'classifier\.head|head\.', r'head.fc.'),
]
MIXER_RENAMES = {
    'in_proj.0': 'conv',
    'qkv_proj': 'qkv',
    'gk_proj': 'decay',
    'g_proj': 'gate',
    'g_norm': 'norm',
    'l_norm': 'local_norm',
    'o_proj': 'proj',
}
OURS = re.compile(r'(blocks|stages\.\d+\.blocks)\.\d+\.mixer\.qkv\.weight')
PUBLISHED = re.compile(r'(blocks\.\d+\.attn|layers\.\d+\.blocks\.\d+\.op)\.qkv_proj\.weight')


def is_published(names: Iterable[str]) -> bool:
    """Whether `names` are the parameter names of the published code."""
    return any(PUBLISHED.match(str(name)) for name in names)


def rename_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames published parameters to `backbone.*` and `head.fc.*`; other entries keep their names.

    The norm before the published classifier becomes that of the last block or stage, the dense variant's `outnorm{i}`
    becomes `norm{i}`, and the position embedding (1, N, C) of a square grid becomes (1, sqrt(N), sqrt(N), C).
    """
    last = max(
        (int(m[1]) for m in (re.match(r'(?:blocks|layers)\.(\d+)\.', name) for name in state_dict) if m), default=0
    )
    renamed = {}
    for name, value in state_dict.items():
        ours = _rename(name, last)
        if ours == 'backbone.pos_embed' and value.dim() == 3:
            side = math.isqrt(value.shape[1])
            value = value.unflatten(1, (side, side))
        renamed[ours] = value
    return renamed


def _rename(name: str, last: int) -> str:
    for pattern, replacement in RENAMES:
        if match := re.match(pattern, name):
            head = match.expand(replacement)
            if '{next}' in head:
                head = head.format(next=int(match[1]) + 1)
            name = head.replace('{last}', str(last)).rstrip('.') + '.' + name[match.end() :].lstrip('.')
            break
    if '.mixer.' in name:
        block, rest = name.split('.mixer.')
        part, _, leaf = rest.rpartition('.')
        for theirs, ours in MIXER_RENAMES.items():
            if part == theirs or part.startswith(theirs + '.'):
                return f'{block}.mixer.{ours}{part.removeprefix(theirs)}.{leaf}'
    return name.rstrip('.')


def normalise_checkpoint(checkpoint: dict) -> dict:
    """Gives a loaded file the form that MMEngine reads: weights under `state_dict`, named as a whole model.

    Weights nested under `model` are unwrapped, whatever model they are of; published names are renamed; those of a
    bare ViG or ViG-H backbone get their `backbone.`. Anything else is returned as it is.
    """
    nest = next((key for key in ('state_dict', 'model') if isinstance(checkpoint.get(key), Mapping)), None)
    weights = checkpoint[nest] if nest else checkpoint
    if is_published(weights):
        weights = rename_published(weights)
    elif any(OURS.match(str(name)) for name in weights):
        weights = {'backbone.' + name: value for name, value in weights.items()}
    elif nest != 'model':
        return checkpoint
    rest = {key: value for key, value in checkpoint.items() if key != nest} if nest else {}
    return {**rest, 'state_dict': weights}


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resizes (1, h, w, C) to (1, *grid, C), bicubically and in float32 (paper's published code)."""
    if _is_of_grid(pos_embed, grid):
        return pos_embed
    dtype, (height, width) = pos_embed.dtype, grid
    device = 'cpu' if pos_embed.is_meta else pos_embed.device.type  # the meta device knows no autocast
    with torch.autocast(device, enabled=False):
        pos_embed = pos_embed.float()
        (h, w), device = pos_embed.shape[1:3], pos_embed.device
        tall = _bicubic(h, height, device) @ pos_embed.flatten(2)  # (1, height, w C)
        resized = _bicubic(w, width, device) @ tall.unflatten(2, pos_embed.shape[2:])
    return resized.to(dtype)


_MATRICES: dict[tuple[int, int, torch.device], Tensor] = {}  # those of `_bicubic`


def _bicubic(n: int, size: int, device: torch.device) -> Tensor:
    """The matrix (size, n) that resizes a dimension n long.

    PyTorch's own resizing takes a thread a pixel for all channels: 1.5 ms a training step of ViG-T at 1024 pixels.
    Matrices are kept: to make both takes a GPU 20 us, 3 % of ViG-T's pass over one image. None is given up, since a
    CUDA graph may read it; there are no more than a side may have patches.
    """
    if torch.compiler.is_compiling():
        return _make_bicubic(n, size, device)
    key = n, size, device
    if key in _MATRICES:
        return _MATRICES[key]
    with torch.inference_mode(False), torch.no_grad():
        matrix = _make_bicubic(n, size, device)
    capturing = device.type == 'cuda' and torch.cuda.is_current_stream_capturing()  # nothing is computed yet
    if type(matrix) is Tensor and not capturing:  # nor is it a stand-in for one, such as those that trace
        _MATRICES[key] = matrix
    return matrix


def _make_bicubic(n: int, size: int, device: torch.device) -> Tensor:
    one = torch.eye(n, device=device)[None, :, :, None]  # as many channels as pixels
    return F.interpolate(one, size=(size, 1), mode='bicubic', align_corners=False)[0, :, :, 0].t()


def _is_of_grid(pos_embed: Tensor, grid: tuple[int, int]) -> bool:
    if torch.compiler.is_compiling():
        # To ask would compile once more for this grid, and for grids that share a side with it; resizing to the same
        # grid changes nothing.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(have == want) for have, want in zip(pos_embed.shape[1:3], grid))
    return pos_embed.shape[1:3] == grid


def adapt_state_dict(backbone: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """State-dict pre-hook of the backbones: takes published files, whole models and other grids; edits in place.

    Raises:
        ValueError: a parameter of the file has another shape than the backbone's, which would be another arch.
    """
    given = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    if is_published(given):
        given = rename_published(given)
    if any(name.startswith('backbone.') for name in given):
        if head := [name for name in given if name.startswith('head.')]:
            print_log(f'not loaded, since {type(backbone).__name__} has no classifier: {head}', 'current')
        given = {name.removeprefix('backbone.'): value for name, value in given.items() if name not in head}

    own = dict(backbone.named_parameters())
    if 'pos_embed' in own and 'pos_embed' in given:
        given['pos_embed'] = resize_pos_embed(given['pos_embed'], own['pos_embed'].shape[1:3])
    for name, value in given.items():
        if name in own and own[name].shape != value.shape:
            raise ValueError(
                f'the checkpoint is of another architecture than this {type(backbone).__name__}: {name} is '
                f'{tuple(value.shape)} in the file and {tuple(own[name].shape)} here; set `arch` (and `in_channels`) '
                'to what the file was trained with'
            )
    state_dict.update({prefix + name: value for name, value in given.items()})
