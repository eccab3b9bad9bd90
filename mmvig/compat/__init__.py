"""What today's torch, setuptools, transformers and matplotlib, and large images, need from the OpenMMLab releases.

One file a cause.

`import mmvig` calls `apply`. Every fix looks whether its cause is present in this environment, does nothing where it
is not, and otherwise waits for the import of the library it mends; `report` says what was changed and why.
"""

from mmvig.compat import (
    checkpoint_loading,
    mask_padding,
    mask_transfer,
    mmcv_ext,
    mmseg_tokenizer,
    multimodal,
    package_metadata,
    published,
    visualizer,
)
from mmvig.compat.change import Change

__all__ = ['Change', 'apply', 'report']

FIXES = (
    mmcv_ext,
    checkpoint_loading,
    published,
    package_metadata,
    multimodal,
    mmseg_tokenizer,
    visualizer,
    mask_transfer,
    mask_padding,
)
_changes: dict[str, Change | None] = {}


def apply() -> None:
    """Install every fix whose cause is present. A second call does nothing."""
    for fix in FIXES:
        if fix.__name__ not in _changes:
            _changes[fix.__name__] = fix.apply()


def report() -> list[Change]:
    """The changes made in this process, in the order of `FIXES`; empty where nothing is broken."""
    return [change for change in _changes.values() if change is not None]
