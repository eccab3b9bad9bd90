"""Instance masks between processes: they arrive as they were, by less."""

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from torch.utils.data import DataLoader

from mmvig import compat

# isort: split
from mmdet.structures.mask import BitmapMasks


def boxes(rng: np.random.Generator, count: int, height: int, width: int) -> BitmapMasks:
    masks = np.zeros((count, height, width), np.uint8)
    for mask in masks:
        y, x = rng.integers(height), rng.integers(width)
        part = mask[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)]
        part[:] = rng.integers(0, 2, part.shape)
    return BitmapMasks(masks, height, width)


CASES = {
    'some': lambda rng: boxes(rng, 12, 90, 140),
    'one pixel': lambda rng: boxes(rng, 3, 1, 1),
    'full': lambda rng: BitmapMasks(np.ones((2, 30, 20), np.uint8), 30, 20),
    'empty': lambda rng: BitmapMasks(np.zeros((3, 30, 20), np.uint8), 30, 20),
    'none': lambda rng: BitmapMasks([], 30, 20),
    'bool': lambda rng: BitmapMasks(rng.integers(0, 2, (2, 30, 20)).astype(bool), 30, 20),
}


@pytest.mark.parametrize('case', CASES)
def test_masks_arrive_as_they_were(case):
    sent = CASES[case](np.random.default_rng(0))
    before = sent.masks.copy()
    got = pickle.loads(ForkingPickler.dumps(sent))
    assert type(got) is BitmapMasks and (got.height, got.width) == (sent.height, sent.width)
    assert got.masks.dtype == before.dtype and np.array_equal(got.masks, before) and np.array_equal(sent.masks, before)


def test_less_is_sent():
    masks = boxes(np.random.default_rng(0), 20, 600, 800)
    assert len(ForkingPickler.dumps(masks)) < len(pickle.dumps(masks)) / 100
    assert np.array_equal(pickle.loads(pickle.dumps(masks)).masks, masks.masks)  # all other pickling is as it was
    assert any(change.name == 'masks between processes' for change in compat.report())


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_from_a_worker(start):
    """Also from one that starts anew."""
    items = [boxes(np.random.default_rng(i), 5, 60, 40) for i in range(3)]
    loader = DataLoader(items, batch_size=None, num_workers=1, multiprocessing_context=start)
    for got, sent in zip(loader, items, strict=True):
        assert np.array_equal(got.masks, sent.masks)
