# Mask R-CNN with ViG-H-T, 12 epochs on COCO from the published ImageNet-1K weights; 8 GPUs x 2 images.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedule_1x_adamw.py',
    'mmdet::_base_/default_runtime.py',
    '../../_base_/vigh-gla-tiny.py',
]

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', **_base_.vigh_gla_tiny),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
