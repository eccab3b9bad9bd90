# The same schedule with ResNet-50.
_base_ = './vigh-gla-tiny_1xb64_digits-64px.py'

model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=50),
    head=dict(in_channels=2048),
)
