_base_ = ['./mask-rcnn_vig-gla-tiny-adapter_fpn_1x_coco.py', '../../_base_/vig-gla-base.py']

model = dict(
    backbone=dict(drop_path_rate=0.3, **_base_.vig_gla_base),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
