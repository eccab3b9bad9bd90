# ViG-H-B with its ImageNet-1K weights, for `backbone=dict(type=..., **_base_.vigh_gla_base)`.
vigh_gla_base = dict(
    arch='base',
    init_cfg=dict(type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_b_84p2acc.pth'),
)
