# ViG-H-S on ImageNet-1K as published: 300 epochs in float16 with a dynamic loss scale; tested at 224 pixels.
_base_ = [
    '../_base_/models/vigh-gla-small.py',
    '../_base_/datasets/imagenet_bs128_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    'mmpretrain::_base_/default_runtime.py',
]

optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(lr=1e-3, weight_decay=0.05))
