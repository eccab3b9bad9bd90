_base_ = './mask-rcnn_vigh-gla-tiny_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_s_83p8acc.pth'),
    ),
)
