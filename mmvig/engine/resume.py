"""Going on from a checkpoint as if the run had never stopped.

MMEngine's checkpoints hold the weights, the optimizer and the schedules. With what is here and the loops and batches
beside it, the loss of every later iteration equals the uninterrupted run's: bit for bit on the CPU in float32. No state
of a random generator is stored, since each iteration and each batch starts from a seed of its own; that also holds for
every process of a distributed run.

Not covered: what a data transform, a data preprocessor or a metric keeps in Python attributes from one iteration to the
next (mmdet's CachedMosaic, the current size of BatchSyncRandomResize, EarlyStoppingHook's best score).
"""

import os
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mmvig.compat.checkpoint_loading import load_checkpoint_file
from mmvig.engine.batches import seed_random
from mmvig.registry import HOOKS

__all__ = ['ResumeHook', 'in_accumulation', 'latest_checkpoint', 'load_for_resume']

VALIDATION = 2  # beside a batch (nothing) and the model (1) of the same iteration


def in_accumulation(optim_wrapper: OptimWrapper | OptimWrapperDict) -> bool:
    """Whether gradients wait for later iterations, by `accumulative_counts`."""
    wrappers = optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]
    return any(not wrapper.should_update() for wrapper in wrappers)


def _parameters(runner) -> dict[str, torch.nn.Parameter]:
    module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return dict(module.named_parameters())


@HOOKS.register_module()
class ResumeHook(Hook):
    """Stores where in the epoch a run stands and the gradients it has accumulated, and brings both back.

    A distributed run stores no gradients: each process has its own and one process writes the checkpoint. There,
    resuming from the middle of an accumulation loses what was accumulated, as MMEngine does and reports.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._loaded = None
        self._in_training = False

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        meta, loop = checkpoint['meta'], runner.train_loop
        gradients = {}
        if runner.world_size == 1 and in_accumulation(runner.optim_wrapper):
            gradients = {name: p.grad.cpu() for name, p in _parameters(runner).items() if p.grad is not None}
        checkpoint['resume'] = dict(
            iter=meta['iter'],
            batches_done=getattr(loop, 'batches_done', 0) if meta['epoch'] == loop.epoch else 0,
            gradients=gradients,
            in_validation=meta.get('in_validation', False),
        )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self._loaded = checkpoint.get('resume')
        checkpoint.get('meta', {}).pop('config', None)  # MMEngine would execute it as Python, whoever wrote the file

    def before_train(self, runner) -> None:
        self._in_training = True
        if runner.iter == 0:
            return
        state = self._loaded
        if state is None or state['iter'] != runner.iter:
            runner.logger.warning(
                'This checkpoint was not written by mmvig.engine.Runner: its epoch starts over, and the losses will '
                "not be exactly the uninterrupted run's."
            )
            return
        runner.train_loop.batches_done = state['batches_done']
        if state['gradients']:
            parameters = _parameters(runner)
            for name, grad in state['gradients'].items():
                parameters[name].grad = grad.to(parameters[name])
            runner.logger.warning('The gradients of the accumulation that the checkpoint interrupted were restored.')
        if state['in_validation'] and runner.val_loop is not None:
            runner.val_loop.run()

    def before_val(self, runner) -> None:
        if self._in_training:
            seed_random(runner.seed, runner.rank, runner.iter, VALIDATION)


def latest_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """The newest file of `work_dir` from which training can go on; unreadable ones are named on the way and left.

    Newest by time of writing, interrupted runs' included. Checkpoints without the optimizer's state ('best' and
    published ones) do not count.
    """
    pointer = Path(work_dir, 'last_checkpoint')
    paths = set(Path(work_dir).glob('*.pth'))
    if pointer.is_file() and (elsewhere := Path(pointer.read_text().strip())).is_file():  # CheckpointHook's out_dir
        paths.add(elsewhere)
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        try:
            load_for_resume(path)
        except (RuntimeError, ValueError) as error:
            print(f'--resume passes over {path}: {error}')
        else:
            return path
    return None


def load_for_resume(path: str | os.PathLike) -> dict:
    """The checkpoint at `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: training cannot go on from it.
        RuntimeError: it is damaged or no checkpoint.
    """
    checkpoint = load_checkpoint_file(path)
    if not isinstance(checkpoint, dict) or 'optimizer' not in checkpoint or 'iter' not in checkpoint.get('meta', {}):
        raise ValueError(
            f"{path} holds weights without the optimizer's state ('best' and published checkpoints do); training "
            f'cannot go on from it. To start a new run with its weights: --cfg-options load_from={path}'
        )
    return checkpoint
