# ViG-B on ImageNet-1K as published: 300 epochs in float32; tested at 224 pixels.
_base_ = [
    '../_base_/models/vig-gla-base.py',
    '../_base_/datasets/imagenet_bs128_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    'mmpretrain::_base_/default_runtime.py',
]

optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05))

train_dataloader = dict(batch_size=64)
