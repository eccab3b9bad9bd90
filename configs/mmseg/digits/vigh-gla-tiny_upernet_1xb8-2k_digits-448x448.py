# UperNet with ViG-H-T on digit scenes, from scratch.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../_base_/digit_scenes.py',
    '../_base_/schedule_digits_2k.py',
    'mmseg::_base_/default_runtime.py',
]

env_cfg = dict(cudnn_benchmark=False)  # test images have many sizes: it would search anew for each, with 33 GB at hand
norm_cfg = dict(type='BN')
class_weight = [0.1] + [1.0] * 10  # nine pixels in ten are background
model = dict(
    data_preprocessor=dict(size=(448, 448), seg_pad_val=0),  # weights know no pixels to be left out
    backbone=dict(_delete_=True, type='mmvig.ViGH', arch='tiny', drop_path_rate=0.0),
    decode_head=dict(num_classes=11, channels=256, norm_cfg=norm_cfg, loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(num_classes=11, norm_cfg=norm_cfg, loss_decode=dict(class_weight=class_weight)),
)
