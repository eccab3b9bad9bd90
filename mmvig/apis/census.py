"""Which configs of the installed OpenMMLab packages take ViG-H for their backbone."""

import csv
import logging
import os
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mmengine.config import Config
from rich import box
from rich.table import Table
from torch import Tensor, nn

from mmvig.apis.measure import SIDE, build, build_part, measure
from mmvig.apis.swap_backbone import STRIDES, locate_model, old_pyramid, swap_backbone

__all__ = [
    'BROKEN',
    'CONVERTED',
    'LIBRARIES',
    'NO_MODEL',
    'REFUSED',
    'WRONG',
    'Entry',
    'find_configs',
    'read_entries',
    'reasons',
    'summary',
    'take_census',
    'write_entries',
]

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
CONVERTED, BROKEN, WRONG, REFUSED, NO_MODEL = (
    'converted',  # and what follows the backbone runs on the maps that ViG-H really gives
    'fails unconverted',  # and so it does converted, by the very same check
    'converted wrongly',
    'refused',
    'no model',  # or not readable: there is nothing to convert
)


class Entry(NamedTuple):
    """A row of the census.

    `backbone` is the old one's type, `strides` those of its maps as they were measured, '4 8 16 32', or '' if it gives
    something else than maps or could not be run; `undilate` tells whether the config took `undilate=True`.
    """

    library: str
    config: str
    backbone: str
    strides: str
    undilate: bool
    outcome: str
    reason: str

    @property
    def is_pyramid(self) -> bool:
        """Whether the old backbone gives maps of ascending strides among 4, 8, 16 and 32: what ViG-H can replace."""
        strides = [int(stride) for stride in self.strides.split()]
        return bool(strides) and strides == sorted(set(strides)) and set(strides) <= set(STRIDES)


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    with path.open('w', newline='') as file:
        csv.writer(file, lineterminator='\n').writerows([Entry._fields, *entries])


def read_entries(path: Path) -> list[Entry]:
    """What `write_entries` wrote, without a last row that was cut off.

    Raises:
        ValueError: the columns are others.
    """
    with path.open(newline='') as file:
        header, *rows = csv.reader(file)
    if tuple(header) != Entry._fields:
        raise ValueError(f'{path} has columns {", ".join(header)}, and not those of a census: name another file')
    entries = [Entry(*row) for row in rows if len(row) == len(header)]
    return [entry._replace(undilate=entry.undilate == 'True') for entry in entries]


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
    configs: Iterable[tuple[str, str]], backbone: str, *, workers: int = 1, limit: float = 60
) -> Iterator[Entry]:
    """Converts each config and checks the model, without memory, on the meta device.

    The neck, and the heads that need no annotations, run on maps of the shapes that the new backbone really gives. The
    old backbone runs on an image, to see that its widths and strides were known correctly. A config that fails is put
    to the same check as it was.

    Args:
        limit: seconds that a config may take.
    """
    tasks = [(library, path, backbone, limit) for library, path in configs]
    with get_context('spawn').Pool(workers, maxtasksperchild=500) as pool:
        yield from pool.imap(_examine_in_time, tasks)


def _examine_in_time(task: tuple[str, str, str, float]) -> Entry:
    library, path, backbone, limit = task
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    os.chdir(_root(library).parent)  # where configs look for others, by the path in their own repository
    if not dist.is_initialized():  # which a SyncBatchNorm asks for when it is built
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return _examine(library, path, backbone)
    except _TimeIsUp:
        return Entry(library, path, '', '', False, WRONG, f'took longer than {limit:g} s')
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _TimeIsUp(BaseException):  # which nobody takes for an error of a config
    pass


def _time_is_up(*_) -> None:
    raise _TimeIsUp


def _examine(library: str, path: str, backbone: str) -> Entry:
    entry = Entry(library, path, '', '', False, NO_MODEL, '')
    try:
        cfg = Config.fromfile(_root(library) / path)
    except Exception as error:  # whatever a config of others raises
        return entry._replace(reason=f'cannot be read: {_brief(error)}')
    if not isinstance(cfg.get('model'), dict):
        return entry._replace(reason='a part of other configs')
    cfg.setdefault('default_scope', library)
    entry = entry._replace(outcome=REFUSED)
    try:
        old = locate_model(cfg)[1].backbone
        entry = entry._replace(backbone=str(old.get('type', '')), strides=' '.join(map(str, measured_strides(cfg))))
        new = swap_backbone(cfg, backbone)
    except ValueError as error:
        if '--undilate' not in str(error):
            return entry._replace(reason=_brief(error))
        entry = entry._replace(undilate=True)
        try:
            new = swap_backbone(cfg, backbone, undilate=True)
        except ValueError as error:
            return entry._replace(reason=_brief(error))
    return entry._replace(**dict(zip(('outcome', 'reason'), _judge(new, cfg))))


def _judge(new: Config, cfg: Config) -> tuple[str, str]:
    """The outcome of a conversion that was made, and the reason if it does not run."""
    if problem := _problem(lambda: check_old_backbone(cfg)):
        original = _problem(lambda: measure(locate_model(cfg)[1].backbone, cfg.default_scope))
        return (BROKEN if original else WRONG), problem
    if problem := _problem(lambda: run_after_backbone(new)):
        original = _problem(lambda: run_after_backbone(cfg))
        if not original:
            return WRONG, problem
        reason = problem if original == problem else f'{problem}; unconverted: {original}'
        if not locate_model(new)[1].get('neck'):
            return BROKEN, reason
        if alone := _problem(lambda: run_neck(new)):
            return (BROKEN if _problem(lambda: run_neck(cfg)) else WRONG), f'{reason}; the neck alone: {alone}'
        return BROKEN, f'{reason}; the neck alone runs'
    if cfg.default_scope == 'mmdet' and locate_model(new)[1].get('neck'):  # the heads behind it stay as they were
        if problem := _problem(lambda: run_neck(cfg)):
            return BROKEN, f'the neck alone, unconverted: {problem}'
        if problem := _problem(lambda: _compare(run_neck(new), run_neck(cfg))):
            return WRONG, problem
    return CONVERTED, ''


def _compare(after: list[int], before: list[int]) -> None:
    if after != before:
        raise ValueError(f'heads get maps of widths {after} instead of {before}')


def _problem(check: Callable[[], Any]) -> str:
    """What `check` raises, '' if nothing."""
    try:
        check()
    except Exception as error:
        return _brief(error)
    return ''


def _brief(error: Exception) -> str:
    """In one line, without the folder that the libraries are in."""
    kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    text = f'{kind}{error}'.replace(f'{_root(LIBRARIES[0]).parents[2]}/', '')
    return ' '.join(text.split())[:300]


# ----------------------------------------------------------------------------------------------------- the backbones


def measured_strides(cfg: Config) -> tuple[int, ...]:
    """The strides of the maps that a config's backbone gives; none if it gives no maps or cannot be run."""
    _, model, scope = locate_model(cfg)
    try:
        shapes = measure(model.backbone, scope)
    except Exception:  # whatever a backbone of others raises
        return ()
    return tuple(SIDE // shape[2] for shape in shapes) if all(len(shape) == 4 for shape in shapes) else ()


def check_old_backbone(cfg: Config) -> None:
    """Compares what the old backbone gives with what `swap_backbone` takes it to give.

    Raises:
        AssertionError: another width or stride.
    """
    _, model, scope = locate_model(cfg)
    pyramid, _ = old_pyramid(model.backbone, scope, 'backbone')
    shapes = measure(model.backbone, scope)
    widths = tuple(shape[1] for shape in shapes)
    strides = tuple(SIDE // shape[2] for shape in shapes)
    assert widths == pyramid.widths, f'the old backbone gives widths {widths}, not {pyramid.widths}'
    assert strides == pyramid.strides, f'the old backbone gives strides {strides}, not {pyramid.strides}'


# --------------------------------------------------------------------------------------------- what reads the backbone


def run_after_backbone(cfg: Config) -> None:
    """Runs the neck, and the heads that need no annotations, on maps as the backbone gives them.

    Raises:
        Exception: what the first part raises that does not take them.
    """
    maps = _maps(cfg)
    model = build(cfg)
    while 'backbone' not in dict(model.named_children()):
        children = dict(model.named_children())
        model = children.get('detector') or children['student']
    if getattr(model.backbone, 'gap_before_final_norm', False):
        maps = tuple(x.mean((2, 3)) for x in maps)
    model.backbone.forward = lambda images: maps
    images = torch.zeros(1, 3, SIDE, SIDE, device='meta')
    parts = dict(model.named_children())
    with torch.no_grad(), torch.device('meta'):
        features = maps if 'track_head' in parts else model.extract_feat(images)
        mask_heads = [part for part in parts.values() if 'pixel_decoder' in dict(part.named_children())]
        if not mask_heads and isinstance(parts.get('decode_head'), nn.ModuleList):
            parts['decode_head'][0](features)  # the others refine what it gives
        elif not mask_heads and ('decode_head' in parts or type(model).__name__ == 'ImageClassifier'):
            model(images)
        elif 'head' in parts and 'neck' in parts:
            model.neck(maps)  # of self-supervised models, which extract_feat leaves to the loss
        auxiliary = parts.get('auxiliary_head', [])
        for head in auxiliary if isinstance(auxiliary, (nn.ModuleList, list)) else [auxiliary]:
            head(features)
    for head in mask_heads:
        _run_pixel_decoder(head.pixel_decoder, [torch.zeros(x.shape) for x in features])


def _maps(cfg: Config) -> tuple[Tensor, ...]:
    """As the backbone of a config gives them."""
    _, settings, scope = locate_model(cfg)
    return tuple(torch.zeros(shape, device='meta') for shape in measure(settings.backbone, scope))


def run_neck(cfg: Config) -> list[int]:
    """Runs the neck alone, or the first of several, and returns the widths of its maps.

    Raises:
        Exception: what it raises if it does not take what the backbone gives.
    """
    _, settings, scope = locate_model(cfg)
    neck = settings.neck[0] if isinstance(settings.neck, (list, tuple)) else settings.neck
    with torch.no_grad():
        maps = build_part(neck, scope)(_maps(cfg))
    return [x.shape[1] for x in ([maps] if isinstance(maps, Tensor) else maps)]


def _run_pixel_decoder(decoder: nn.Module, maps: list[torch.Tensor]) -> None:
    """On the CPU, since deformable attention looks at values."""
    decoder.to_empty(device='cpu')
    with torch.no_grad():
        if type(decoder).__name__ == 'MSDeformAttnPixelDecoder':
            decoder(maps)
        else:
            decoder(maps, [dict(img_shape=(SIDE, SIDE), batch_input_shape=(SIDE, SIDE))])


# ------------------------------------------------------------------------------------------------------------- reports


def summary(entries: Iterable[Entry]) -> Table:
    """The outcomes of each library: of the configs whose backbone gives a pyramid, and of those with other maps.

    The share is of the pyramids that work here unconverted: what lacks an optional package cannot be judged.
    """
    entries = list(entries)
    columns = ('pyramids', 'unfit', 'converted', 'share', 'others', 'undilated', 'wrong', 'all')
    table = Table('library', *columns, box=box.MARKDOWN)
    for name, libraries in [*((library, [library]) for library in LIBRARIES), ('all', LIBRARIES)]:
        rows = [entry for entry in entries if entry.library in libraries and entry.outcome != NO_MODEL]
        counts = Counter((entry.is_pyramid, entry.outcome) for entry in rows)
        pyramids = sum(count for (is_pyramid, _), count in counts.items() if is_pyramid)
        converted, broken = counts[True, CONVERTED], counts[True, BROKEN]
        share = f'{100 * converted / max(pyramids - broken, 1):.1f} %'
        others, undilated = len(rows) - pyramids, counts[False, CONVERTED]
        wrong = counts[True, WRONG] + counts[False, WRONG]
        table.add_row(name, *map(str, (pyramids, broken, converted, share, others, undilated, wrong, len(rows))))
    return table


def reasons(entries: Iterable[Entry], most: int = 20) -> Table:
    """The most frequent reasons for which a config was not converted, or fails."""
    counts = Counter((entry.outcome, entry.is_pyramid, _kind_of(entry)) for entry in entries if entry.reason)
    table = Table('configs', 'outcome', 'pyramid', 'reason', box=box.MARKDOWN)
    for (outcome, pyramid, reason), count in counts.most_common(most):
        table.add_row(str(count), outcome, 'yes' if pyramid else 'no', reason)
    return table


def _kind_of(entry: Entry) -> str:
    """The reason without what is said of one config alone: kinds of modules, shapes, names of files."""
    reason = re.sub(r' is an? [\w.]+, (which|whose) ', r' \1 ', entry.reason.split('; ')[0])
    error, text = re.fullmatch(r'(\w+(?:Error|Exception): )?(.*)', reason, re.DOTALL).groups()
    return (error or '') + re.split(r'[:(\[=]|, | among |\.$', text)[0].strip()
