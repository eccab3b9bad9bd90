import cv2
import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.dataset import ConcatDataset, RepeatDataset

from mmvig.engine.settings import SetupError
from mmvig.utils.dataset_browser import build_training_set, untransformed

LIBRARIES = ['mmdet', 'mmseg', 'mmpretrain']


@pytest.fixture
def browse(run_tool, library_file, tmp_path):
    """Runs tools/browse_dataset.py on a library's toy: (exit status or message, standard output, pictures by name)."""

    def run(library: str, *arguments: object, more: str = '') -> tuple[int | str, str, dict[str, np.ndarray]]:
        out, file = tmp_path / 'out', library_file(library)
        file.write_text(file.read_text() + more)
        status, said = run_tool('browse_dataset.py', file, '--out-dir', out, *arguments)
        return status, said, {path.name: cv2.imread(str(path)) for path in sorted(out.glob('*'))}

    return run


@pytest.mark.parametrize('library', LIBRARIES)
def test_original(browse, library, digit_scenes):
    status, said, pictures = browse(library, '--number', 2, '--mode', 'original')
    assert status == 0 and 'images  iter 2/2' in said and said.splitlines()[-1].startswith('2 of ')
    assert [name[:7] for name in pictures] == ['000000_', '000001_']
    folder = digit_scenes / ('crops/train' if library == 'mmpretrain' else 'images/train')
    for name, picture in pictures.items():
        image = cv2.imread(str(next(folder.rglob(f'{name[7:-4]}.*'))))
        if library == 'mmpretrain':  # drawn larger, for its text; compared below that
            image = cv2.resize(image, picture.shape[1::-1])[40:]
            picture = picture[40:]
        assert picture.shape == image.shape
        difference = np.abs(picture.astype(int) - image).mean(axis=(0, 1))
        swapped = np.abs(picture[..., ::-1].astype(int) - image).mean()
        assert difference.mean() < swapped  # the colours are the right way round
        assert library == 'mmpretrain' or difference.mean() > 1  # and there is something drawn


@pytest.mark.parametrize('library', LIBRARIES)
def test_transformed(browse, library):
    resize = dict(type='Resize', scale=(72, 48)) | (dict(keep_ratio=False) if library != 'mmpretrain' else {})
    status, _, pictures = browse(library, '--number', 1, more=f'train_pipeline.insert(-1, {resize})\n')
    assert status == 0, status
    (picture,) = pictures.values()
    assert picture.shape == ((224, 336, 3) if library == 'mmpretrain' else (48, 72, 3))


def test_samples_of_several_views(browse):
    views = "train_pipeline.insert(-1, dict(type='MultiView', num_views=2, transforms=[[]]))\n"
    status, _, pictures = browse('mmpretrain', more=views)
    assert 'packing of one image, got inputs of type list' in status and not pictures


def test_untransformed():
    leaf = dict(
        type='CocoDataset',
        pipeline=[dict(type='mmdet.LoadAnnotations'), dict(type='Resize'), dict(type='PackDetInputs')],
    )
    kept = dict(leaf, pipeline=[leaf['pipeline'][0], leaf['pipeline'][2]])
    mosaic = dict(type='MultiImageMixDataset', dataset=leaf, pipeline=[dict(type='Mosaic')])
    several = dict(type=RepeatDataset, times=2, dataset=dict(type=ConcatDataset, datasets=[mosaic, leaf]))
    expected = dict(type=RepeatDataset, times=2, dataset=dict(type=ConcatDataset, datasets=[kept, kept]))
    assert untransformed(several) == expected
    assert len(leaf['pipeline']) == 3  # the config is left alone


def test_what_cannot_be_drawn(run_tool, toy_file, library_file, tmp_path):
    status, _ = run_tool('browse_dataset.py', toy_file, '--out-dir', tmp_path / 'out')
    assert 'default_scope must be one of' in status
    options = ['--out-dir', tmp_path / 'out', '--cfg-options', 'train_dataloader.dataset.data_root=nowhere']
    status, _ = run_tool('browse_dataset.py', library_file('mmseg'), *options)
    assert 'train_dataloader.dataset: the data are not where' in status
    assert run_tool('browse_dataset.py', toy_file, '--number', 0)[0] == 2
    cfg = Config.fromfile(library_file('mmdet'))
    with pytest.raises(SetupError, match="--mode must be one of .*got 'both'"):
        build_training_set(cfg, 'both')
    with pytest.raises(SetupError, match='no train_dataloader'):
        build_training_set(ConfigDict(default_scope='mmdet'), 'original')
