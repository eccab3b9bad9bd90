"""MMEngine's two training loops, with every iteration a function of the seed and the iteration's number."""

from collections.abc import Iterator

from mmengine.dist import get_rank
from mmengine.runner import loops

from mmvig.engine.batches import seed_random

__all__ = ['EpochBasedTrainLoop', 'IterBasedTrainLoop']

MODEL = 1  # keeps the random numbers of the model apart from those of the batch of the same iteration


class EpochBasedTrainLoop(loops.EpochBasedTrainLoop):
    """Continues a half-finished epoch where it stood.

    Its data loader is built from a config that went through `mmvig.engine.batches.positioned`.
    """

    batches_done = 0  # of the current epoch, the batch in work included

    def run_epoch(self) -> None:
        self._first = self.batches_done
        self.dataloader.batch_sampler.seek(self._first, count_from=self._iter - self._first)
        super().run_epoch()
        self.batches_done = 0

    def run_iter(self, idx: int, data_batch: dict) -> None:
        idx += self._first
        self.batches_done = idx + 1
        seed_random(self.runner.seed, get_rank(), self._iter, MODEL)
        super().run_iter(idx, data_batch)


class IterBasedTrainLoop(loops.IterBasedTrainLoop):
    """Continues at the right batch without loading those before it.

    Its data loader is built from a config that went through `mmvig.engine.batches.positioned`, endless.
    """

    def run(self) -> None:
        sampler = self.dataloader.batch_sampler
        sampler.seek(self._iter)
        for _ in range(min(self._iter, sampler.drawn)):  # the workers were given these when the loop was built
            next(self.dataloader_iterator)
        self.dataloader_iterator = _Advanced(self.dataloader_iterator, self._iter)
        self.fast_forward_on_resume = False  # of onedl-mmengine: to pass over nothing; it costs nothing here
        return super().run()

    def run_iter(self, data_batch: dict) -> None:
        seed_random(self.runner.seed, get_rank(), self._iter, MODEL)
        super().run_iter(data_batch)


class _Advanced(Iterator):
    """Batches that start where training goes on, for loops of MMEngine, which first pass over those of before.

    Stock MMEngine takes them one by one, and gets None; onedl-mmengine says how many.
    """

    def __init__(self, batches: Iterator, passed: int):
        self.batches = batches
        self.passed = passed

    def __next__(self):
        if self.passed:
            self.passed -= 1
            return None
        return next(self.batches)

    def skip_iter(self, count: int) -> None:
        self.passed -= count
