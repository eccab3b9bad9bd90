# The same with a ViG-H small enough for two CPU cores.
_base_ = './vigh-gla-tiny_1xb64_digits-64px.py'

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
    head=dict(in_channels=192),
)
