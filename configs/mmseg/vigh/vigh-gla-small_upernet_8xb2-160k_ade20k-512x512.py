_base_ = ['./vigh-gla-tiny_upernet_8xb2-160k_ade20k-512x512.py', '../../_base_/vigh-gla-small.py']

model = dict(backbone=_base_.vigh_gla_small)
