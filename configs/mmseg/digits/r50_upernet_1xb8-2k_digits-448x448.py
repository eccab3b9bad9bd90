# The same schedule with ResNet-50.
_base_ = './vigh-gla-tiny_upernet_1xb8-2k_digits-448x448.py'

model = dict(
    backbone=dict(_delete_=True, type='ResNetV1c', depth=50),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
