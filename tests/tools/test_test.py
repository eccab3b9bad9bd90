import json
import pickle

import pytest
from torch import nn

METRIC = dict(mmdet='coco/bbox_mAP', mmseg='mIoU', mmpretrain='accuracy/top1')


@pytest.fixture
def test(run_tool, library_file, untrained, tmp_path):
    """Runs tools/test.py on an untrained model of a library: (exit status or message, standard output)."""

    def run(library: str, *arguments: object) -> tuple[int | str, str]:
        file = library_file(library)
        return run_tool('test.py', file, untrained(file), '--work-dir', tmp_path / 'work', *arguments)

    return run


@pytest.mark.parametrize('library', METRIC)
def test_metrics_and_pictures(test, library, tmp_path):
    interval = '+default_hooks.visualization.interval=1'
    arguments = ['--out', tmp_path / 'metrics.json', '--show-dir', tmp_path / 'drawn', '--cfg-options', interval]
    status, said = test(library, *arguments)
    assert status == 0, said
    assert 'test   iter' in said
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert METRIC[library] in metrics
    assert ('AP50' if library == 'mmdet' else METRIC[library]) in said
    assert any(path.suffix in ('.jpg', '.png') for path in tmp_path.rglob('drawn/**/*'))


@pytest.mark.parametrize('library', ['mmdet', 'mmpretrain'])
def test_predictions_and_mirrored_images(test, library, tmp_path):
    arguments = ['--tta', '--out', tmp_path / 'found.pkl']
    if library == 'mmdet':
        status, _ = test(library, *arguments)
        assert status.startswith('--tta: ') and 'masks' in status
        arguments += ['--cfg-options', 'model.roi_head.mask_head=None', 'test_evaluator.metric=bbox']
    status, said = test(library, *arguments)
    assert status == 0, said
    found = pickle.loads((tmp_path / 'found.pkl').read_bytes())
    assert ('pred_instances' if library == 'mmdet' else 'pred_score') in found[0]


def test_label_maps(test, tmp_path):
    assert test('mmseg', '--out', tmp_path / 'maps')[0] == 0
    assert sorted(path.name for path in (tmp_path / 'maps').iterdir()) == ['000001.png', '000002.png', '000003.png']


def test_missing_checkpoint_and_data(run_tool, library_file, tmp_path):
    file = library_file('mmdet')
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', 'test_dataloader.dataset.data_root=nowhere']
    status, said = run_tool('test.py', file, 'gone.pth', *options)
    assert 'load_from: there is no file gone.pth' in status
    assert 'test_dataloader.dataset: the data are not where' in status
    assert said == ''


@pytest.mark.parametrize('library', METRIC)
def test_compile(test, library, monkeypatch):
    """The backbone is what compiles, once, whatever the library."""
    compiled = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self, **settings: compiled.append(type(self).__name__))
    status, said = test(library, '--compile')
    assert status == 0, said
    assert compiled == [dict(mmseg='ResNetV1c').get(library, 'ResNet')]
