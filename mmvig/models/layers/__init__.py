"""The parts that the backbones are made of."""

from .block import Block
from .conv_norm import ConvNorm
from .deformable_attention import DeformableAttention
from .gated_mlp import GatedMLP
from .interaction import ConvFFN, Extractor, Injector
from .mixer import BiGLAMixer
from .norm import LayerNorm, RMSNorm
from .spatial_prior import SpatialPrior

__all__ = [
    'BiGLAMixer',
    'Block',
    'ConvFFN',
    'ConvNorm',
    'DeformableAttention',
    'Extractor',
    'GatedMLP',
    'Injector',
    'LayerNorm',
    'RMSNorm',
    'SpatialPrior',
]
