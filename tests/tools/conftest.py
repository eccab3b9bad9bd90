import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.visualization import Visualizer

from mmvig.datasets.digit_scenes import Recipe, make_digit_scenes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs a script of tools/ in this process: (exit status, or the message that it ended with; standard output)."""

    def run(name: str, *arguments: object) -> tuple[int | str, str]:
        for kind in Visualizer.__subclasses__():  # each library's keeps the one of the run before under its name
            kind._instance_dict.clear()
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}', *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def toy_file(monkeypatch, tmp_path) -> Path:
    """The config file of the engine tests' toy run, which the tools can import the toy for."""
    monkeypatch.syspath_prepend(ROOT / 'tests/engine')
    file = tmp_path / 'toy.py'
    file.write_text(import_module('toy_training').CONFIG)
    return file


@pytest.fixture(scope='session')
def digit_scenes(tmp_path_factory) -> Path:
    """A data set of four training and three test scenes."""
    root = tmp_path_factory.mktemp('data') / 'digit_scenes'
    make_digit_scenes(root, Recipe(train=4, test=3, size=128, seed=0), workers=1)
    return root


# One small model for each library, on the digit scenes: all but its type, its data and its schedule is the library's.
CONFIGS = dict(
    mmdet="""
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
metainfo = dict(classes=tuple('0123456789'))
model = dict(
    backbone=dict(depth=18, stem_channels=8, base_channels=8, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=10),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=10),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(128, 128), keep_ratio=True)] + [
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
dataset = dict(type='CocoDataset', data_root=data_root, metainfo=metainfo)
train_dataset = dict(
    ann_file='annotations/instances_train.json', data_prefix=dict(img='images/train/'), pipeline=train_pipeline
)
test_dataset = dict(
    ann_file='annotations/instances_test.json',
    data_prefix=dict(img='images/test/'),
    test_mode=True,
    pipeline=test_pipeline,
)
test_evaluator = dict(
    type='CocoMetric', ann_file=data_root + '/annotations/instances_test.json', metric=['bbox', 'segm']
)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
""",
    mmseg="""
_base_ = ['mmseg::_base_/models/fcn_r50-d8.py', 'mmseg::_base_/default_runtime.py']
classes = ('background',) + tuple('0123456789')
palette = [[20 * i, 255 - 20 * i, 128] for i in range(11)]
data_preprocessor = dict(size=(64, 64))
model = dict(
    pretrained=None,
    data_preprocessor=data_preprocessor,
    backbone=dict(type='ResNetV1c', depth=18, stem_channels=8, base_channels=8, norm_cfg=dict(type='BN')),
    decode_head=dict(in_channels=64, channels=16, num_classes=11, norm_cfg=dict(type='BN')),
    auxiliary_head=None,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=dict(classes=classes, palette=palette), img_suffix='.jpg'
)
train_dataset = dict(
    data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'), pipeline=train_pipeline
)
test_dataset = dict(
    data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'), test_mode=True, pipeline=test_pipeline
)
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
""",
    mmpretrain="""
_base_ = ['mmpretrain::_base_/models/resnet18.py', 'mmpretrain::_base_/default_runtime.py']
model = dict(
    backbone=dict(stem_channels=8, base_channels=8), head=dict(in_channels=64, num_classes=10, topk=(1,))
)
data_preprocessor = dict(num_classes=10)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.8, 1.0)),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')]
dataset = dict(type='CustomDataset', data_root=data_root, classes=list('0123456789'))
train_dataset = dict(data_prefix='crops/train', pipeline=train_pipeline)
test_dataset = dict(data_prefix='crops/test', pipeline=test_pipeline)
test_evaluator = dict(type='Accuracy', topk=(1, 5))
train_cfg = dict(by_epoch=True, max_epochs=1)
""",
)
COMMON = """
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(dataset, **train_dataset),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, **test_dataset),
)
val_dataloader = test_dataloader
val_evaluator = test_evaluator
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.001))
"""


@pytest.fixture
def library_file(tmp_path, digit_scenes):
    """Writes a config file for a model of one of the three libraries."""

    def write(library: str) -> Path:
        file = tmp_path / f'{library}_toy.py'
        file.write_text(f'data_root = {str(digit_scenes)!r}\n{CONFIGS[library]}{COMMON}')
        return file

    return write


@pytest.fixture
def untrained(tmp_path):
    """Writes a checkpoint, as MMEngine does, of a config's model with the weights that it is born with."""

    def save(file: Path) -> Path:
        cfg = Config.fromfile(file)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        if 'data_preprocessor' in cfg:
            cfg.model.data_preprocessor = cfg.data_preprocessor
        model = MODELS.build(cfg.model)
        model.init_weights()
        metainfo = cfg.dataset.get('metainfo', dict(classes=cfg.dataset.get('classes')))
        path = tmp_path / f'{file.stem}.pth'
        torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(metainfo))), path)
        return path

    return save
