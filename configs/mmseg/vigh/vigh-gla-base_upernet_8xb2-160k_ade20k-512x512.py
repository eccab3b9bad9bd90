_base_ = ['./vigh-gla-tiny_upernet_8xb2-160k_ade20k-512x512.py', '../../_base_/vigh-gla-base.py']

model = dict(
    backbone=_base_.vigh_gla_base,
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
