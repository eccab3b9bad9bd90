_base_ = './vigh-gla-tiny.py'

model = dict(backbone=dict(arch='small'))
