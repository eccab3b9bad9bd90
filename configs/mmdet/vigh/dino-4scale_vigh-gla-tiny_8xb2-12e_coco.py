# DINO with ViG-H-T at four scales, 12 epochs on COCO.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', '../../_base_/vigh-gla-tiny.py']

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', out_indices=(1, 2, 3), **_base_.vigh_gla_tiny),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(
    constructor='mmvig.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0),  # DINO's own tenth for the whole backbone; vectors without weight decay
)
