_base_ = './mask-rcnn_vig-gla-tiny-adapter_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_b_82p6acc.pth'),
    ),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
