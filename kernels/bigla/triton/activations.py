"""SiLU and GELU, and their gradients, of tiles in float32.

TO is the dtype of the result. For bfloat16 the errors of sigmoid and erf are small beside its rounding of 1, 2^-9, and
not beside that of what is far smaller: SiLU(-8), which is -0.003, may be off by 0.002.
"""

import triton
import triton.language as tl

from .primitives import LOG2E, ON_CPU, reciprocal

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0


@triton.jit
def sigmoid(x, TO: tl.constexpr):
    """For bfloat16 within 2^-12: one use of the unit for such functions, instead of two."""
    if tl.bfloat16 == TO and not ON_CPU:
        t = tl.inline_asm_elementwise('tanh.approx.f32 $0, $1;', '=f,f', [x * 0.5], tl.float32, is_pure=True, pack=1)
        return t * 0.5 + 0.5
    else:
        return reciprocal(1 + tl.exp2(-LOG2E * x))


@triton.jit
def erf(x, TO: tl.constexpr):
    """For bfloat16 within 2.5e-5, by Abramowitz and Stegun's 7.1.25: a third of the instructions."""
    if tl.bfloat16 == TO and not ON_CPU:
        y = tl.abs(x)
        t = reciprocal(1 + 0.47047 * y)
        y = 1 - t * (0.3480242 + t * (-0.0958798 + t * 0.7478556)) * tl.exp2(-LOG2E * y * y)
        return tl.where(x < 0, -y, y)
    else:
        return tl.erf(x)


@triton.jit
def activate(z, ACT: tl.constexpr, TO: tl.constexpr):
    """SiLU(z), GELU(z), or z for ''."""
    if ACT == 'silu':
        z = z * sigmoid(z, TO)
    elif ACT == 'gelu':
        z = z * 0.5 * (1 + erf(z * ROOT_HALF, TO))
    return z


@triton.jit
def activate_grad(dy, z, ACT: tl.constexpr, TO: tl.constexpr):
    """Gradient of z from that of `activate(z)`."""
    if ACT == 'silu':
        s = sigmoid(z, TO)
        dy = dy * s * (1 + z * (1 - s))
    elif ACT == 'gelu':
        dy = dy * (0.5 * (1 + erf(z * ROOT_HALF, TO)) + z * DENSITY * tl.exp(-0.5 * z * z))
    return dy
