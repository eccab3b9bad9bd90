"""The registered models; importing this package puts them into `mmvig.registry.MODELS`."""

from .backbones import ViG, ViGAdapter, ViGH
from .necks import SimpleFPN

__all__ = ['SimpleFPN', 'ViG', 'ViGAdapter', 'ViGH']
