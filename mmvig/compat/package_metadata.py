"""MMEngine's look-ups of installed packages, on which every `mmdet::...` config address depends.

`is_installed` and `get_installed_path` of stock MMEngine import `pkg_resources`, which setuptools 82 removed; here
`importlib.metadata` of the standard library answers the same. onedl-mmengine asks it too, and errs in two ways. It
does not know the names of its own family: mmsegmentation is not there for it, so that an `mmseg::...` address raises,
and `get_config` has pip install the stock package over the fork. And it takes the first module that a distribution
lists for the one that was asked for, which of mmvig is `bigla`.
"""

import os
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from types import ModuleType

from mmvig.compat.change import Change
from mmvig.compat.imports import after_import, distribution_version, installed, rebind

__all__ = ['apply', 'get_installed_path', 'is_installed', 'package2module']


def apply() -> Change | None:
    """Replace the three look-ups, where pkg_resources is gone and in the fork."""
    if distribution_version('onedl-mmengine'):
        cause = 'onedl-mmengine finds neither onedl-mmsegmentation by its addresses, `mmseg::...`, nor mmvig in a wheel'
        cure = 'nothing to do'
    elif installed('mmengine') and not installed('pkg_resources'):
        cause = 'setuptools 82 and newer bring no pkg_resources, which MMEngine imports for every `package::config`'
        cure = 'nothing to do; without mmvig: pip install "setuptools<82"'
    else:
        return None
    after_import('mmengine.utils.package_utils', _patch)
    return Change(
        name='package look-up',
        cause=cause,
        action='mmengine.utils.is_installed, get_installed_path and package2module use importlib.metadata',
        cure=cure,
    )


def _patch(package_utils: ModuleType) -> None:
    for ours in (is_installed, get_installed_path, package2module):
        theirs = getattr(package_utils, ours.__name__)
        if theirs is not ours:
            rebind(theirs, ours)
            setattr(package_utils, ours.__name__, ours)


def _find(package: str) -> Distribution:
    """The distribution of this name, or the fork of it that `onedl-` before the name makes."""
    for name in (package, f'onedl-{package}'):
        with suppress(PackageNotFoundError):
            return distribution(name)
    raise PackageNotFoundError(package)


def is_installed(package: str) -> bool:
    """Whether a distribution, or else an importable module that is no namespace package, has this name."""
    try:
        _find(package)
    except PackageNotFoundError:
        spec = find_spec(package)
        return spec is not None and spec.origin is not None
    return True


def get_installed_path(package: str) -> str:
    """The folder of an installed package's module.

    Args:
        package: Name of a distribution ('mmsegmentation') or of a module ('mmseg').

    Raises:
        PackageNotFoundError: Neither exists.
        RuntimeError: It is a namespace package, which has no one folder.
    """
    try:
        path = _find(package).locate_file(package)
    except PackageNotFoundError:
        module = package
    else:
        if os.path.isdir(path):
            return str(path)
        module = package2module(package)
    spec = find_spec(module)
    if spec is None:
        raise PackageNotFoundError(package)
    if spec.origin is None:
        raise RuntimeError(f'package={package!r} is a namespace package: it has no one folder')
    return os.path.dirname(spec.origin)


def package2module(package: str) -> str:
    """The module that a distribution installs: 'mmsegmentation' -> 'mmseg'.

    Raises:
        ValueError: The distribution does not say.
    """
    names = (_find(package).read_text('top_level.txt') or '').split()
    if not names:
        raise ValueError(f'package={package!r} does not say which module it installs (no top_level.txt)')
    return package if package in names else names[0]
