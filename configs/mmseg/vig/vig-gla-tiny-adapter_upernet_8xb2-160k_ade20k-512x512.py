# UperNet with a ViT-Adapter around ViG-T on ADE20K.
_base_ = [
    '../_base_/upernet_vig-gla-tiny-adapter.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedule_160k_adamw_layer-decay.py',
    'mmseg::_base_/default_runtime.py',
]

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=1.2e-4), paramwise_cfg=dict(layer_decay_rate=0.95))
