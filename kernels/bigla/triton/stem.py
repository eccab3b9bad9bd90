"""A strided convolution and the LayerNorm and activation behind it, in Triton: how an image becomes tokens.

With p = conv(x) + bias, z = LayerNorm(p) and y = SiLU(z), GELU(z) or z. What is narrow enough for a program to hold
whole tokens is one kernel, an implicit matrix product whose columns are taps and channels; elsewhere PyTorch's
convolution comes before the norm's kernel. The backward computes p again. Of an image, which needs no gradient and is
narrow, that of the weights is such a product, too: cuDNN would pad three channels to eight first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .launch import begin, kernel
from .norm import launch_norm, launch_norm_grad
from .primitives import block, ceil_div, plain_precision
from .sums import Sums

WIDEST = 128  # channels of tokens that a program can hold
TOKENS, TAPS, WARPS, STAGES = 64, 32, 4, 3  # twice the tokens where windows are at most 3 x 3
# The same of the weights' gradient, the taps of all channels that it is for at most, and programs. It reads nothing
# ahead: pixels come four bytes at a time, and by asynchronous copies that took three to five times as long on an H200.
GRAD_TOKENS, GRAD_TAPS, GRAD_WARPS, FEW, PROGRAMS = 64, 32, 4, 256, 1024
SIZE = 1024  # weights that a program lays out


@triton.jit
def split(k, C: tl.constexpr, SIDE: tl.constexpr, LAST: tl.constexpr):
    """Row and column in the window and channel of k = (tap, channel), or with LAST not (channel, tap)."""
    if LAST:
        i, j, c = k // (SIDE * C), k // C % SIDE, k % C
    else:
        i, j, c = k // SIDE % SIDE, k % SIDE, k // (SIDE * SIDE)
    return i, j, c


@kernel(do_not_specialize=('D',))
def lay_out_kernel(
    weight, rows, weight_s, D,
    C: tl.constexpr, SIDE: tl.constexpr, PITCH: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE numbers of the D rows (PITCH) of weights, in the order of `split`, with zeros at their ends."""
    begin(True)
    n = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    d, k = n // PITCH, n % PITCH
    i, j, c = split(k, C, SIDE, LAST)
    at = weight + (d * weight_s[0] + c * weight_s[1] + i * weight_s[2] + j * weight_s[3])
    some = tl.load(at, mask=(d < D) & (k < SIDE * SIDE * C), other=0.0)
    tl.store(rows + n, some.to(rows.dtype.element_ty), mask=d < D)


@triton.jit
def load_patches(
    x, x_s, h, w, k, inside, H, W, C: tl.constexpr, SIDE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Pixels k, in the order of `split`, of windows whose corners are at h, w.  (BM, BK)"""
    i, j, c = split(k, C, SIDE, LAST)
    shift = c if LAST else c * x_s[3]
    row, column = h[:, None] + i[None, :], w[:, None] + j[None, :]
    # Of what is below 0, too, a comparison of unsigned numbers makes one with the far edge.
    inside = inside[:, None] & (row.to(tl.uint32, bitcast=True) < H) & (column.to(tl.uint32, bitcast=True) < W)
    inside = inside & (k < SIDE * SIDE * C)[None, :]
    if WIDE:
        row, column, shift = row.to(tl.int64), column.to(tl.int64), shift.to(tl.int64)
    return tl.load(x + (row * x_s[1] + column * x_s[2] + shift[None, :]), mask=inside, other=0.0)


@triton.jit
def load_vector(vector, d, D):
    """Entries d, for all rows.  (1, BD)"""
    return tl.load(vector + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@kernel(do_not_specialize=('H', 'W', 'HO', 'WO'))
def conv_norm_kernel(
    x, weight, bias, norm_weight, norm_bias, y, x_s, H, W, HO, WO, eps,
    C: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, PITCH: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr,
    ACT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """BM tokens of one sample's y, or of its p without NORM, in pieces of BD channels.

    The weights are a matrix of D rows PITCH apart, which is a multiple of BK, with zeros at their ends. LAST: channels
    are dense in x, and the weights' fastest dimension, too. WIDE: a sample of x does not lie within int32.
    """
    begin(True)
    M = HO * WO
    tiles = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    h, w = m // WO * STRIDE - 1, m % WO * STRIDE - 1
    PIECES: tl.constexpr = (D + BD - 1) // BD
    d = tl.arange(0, BD)
    at = x + b * x_s[0]
    p = ()
    for _ in tl.static_range(PIECES):
        p = p + (tl.zeros([BM, BD], tl.float32),)
    for k0 in tl.range(0, SIDE * SIDE * C, BK):
        k = k0 + tl.arange(0, BK)
        part = load_patches(at, x_s, h, w, k, m < M, H, W, C, SIDE, LAST, WIDE)
        added = ()
        for j in tl.static_range(PIECES):
            row = j * BD + d
            taps = tl.load(weight + row[None, :] * PITCH + k[:, None], mask=(row < D)[None, :], other=0.0)
            added = added + (tl.dot(part.to(taps.dtype), taps, p[j], input_precision=PREC),)
        p = added
    biased = ()
    for j in tl.static_range(PIECES):
        biased = biased + (p[j] + load_vector(bias, j * BD + d, D),)
    p = biased
    if NORM:
        mean = tl.zeros([BM], tl.float32)
        for j in tl.static_range(PIECES):
            mean += tl.sum(p[j], 1) / D
        centered = ()
        square = tl.zeros([BM], tl.float32)
        for j in tl.static_range(PIECES):
            u = tl.where((j * BD + d < D)[None, :], p[j] - mean[:, None], 0.0)
            square += tl.sum(u * u, 1) / D
            centered = centered + (u,)
        p = centered
        r = tl.rsqrt(square + eps)[:, None]
    for j in tl.static_range(PIECES):
        c = j * BD + d
        z = p[j]
        if NORM:
            z = z * r * load_vector(norm_weight, c, D) + load_vector(norm_bias, c, D)
            z = activate(z, ACT, y.dtype.element_ty)
        to = y + b * M * D + m.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(to, z.to(y.dtype.element_ty), mask=(m < M)[:, None] & (c < D)[None, :])


@kernel(do_not_specialize=('H', 'W', 'HO', 'WO', 'N'))
def conv_weight_grad_kernel(
    x, dp, parts, x_s, H, W, HO, WO, N,
    C: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A part (D, BK) of the weights' gradient: the sum over every so-many-th of N tiles, BM tokens of a row each."""
    begin(False)
    across = tl.cdiv(WO, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    d = tl.arange(0, BD)
    acc = tl.zeros([BD, BK], tl.float32)
    for tile in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=1):
        w = tile % across * BM + tl.arange(0, BM)
        row = tile // across  # of all samples
        b, h = (row // HO).to(tl.int64), tl.full([1], row % HO, tl.int32)
        part = load_patches(x + b * x_s[0], x_s, h * STRIDE - 1, w * STRIDE - 1, k, w < WO, H, W, C, SIDE, LAST, WIDE)
        at = dp + (row.to(tl.int64) * WO + w[:, None]) * D + d[None, :]
        some = tl.load(at, mask=(w < WO)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(some), part.to(some.dtype), acc, input_precision=PREC)
    at = parts + (tl.program_id(0).to(tl.int64) * D + d[:, None]) * (SIDE * SIDE * C) + k[None, :]
    tl.store(at, acc, mask=(d < D)[:, None] & (k < SIDE * SIDE * C)[None, :])


def out_side(side: int, kernel: int, stride: int) -> int:
    return (side + 2 - kernel) // stride + 1


def piece(D: int) -> int:
    """Channels of each piece of D: a power of two, as large as padding of at most an eighth allows, or 16."""
    return next(n for n in (128, 64, 32, 16) if n == 16 or ceil_div(D, n) * n <= D * 9 / 8)


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, C) as PyTorch's convolutions like it best: (B, C, H, W), with its channels dense."""
    return x.to(dtype).contiguous().permute(0, 3, 1, 2)


def is_last(x: Tensor) -> bool:
    """Whether neighbours in memory are the channels of a pixel."""
    return x.stride(-1) == 1 and x.shape[-1] > 1


def is_wide(x: Tensor) -> bool:
    """Whether a sample does not lie within int32."""
    return sum((n - 1) * step for n, step in zip(x.shape[1:], x.stride()[1:])) >= 2**31


def lay_out(weight: Tensor, dtype: torch.dtype, last: bool, multiple: int = 1) -> Tensor:
    """(D, C, side, side) of any strides as rows in the order of `split`, zeros behind up to a multiple.  (D, PITCH)

    One launch casts, permutes and pads, where PyTorch takes up to four.
    """
    D, C, side = weight.shape[:3]
    rows = weight.new_empty(D, ceil_div(C * side**2, multiple) * multiple, dtype=dtype)
    lay_out_kernel[ceil_div(rows.numel(), SIZE),](
        weight, rows, weight.stride(), D,
        C=C, SIDE=side, PITCH=rows.shape[1], LAST=last, SIZE=SIZE, num_warps=WARPS,
    )  # fmt: skip
    return rows


def channels_last_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(D, C, side, side) with its channels dense, too: beside `channels_last` PyTorch would copy others for cuDNN."""
    D, C, side = weight.shape[:3]
    return lay_out(weight, dtype, True).view(D, side, side, C).permute(0, 3, 1, 2)


def launch_narrow_conv(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, eps: float,
    act: str, inner: torch.dtype, dtype: torch.dtype, norm: bool,
) -> Tensor:  # fmt: skip
    """y of `dtype`, or p without `norm`, by the one kernel."""
    B, H, W, C = x.shape
    D, side = weight.shape[0], weight.shape[-1]
    HO, WO = out_side(H, side, stride), out_side(W, side, stride)
    y = x.new_empty(B, HO, WO, D, dtype=dtype)
    bias, norm_weight, norm_bias = bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    last = is_last(x)
    tokens = TOKENS if side > 3 else 2 * TOKENS
    if y.numel():
        rows = lay_out(weight, inner, last, TAPS)
        conv_norm_kernel[ceil_div(HO * WO, tokens) * B,](
            x, rows, bias, norm_weight, norm_bias, y, x.stride(), H, W, HO, WO, eps,
            C=C, D=D, SIDE=side, STRIDE=stride, BM=tokens, BD=piece(D),
            BK=TAPS, PITCH=rows.shape[1], LAST=last, WIDE=is_wide(x), NORM=norm, ACT=act, num_stages=STAGES,
            PREC=plain_precision(inner), num_warps=WARPS,
        )  # fmt: skip
    return y


def launch_conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, eps: float,
    act: str, inner: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y (B, HO, WO, D) of `dtype` from x (B, H, W, C) of any strides; products are those of `inner`."""
    if weight.shape[0] <= WIDEST:
        return launch_narrow_conv(x, weight, bias, norm_weight, norm_bias, stride, eps, act, inner, dtype, True)
    p = plain_conv(channels_last(x, inner), channels_last_weight(weight, inner), stride)
    return launch_norm(p, None, norm_weight, norm_bias, eps, dtype, act, shift=bias.contiguous())[1]


def plain_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """p (B, HO, WO, D) less the bias, which PyTorch would add in a pass of its own, from x (B, C, H, W).

    Channels are dense in both.
    """
    return torch.conv2d(x, weight, None, stride, 1).permute(0, 2, 3, 1).contiguous()


def launch_conv_norm_grad(
    sums: Sums, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    stride: int, eps: float, act: str, inner: torch.dtype, needs_dx: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the five tensors that `launch_conv_norm` got; x's None unless `needs_dx`.

    Those of vectors, and of an image's weights, are of `sums`.
    """
    narrow = weight.shape[0] <= WIDEST
    by_kernel = narrow and not needs_dx and weight[0].numel() <= FEW
    image, taps = (None, None) if by_kernel else (channels_last(x, inner), channels_last_weight(weight, inner))
    if narrow:
        p = launch_narrow_conv(x, weight, bias, norm_weight, norm_bias, stride, eps, '', inner, inner, False)
    else:
        p = plain_conv(image, taps, stride)
    dp, _, *dnorm = launch_norm_grad(
        sums, None, dy.contiguous(), p, norm_weight, norm_bias, eps, inner, None, act,
        shift=None if narrow else bias.contiguous(),
    )  # fmt: skip
    if by_kernel:
        dx, dweight = None, launch_conv_weight_grad(sums, dp, x, weight.shape[-1], stride)
    else:
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dp.permute(0, 3, 1, 2), image, taps, None,
            [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [needs_dx, True, False],
        )  # fmt: skip
    (dbias,) = sums.add((dp.flatten(0, 2), 1))
    return None if dx is None else dx.permute(0, 2, 3, 1).to(x.dtype), dweight, dbias, *dnorm


def launch_conv_weight_grad(sums: Sums, dp: Tensor, x: Tensor, side: int, stride: int) -> Tensor:
    """That of the weights (D, C, side, side), of `sums`, from dp (B, HO, WO, D), dense, and x (B, H, W, C)."""
    B, HO, WO, D = dp.shape
    H, W, C = x.shape[1:]
    K = C * side**2
    across = ceil_div(K, GRAD_TAPS)
    N = ceil_div(WO, GRAD_TOKENS) * HO * B
    parts = dp.new_empty(min(N, ceil_div(PROGRAMS, across)), D * K, dtype=torch.float32)
    last = is_last(x)
    if N:
        conv_weight_grad_kernel[len(parts), across](
            x, dp, parts, x.stride(), H, W, HO, WO, N,
            C=C, D=D, SIDE=side, STRIDE=stride, BM=GRAD_TOKENS, BD=block(D), BK=GRAD_TAPS, LAST=last, WIDE=is_wide(x),
            PREC=plain_precision(dp.dtype), num_warps=GRAD_WARPS,
        )  # fmt: skip
    (dweight,) = sums.add((parts, 1))
    return dweight.view(D, side, side, C).permute(0, 3, 1, 2) if last else dweight.view(D, C, side, side)
