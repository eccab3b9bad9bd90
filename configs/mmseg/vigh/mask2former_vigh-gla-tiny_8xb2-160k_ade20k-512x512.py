# Mask2Former with ViG-H-T on ADE20K; mmdet has its parts.
_base_ = ['mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', '../../_base_/vigh-gla-tiny.py']

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', **_base_.vigh_gla_tiny),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor='mmvig.LayerDecayOptimWrapperConstructor',
    # Mask2Former's own tenth for the whole backbone; vectors without weight decay
    paramwise_cfg=dict(layer_decay_rate=1.0, custom_keys=dict(backbone=dict(_delete_=True, lr_mult=0.1))),
)
