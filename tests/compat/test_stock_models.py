"""One training step and one prediction of stock models on this stack: small here, as published in the slow tests."""

import numpy as np
import pytest
import torch
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

import mmvig  # noqa: F401  mends the libraries

SMALL_RESNET = dict(backbone=dict(depth=18), neck=dict(in_channels=[64, 128, 256, 512]))
ONE_LAYER = dict(encoder=dict(num_layers=1), decoder=dict(num_layers=1), num_queries=10)
SMALL_SWIN = dict(arch=dict(_delete_=True, embed_dims=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]))
SMALL = {
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': SMALL_RESNET,
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py': SMALL_RESNET,
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': ONE_LAYER
    | dict(backbone=dict(depth=18), neck=dict(in_channels=[128, 256, 512])),
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py': dict(
        backbone=dict(embed_dims=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
        decode_head=dict(channels=32, in_channels=[24, 48, 96, 192]),
        auxiliary_head=dict(channels=32, in_channels=96),
    ),
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py': dict(backbone=SMALL_SWIN, head=dict(in_channels=192)),
}
PUBLISHED = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    'mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py',
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'mmdet::dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'mmdet::dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
]
HEIGHT, WIDTH = 96, 128


def batch(scope: str) -> dict:
    """Two images of noise with annotations, as the data pipelines of a library hand them over."""
    images = [torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in range(2)]
    meta = dict(img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH), scale_factor=(1.0, 1.0), img_id=0)
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
        return dict(inputs=images, data_samples=[DataSample().set_gt_label(label) for label in (1, 5)])
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        labels = PixelData(data=torch.randint(0, 19, (1, HEIGHT, WIDTH)))
        return dict(inputs=images, data_samples=[SegDataSample(gt_sem_seg=labels, metainfo=meta) for _ in range(2)])
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[10.0, 10, 60, 70], [50, 40, 120, 90]])
    masks = BitmapMasks(np.ones((2, HEIGHT, WIDTH), np.uint8), HEIGHT, WIDTH)
    objects = InstanceData(bboxes=boxes, labels=torch.tensor([1, 3]), masks=masks)
    return dict(inputs=images, data_samples=[DetDataSample(gt_instances=objects, metainfo=meta) for _ in range(2)])


def train_and_predict(address: str, changes: dict) -> None:
    scope = address.partition('::')[0]
    config = get_config(address)
    config.model.backbone.init_cfg = None  # no download
    init_default_scope(scope)
    config.merge_from_dict(dict(model=changes))
    if scope == 'mmseg':
        config.model.pretrained = None
    if scope == 'mmpretrain':
        config.model.data_preprocessor = dict(config.data_preprocessor)
    model: nn.Module = revert_sync_batchnorm(MODELS.build(config.model))
    model.init_weights()
    optimizer = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-4)))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = model.train().train_step(batch(scope), optimizer)
    assert losses and all(value.isfinite().all() for value in losses.values())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    results = model.eval().test_step(batch(scope))
    assert len(results) == 2
    attribute = dict(mmdet='pred_instances', mmseg='pred_sem_seg', mmpretrain='pred_score')[scope]
    assert all(attribute in result for result in results)


@pytest.mark.parametrize('address', SMALL, ids=lambda address: address.rpartition('/')[2].removesuffix('.py'))
def test_small(address: str):
    train_and_predict(address, SMALL[address])


@pytest.mark.slow
@pytest.mark.parametrize('address', PUBLISHED, ids=lambda address: address.rpartition('/')[2].removesuffix('.py'))
def test_as_published(address: str):
    train_and_predict(address, {})
