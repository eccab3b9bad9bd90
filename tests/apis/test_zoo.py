"""Our models by name and by address, in our own functions and in those of MMEngine and of the three libraries."""

import subprocess
import sys
from pathlib import Path

import mmengine.hub
import numpy as np
import pytest
import torch

from mmvig.apis import find_model, get_model, list_models, zoo
from mmvig.utils import home as home_of

ROOT = Path(__file__).parents[2]
DETECTOR = 'mask-rcnn_vigh-gla-nano_fpn_quickstart_digits'
SEGMENTOR = 'vigh-gla-nano_upernet_1xb8-2k_digits-448x448'
CLASSIFIER = 'vigh-gla-nano_1xb64_digits-64px'
ADDRESSES = {
    DETECTOR: f'mmvig::mmdet/digits/{DETECTOR}.py',
    SEGMENTOR: f'mmvig::mmseg/digits/{SEGMENTOR}.py',
    CLASSIFIER: f'mmvig::mmpretrain/digits/{CLASSIFIER}.py',
}
KINDS = {DETECTOR: 'MaskRCNN', SEGMENTOR: 'EncoderDecoder', CLASSIFIER: 'ImageClassifier'}
DIGITS = tuple('0123456789')
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def checkpoint(request, tmp_path) -> Path:
    """A file as a run of ours leaves it, of the model that the test names."""
    name = request.param
    classes = ('background', *DIGITS) if name == SEGMENTOR else DIGITS
    meta = dict(dataset_meta=dict(classes=classes, palette=[[20 * i] * 3 for i in range(len(classes))]))
    torch.save(dict(state_dict=get_model(name).state_dict(), meta=meta), tmp_path / f'{name}.pth')
    return tmp_path / f'{name}.pth'


def test_list_models():
    names = list_models()
    assert names == sorted(set(names)) and len(names) == len(list(ROOT.glob('configs/mm*/[!_]*/*.py')))
    assert list_models('vigh-gla-?iny_3rdparty_in1k') == ['vigh-gla-tiny_3rdparty_in1k']
    assert list_models('no such*') == []


def test_find_model():
    entry = find_model('vigh-gla-tiny_3rdparty_in1k')
    assert entry.config.name == 'vigh-gla-tiny_8xb128-amp_in1k.py' and entry.config.exists()
    assert entry.weights.endswith('vig_h_t_82p8acc.pth')
    with pytest.raises(ValueError, match="'vigh-gla-tiny_3rd' is no model .*; is it vigh-gla-tiny_3rdparty_in1k, "):
        find_model('vigh-gla-tiny_3rd')
    with pytest.raises(ValueError, match="'alexnet' is no model of this project; list_models"):
        find_model('alexnet')


@pytest.mark.parametrize('installed', [True, False])
def test_the_zoo_of_an_installation_and_of_the_sources(installed, monkeypatch, tmp_path):
    home = tmp_path / 'mmvig' / '.mim' if installed else tmp_path
    (home / 'configs').mkdir(parents=True)
    monkeypatch.setattr(
        home_of, 'find_spec', lambda name: type('Spec', (), dict(submodule_search_locations=[tmp_path / name]))
    )
    assert home_of.home() == home


@pytest.mark.parametrize('name', KINDS)
def test_get_model(name):
    model = get_model(name)
    assert type(model).__name__ == KINDS[name] and not model.training
    assert model.cfg.default_scope == type(model).__module__.split('.')[0]
    features = model.extract_feat(torch.rand(1, 3, 64, 64))
    assert all(x.isfinite().all() for x in features)


@pytest.mark.parametrize('checkpoint', [CLASSIFIER], indirect=True)
def test_get_model_with_weights(checkpoint):
    one, other = get_model(CLASSIFIER, str(checkpoint)), get_model(CLASSIFIER)
    saved = torch.load(checkpoint, weights_only=True)['state_dict']
    assert all(value.equal(saved[key]) for key, value in one.state_dict().items())
    assert not all(value.equal(saved[key]) for key, value in other.state_dict().items())
    with pytest.raises(ValueError, match='pretrained=True: no weights of vigh-gla-nano.* were published'):
        get_model(CLASSIFIER, pretrained=True)


def test_pretrained_loads_the_published_file(monkeypatch):
    asked = []
    monkeypatch.setattr(zoo, 'load_checkpoint', lambda model, address, **_: asked.append(address))
    get_model('vig-gla-tiny_3rdparty_in1k', pretrained=True)
    assert asked == [find_model('vig-gla-tiny_3rdparty_in1k').weights]


# ---- MMEngine's hub


@pytest.mark.parametrize('name', KINDS)
def test_hub(name):
    cfg = mmengine.hub.get_config(ADDRESSES[name])
    assert cfg.model.backbone.type == 'mmvig.ViGH'
    model = mmengine.hub.get_model(ADDRESSES[name])
    assert type(model).__name__ == KINDS[name] and type(model.backbone).__name__ == 'ViGH'
    assert all(x.isfinite().all() for x in model.eval().extract_feat(torch.rand(1, 3, 64, 64)))


def test_hub_knows_the_weights():
    address = 'mmvig::mmpretrain/vigh/vigh-gla-small_8xb128-amp_in1k.py'
    assert mmengine.hub.get_config(address, pretrained=True).model_path.endswith('vig_h_s_83p8acc.pth')


# ---- the libraries' own entries


def test_mmpretrain():
    """In a process of its own: what is registered stays."""
    code = f"""
import mmvig.apis, mmpretrain, torch
assert not mmpretrain.list_models('*vigh-gla*')
mmvig.apis.register_models()
mmvig.apis.register_models()
assert 'vigh-gla-tiny_3rdparty_in1k' in mmpretrain.list_models('*vigh-gla*')
assert not mmpretrain.list_models('mask-rcnn*')
model = mmpretrain.get_model('{CLASSIFIER}', backbone=dict(out_indices=(2, 3)))
assert [x.shape[1] for x in model.backbone(torch.rand(1, 3, 64, 64))] == [128, 192]
assert mmpretrain.get_model('vig-gla-tiny_3rdparty_in1k').head.num_classes == 1000
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('checkpoint', [DETECTOR], indirect=True)
def test_det_inferencer(checkpoint, tmp_path):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(str(find_model(DETECTOR).config), str(checkpoint), device='cpu', show_progress=False)
    assert inferencer.model.dataset_meta['classes'] == DIGITS
    found = inferencer(IMAGE, return_vis=True)
    (prediction,) = found['predictions']
    assert len(prediction['bboxes']) == len(prediction['scores']) == len(prediction['labels'])
    assert found['visualization'][0].shape == IMAGE.shape


@pytest.mark.parametrize('checkpoint', [SEGMENTOR], indirect=True)
def test_seg_inferencer(checkpoint):
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(str(find_model(SEGMENTOR).config), str(checkpoint), device='cpu')
    found = inferencer(IMAGE)
    assert found['predictions'].shape == IMAGE.shape[:2] and found['predictions'].max() <= 10


@pytest.mark.parametrize('checkpoint', [CLASSIFIER], indirect=True)
def test_classification_inferencer(checkpoint):
    from mmpretrain import ImageClassificationInferencer

    inferencer = ImageClassificationInferencer(str(find_model(CLASSIFIER).config), str(checkpoint), device='cpu')
    (found,) = inferencer(IMAGE)
    assert found['pred_class'] == str(found['pred_label']) and found['pred_scores'].sum() == pytest.approx(1, abs=1e-4)
