# ViG-B with its ImageNet-1K weights, for `backbone=dict(type=..., **_base_.vig_gla_base)`.
vig_gla_base = dict(
    arch='base',
    init_cfg=dict(type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_b_82p6acc.pth'),
)
