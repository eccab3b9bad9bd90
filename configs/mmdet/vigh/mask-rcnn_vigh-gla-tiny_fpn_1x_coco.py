# Mask R-CNN with ViG-H-T, 12 epochs on COCO from the published ImageNet-1K weights; 8 GPUs x 2 images.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedule_1x_adamw.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvig.ViGH',
        arch='tiny',
        init_cfg=dict(
            type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_t_82p8acc.pth'
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
