"""Instance masks on their way from a data loader's workers to the training process.

mmdet keeps the masks of an image as whole bitmaps, one for each instance, in a NumPy array, and what is no tensor goes
from process to process through a pipe: 25 masks at 1,536 pixels are 32 to 60 MB an image, and take about as long as a
training step. Here the pipe gets what lies in the box of each mask.
"""

from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import TYPE_CHECKING

from mmvig.compat.change import Change
from mmvig.compat.imports import after_import, installed

if TYPE_CHECKING:
    import numpy as np

__all__ = ['apply']

Box = tuple[int, int, int, int]  # rows y0 up to y1, columns x0 up to x1


def apply() -> Change | None:
    """Have processes hand each other mmdet's bitmaps as crops."""
    if not installed('mmdet'):
        return None
    after_import('mmdet.structures.mask.structures', _patch)
    return Change(
        name='masks between processes',
        cause='mmdet sends whole bitmaps of all instances from the workers of a data loader, through a pipe',
        action='what is sent is the part of each bitmap that is not empty; masks arrive as they were',
        cure='none is known: mmdet 3.3 is the last release',
    )


def _patch(structures: ModuleType) -> None:
    ForkingPickler.register(structures.BitmapMasks, _crop)  # what multiprocessing pickles with, and nothing else


def _crop(masks) -> tuple:
    """How `masks`, a BitmapMasks, is pickled."""
    rows, columns = masks.masks.any(2), masks.masks.any(1)  # (instances, H), (instances, W)
    boxes = [(*_extent(y), *_extent(x)) for y, x in zip(rows, columns)]
    crops = [mask[y0:y1, x0:x1].copy() for mask, (y0, y1, x0, x1) in zip(masks.masks, boxes)]
    return _restore, (type(masks), crops, boxes, masks.height, masks.width, masks.masks.dtype)


def _extent(filled: 'np.ndarray') -> tuple[int, int]:
    """From the first true entry up to behind the last; of none, nothing."""
    (where,) = filled.nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def _restore(cls: type, crops: 'list[np.ndarray]', boxes: list[Box], height: int, width: int, dtype: 'np.dtype'):
    import numpy as np  # here: `import mmvig` is light

    masks = np.zeros((len(crops), height, width), dtype)
    for mask, crop, (y0, y1, x0, x1) in zip(masks, crops, boxes):
        mask[y0:y1, x0:x1] = crop
    return cls(masks, height, width)
