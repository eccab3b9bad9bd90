"""The fixes together, on the installed libraries."""

import sys

from mmvig import compat


def test_import_is_light(python):
    loaded = python('import mmvig; print(*sys.modules)').split()
    assert 'mmvig' in loaded
    assert not {'torch', 'numpy', 'triton', 'mmengine', 'mmcv', 'mmdet'} & set(loaded)


def test_swap_backbone_comes_when_it_is_asked_for(python):
    python("""
        import sys, mmvig
        assert not {'mmvig.apis', 'triton'} & set(sys.modules)
        from mmvig import swap_backbone
        import mmvig.apis
        assert swap_backbone is mmvig.swap_backbone is mmvig.apis.swap_backbone
        assert not hasattr(mmvig, 'no_such_name')
    """)


def test_apply_is_idempotent():
    before, report = list(sys.meta_path), compat.report()
    compat.apply()
    assert sys.meta_path == before and compat.report() == report


def test_report_names_cause_and_cure():
    for change in compat.report():
        assert all(change), change


def test_all_three_libraries_import(python):
    python("""
        import mmvig
        import mmdet, mmseg, mmpretrain
        for library in 'mmdet', 'mmseg', 'mmpretrain':
            __import__(f'{library}.utils').utils.register_all_modules(init_default_scope=False)
        from mmengine.registry import MODELS
        for name in 'mmdet.MaskRCNN', 'mmseg.EncoderDecoder', 'mmpretrain.ImageClassifier':
            assert MODELS.get(name), name
    """)


def test_libraries_imported_before_are_mended_too(python):
    python(
        """
        import mmcv
        from mmengine.runner import CheckpointLoader
        from mmengine.utils import is_installed
        import mmengine.config.config as user
        stock = CheckpointLoader.load_checkpoint
        import mmvig
        from mmvig.compat import package_metadata
        assert CheckpointLoader.load_checkpoint != stock
        assert user.is_installed is package_metadata.is_installed is not is_installed
        assert user.get_installed_path is package_metadata.get_installed_path
        import mmcv.ops
        """,
        block=('pkg_resources',),
    )


def test_config_addresses_resolve_whatever_is_imported_first(python):
    python("""
        from mmengine.config.utils import MODULE2PACKAGE
        import mmvig
        assert MODULE2PACKAGE['mmvig'] == 'mmvig'
    """)
