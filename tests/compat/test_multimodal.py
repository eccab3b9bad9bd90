"""mmpretrain beside a transformers 5 that lacks the names which its image-and-text models import."""

import pytest


@pytest.fixture
def transformers(tmp_path):
    """A folder with a distribution `transformers` 5.17.0 whose modules are there and hold nothing."""
    package = tmp_path / 'site' / 'transformers'
    for name in ('', 'modeling_utils', 'models', 'models/auto', 'models/auto/auto_factory', 'models/bert'):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / '__init__.py').touch()
    metadata = tmp_path / 'site' / 'transformers-5.17.0.dist-info' / 'METADATA'
    metadata.parent.mkdir()
    metadata.write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n')
    return tmp_path / 'site'


def test_import_fails_without_it(python, transformers):
    python(
        """
        import mmvig
        from mmvig.compat.imports import _PATCHES
        del _PATCHES.patches['mmpretrain.utils.dependency']
        try:
            import mmpretrain.models
        except ImportError as error:
            assert 'transformers' in str(error)
        else:
            sys.exit('mmpretrain imports beside transformers 5')
        """,
        path=transformers,
    )


def test_all_other_models_work_and_those_say_what_they_need(python, transformers):
    python(
        """
        import mmvig
        import mmdet.models
        assert mmdet.models.reid.base_reid.mmpretrain is not None
        import mmpretrain.datasets
        from mmpretrain.registry import MODELS
        assert MODELS.get('ImageClassifier') and MODELS.get('SwinTransformer')
        try:
            MODELS.build(dict(type='BlipCaption'))
        except ImportError as error:
            assert 'BlipCaption' in str(error) and 'transformers>=4.28,<5' in str(error), error
        else:
            sys.exit('built')
        """,
        path=transformers,
    )


@pytest.mark.parametrize(('version', 'acts'), [('5.0.0rc1', True), ('4.57.6', False)])
def test_only_transformers_5_is_the_cause(version: str, acts: bool, python, transformers):
    metadata = transformers / 'transformers-5.17.0.dist-info' / 'METADATA'
    metadata.write_text(metadata.read_text().replace('5.17.0', version))
    names = python(
        'from mmvig import compat; print(*(change.name for change in compat.report()), sep=",")', path=transformers
    )
    assert ('mmpretrain models' in names) == acts
