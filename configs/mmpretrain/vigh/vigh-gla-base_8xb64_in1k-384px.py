# For tools/test.py alone: ViG-H-B at 384 pixels with weights trained at 224.
_base_ = [
    '../_base_/models/vigh-gla-base.py',
    '../_base_/datasets/imagenet_bs64_eval_384.py',
    'mmpretrain::_base_/default_runtime.py',
]
