"""What scripts and notebooks call."""

from .convert_checkpoint import Conversion, convert_checkpoint
from .swap_backbone import swap_backbone
from .zoo import find_model, get_model, list_models, register_models

__all__ = [
    'Conversion',
    'convert_checkpoint',
    'find_model',
    'get_model',
    'list_models',
    'register_models',
    'swap_backbone',
]
