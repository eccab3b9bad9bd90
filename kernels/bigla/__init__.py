"""Bidirectional gated linear attention (BiGLA), the operator of ViG: one public function and its implementations."""

from .api import bigla, debug

__all__ = ['bigla', 'debug']
