"""Import hooks: a patch that runs right after a module is imported, and a module of our own in a missing one's place.

Both wait for the import, so that `import mmvig` loads none of the libraries it mends.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ['StandIn', 'after_import', 'distribution_version', 'installed', 'rebind']

Patch = Callable[[ModuleType], None]


def installed(name: str) -> bool:
    """Whether `import name` would find a top-level module; nothing is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a finder that forbids the name, a module without a spec
        return False


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution ('mmcv-lite', not 'mmcv'), or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def after_import(name: str, patch: Patch) -> None:
    """Call `patch(module)` as soon as the module `name` has been executed: now, if it already was."""
    _PATCHES.patches.setdefault(name, []).append(patch)
    if name in sys.modules:
        patch(sys.modules[name])


def rebind(old: object, new: object) -> None:
    """Put `new` wherever a loaded OpenMMLab module holds `old` under some name, `from x import old` included."""
    for name, module in list(sys.modules.items()):
        if name.startswith('mm') and isinstance(module, ModuleType):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)


class _PatchFinder(MetaPathFinder):
    """Finds a module as everyone else would, and lets its loader run our patches after the module's own code."""

    def __init__(self):
        self.patches: dict[str, list[Patch]] = {}

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.patches:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for patch in self.patches[name]:
                patch(module)

        spec.loader.exec_module = exec_module  # the loader object belongs to this one module
        return spec


class StandIn(MetaPathFinder, Loader):
    """Finder and loader of one module, filled by `fill(module)`.

    Appended to `sys.meta_path` it serves a module that no other finder has; inserted at the front it goes before one
    that is there and cannot be imported.
    """

    def __init__(self, name: str, fill: Patch):
        self.name = name
        self.fill = fill

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_loader(name, self, origin=f'stand-in by {__package__}')

    def exec_module(self, module: ModuleType) -> None:
        self.fill(module)


_PATCHES = _PatchFinder()
sys.meta_path.insert(0, _PATCHES)
