# For tools/test.py alone: ViG-B at 512 pixels with weights trained at 224.
_base_ = [
    '../_base_/models/vig-gla-base.py',
    '../_base_/datasets/imagenet_bs32_eval_512.py',
    'mmpretrain::_base_/default_runtime.py',
]
