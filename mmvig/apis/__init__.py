"""What scripts and notebooks call."""

from .convert_checkpoint import Conversion, convert_checkpoint
from .swap_backbone import swap_backbone

__all__ = ['Conversion', 'convert_checkpoint', 'swap_backbone']
