# Digit scenes of nominal size 1536, with 14 to 34 digits each, of 24 to 576 pixels: 5 epochs of 300 scenes.
# `python tools/digits_study.py` writes the scenes. No activation is recomputed: memory is one of the things compared.
_base_ = './mask-rcnn_fpn_512px_digits.py'

data_root = 'data/digit_scenes_1536/'
scale = (1536, 1536)
max_epochs = 5

model = dict(data_preprocessor=dict(pad_size_divisor=1536), test_cfg=dict(rcnn=dict(max_per_img=60)))
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
train_dataloader = dict(batch_size=2, num_workers=8, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(batch_size=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_test.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0, optimizer=dict(lr=2e-4))
param_scheduler = [
    *_base_.param_scheduler[:1],
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
