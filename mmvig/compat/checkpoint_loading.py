"""Checkpoints under torch 2.6 and newer, which unpickle tensors and plain containers alone (`weights_only=True`).

MMEngine's checkpoints also hold numpy numbers and, in their log, HistoryBuffers, so that stock MMEngine can neither
resume nor load them; onedl-mmengine loads again, unguarded, whatever torch has refused. Here those few names are
answered, for the length of a load, by functions of this file that build numeric arrays and HistoryBuffers and nothing
else; `weights_only` stays on. The real numpy and builtins functions would open what it closes: a pickled dtype may
claim that its bytes are pointers to objects, and `builtins.getattr`, which HistoryBuffer's pickle asks for, reaches
from any class to everything.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

from mmvig.compat.change import Change
from mmvig.compat.imports import after_import, distribution_version, installed

__all__ = ['CheckpointError', 'apply', 'load_checkpoint_file']

STATISTICS = ('mean', 'max', 'min', 'current')
LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the start of the files of torch before 1.6


def apply() -> Change | None:
    """Guard MMEngine's loading of files, from torch 2.6 on."""
    torch = distribution_version('torch')
    if torch is None or _release(torch) < (2, 6):
        return None
    after_import('mmengine.runner.checkpoint', _patch)
    cause = 'torch 2.6 and newer load weights_only by default and refuse what MMEngine saves beside the weights'
    if distribution_version('onedl-mmengine'):
        cause = 'onedl-mmengine loads again with weights_only=False what torch refuses, which runs what a file holds'
    return Change(
        name='checkpoint loading',
        cause=cause,
        action="resume, load_from, init_cfg and init_detector also accept numeric arrays and MMEngine's log; "
        'weights_only stays on, for downloads as well',
        cure='nothing to do',
    )


class CheckpointError(RuntimeError, pickle.UnpicklingError):
    """A file that is damaged, is no checkpoint, or asks for more than data."""


class _Refused(Exception):
    """What a file asks for and does not get; no UnpicklingError, which torch would rewrite on its way."""


def load_checkpoint_file(path: str | os.PathLike, map_location: Any = 'cpu') -> Any:
    """What `torch.save` wrote to `path`, MMEngine's checkpoints included, without running anything the file holds.

    Args:
        path: A local file.
        map_location: As in `torch.load`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, is no checkpoint, or asks for more than data; it says which, and the cure.
    """
    import torch

    with _reading(str(path)):
        return _plain(torch.load(path, map_location=map_location, weights_only=True))


def _patch(checkpoint: ModuleType) -> None:
    """Guard the one method through which MMEngine loads files of every scheme."""
    loader = checkpoint.CheckpointLoader
    stock = loader.load_checkpoint.__func__

    @wraps(stock)
    def load_checkpoint(cls, filename, map_location=None, logger='current'):
        with _reading(filename):
            return _plain(stock(cls, filename, map_location, logger))

    loader.load_checkpoint = classmethod(load_checkpoint)
    checkpoint.load_url = partial(checkpoint.load_url, weights_only=True)  # torch.hub still unpickles anything
    if hasattr(checkpoint, '_safe_torch_load'):  # of onedl-mmengine, which tries again without weights_only
        checkpoint._safe_torch_load = partial(checkpoint.torch.load, weights_only=True)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Answer for the names of MMEngine's pickles while a file is read, and say what is wrong with a bad file."""
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    answers, before = _answers(), get_safe_globals()
    clear_safe_globals()  # a name that the user allowed for good, numpy.dtype say, would compete with its answer
    add_safe_globals([entry for entry in before if _name(entry) not in map(_name, answers)] + answers)
    try:
        yield
    except Exception as error:
        reason = _diagnose(path, error)
        if reason is None:
            raise
        raise CheckpointError(reason) from error
    finally:
        learnt = [entry for entry in get_safe_globals() if entry not in answers]  # torch adds some as it imports
        clear_safe_globals()
        add_safe_globals(before + learnt)


def _name(entry) -> str:
    """The dotted name that an entry of torch's list allows."""
    return entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'


# What may be built


class _Dtype:
    """A numeric dtype; of its pickled state only the byte order counts, which carries no flags into numpy."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, '='

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def read(self, data: bytes):
        """The numbers (n,) in these bytes."""
        import numpy as np

        dtype = np.dtype(self.code).newbyteorder(self.order)
        if dtype.kind not in 'biufcSU':
            raise _Refused(f'an array of numpy dtype {dtype}, which is no kind of number or text')
        return np.frombuffer(data, dtype) if data else np.empty(0, dtype)  # numpy reads no empty buffer


class _Array:
    """The place of a numpy array, whose contents come in a second step of the pickle."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = dtype.read(data).reshape(shape, order='F' if is_fortran else 'C').copy()


def _scalar(dtype: _Dtype, data: bytes):
    return dtype.read(data)[0]


def _statistic(owner: type, name: str) -> Callable:
    """What `builtins.getattr` answers: the four statistics of HistoryBuffer."""
    from mmengine.logging import HistoryBuffer

    if not isinstance(owner, type) or not issubclass(owner, HistoryBuffer) or name not in STATISTICS:
        raise _Refused(f'getattr({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)


@cache
def _answers() -> list:
    """The names that MMEngine's checkpoints ask for, each answered by something of this file."""

    def named(answer, name: str):
        answer.__module__, _, answer.__qualname__ = name.rpartition('.')
        answer.__name__ = answer.__qualname__
        return answer

    def function(answer, name: str):
        return named(lambda *args: answer(*args), name)

    answers = [_Array, _Dtype, function(_Dtype, 'numpy.dtype'), function(_Array, 'numpy.ndarray')]
    answers += [function(lambda *_: b'', 'builtins.bytes')]  # the contents of an empty array
    answers += [function(lambda text, _: text.encode('latin1'), '_codecs.encode')]  # of another; torch 2.5 knows it
    for core in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # numpy 2, numpy 1
        answers += [function(_Array, f'{core}._reconstruct'), function(_scalar, f'{core}.scalar')]
    if installed('mmengine'):
        from mmengine.logging import HistoryBuffer

        class History(HistoryBuffer):
            """Takes the numbers of a pickled HistoryBuffer; its methods are this process's own."""

            def __setstate__(self, state: dict) -> None:
                self.__class__ = HistoryBuffer
                self.__init__(max_length=state['max_length'])
                self._log_history, self._count_history = _plain(state['_log_history']), _plain(state['_count_history'])

        answers += [named(History, 'mmengine.logging.history_buffer.HistoryBuffer')]
        answers += [function(_statistic, 'builtins.getattr')]
    return answers


def _plain(value: Any) -> Any:
    """The loaded value with arrays put into their places, containers kept."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        for key, item in value.items():  # not update(), which adds where the dict is a Counter
            value[key] = _plain(item)
    elif isinstance(value, list):
        value[:] = map(_plain, value)
    elif type(value) is tuple:
        return tuple(map(_plain, value))
    return value


# What is wrong with a file


def _diagnose(path: str, error: Exception) -> str | None:
    """A sentence on the file that made `error`, with the cure; None where the file is not to blame."""
    if isinstance(error, _Refused):
        return _refusal(path, str(error))
    if refused := re.search(r'GLOBAL (\S+)|unrecognized function (<.*?>)|but got (<class .*?>)', str(error)):
        return _refusal(path, next(filter(None, refused.groups())))
    file = _local_file(path)
    if not os.path.isfile(file) or not os.access(file, os.R_OK):
        return None
    size = os.path.getsize(file)
    damaged = _is_damaged(file, error)
    if damaged is None:
        with open(file, 'rb') as stream:
            head = stream.read(24)
        return (
            f'{file} is no PyTorch checkpoint: torch.save did not write its {size} bytes, {head!r} and on. '
            'A web page or a Git LFS pointer in its place means that the download went wrong.'
        )
    if damaged:
        again = 'Fetch it again' if file == path else 'Delete this file to download it again'
        return (
            f'{file} is a damaged checkpoint ({size} bytes): its writing, copying or download was cut off. {again}, '
            'or go on from an earlier one of its folder.'
        )
    return None  # a sound file; the device that it wants is not there, say


def _is_damaged(file: str, error: Exception) -> bool | None:
    """Whether a file of torch.save has lost a part; None where it is no such file."""
    with open(file, 'rb') as stream:
        head = stream.read(len(LEGACY))
    if head.startswith(b'PK\x03\x04'):
        try:
            with zipfile.ZipFile(file) as archive:
                if not any(name.endswith('/data.pkl') for name in archive.namelist()):
                    return None
                return archive.testzip() is not None
        except zipfile.BadZipFile:
            return True
    if head == LEGACY:
        return isinstance(error, (pickle.UnpicklingError, EOFError)) or 'unexpected EOF' in str(error)
    return None


def _refusal(path: str, what: str) -> str:
    return (
        f'{path} was not loaded: beside data it holds {what}, which loading would have to import and call. '
        'A file of weights needs no such thing. If you know where it comes from and trust it, allow the name with '
        'torch.serialization.add_safe_globals before loading it.'
    )


def _local_file(path: str) -> str:
    """The file on this machine behind a path or an address that torch.hub has downloaded."""
    address = urlparse(path)
    if address.scheme in ('http', 'https'):
        from torch.hub import get_dir

        return os.path.join(get_dir(), 'checkpoints', os.path.basename(address.path))
    return os.path.expanduser(path)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', text)[:2])
