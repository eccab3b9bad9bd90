_base_ = ['./mask-rcnn_vigh-gla-tiny_fpn_ms-crop-3x_coco.py', '../../_base_/vigh-gla-small.py']

model = dict(backbone=_base_.vigh_gla_small)
