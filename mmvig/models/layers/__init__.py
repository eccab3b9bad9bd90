"""The parts that both backbones are made of."""

from .block import Block
from .conv_norm import ConvNorm
from .gated_mlp import GatedMLP
from .mixer import BiGLAMixer

__all__ = ['BiGLAMixer', 'Block', 'ConvNorm', 'GatedMLP']
