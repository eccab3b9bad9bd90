"""The import hooks, on modules written for the occasion."""

import importlib
import sys

import pytest

from mmvig.compat import imports


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module that is not imported yet: `value = 1`."""
    name = f'mm_{tmp_path.name}'.replace('-', '_').replace('[', '_').replace(']', '_')
    (tmp_path / f'{name}.py').write_text('value = 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    imports._PATCHES.patches.pop(name, None)
    sys.modules.pop(name, None)


def test_a_patch_waits_for_the_import(module: str):
    imports.after_import(module, lambda loaded: setattr(loaded, 'value', loaded.value + 1))
    imports.after_import(module, lambda loaded: setattr(loaded, 'value', loaded.value * 10))
    assert module not in sys.modules
    loaded = importlib.import_module(module)
    assert loaded.value == 20
    assert loaded.__file__.endswith(f'{module}.py')
    assert importlib.reload(loaded).value == 20


def test_a_patch_of_a_loaded_module_is_immediate(module: str):
    loaded = importlib.import_module(module)
    imports.after_import(module, lambda loaded: setattr(loaded, 'value', 2))
    assert loaded.value == 2


def test_a_module_that_does_not_exist_stays_missing():
    imports.after_import('mm_no_such_module', lambda loaded: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module('mm_no_such_module')
    del imports._PATCHES.patches['mm_no_such_module']


@pytest.mark.parametrize(('position', 'expected'), [(0, 'ours'), (10**6, 1)])
def test_a_stand_in_goes_first_or_last(module: str, position: int, expected, monkeypatch):
    finder = imports.StandIn(module, lambda loaded: setattr(loaded, 'value', 'ours'))
    monkeypatch.setattr(sys, 'meta_path', sys.meta_path.copy())
    sys.meta_path.insert(position, finder)
    loaded = importlib.import_module(module)
    assert loaded.value == expected
    assert loaded.__spec__ is not None and importlib.util.find_spec(module) is loaded.__spec__


def test_rebind_reaches_names_imported_elsewhere(module: str):
    loaded = importlib.import_module(module)
    loaded.function = loaded.alias = old = lambda: 'old'
    imports.rebind(old, new := lambda: 'new')
    assert loaded.function is loaded.alias is new


def test_what_is_installed():
    assert imports.installed('json') and not imports.installed('mm_no_such_module')
    assert imports.distribution_version('pytest') == pytest.__version__
    assert imports.distribution_version('mm-no-such-distribution') is None
