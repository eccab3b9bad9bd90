# UperNet with ViG-H-T on digit scenes, from scratch.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../_base_/digit_scenes.py',
    '../_base_/schedule_digits_2k.py',
    'mmseg::_base_/default_runtime.py',
]

norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(size=(224, 224)),
    backbone=dict(_delete_=True, type='mmvig.ViGH', arch='tiny', drop_path_rate=0.0),
    decode_head=dict(num_classes=11, channels=256, norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=11, norm_cfg=norm_cfg),
)
