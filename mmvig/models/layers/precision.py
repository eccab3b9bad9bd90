"""The type that autocast computes in, for functions of ours that autocast does not know."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast, where it is on, would compute a product of `x`."""
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
