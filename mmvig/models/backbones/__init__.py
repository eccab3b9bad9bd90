from .vig import ViG
from .vigh import ViGH

__all__ = ['ViG', 'ViGH']
