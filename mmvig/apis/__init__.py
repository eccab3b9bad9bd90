"""What scripts and notebooks call."""

from .convert_checkpoint import Conversion, convert_checkpoint

__all__ = ['Conversion', 'convert_checkpoint']
