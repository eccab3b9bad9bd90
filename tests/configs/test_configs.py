"""Every config of the project parses, fits its backbone, and (those of detection) trains a step on digit scenes."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner

import mmvig  # noqa: F401  resolves what the configs name

ROOT = Path(__file__).parents[2]
LEAVES = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)
DETECTION = [path for path in LEAVES if path.parts[-3] == 'mmdet']


def ids(path: Path) -> str:
    return path.stem


def load(path: Path) -> Config:
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None  # no downloads
    return cfg


def build(cfg: Config) -> torch.nn.Module:
    return MODELS.build(cfg.model)


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('scenes') / 'data'
    command = [sys.executable, ROOT / 'tools/make_digit_scenes.py', out, '--train', 4, '--test', 2, '--workers', 1]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return out


def test_there_are_configs():
    assert len(LEAVES) >= 6


def test_names():
    """Unique basenames (mim finds configs by them), and the fields that the libraries' conventions prescribe."""
    assert not [name for name, count in Counter(path.stem for path in LEAVES).items() if count > 1]
    pattern = re.compile(r'[a-z0-9-]+_[a-z0-9-]+_(fpn)_([a-z0-9-]+_)?(coco|digits)')
    assert not [path.stem for path in DETECTION if not pattern.fullmatch(path.stem)]


@pytest.mark.parametrize('path', LEAVES, ids=ids)
def test_widths_are_those_of_the_backbone(path):
    cfg = load(path)
    backbone = build(cfg).backbone
    with torch.no_grad():
        backbone.eval()
        outs = backbone(torch.rand(1, 3, 64, 64))
    assert [out.shape[1] for out in outs] == cfg.model.neck.in_channels
    assert len(cfg.model.neck.in_channels) == 4


@pytest.mark.parametrize('path', DETECTION, ids=ids)
def test_one_training_step_on_digit_scenes(path, scenes, tmp_path):
    """The config's own pipeline, model and optimiser, with the data paths overridden and small images."""
    cfg = load(path)
    metainfo = Config.fromfile(ROOT / 'configs/mmdet/_base_/digit_scenes_instance.py').metainfo
    data = cfg.train_dataloader.dataset
    data.update(data_root=str(scenes), ann_file='annotations/instances_train.json', metainfo=metainfo)
    data.data_prefix.img = 'images/train/'
    for step in data.pipeline:
        if 'scale' in step:
            step.scale = (128, 128)
    cfg.model.data_preprocessor.pad_size_divisor = 32
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.optim_wrapper.type = 'OptimWrapper'  # mixed precision needs a GPU
    cfg.optim_wrapper.pop('dtype', None)
    cfg.work_dir = str(tmp_path)
    if cfg.model.backbone.type.startswith('mmvig.'):
        cfg.model.backbone.drop_path_rate = 0.0  # a block that is skipped for every image does not move
    for split in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg.pop(f'{split}_{part}', None)
    runner = Runner.from_cfg(cfg)
    model = runner.model
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    batch = next(iter(runner.build_dataloader(cfg.train_dataloader, seed=0)))
    losses = model.train().train_step(batch, wrapper)
    assert losses['loss'].isfinite()
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not [name for name in still if name.startswith('backbone')]


@pytest.mark.parametrize('path', [path for path in LEAVES if 'gla' in path.stem], ids=ids)
def test_no_decay_on_vectors(path):
    """RMSNorm, LayerNorm and biases are free of weight decay, matrices and kernels are not."""
    cfg = load(path)
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('dtype', None)
    from mmengine.optim import build_optim_wrapper

    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    for name, p in model.backbone.named_parameters():
        assert (decay[id(p)] == 0) == (p.dim() <= 1), name


def test_digit_scenes_load_as_the_config_says(scenes):
    cfg = Config.fromfile(ROOT / 'configs/mmdet/_base_/digit_scenes_instance.py')
    init_default_scope('mmdet')
    from mmvig.datasets.digit_layout import CLASSES

    assert cfg.metainfo['classes'] == CLASSES
    for loader, count in ((cfg.train_dataloader, 4), (cfg.test_dataloader, 2)):
        data = DATASETS.build(loader.dataset | dict(data_root=str(scenes)))
        assert len(data) == count and data[0]['data_samples'].gt_instances.masks.masks.any()
