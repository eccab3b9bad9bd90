# ViG-H-T on the crops of the digit scenes, from scratch.
_base_ = [
    '../_base_/models/vigh-gla-tiny.py',
    '../_base_/datasets/digit_crops_bs64.py',
    '../_base_/schedules/digits_adamw_10e.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(drop_path_rate=0.0),
    head=dict(num_classes=10, loss=dict(_delete_=True, type='CrossEntropyLoss'), topk=(1,)),
    train_cfg=None,
)
