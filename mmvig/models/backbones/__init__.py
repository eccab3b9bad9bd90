from .vig import ViG
from .vig_adapter import ViGAdapter
from .vigh import ViGH

__all__ = ['ViG', 'ViGAdapter', 'ViGH']
