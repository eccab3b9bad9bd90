"""The gated feed-forward network in Triton: the first product with its SwiGLU, or the gradient of both.

With [a, b] = W1 x, u = SiLU(a) b and y = W2 u::

    du = W2^T dy      db = du SiLU(a)      da = du b SiLU'(a)      dx = W1^T [da, db]

The backward computes a and b again, in one kernel with what is made of them: of all that is wider than x nothing is
kept. Where all channels of a tile of tokens fit into a program's registers, the sum and the norm before the network and
the sum behind it are part of it, and not even u is written::

    s = x + f branch      y = s + scale W2 u  with [a, b] = W1 norm(s)

On Hopper the projection that the branch comes from is part of it, too, the gradient is one kernel but for the weights'
own, and what is wider has kernels of its own for the first product: see `hopper`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .activations import sigmoid
from .casts import scaled
from .launch import KNOWN, begin, kernel
from .norm import Norm, launch_norm, launch_norm_grad, load_branch, load_factor
from .primitives import INTERPRETED, block, capability, ceil_div, plain_precision
from .products import add_product, product
from .sums import Sums

if KNOWN and not INTERPRETED:  # Gluon is as new as that, and has no interpreter
    from . import hopper


class Tile(NamedTuple):
    """What a program takes at a time, and how it runs."""

    BM: int  # tokens
    BH: int  # hidden channels
    num_warps: int
    num_stages: int


CHANNELS = 64  # at a time, where they are a multiple of that
SWIGLU = Tile(128, 64, 8, 3)
SWIGLU_GRAD = Tile(64, 64, 4, 4)
WIDEST = 256  # channels of a residual MLP in one kernel
# Tokens: fewer do not fill a large GPU, and take longer in one kernel than in three. On an H200 three take 26 us with
# 8,192 for one's 33, and 54 with 16,384 for 42.
FEWEST = 12288
# By block(C), for GPUs with 227 KB of shared memory a program, and with 99.
TILES = {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(128, 32, 8, 3)}
SMALL_TILES = {64: Tile(128, 32, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 16, 8, 2)}


@triton.jit
def pair_columns(BH: tl.constexpr):
    """Hidden channels in the order in which columns 2 i and 2 i + 1 of a product hold a and b of the i-th.

    A thread holds both, then. Of eight channels, thread t of four gets columns t and t + 4: those are to be 2 t and
    2 t + 1, which it also holds of a tile (BM, BH) of another product, or wants for one.  (2 BH)
    """
    i = tl.arange(0, 2 * BH) // 2
    return i // 8 * 8 + i % 4 * 2 + i % 8 // 4


@triton.jit
def in_order(x, BM: tl.constexpr, BH: tl.constexpr):
    """Columns (BM, BH) in the order of channels, from that of `pair_columns`: no thread hands anything over."""
    return tl.reshape(tl.permute(tl.reshape(x, [BM, BH // 8, 2, 4]), (0, 1, 3, 2)), [BM, BH])


@kernel(do_not_specialize=('M', 'L'))
def swiglu_kernel(
    x, fc1, scale, dy, fc2, u, dh, x_s, M, L, C, H,
    BM: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
    SCALED: tl.constexpr, GRAD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """u (M, H), SCALED by an entry of `scale` for L tokens each; GRAD: also dh = [da, db] (M, 2 H) from dy (M, C)."""
    begin(not GRAD)
    across = tl.cdiv(H, BH)
    m = tl.program_id(0) // across * BM + tl.arange(0, BM)
    h0 = tl.program_id(0) % across * BH
    h = h0 + tl.arange(0, BH)
    row = h0 + pair_columns(BH)
    c = tl.arange(0, BC)
    at_x = x + m.to(tl.int64)[:, None] * x_s + c[None, :]
    at_w = fc1 + (row + tl.arange(0, 2 * BH) % 2 * H)[None, :] * C + c[:, None]
    p = tl.zeros([BM, 2 * BH], tl.float32)
    for c0 in tl.range(0, C, BC):
        inside = c0 + c < C
        some = tl.load(at_x + c0, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        p = tl.dot(
            some, tl.load(at_w + c0, mask=inside[:, None] & (row < H)[None, :], other=0.0), p, input_precision=PREC
        )
    a, b = tl.split(tl.reshape(p, [BM, BH, 2]))
    inside_u = (m < M)[:, None] & (h < H)[None, :]
    at_u = m.to(tl.int64)[:, None] * H + h[None, :]
    s = sigmoid(a, u.dtype.element_ty)
    y = a * s * b
    if SCALED:
        y = y * load_factor(scale, m, M, L)
    tl.store(u + at_u, in_order(y.to(u.dtype.element_ty), BM, BH), mask=inside_u)
    if GRAD:
        at_dy = dy + m.to(tl.int64)[:, None] * C + c[None, :]
        at_w = fc2 + c[:, None] * H + h[None, :]
        du = tl.zeros([BM, BH], tl.float32)
        for c0 in tl.range(0, C, BC):
            inside = c0 + c < C
            some = tl.load(at_dy + c0, mask=(m < M)[:, None] & inside[None, :], other=0.0)
            w = tl.load(at_w + c0 * H, mask=inside[:, None] & (h < H)[None, :], other=0.0)
            du = tl.dot(some, w, du, input_precision=PREC)
        at_h = dh + m.to(tl.int64)[:, None] * (2 * H) + h[None, :]
        da = du * in_order(b * s * (1 + a * (1 - s)), BM, BH)
        tl.store(at_h, da.to(dh.dtype.element_ty), mask=inside_u)
        tl.store(at_h + H, (du * in_order(a * s, BM, BH)).to(dh.dtype.element_ty), mask=inside_u)


def launch_swiglu(
    x: Tensor, fc1: Tensor, dy: Tensor | None = None, fc2: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u (M, H) of x (M, C) and W1 (2 H, C), contiguous; with dy (M, C) and W2 (C, H) also dh (M, 2 H), else empty.

    scale (B,), dense, are factors of u for the tokens of each sample. Hopper's kernel takes du as it is rounded to x's
    dtype.
    """
    M, C = x.shape
    H = fc1.shape[0] // 2
    grad = dy is not None
    if _on_hopper('swiglu_grad' if grad else 'swiglu', x, H, fc1):
        return hopper.launch_resident_swiglu(x, fc1, scale, dy @ fc2 if grad else None)
    u = x.new_empty(M, H)
    half = x.dtype != torch.float32
    dh = x.new_empty(M if grad else 0, 2 * H)
    if M:
        tile = SWIGLU_GRAD if grad else SWIGLU
        swiglu_kernel[ceil_div(M, tile.BM) * ceil_div(H, tile.BH),](
            x, fc1, x if scale is None else scale, dy if grad else x, fc2 if grad else fc1, u, dh,
            x.stride(0), M, M if scale is None else M // len(scale), C, H,
            BC=CHANNELS if half and C % CHANNELS == 0 else 32, SCALED=scale is not None, GRAD=grad,
            PREC=plain_precision(x.dtype), **tile._asdict(),
        )  # fmt: skip
    return u, dh


@kernel(do_not_specialize=('M', 'L'))
def residual_mlp_kernel(
    x, branch, norm_weight, norm_bias, fc1, fc2, scale, factors, y, M, L, H, eps,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
    CENTER: tl.constexpr, SCALED: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """y (M, C): the channels of BM tokens stay, those of u pass by. C1 + C2 >= C, since a tile's width is a power of 2.

    `scale` and `factors` have an entry for L tokens each.
    """
    begin(True)
    first = tl.program_id(0) * BM
    x += first.to(tl.int64) * C
    branch += first.to(tl.int64) * C
    y += first.to(tl.int64) * C
    m = tl.arange(0, BM)
    c1 = tl.arange(0, C1)
    c2 = C1 + tl.arange(0, C2)
    at_s1 = m[:, None] * C + c1[None, :]
    at_s2 = m[:, None] * C + c2[None, :]
    inside1 = (m < M - first)[:, None] & (c1 < C)[None, :]
    inside2 = (m < M - first)[:, None] & (c2 < C)[None, :]
    s1 = tl.load(x + at_s1, mask=inside1, other=0.0).to(tl.float32)
    s1 += load_branch(branch, factors, at_s1, first + m, inside1, M, L, FACTORS)
    s2 = tl.load(x + at_s2, mask=inside2, other=0.0).to(tl.float32)
    s2 += load_branch(branch, factors, at_s2, first + m, inside2, M, L, FACTORS)
    # The sums are what the second product adds to. Zeros would be written to registers of products under way, as ptxas
    # sees it, and it would let no two of Hopper's products run at a time.
    acc1 = s1
    acc2 = s2
    if CENTER:
        mean = ((tl.sum(s1, 1) + tl.sum(s2, 1)) / C)[:, None]
        s1 = tl.where(inside1, s1 - mean, 0.0)
        s2 = tl.where(inside2, s2 - mean, 0.0)
    r = tl.rsqrt((tl.sum(s1 * s1, 1) + tl.sum(s2 * s2, 1)) / C + eps)[:, None]
    s1 = s1 * r * tl.load(norm_weight + c1, mask=c1 < C, other=0.0).to(tl.float32)[None, :]
    s2 = s2 * r * tl.load(norm_weight + c2, mask=c2 < C, other=0.0).to(tl.float32)[None, :]
    if CENTER:
        s1 += tl.load(norm_bias + c1, mask=c1 < C, other=0.0).to(tl.float32)[None, :]
        s2 += tl.load(norm_bias + c2, mask=c2 < C, other=0.0).to(tl.float32)[None, :]
    n1 = s1.to(fc1.dtype.element_ty)
    n2 = s2.to(fc1.dtype.element_ty)
    if SCALED:
        factor = load_factor(scale, first + m, M, L)
    h = tl.arange(0, BH)
    j = pair_columns(BH)
    row = j + tl.arange(0, 2 * BH) % 2 * H
    for h0 in tl.range(0, H, BH):
        at1 = fc1 + (h0 + row)[None, :] * C + c1[:, None]
        at2 = fc1 + (h0 + row)[None, :] * C + c2[:, None]
        some = (h0 + j < H)[None, :]
        p = tl.dot(n1, tl.load(at1, mask=(c1 < C)[:, None] & some, other=0.0))
        p = tl.dot(n2, tl.load(at2, mask=(c2 < C)[:, None] & some, other=0.0), p)
        a, b = tl.split(tl.reshape(p, [BM, BH, 2]))
        u = a * sigmoid(a, fc2.dtype.element_ty) * b
        if SCALED:
            u = u * factor
        u = in_order(u.to(fc2.dtype.element_ty), BM, BH)
        at1 = fc2 + c1[None, :] * H + (h0 + h)[:, None]
        at2 = fc2 + c2[None, :] * H + (h0 + h)[:, None]
        some = (h0 + h < H)[:, None]
        acc1 = tl.dot(u, tl.load(at1, mask=some & (c1 < C)[None, :], other=0.0), acc1)
        acc2 = tl.dot(u, tl.load(at2, mask=some & (c2 < C)[None, :], other=0.0), acc2)
    tl.store(y + at_s1, acc1.to(y.dtype.element_ty), mask=inside1)
    tl.store(y + at_s2, acc2.to(y.dtype.element_ty), mask=inside2)


def launch_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """y (M, C) of x (M, C), W1 (2 H, C) and W2 (C, H), all of one dtype and contiguous."""
    return F.linear(launch_swiglu(x, fc1)[0], fc2)


def launch_mlp_grad(dy: Tensor, x: Tensor, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of W1 and W2 in float32."""
    if _on_hopper('mlp_grad', x, fc2.shape[1], dy, fc1, fc2):
        dx, u, dh = hopper.launch_mlp_grad(dy, x, fc1, fc2)
    else:
        u, dh = launch_swiglu(x, fc1, dy, fc2)
        dx = dh @ fc1
    return dx, product(dh.t(), x), product(dy.t(), u)


class Half(NamedTuple):
    """The tensors of a residual MLP: dense ones, W1 and W2 of one dtype."""

    x: Tensor  # (B, .., C)
    branch: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor | None
    fc1: Tensor
    fc2: Tensor
    scale: Tensor | None  # (B,)
    factors: Tensor | None  # (B,), of the branch


def launch_residual_mlp(t: Half, eps: float) -> Tensor:
    """y (B, .., C), of the wider dtype of x and branch.

    By one kernel; in float32, with fewer than `FEWEST` tokens or more than `WIDEST` channels by those of its parts.
    """
    C, H = t.fc2.shape
    M = t.x.numel() // C
    if M == 0 or M < FEWEST or C > WIDEST or t.fc1.dtype == torch.float32:
        return _launch_apart(t, eps)
    y = torch.empty_like(t.x, dtype=torch.promote_types(t.x.dtype, t.branch.dtype))
    C1 = max(16, block(C) // 2)
    tile = (TILES if capability() in (90, 100, 103) else SMALL_TILES)[max(64, block(C))]
    norm_bias, scale, factors = (t.norm_weight if v is None else v for v in (t.norm_bias, t.scale, t.factors))
    residual_mlp_kernel[ceil_div(M, tile.BM),](
        t.x, t.branch, t.norm_weight, norm_bias, t.fc1, t.fc2, scale, factors, y, M, M // t.x.shape[0], H, eps,
        C=C, C1=C1, C2=block(C - C1), CENTER=t.norm_bias is not None, SCALED=t.scale is not None,
        FACTORS=t.factors is not None, **tile._asdict(),
    )  # fmt: skip
    return y


def launch_projected_mlp(
    z: Tensor, proj: Tensor, t: Half, eps: float, following: Norm | None = None
) -> tuple[Tensor, Tensor | None]:
    """`launch_residual_mlp` with z (.., C) times `proj` for the branch, and y's norm if there is one `following`.

    Both factors are dense, and of W1's dtype, as the norm is.
    """
    if _on_hopper('block_end', z, t.fc2.shape[1], t.x, t.fc1, t.fc2, proj) and t.x.dtype in (torch.float32, z.dtype):
        return hopper.launch_block_end(z, proj, t, eps, following)
    y = launch_residual_mlp(t._replace(branch=F.linear(z, proj).view(t.x.shape)), eps)
    return y, None if following is None else launch_norm(y, None, *following, eps, z.dtype)[1]


def _on_hopper(what: str, x: Tensor, H: int, *others: Tensor) -> bool:
    """Whether Hopper's kernel of that name is there, takes x (.., C) with H hidden channels, and is the fastest.

    `others` are what else it copies.
    """
    if not KNOWN or INTERPRETED or capability() != 90 or x.dtype == torch.float32:
        return False
    C = x.shape[-1]
    many = x.numel() >= max(1, hopper.FEWEST[what]) * C
    fits = hopper.WIDEST[what] >= C and C % 8 == 0 and H % hopper.DIVISOR[what] == 0
    return many and fits and all(m.data_ptr() % 16 == 0 for m in (x, *others))


def _launch_apart(t: Half, eps: float) -> Tensor:
    """`launch_residual_mlp` by the kernels of its parts."""
    total, n = launch_norm(t.x, t.branch, t.norm_weight, t.norm_bias, eps, t.fc1.dtype, factors=t.factors)
    u, _ = launch_swiglu(n.view(-1, t.fc2.shape[0]), t.fc1, scale=t.scale)
    return add_product(total, u, t.fc2.t())


def launch_residual_mlp_grad(sums: Sums, dy: Tensor, t: Half, eps: float) -> tuple[Tensor, ...]:
    """Gradients of x, branch, and in float32 of the norm's weight and bias (of `sums`), W1 and W2."""
    C, dtype = t.fc2.shape[0], t.fc1.dtype
    n = launch_norm(t.x, t.branch, t.norm_weight, t.norm_bias, eps, dtype, keep=False, factors=t.factors)[1]
    dz = scaled(dy, t.scale, dtype)
    dn, dfc1, dfc2 = launch_mlp_grad(dz.view(-1, C), n.view(-1, C), t.fc1, t.fc2)
    dx, dbranch, dw, db = launch_norm_grad(
        sums, dy, dn.view(dy.shape), t.x, t.norm_weight, t.norm_bias, eps, t.x.dtype, t.branch.dtype, branch=t.branch,
        factors=t.factors,
    )  # fmt: skip
    return dx, dbranch, dw, db, dfc1, dfc2
