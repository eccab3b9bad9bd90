# Everything but the backbone of the full schedule on digit scenes: from scratch, minutes on one data-centre GPU.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    './digit_scenes_instance.py',
    'mmdet::_base_/default_runtime.py',
]

# Digits are small (18 to 123 pixels) and few in a scene, so scenes are enlarged and proposals are fewer. All batches
# are padded to one size: a new size costs a GPU more than the padding does. One box regressor serves all classes, which
# gives it ten times the examples. Digits are about as wide as high, so one anchor a place will do, a third of what
# there was to assign, sample and decode. Every object is among the proposals of the second stage, so none needs a match
# of low quality there, a search object by object.
image_scale = (448, 448)
model = dict(
    data_preprocessor=dict(pad_size_divisor=448),
    rpn_head=dict(anchor_generator=dict(scales=[4], ratios=[1.0])),
    roi_head=dict(bbox_head=dict(num_classes=10, reg_class_agnostic=True), mask_head=dict(num_classes=10)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=300),
        rcnn=dict(assigner=dict(match_low_quality=False), sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=image_scale, ratio_range=(0.8, 1.0), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=8, num_workers=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=4, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 6
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, bias_decay_mult=0.0, norm_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
