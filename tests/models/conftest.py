"""One training step of Mask R-CNN on digit scenes, for the backbones and necks that detectors get."""

from collections.abc import Callable

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmvig.datasets.digit_scenes import Recipe, make_digit_scenes

MASK_RCNN = """
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
model = dict(
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=10),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=10),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
)
"""


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> list[dict]:
    """Two scenes of 128 x 128 pixels as mmdet's pipeline packs them."""
    root = tmp_path_factory.mktemp('data') / 'digit_scenes'
    make_digit_scenes(root, Recipe(train=2, test=1, size=128, seed=0), workers=1)
    init_default_scope('mmdet')
    data = DATASETS.build(
        dict(
            type='CocoDataset',
            data_root=str(root),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='images/train/'),
            metainfo=dict(classes=tuple('0123456789')),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                dict(type='PackDetInputs'),
            ],
        )
    )
    return [data[0], data[1]]


@pytest.fixture
def mask_rcnn_step(scenes) -> Callable[[dict, dict], tuple[dict, list[str]]]:
    """Builds Mask R-CNN around a backbone and a neck and trains one step: (losses, parameters that did not move)."""

    def step(backbone: dict, neck: dict) -> tuple[dict, list[str]]:
        config = Config.fromstring(MASK_RCNN, '.py').model
        config.backbone, config.neck = backbone, neck
        init_default_scope('mmdet')
        model = MODELS.build(config)
        model.init_weights()
        wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3)))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = dict(
            inputs=[scene['inputs'] for scene in scenes], data_samples=[scene['data_samples'] for scene in scenes]
        )
        losses = model.train().train_step(batch, wrapper)
        return losses, [name for name, p in model.named_parameters() if torch.equal(p, before[name])]

    return step
