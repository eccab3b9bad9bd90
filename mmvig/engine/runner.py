"""MMEngine's Runner with exact resuming, safe interruption and a display of progress."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as MMEngineRunner
from torch import nn
from torch.utils.data import DataLoader

from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.engine.batches import positioned
from mmvig.engine.checkpoint import publish
from mmvig.engine.interrupt import InterruptHook
from mmvig.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmvig.engine.param_groups import merge_param_groups
from mmvig.engine.settings import SetupError

__all__ = ['Runner', 'build_runner']


class Runner(MMEngineRunner):
    """Takes every config that MMEngine's Runner takes.

    - Resuming continues with the losses of the uninterrupted run (`mmvig.engine.resume`), for the train loops
      'EpochBasedTrainLoop' and 'IterBasedTrainLoop'; write 'mmengine.EpochBasedTrainLoop' for MMEngine's own.
    - The first Ctrl-C or SIGTERM in `train` leaves a checkpoint and raises `Interrupted`.
    - `test` takes checkpoints of its model alone, and a data set that is empty or damaged is named.
    - A checkpoint has its name only once it is complete, and an old one is deleted only once the new one is
      (`mmvig.engine.checkpoint`).
    - `default_hooks.progress`, a ProgressHook, shows how far the run is; the log file is MMEngine's, and the console
      gets its warnings alone. `default_hooks=dict(progress=None)` gives MMEngine's console back.
    """

    _exact = False  # whether a checkpoint must be of this very model

    def train(self):
        interrupt = InterruptHook()
        self.register_hook(interrupt)
        with interrupt.listening():
            try:
                return super().train()
            finally:
                self.call_hook('close_display')

    def val(self) -> dict:
        try:
            return super().val()
        finally:
            self.call_hook('close_display')

    def test(self) -> dict:
        self._exact = True
        try:
            return super().test()
        finally:
            self._exact = False
            self.call_hook('close_display')

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        model = self.model.module if is_model_wrapper(self.model) else self.model
        unfit: list[str] = []

        def compare(module: nn.Module, names) -> None:
            """As a hook of torch it learns what the model lacks and what the file has too much."""
            unfit.extend(name for name in names.missing_keys if not name.endswith('num_batches_tracked'))
            unfit.extend(name for name in names.unexpected_keys if name.startswith('backbone.'))

        hook = model.register_load_state_dict_post_hook(compare)
        try:
            checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        finally:
            hook.remove()
        own, given = model.state_dict(), checkpoint.get('state_dict', {})
        unfit += [name for name, value in given.items() if name in own and value.shape != own[name].shape]
        if unfit and self._exact:
            raise CheckpointError(
                f'{filename} is no checkpoint of this model, whose test would say nothing: {len(unfit)} parameters are '
                f'in one of them alone or of another shape, such as {unfit[:3]}; take the config that it was trained by'
            )
        return checkpoint

    @staticmethod
    def build_dataloader(dataloader: dict, *args, **kwargs) -> DataLoader:
        try:
            return MMEngineRunner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError as error:
            dataset = dataloader.get('dataset') or {}
            place = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
            empty = 'at least one array to concatenate' in str(error)  # MMEngine's list of samples
            raise SetupError(
                f'the data set {dataset.get("type")} of {place or "the config"} '
                + (
                    'holds no sample: its annotations name none, or a filter leaves none'
                    if empty
                    else f'cannot be read: {error}'
                )
            ) from error

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        if self.cfg.get('default_hooks', {}).get('progress', {}) is not None:
            for handler in logger.handlers:
                if not isinstance(handler, logging.FileHandler):
                    handler.setLevel(max(handler.level, logging.WARNING))
                    handler.addFilter(_is_for_users)
        return logger

    def build_optim_wrapper(self, optim_wrapper: dict | OptimWrapper | OptimWrapperDict):
        built = super().build_optim_wrapper(optim_wrapper)
        if isinstance(optim_wrapper, dict):  # one that was built elsewhere stays as it is
            for wrapper in built.values() if isinstance(built, OptimWrapperDict) else [built]:
                merge_param_groups(wrapper.optimizer)
        return built

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        with self._prints_in_log():
            if isinstance(loop, dict) and isinstance(self._train_dataloader, dict):
                settings = dict(loop)
                settings.pop('_scope_', None)  # of the library whose schedule the config inherits
                by_epoch = settings.pop('by_epoch', None)
                kind = settings.pop('type', 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
                for cls, endless in ((EpochBasedTrainLoop, False), (IterBasedTrainLoop, True)):
                    if kind == cls.__name__:
                        batches = positioned(self._train_dataloader, seed=self.seed, endless=endless)
                        return cls(self, batches, **settings)
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        with self._prints_in_log():
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        with self._prints_in_log():
            return super().build_test_loop(loop)

    @contextmanager
    def _prints_in_log(self) -> Iterator[None]:
        """Datasets and metrics are read here, which pycocotools tells the standard output about."""
        with redirect_stdout(io.StringIO()) as printed:
            yield
        self.logger.info(printed.getvalue())

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        ours = dict(resume=dict(type='mmvig.ResumeHook'), progress=dict(type='mmvig.ProgressHook'))
        merged = {**ours, 'checkpoint': dict(type='CheckpointHook', interval=1), **(hooks or {})}
        if isinstance(merged['checkpoint'], dict) and merged['checkpoint']['type'] == 'CheckpointHook':
            merged['checkpoint'] = dict(merged['checkpoint'], type='mmvig.CheckpointHook')
        super().register_default_hooks(
            {name: hook for name, hook in merged.items() if hook is not None or name not in ours}
        )

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        if '://' in str(out_dir):  # object stores publish complete files only
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        with publish(Path(out_dir), filename, is_main_process()) as unfinished:
            super().save_checkpoint(out_dir, unfinished, *args, **kwargs)


def _is_for_users(record: logging.LogRecord) -> bool:
    """Whether a warning is not MMEngine's to its own developers, which every run repeats."""
    return 'will be deprecated in future' not in record.getMessage()


def build_runner(cfg: Config) -> MMEngineRunner:
    """The runner that `cfg.runner_type` names, else ours."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
