"""Checkpoints that are whole or not there: written aside, kept until the next one is safe, with errors that help."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.fileio import BaseStorageBackend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook

from mmvig.registry import HOOKS

__all__ = ['CheckpointHook', 'WriteError', 'publish']

UNFINISHED = 'checkpoint.part'  # one name a folder: what a killed run leaves, the next one overwrites
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(OSError):
    """A checkpoint could not be written; earlier ones are as they were."""


@contextmanager
def publish(folder: Path, name: str, is_writer: bool) -> Iterator[str]:
    """Gives a file name to write to inside `folder`, and at the end of the block renames that file to `name`.

    The data are on the disk before the file has its name, so a name never stands for a part of a checkpoint, also after
    a power cut. `is_writer`: whether this process of a distributed run is the one that writes.

    Raises:
        WriteError: the block or the renaming raised an OSError.
    """
    unfinished = folder / UNFINISHED
    try:
        yield unfinished.name
        if is_writer:
            with unfinished.open('rb') as file:
                os.fsync(file.fileno())
            os.replace(unfinished, folder / name)
    except OSError as error:
        cure = 'free some space' if error.errno in FULL else 'mend that'
        raise WriteError(
            error.errno,
            f'{folder / name} could not be written ({error.strerror or error}); earlier checkpoints are untouched. '
            f'To go on from the newest: {cure}, and run again with --resume',
        ) from error
    finally:
        if is_writer:
            unfinished.unlink(missing_ok=True)


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's, with `max_keep_ckpts` and `save_best` deleting the old file after the new one is written.

    MMEngine deletes first: a kill or a full disk in between leaves no checkpoint where one is kept.
    """

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        with self._deleting_last():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        if self.save_best:
            with self._deleting_last():
                super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _deleting_last(self) -> Iterator[None]:
        usual = self.file_backend
        self.file_backend = late = _DeletesLast(usual)
        try:
            yield
        finally:
            self.file_backend = usual
        written = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}  # one of them may have an old one's name
        written.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        for delete, path in late.deletions:
            if path not in written:
                delete(path)


class _DeletesLast:
    """A storage backend that remembers what to delete; the caller does it."""

    def __init__(self, backend: BaseStorageBackend) -> None:
        self.backend = backend
        self.deletions: list[tuple[Callable, str]] = []

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.deletions.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.deletions.append((self.backend.rmtree, path))
