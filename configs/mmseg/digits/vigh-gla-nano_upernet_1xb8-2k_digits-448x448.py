# The same with a ViG-H and heads small enough for two CPU cores.
_base_ = './vigh-gla-tiny_upernet_1xb8-2k_digits-448x448.py'

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=(32, 64, 128, 192),
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 6),
            drop_path_rate=0.0,
        )
    ),
    decode_head=dict(in_channels=[32, 64, 128, 192], channels=64),
    auxiliary_head=dict(in_channels=128, channels=32),
)
