# For tools/test.py alone: ViG-H-S at 768 pixels with weights trained at 224.
_base_ = [
    '../_base_/models/vigh-gla-small.py',
    '../_base_/datasets/imagenet_bs16_eval_768.py',
    'mmpretrain::_base_/default_runtime.py',
]
