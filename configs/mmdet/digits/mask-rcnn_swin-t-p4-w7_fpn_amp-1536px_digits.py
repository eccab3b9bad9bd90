# The same schedule with Swin-T, from scratch.
_base_ = '../_base_/mask-rcnn_fpn_amp-1536px_digits.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
