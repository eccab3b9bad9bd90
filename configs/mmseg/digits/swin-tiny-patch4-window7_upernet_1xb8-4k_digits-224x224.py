# The same schedule with Swin-T.
_base_ = './vigh-gla-tiny_upernet_1xb8-4k_digits-224x224.py'

model = dict(backbone=dict(_delete_=True, type='SwinTransformer', depths=(2, 2, 6, 2), drop_path_rate=0.0))
