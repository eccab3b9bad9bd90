# RetinaNet with ViG-H-T, 12 epochs on COCO; 8 GPUs x 2 images.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedule_1x_adamw.py',
    'mmdet::_base_/default_runtime.py',
    '../../_base_/vigh-gla-tiny.py',
]

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', out_indices=(1, 2, 3), **_base_.vigh_gla_tiny),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
