# ImageNet-1K's validation images at 768 pixels, the same part of the picture as 224 of 256; nothing to train on.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=877, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=768),
    dict(type='PackInputs'),
]
test_dataloader = dict(batch_size=16, dataset=dict(pipeline=test_pipeline))
test_cfg = dict()
train_dataloader = val_dataloader = val_evaluator = None
