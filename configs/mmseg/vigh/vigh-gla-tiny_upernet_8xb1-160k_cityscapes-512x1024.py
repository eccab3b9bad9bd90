# UperNet with ViG-H-T on Cityscapes: crops of 512 x 1024, tested on whole images of 1024 x 2048.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/cityscapes.py',
    '../_base_/schedule_160k_adamw.py',
    'mmseg::_base_/default_runtime.py',
    '../../_base_/vigh-gla-tiny.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(_delete_=True, type='mmvig.ViGH', **_base_.vigh_gla_tiny),
)
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
