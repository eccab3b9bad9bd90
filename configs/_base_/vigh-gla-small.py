# ViG-H-S with its ImageNet-1K weights, for `backbone=dict(type=..., **_base_.vigh_gla_small)`.
vigh_gla_small = dict(
    arch='small',
    init_cfg=dict(type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_s_83p8acc.pth'),
)
