_base_ = './vig-gla-tiny.py'

model = dict(backbone=dict(arch='small'), head=dict(in_channels=384))
