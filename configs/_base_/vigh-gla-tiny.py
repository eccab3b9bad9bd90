# ViG-H-T with its ImageNet-1K weights, for `backbone=dict(type=..., **_base_.vigh_gla_tiny)`.
vigh_gla_tiny = dict(
    arch='tiny',
    init_cfg=dict(type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_t_82p8acc.pth'),
)
