# The same schedule with Swin-T.
_base_ = './vigh-gla-tiny_upernet_1xb8-2k_digits-448x448.py'

model = dict(backbone=dict(_delete_=True, type='SwinTransformer', depths=(2, 2, 6, 2), drop_path_rate=0.0))
