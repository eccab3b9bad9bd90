# Mask R-CNN with ViG-H-T, 36 epochs on COCO at many scales as Swin is trained; 8 GPUs x 2 images.
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', '../../_base_/vigh-gla-tiny.py']

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', **_base_.vigh_gla_tiny),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(_delete_=True, flat_decay_mult=0.0, bias_decay_mult=0.0, norm_decay_mult=0.0),
)
