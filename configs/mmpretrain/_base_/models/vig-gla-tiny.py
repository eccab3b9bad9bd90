# ViG-T as a classifier: neck, loss and mixing of images are those of Swin, which the published recipe shares.
_base_ = 'mmpretrain::_base_/models/swin_transformer/base_224.py'

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViG', arch='tiny'),
    head=dict(in_channels=192, init_cfg=dict(_delete_=True, type='Normal', layer='Linear', std=0.02)),
    init_cfg=None,
)
