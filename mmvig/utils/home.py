"""Where the files beside the package are."""

from importlib.util import find_spec
from pathlib import Path

__all__ = ['home']


def home() -> Path:
    """The folder with `configs`, `tools` and `model-index.yml`: in an installed package, or the root of the sources."""
    package = Path(find_spec('mmvig').submodule_search_locations[0])
    installed = package / '.mim'
    return installed if installed.exists() else package.parent
