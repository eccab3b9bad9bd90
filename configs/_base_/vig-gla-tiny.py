# ViG-T with its ImageNet-1K weights, for `backbone=dict(type=..., **_base_.vig_gla_tiny)`.
vig_gla_tiny = dict(
    arch='tiny',
    init_cfg=dict(type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_t_77p2acc.pth'),
)
