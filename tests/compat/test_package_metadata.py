"""MMEngine's look-ups with and without pkg_resources, and the fork's."""

import os
import textwrap
from importlib.metadata import PackageNotFoundError

import mmdet
import mmseg
import pytest

from mmvig.compat import package_metadata as ours
from mmvig.compat.imports import distribution_version

FORK = distribution_version('onedl-mmengine') is not None
ADDRESS = """
from mmengine.config import Config
open('config.py', 'w').write("_base_ = ['mmseg::_base_/models/upernet_r50.py']")
assert Config.fromfile('config.py').model.type == 'EncoderDecoder'
"""


def test_config_addresses_break_without_it(python):
    """The cause. Where this fails, the fix has had its day."""
    code = f'try:{textwrap.indent(ADDRESS, "    ")}except ModuleNotFoundError as error:\n    print(error)'
    cause = 'mmsegmentation is not installed' if FORK else 'pkg_resources'
    assert cause in python(code, block=('pkg_resources',))


@pytest.mark.parametrize('order', ['import mmvig', 'import mmengine.config; import mmvig'], ids=['first', 'later'])
def test_config_addresses_resolve(order: str, python):
    python(order + ADDRESS, block=('pkg_resources',))


@pytest.mark.skipif(FORK, reason='the look-ups of onedl-mmengine err with pkg_resources too')
def test_stock_look_ups_stay_where_they_work(python, tmp_path):
    (tmp_path / 'pkg_resources.py').touch()
    python(
        """
        import mmvig, mmengine.utils
        assert mmengine.utils.is_installed.__module__ == 'mmengine.utils.package_utils'
        """,
        path=tmp_path,
    )


def test_is_installed():
    assert ours.is_installed('mmsegmentation') and ours.is_installed('mmseg')
    assert not ours.is_installed('mm-no-such-package')


def test_get_installed_path():
    assert ours.get_installed_path('mmdet') == os.path.dirname(mmdet.__file__)
    assert (
        ours.get_installed_path('mmsegmentation') == ours.get_installed_path('mmseg') == os.path.dirname(mmseg.__file__)
    )
    with pytest.raises(PackageNotFoundError):
        ours.get_installed_path('mm_no_such_package')


def test_get_installed_path_of_a_namespace_package(tmp_path, monkeypatch):
    (tmp_path / 'mm_namespace').mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="package='mm_namespace' is a namespace package"):
        ours.get_installed_path('mm_namespace')


def test_a_fork_and_a_distribution_of_several_modules(tmp_path, monkeypatch):
    for module in ('aardvark', 'mm_forked'):
        (tmp_path / module).mkdir()
        (tmp_path / module / '__init__.py').touch()
    for name, modules in (('onedl_mm_stock', 'mm_forked'), ('mm_forked', 'aardvark\nmm_forked')):
        metadata = tmp_path / f'{name}-1.0.dist-info'
        metadata.mkdir()
        (metadata / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        (metadata / 'top_level.txt').write_text(modules)
    monkeypatch.syspath_prepend(tmp_path)
    assert ours.is_installed('mm_stock') and ours.package2module('mm_stock') == 'mm_forked'
    for package in ('mm_stock', 'mm_forked'):
        assert ours.get_installed_path(package) == str(tmp_path / 'mm_forked')


def test_package2module(tmp_path, monkeypatch):
    assert ours.package2module('mmsegmentation') == 'mmseg'
    with pytest.raises(PackageNotFoundError, match='mm_no_such_package'):
        ours.package2module('mm_no_such_package')
    (tmp_path / 'mm_mute-1.0.dist-info').mkdir()
    (tmp_path / 'mm_mute-1.0.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: mm_mute\nVersion: 1.0\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="package='mm_mute' does not say"):
        ours.package2module('mm_mute')
