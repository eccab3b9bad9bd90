# The same schedule with ResNet-50, from scratch as well, so all of it trains.
_base_ = '../_base_/mask-rcnn_fpn_amp-1536px_digits.py'

model = dict(backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None))
