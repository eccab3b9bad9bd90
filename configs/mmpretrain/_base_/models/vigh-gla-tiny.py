# ViG-H-T as a classifier: neck, loss and mixing of images are those of Swin, which the published recipe shares.
_base_ = 'mmpretrain::_base_/models/swin_transformer/base_224.py'

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', arch='tiny', out_indices=3),
    head=dict(in_channels=768, init_cfg=dict(_delete_=True, type='TruncNormal', layer='Linear', std=0.02)),
    init_cfg=None,
)
