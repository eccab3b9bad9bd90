_base_ = ['./vig-gla-tiny-adapter_upernet_8xb2-160k_ade20k-512x512.py', '../../_base_/vig-gla-small.py']

model = dict(
    backbone=dict(drop_path_rate=0.2, **_base_.vig_gla_small),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.85))
