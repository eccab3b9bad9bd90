# The same schedule with Swin-T, whose last maps are smaller than its windows.
_base_ = './vigh-gla-tiny_1xb64_digits-64px.py'

model = dict(
    backbone=dict(
        _delete_=True, type='SwinTransformer', arch='tiny', img_size=64, drop_path_rate=0.0, pad_small_map=True
    )
)
