# A Mask R-CNN small enough to learn digit scenes on two CPU cores.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

width = 48  # of the pyramid and of the heads
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvig.ViGH',
        arch=dict(embed_dims=(32, 64, 128, 192), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 6), drop_path_rate=0.0),
    ),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=width),
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4], ratios=[1.0])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=32, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=10, reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=width, finest_scale=32, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(in_channels=width, conv_out_channels=width, num_convs=2, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)
