_base_ = ['./vig-gla-tiny-adapter_upernet_8xb2-160k_ade20k-512x512.py', '../../_base_/vig-gla-base.py']

model = dict(
    backbone=dict(drop_path_rate=0.3, **_base_.vig_gla_base),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.8))
