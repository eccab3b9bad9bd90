"""Backbones by name: ours, and those that they are compared with."""

from mmvig.models.backbones import ViG, ViGH

__all__ = ['BACKBONES', 'VIGH']

VIGH = {f'vigh-gla-{arch}': dict(type='mmvig.ViGH', arch=arch) for arch in ViGH.arch_table}
BACKBONES = {
    **{f'vig-gla-{arch}': dict(type='mmvig.ViG', arch=arch) for arch in ViG.arch_table},
    **VIGH,
    'swin-tiny': dict(type='mmpretrain.SwinTransformer', arch='tiny', out_indices=(0, 1, 2, 3)),
    'swin-small': dict(type='mmpretrain.SwinTransformer', arch='small', out_indices=(0, 1, 2, 3)),
    'convnext-tiny': dict(
        type='mmpretrain.ConvNeXt', arch='tiny', out_indices=(0, 1, 2, 3), gap_before_final_norm=False
    ),
    'resnet-50': dict(type='mmpretrain.ResNet', depth=50, out_indices=(0, 1, 2, 3)),
    # These call F.scaled_dot_product_attention: FlashAttention's kernels, on a GPU in half precision.
    'deit-tiny': dict(
        type='mmpretrain.VisionTransformer', arch='deit-t', img_size=224, patch_size=16, out_type='featmap'
    ),
    'deit-small': dict(
        type='mmpretrain.VisionTransformer', arch='deit-s', img_size=224, patch_size=16, out_type='featmap'
    ),
    'deit-tiny-timm': dict(type='mmpretrain.TIMMBackbone', model_name='deit_tiny_patch16_224', dynamic_img_size=True),
}
