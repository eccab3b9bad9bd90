"""mmseg without ftfy and regex, which it imports and does not declare.

`import mmseg` loads the tokenizer of its one text-prompted segmentor, and that imports both. Where one is missing, a
module that raises when it is used takes the tokenizer's place, and everything else of mmseg works.
"""

import sys
from types import ModuleType
from typing import NoReturn

from mmvig.compat.change import Change
from mmvig.compat.imports import StandIn, installed

__all__ = ['apply']

CURE = 'pip install ftfy regex'


def apply() -> Change | None:
    """Put a placeholder before the tokenizer, where it could not be imported."""
    missing = [name for name in ('ftfy', 'regex') if not installed(name)]
    if not missing or not installed('mmseg'):
        return None
    sys.meta_path.insert(0, StandIn('mmseg.utils.tokenizer', _fill))
    return Change(
        name='mmseg tokenizer',
        cause=f'mmseg imports {" and ".join(missing)}, which it does not declare and nothing has installed',
        action='mmseg.utils.tokenizer raises when it is used (text-prompted segmentation); the rest of mmseg works',
        cure=CURE,
    )


def _fill(module: ModuleType) -> None:
    module.__getattr__ = _refuse


def _refuse(name: str):
    if name.startswith('__'):
        raise AttributeError(f"module 'mmseg.utils.tokenizer' has no attribute {name!r}")

    def use(*args, **kwargs) -> NoReturn:
        raise ImportError(f'mmseg.utils.tokenizer.{name} needs ftfy and regex: {CURE}')

    return use
