# Twice the usual resolution: the short side has 1536 pixels, and each block is recomputed in the backward pass.
_base_ = './mask-rcnn_vigh-gla-tiny_fpn_1x_coco.py'

model = dict(backbone=dict(with_cp=True))
resize = dict(type='Resize', scale=(2560, 1536), keep_ratio=True)
train_pipeline = [*_base_.train_pipeline[:2], resize, *_base_.train_pipeline[3:]]
test_pipeline = [_base_.test_pipeline[0], resize, *_base_.test_pipeline[2:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
