# In bfloat16, which has the range of float32: no loss scale.
_base_ = './mask-rcnn_vigh-gla-tiny_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
