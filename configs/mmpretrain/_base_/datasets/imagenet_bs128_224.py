# ImageNet-1K with the published augmentation, which is Swin's; tested at 224 pixels cut from a short side of 256.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader
