"""Batches that depend on nothing but the seed and the iteration that consumes them.

MMEngine seeds a process once, so the random numbers that a sample is augmented with depend on every sample that the
same process has made before. Here every batch carries a seed of its own, and whichever process makes it, the main one
or a worker, starts from that seed. Which batch comes n-th is a question of indices alone, so a resumed run goes to the
n-th one without loading those before it.

What a transform keeps from one sample to the next (mmdet's CachedMosaic and CachedMixUp) is outside this scheme.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler, Sampler

__all__ = ['PositionedBatchSampler', 'SeededBatch', 'positioned', 'seed_random']


def seed_random(*key: int) -> None:
    """Puts the global generators of Python, NumPy and torch, on all devices, into the state that `key` (>= 0) names."""
    python, numpy, torch_high, torch_low = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_high << 32 | torch_low)


@dataclass(frozen=True)
class SeededBatch:
    """The indices of one batch; to iterate over them, as the DataLoader does where it makes the batch, seeds first."""

    indices: list
    key: tuple[int, ...]

    def __iter__(self) -> Iterator:
        seed_random(*self.key)
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class PositionedBatchSampler(Sampler):
    """Counts the batches of another batch sampler, seeds each by its count, and can start at any of them.

    Args:
        sampler: the sampler of indices.
        batch_size: handed to `batch_sampler`.
        batch_sampler: config of the batch sampler to count; its `type` takes `sampler` and `batch_size`.
        seed: >= 0; with the rank and the count it makes a batch's seed.
        endless: start over when `batch_sampler` is through, with the next epoch's order, and count on.
    """

    def __init__(self, sampler: Sampler, batch_size: int, batch_sampler: dict, seed: int, endless: bool) -> None:
        self.sampler = sampler
        self.batch_sampler = DATA_SAMPLERS.build(
            batch_sampler, default_args=dict(sampler=sampler, batch_size=batch_size)
        )
        self.key = (seed, get_rank())
        self.endless = endless
        self.count_from = 0
        self.start = 0
        self.drawn = 0

    def seek(self, start: int, count_from: int = 0) -> None:
        """Batches number 0 to `start` - 1 are passed over, at once even where iteration has begun.

        `count_from` is the number, in the seeds, of the first batch of the next iteration over this sampler.
        """
        self.start, self.count_from = start, count_from

    def __iter__(self) -> Iterator[SeededBatch]:
        position = 0
        for epoch in itertools.count():
            for indices in self.batch_sampler:
                if position >= self.start:
                    self.drawn += 1
                    yield SeededBatch(indices, (*self.key, self.count_from + position))
                position += 1
            if not self.endless:
                return
            reshuffle = getattr(self.sampler, 'set_epoch', None)  # torch's own samplers have none
            if reshuffle is not None:
                reshuffle(epoch + 1)

    def __len__(self) -> int:
        return len(self.batch_sampler)


def positioned(dataloader: dict, *, seed: int, endless: bool) -> dict:
    """The data loader config with its batch sampler, stated or torch's default, inside a PositionedBatchSampler."""
    dataloader = dict(dataloader)
    inner = dataloader.pop('batch_sampler', None)
    if inner is None:
        inner = dict(type=BatchSampler, drop_last=dataloader.pop('drop_last', False))
    dataloader.setdefault('batch_size', 1)
    dataloader['batch_sampler'] = dict(type=PositionedBatchSampler, batch_sampler=inner, seed=seed, endless=endless)
    return dataloader
