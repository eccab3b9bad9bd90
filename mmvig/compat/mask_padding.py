"""Instance masks padded to the size of their batch.

mmdet pads each bitmap of an image in the training process, before every step: a copy of each with OpenCV, a second one
into an array, a third one into the BitmapMasks that holds it, also where there is nothing to add.
"""

import copy
from types import ModuleType

from mmvig.compat.change import Change
from mmvig.compat.imports import after_import, installed

__all__ = ['apply']


def apply() -> Change | None:
    """Have mmdet's bitmaps padded by one copy, or by none."""
    if not installed('mmdet'):
        return None
    after_import('mmdet.structures.mask.structures', _patch)
    return Change(
        name='padding of masks',
        cause='mmdet pads bitmaps of instances by three copies of each, in the training process',
        action='masks are padded by one copy, and those of the right size by none',
        cure='none is known: mmdet 3.3 is the last release',
    )


def _patch(structures: ModuleType) -> None:
    import numpy as np  # here: `import mmvig` is light

    theirs = structures.BitmapMasks.pad

    def pad(self, out_shape, pad_val=0):
        """See `BaseInstanceMasks.pad`; what has this shape already shares its bitmaps with the result."""
        height, width = out_shape
        if len(self.masks) == 0 or height < self.height or width < self.width:
            return theirs(self, out_shape, pad_val)  # which has nothing to copy, or refuses
        padded = copy.copy(self)
        padded.height, padded.width = height, width
        if (height, width) != (self.height, self.width):
            padded.masks = np.full((len(self.masks), height, width), pad_val, self.masks.dtype)
            padded.masks[:, : self.height, : self.width] = self.masks
        return padded

    structures.BitmapMasks.pad = pad
