# UperNet with ViG-H-T on Cityscapes in crops of 1024 x 1024; each block is recomputed in the backward pass.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/cityscapes_1024x1024.py',
    '../_base_/schedule_160k_adamw.py',
    'mmseg::_base_/default_runtime.py',
    '../../_base_/vigh-gla-tiny.py',
]

model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    backbone=dict(_delete_=True, type='mmvig.ViGH', with_cp=True, **_base_.vigh_gla_tiny),
)
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
