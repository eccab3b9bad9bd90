# UperNet with ViG-H-T on ADE20K.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedule_160k_adamw.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmvig.ViGH',
        arch='tiny',
        init_cfg=dict(
            type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_t_82p8acc.pth'
        ),
    ),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=2)
