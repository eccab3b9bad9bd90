# Mask R-CNN with ViG-H-T on digit scenes of 1536 pixels, from scratch.
_base_ = '../_base_/mask-rcnn_fpn_amp-1536px_digits.py'

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', arch='tiny', drop_path_rate=0.0),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
