# The full schedule on digit scenes of nominal size 512, with 5 to 11 digits each: 4 epochs of 1,200 scenes.
# `python tools/digits_study.py` writes the scenes.
_base_ = './mask-rcnn_fpn_full_digits.py'

data_root = 'data/digit_scenes_512/'
scale = (512, 512)
max_epochs = 4

model = dict(data_preprocessor=dict(pad_size_divisor=512))
train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(type='RandomResize', scale=scale, ratio_range=(0.8, 1.0), keep_ratio=True),
    *_base_.train_pipeline[3:],
]
test_pipeline = [
    *_base_.test_pipeline[:1],
    dict(type='Resize', scale=scale, keep_ratio=True),
    *_base_.test_pipeline[2:],
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_test.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    *_base_.param_scheduler[:1],
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))
