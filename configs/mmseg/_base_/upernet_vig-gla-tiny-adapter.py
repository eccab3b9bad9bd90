# UperNet with a ViT-Adapter around ViG-T for the 150 classes of ADE20K, tested in overlapping windows.
_base_ = ['mmseg::_base_/models/upernet_swin.py', '../../_base_/vig-gla-tiny.py']

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='mmvig.ViGAdapter', drop_path_rate=0.1, **_base_.vig_gla_tiny),
    decode_head=dict(in_channels=[192, 192, 192, 192], num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
