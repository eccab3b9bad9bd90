_base_ = './vigh-gla-tiny.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=1024))
