_base_ = './cascade-mask-rcnn_vigh-gla-tiny_fpn_4conv1fc-giou_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_b_84p2acc.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
