"""Kernels for Hopper, in Gluon: several products of a block by one of them, with what lies between."""

from .block_end import launch_block_end
from .mlp_grad import launch_mlp_grad

# Channels that fit into a program's registers, and tokens: fewer take longer in one kernel than in its parts. On an
# H200, with ViG-T's channels, 4,096 take 20.7 us for 17.6 at the end of a block, and 5,120 take 20.9 for 21.7; of the
# gradient 4,096 take 28.2 for 19.1, and 8,192 take 28.5 for 31.9.
WIDEST = 192
FEWEST = {'block_end': 5120, 'mlp_grad': 7168}

__all__ = ['launch_block_end', 'launch_mlp_grad']
