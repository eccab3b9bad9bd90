# For tools/test.py alone: ViG-H-S at 1024 pixels with weights trained at 224.
_base_ = [
    '../_base_/models/vigh-gla-small.py',
    '../_base_/datasets/imagenet_bs8_eval_1024.py',
    'mmpretrain::_base_/default_runtime.py',
]
