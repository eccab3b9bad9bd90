# Mask R-CNN with ViTDet's simple feature pyramid on ViG-T, 12 epochs on COCO; 8 GPUs x 2 images.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedule_1x_adamw_layer-decay.py',
    'mmdet::_base_/default_runtime.py',
    '../../_base_/vig-gla-tiny.py',
]

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViG', drop_path_rate=0.1, **_base_.vig_gla_tiny),
    neck=dict(_delete_=True, type='mmvig.SimpleFPN', in_channels=192, out_channels=256, num_outs=5),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))
