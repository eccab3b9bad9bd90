# UperNet with ViG-H-T on ADE20K.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedule_160k_adamw.py',
    'mmseg::_base_/default_runtime.py',
    '../../_base_/vigh-gla-tiny.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='mmvig.ViGH', **_base_.vigh_gla_tiny),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=2)
