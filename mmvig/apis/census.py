"""Which configs of the installed OpenMMLab packages take ViG-H for their backbone."""

import logging
import re
import signal
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from rich.table import Table
from torch import nn
from torch.overrides import TorchFunctionMode

from mmvig.apis.swap_backbone import find_model, old_pyramid, swap_backbone

__all__ = ['BUILT', 'LIBRARIES', 'NOT_BUILT', 'REFUSED', 'Entry', 'find_configs', 'reasons', 'summary', 'take_census']

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
BUILT, NOT_BUILT, REFUSED = 'converted and built', 'converted, does not build', 'refused'


class Entry(NamedTuple):
    """A row of the census. `backbone` is the old one's type; `undilate` whether it took `undilate=True`."""

    library: str
    config: str
    backbone: str
    undilate: bool
    outcome: str
    reason: str


def find_configs() -> list[tuple[str, str]]:
    """(library, path below its configs) of every config of the installed libraries that is no base of others."""
    found = []
    for library in LIBRARIES:
        root = _root(library)
        files = sorted(file.relative_to(root) for file in root.rglob('*.py'))
        found += [(library, file.as_posix()) for file in files if '_base_' not in file.parts]
    return found


def _root(library: str) -> Path:
    return Path(find_spec(library).submodule_search_locations[0], '.mim/configs')


def take_census(
    configs: Iterable[tuple[str, str]], backbone: str, *, workers: int = 1, limit: int = 60
) -> Iterator[Entry]:
    """Converts each config and builds its model without memory, on the meta device.

    What follows the backbone is also run on maps of the backbone's shapes, and the old backbone on an image, to see
    that its widths and strides were known correctly. An image of 256 pixels a side has all strides.

    Args:
        limit: seconds that a config may take.
    """
    tasks = [(library, path, backbone, limit) for library, path in configs]
    with get_context('spawn').Pool(workers, maxtasksperchild=500) as pool:
        yield from pool.imap(_examine_in_time, tasks)


def _examine_in_time(task: tuple[str, str, str, int]) -> Entry:
    library, path, backbone, limit = task
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.alarm(limit)
    try:
        return _examine(library, path, backbone)
    except TimeoutError:
        return Entry(library, path, '', False, NOT_BUILT, f'took longer than {limit} s')
    finally:
        signal.alarm(0)


def _time_is_up(*_) -> None:
    raise TimeoutError


def _examine(library: str, path: str, backbone: str) -> Entry:
    try:
        cfg = Config.fromfile(_root(library) / path)
    except Exception as error:  # whatever a config of others raises
        return Entry(library, path, '', False, REFUSED, f'cannot be read: {_brief(error)}')
    if not isinstance(cfg.get('model'), dict):
        return Entry(library, path, '', False, REFUSED, 'has no model: a part of other configs')
    cfg.setdefault('default_scope', library)
    undilate, kind = False, ''
    try:
        kind = str(find_model(cfg)[1].backbone.get('type', ''))
        new = swap_backbone(cfg, backbone)
    except ValueError as error:
        if '--undilate' not in str(error):
            return Entry(library, path, kind, False, REFUSED, _brief(error))
        try:
            new, undilate = swap_backbone(cfg, backbone, undilate=True), True
        except ValueError as error:
            return Entry(library, path, kind, True, REFUSED, _brief(error))
    try:
        check_old_backbone(cfg)
        run_without_backbone(build(new))
    except TimeoutError:
        raise
    except Exception as error:
        reason = _brief(error)
        try:
            build(cfg)
        except Exception as original:
            reason += f'; neither does the original: {_brief(original)}'
        return Entry(library, path, kind, undilate, NOT_BUILT, reason)
    return Entry(library, path, kind, undilate, BUILT, '')


def _brief(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__ + ": " if not isinstance(error, ValueError) else ""}{error}'.split())[:300]


def build(cfg: Config) -> nn.Module:
    """The model of a config on the meta device, in eval mode."""
    model = dict(cfg.model)
    if 'teacher_ckpt' in model:  # which mmdet downloads while building
        model['teacher_ckpt'] = None
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return _build(model, cfg.default_scope)


def _build(settings: dict, scope: str) -> nn.Module:
    import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(scope), torch.device('meta'), _Uninitialised():
        model = MODELS.build(settings)
    model.eval()  # which returns nothing in OpenMMLab's ResNets
    return model


class _Uninitialised(TorchFunctionMode):
    """Spares drawing weights that are not there; drop path rates, which backbones read off a tensor, are drawn."""

    draws = ('normal_', 'uniform_', 'erfinv_', 'mul_', 'add_', 'clamp_', 'fill_', 'zero_')

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linspace:
            return func(*args, **{'device': 'cpu', **(kwargs or {})})
        if getattr(func, '__name__', '') in self.draws and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def run_without_backbone(model: nn.Module) -> None:
    """Runs the neck, and the heads that need no annotations, on maps as the model's ViG-H gives them.

    Raises:
        Exception: what the first part raises that does not take them.
    """
    while 'backbone' not in dict(model.named_children()):
        children = dict(model.named_children())
        model = children.get('detector') or children['student']
    backbone = model.backbone
    maps = tuple(
        torch.zeros(1, width, 256 // stride, 256 // stride, device='meta')
        for width, stride in zip(backbone.out_channels, backbone.out_strides)
    )
    backbone.forward = lambda images: maps
    images = torch.zeros(1, 3, 256, 256, device='meta')
    parts = dict(model.named_children())
    with torch.no_grad(), torch.device('meta'):
        features = maps if 'track_head' in parts else model.extract_feat(images)
        mask_heads = [part for part in parts.values() if 'pixel_decoder' in dict(part.named_children())]
        if not mask_heads and ('decode_head' in parts or type(model).__name__ == 'ImageClassifier'):
            model(images)
        elif 'head' in parts and 'neck' in parts:
            model.neck(maps)  # of self-supervised models, which extract_feat leaves to the loss
        auxiliary = parts.get('auxiliary_head', [])
        for head in auxiliary if isinstance(auxiliary, (nn.ModuleList, list)) else [auxiliary]:
            head(features)
    for head in mask_heads:
        _run_pixel_decoder(head.pixel_decoder, [torch.zeros(x.shape) for x in features])


def _run_pixel_decoder(decoder: nn.Module, maps: list[torch.Tensor]) -> None:
    """On the CPU, since deformable attention looks at values."""
    decoder.to_empty(device='cpu')
    with torch.no_grad():
        if type(decoder).__name__ == 'MSDeformAttnPixelDecoder':
            decoder(maps)
        else:
            decoder(maps, [dict(img_shape=(256, 256), batch_input_shape=(256, 256))])


def check_old_backbone(cfg: Config) -> None:
    """Compares what the old backbone gives with what `swap_backbone` takes it to give.

    Raises:
        AssertionError: another width or stride.
    """
    _, model, scope = find_model(cfg)
    settings = {key: value for key, value in model.backbone.to_dict().items() if key not in WITHOUT_EFFECT}
    _check_old_backbone(scope, repr(settings))


# Settings that change no shape, and that would load a file or run operators which know no meta device.
WITHOUT_EFFECT = ('init_cfg', 'pretrained', 'dcn', 'stage_with_dcn', 'plugins', 'sac', 'stage_with_sac')


@cache
def _check_old_backbone(scope: str, settings: str) -> None:
    settings = literal_eval(settings)
    pyramid, pools = old_pyramid(settings, scope, 'backbone')
    with torch.device('meta'), torch.no_grad():
        maps = _build(settings, scope)(torch.zeros(1, 3, 256, 256))
    widths = tuple(x.shape[1] for x in maps)
    assert widths == pyramid.widths, f'the old backbone gives widths {widths}, not {pyramid.widths}'
    if not pools:
        strides = tuple(256 // x.shape[2] for x in maps)
        assert strides == pyramid.strides, f'the old backbone gives strides {strides}, not {pyramid.strides}'


def summary(entries: Iterable[Entry]) -> Table:
    """The counts of each library's outcomes."""
    counts = Counter((entry.library, _column(entry)) for entry in entries)
    columns = (BUILT, f'{BUILT}, --undilate', NOT_BUILT, REFUSED)
    table = Table('library', *columns, 'all')
    for name, libraries in [*((library, [library]) for library in LIBRARIES), ('all', LIBRARIES)]:
        row = [sum(counts[library, column] for library in libraries) for column in columns]
        table.add_row(name, *map(str, row), str(sum(row)))
    return table


def _column(entry: Entry) -> str:
    return f'{BUILT}, --undilate' if entry.undilate and entry.outcome == BUILT else entry.outcome


def reasons(entries: Iterable[Entry], most: int = 20) -> Table:
    """The most frequent reasons for which a config was not converted or did not build."""
    counts = Counter((entry.outcome, _kind_of(entry.reason)) for entry in entries if entry.reason)
    table = Table('configs', 'outcome', 'reason')
    for (outcome, reason), count in counts.most_common(most):
        table.add_row(str(count), outcome, reason)
    return table


def _kind_of(reason: str) -> str:
    """Without what is said of one config alone."""
    return re.split(r'[;:(]', reason)[0]
