"""Kernels for Hopper, in Gluon: several products of a block by one of them, with what lies between."""

from .block_end import launch_block_end
from .mlp_grad import launch_mlp_grad
from .parts import HIDDEN
from .swiglu import launch_resident_swiglu

# Channels that fit into a program's registers.
WIDEST = {'block_end': 192, 'mlp_grad': 192, 'swiglu': 512, 'swiglu_grad': 512}
# What divides the hidden channels: rows that can be copied are multiples of 16 bytes, and where a part of the hidden
# channels lacked some of a, it would hold some of b.
DIVISOR = {'block_end': 8, 'mlp_grad': HIDDEN.value, 'swiglu': 8, 'swiglu_grad': HIDDEN.value}
# Tokens: fewer take longer in one kernel than in its parts, or in Triton's. On an H200, with ViG-T's channels, 4,096
# take 20.7 us for 17.6 at the end of a block, and 5,120 take 20.9 for 21.7; in the gradient 4,096 take 28.3 for 19.2,
# and 8,192 take 28.6 for 31.9, between which 7,168 is a guess. SwiGLU, on an H100: 4,096 take 6.1 for 5.7, and 4,704
# take 8.4 for 8.7; with 384 channels 2,100 take 14.0 for 11.5, and 4,200 take 13.6 for 15.6, in its gradient 26.7 for
# 37.0, with 192 channels 12.3 for 12.7. It was not among the parts of the others when these were measured.
FEWEST = {'block_end': 5120, 'mlp_grad': 7168, 'swiglu': 4200, 'swiglu_grad': 4200}

__all__ = ['launch_block_end', 'launch_mlp_grad', 'launch_resident_swiglu']
