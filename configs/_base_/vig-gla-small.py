# ViG-S with its ImageNet-1K weights, for `backbone=dict(type=..., **_base_.vig_gla_small)`.
vig_gla_small = dict(
    arch='small',
    init_cfg=dict(type='Pretrained', checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_s_81p7acc.pth'),
)
