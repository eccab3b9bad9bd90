_base_ = './mask-rcnn_vig-gla-tiny-adapter_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_s_81p7acc.pth'),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
