"""The registered models; importing this package puts them into `mmvig.registry.MODELS`."""

from .backbones import ViG, ViGH

__all__ = ['ViG', 'ViGH']
