_base_ = ['./mask-rcnn_vigh-gla-tiny_fpn_1x_coco.py', '../../_base_/vigh-gla-base.py']

model = dict(
    backbone=_base_.vigh_gla_base,
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
