_base_ = './vigh-gla-tiny_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(checkpoint='https://huggingface.co/hustvl/ViG/resolve/main/vig_h_s_83p8acc.pth'),
    ),
)
