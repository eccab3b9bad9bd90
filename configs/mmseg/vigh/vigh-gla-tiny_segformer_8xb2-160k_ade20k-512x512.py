# SegFormer's head and schedule with ViG-H-T on ADE20K.
_base_ = ['mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', '../../_base_/vigh-gla-tiny.py']

model = dict(
    backbone=dict(_delete_=True, type='mmvig.ViGH', **_base_.vigh_gla_tiny),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor='mmvig.LayerDecayOptimWrapperConstructor',
    # SegFormer's tenfold rate of the head; vectors without weight decay
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=1.0, custom_keys=dict(decode_head=dict(lr_mult=10.0))),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
