"""Kernels for Hopper, in Gluon: several products of a block by one of them, with what lies between."""

from .block_end import launch_block_end
from .mlp_grad import launch_mlp_grad
from .parts import HIDDEN
from .swiglu import launch_resident_swiglu

WIDEST = {'block_end': 192, 'mlp_grad': 192, 'swiglu': 512}  # channels that fit into a program's registers
# What divides the hidden channels: rows that can be copied are multiples of 16 bytes, and where a part of the hidden
# channels lacked some of a, it would hold some of b.
DIVISOR = {'block_end': 8, 'mlp_grad': HIDDEN.value, 'swiglu': 8}
# Tokens: fewer take longer in one kernel than in its parts. On an H200, with ViG-T's channels, 4,096 take 20.7 us for
# 17.6 at the end of a block, and 5,120 take 20.9 for 21.7; in the gradient 4,096 take 28.3 for 19.2, and 8,192 take
# 28.6 for 31.9, between which 7,168 is a guess.
FEWEST = {'block_end': 5120, 'mlp_grad': 7168, 'swiglu': 512}

__all__ = ['launch_block_end', 'launch_mlp_grad', 'launch_resident_swiglu']
