_base_ = './vig-gla-tiny.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=768))
