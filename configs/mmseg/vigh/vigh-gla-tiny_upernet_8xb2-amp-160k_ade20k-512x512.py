# In bfloat16, which has the range of float32: no loss scale.
_base_ = './vigh-gla-tiny_upernet_8xb2-160k_ade20k-512x512.py'

optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
