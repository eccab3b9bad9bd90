_base_ = ['./cascade-mask-rcnn_vigh-gla-tiny_fpn_4conv1fc-giou_ms-crop-3x_coco.py', '../../_base_/vigh-gla-small.py']

model = dict(backbone=_base_.vigh_gla_small)
