_base_ = ['./mask-rcnn_vig-gla-tiny-adapter_fpn_1x_coco.py', '../../_base_/vig-gla-small.py']

model = dict(
    backbone=dict(drop_path_rate=0.2, **_base_.vig_gla_small),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
