"""Instance masks padded to their batch: as mmdet pads them, by fewer copies."""

import cv2
import numpy as np
import pytest

from mmvig import compat

# isort: split
from mmdet.structures.mask import BitmapMasks


def theirs(masks: BitmapMasks, shape: tuple[int, int], value: int) -> np.ndarray:
    down, right = shape[0] - masks.height, shape[1] - masks.width
    return np.stack([cv2.copyMakeBorder(m, 0, down, 0, right, cv2.BORDER_CONSTANT, value=value) for m in masks.masks])


@pytest.mark.parametrize('shape', [(30, 20), (32, 20), (30, 64), (64, 33)])
@pytest.mark.parametrize('value', [0, 1])
def test_as_mmdet_pads(shape, value):
    masks = BitmapMasks(np.random.default_rng(0).integers(0, 2, (3, 30, 20)).astype(np.uint8), 30, 20)
    before = masks.masks.copy()
    padded = masks.pad(shape, value)
    assert type(padded) is BitmapMasks and (padded.height, padded.width) == shape
    assert np.array_equal(padded.masks, theirs(masks, shape, value)) and padded.masks.dtype == np.uint8
    assert np.array_equal(masks.masks, before) and (masks.height, masks.width) == (30, 20)
    assert np.shares_memory(padded.masks, masks.masks) == (shape == (30, 20))
    assert any(change.name == 'padding of masks' for change in compat.report())


def test_nothing_to_pad():
    assert BitmapMasks([], 30, 20).pad((40, 50)).masks.shape == (0, 40, 50)


def test_a_smaller_shape_is_refused_as_before():
    with pytest.raises(ValueError):
        BitmapMasks(np.ones((1, 30, 20), np.uint8), 30, 20).pad((29, 20))
