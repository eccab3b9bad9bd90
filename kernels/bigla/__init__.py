"""Bidirectional gated linear attention (BiGLA), the operator of ViG, and what its blocks fuse around it."""

from .api import (
    add_norm,
    add_pos_embed,
    bigla,
    bigla_mixer,
    block,
    conv_norm,
    debug,
    depthwise_conv,
    gated_mlp,
    norm_depthwise_conv,
    residual_mlp,
    token_mixer,
)

__all__ = [
    'add_norm',
    'add_pos_embed',
    'bigla',
    'bigla_mixer',
    'block',
    'conv_norm',
    'debug',
    'depthwise_conv',
    'gated_mlp',
    'norm_depthwise_conv',
    'residual_mlp',
    'token_mixer',
]
