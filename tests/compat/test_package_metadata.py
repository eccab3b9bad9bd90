"""MMEngine's look-ups with and without pkg_resources."""

import os
import textwrap
from importlib.metadata import PackageNotFoundError

import mmdet
import mmseg
import pytest

from mmvig.compat import package_metadata as ours

ADDRESS = """
from mmengine.config import Config
open('config.py', 'w').write("_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']")
assert Config.fromfile('config.py').model.type == 'MaskRCNN'
"""


def test_config_addresses_break_without_it(python):
    code = f'try:{textwrap.indent(ADDRESS, "    ")}except ModuleNotFoundError as error:\n    print(error.name)'
    assert python(code, block=('pkg_resources',)).split() == ['pkg_resources']


@pytest.mark.parametrize('order', ['import mmvig', 'import mmengine.config; import mmvig'], ids=['first', 'later'])
def test_config_addresses_resolve(order: str, python):
    python(order + ADDRESS, block=('pkg_resources',))


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


def test_package2module(tmp_path, monkeypatch):
    assert ours.package2module('mmsegmentation') == 'mmseg'
    (tmp_path / 'mm_mute-1.0.dist-info').mkdir()
    (tmp_path / 'mm_mute-1.0.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: mm_mute\nVersion: 1.0\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="package='mm_mute' does not say"):
        ours.package2module('mm_mute')
