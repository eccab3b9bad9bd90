"""SiLU and GELU, and their gradients, of tiles in float32."""

import triton
import triton.language as tl

from .primitives import LOG2E, reciprocal

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0


@triton.jit
def sigmoid(x):
    return reciprocal(1 + tl.exp2(-LOG2E * x))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """SiLU(z), GELU(z), or z for ''."""
    if ACT == 'silu':
        z = z * sigmoid(z)
    elif ACT == 'gelu':
        z = z * 0.5 * (1 + tl.erf(z * ROOT_HALF))
    return z


@triton.jit
def activate_grad(dy, z, ACT: tl.constexpr):
    """Gradient of z from that of `activate(z)`."""
    if ACT == 'silu':
        s = sigmoid(z)
        dy = dy * s * (1 + z * (1 - s))
    elif ACT == 'gelu':
        dy = dy * (0.5 * (1 + tl.erf(z * ROOT_HALF)) + z * DENSITY * tl.exp(-0.5 * z * z))
    return dy
