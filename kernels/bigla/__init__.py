"""Bidirectional gated linear attention (BiGLA), the operator of ViG, and what its token mixer fuses around it."""

from .api import bigla, bigla_mixer, debug, depthwise_conv

__all__ = ['bigla', 'bigla_mixer', 'debug', 'depthwise_conv']
