"""Kernels for Hopper, in Gluon: several products by one of them, with what lies between."""

from .bigla_grad import launch_bigla_grad
from .bigla_out import launch_bigla_out
from .bigla_state import launch_bigla_state
from .bigla_whole import launch_bigla_whole
from .block_end import launch_block_end
from .chunks import copyable, prepared
from .mlp_grad import launch_mlp_grad
from .parts import HIDDEN
from .swiglu import launch_resident_swiglu

# Channels that fit into a program's registers.
WIDEST = {'block_end': 192, 'mlp_grad': 192, 'swiglu': 512, 'swiglu_grad': 512}
# What divides the hidden channels: rows that can be copied are multiples of 16 bytes, and where a part of the hidden
# channels lacked some of a, it would hold some of b.
DIVISOR = {'block_end': 8, 'mlp_grad': HIDDEN.value, 'swiglu': 8, 'swiglu_grad': HIDDEN.value}
# Tokens: fewer take longer in one kernel than in its parts, SwiGLU's among them, or in Triton's. On an H100, with
# ViG-T's channels, 1,024 take 13.7 us for 12.9 at the end of a block, 2,048 take 13.9 for 13.9, and 8,400 take 15.0 for
# 23.9; in the gradient 4,096 take 21.0 for 18.5, and 5,120 take 21.2 for 22.9. SwiGLU: 4,096 take 6.1 for 5.7, and
# 4,704 take 8.4 for 8.7; with 384 channels 2,100 take 14.0 for 11.5, and 4,200 take 13.6 for 15.6, in its gradient 26.7
# for 37.0, with 192 channels 12.3 for 12.7.
FEWEST = {'block_end': 2048, 'mlp_grad': 5120, 'swiglu': 4200, 'swiglu_grad': 4200}

__all__ = [
    'copyable',
    'launch_bigla_grad',
    'launch_bigla_out',
    'launch_bigla_state',
    'launch_bigla_whole',
    'launch_block_end',
    'launch_mlp_grad',
    'launch_resident_swiglu',
    'prepared',
]
