"""The end of a block on Hopper, in Gluon: output projection, sum, norm, gated MLP and sum by one kernel.

With z what the mixer's heads gave::

    s = x + f Wo z      y = s + scale W2 (SiLU(a) b)      [a, b] = W1 norm(s)

A program stays on its multiprocessor, and its warps have roles. Two groups of four multiply, for 64 tokens each: what
lies between x, z and y never leaves their registers. They take turns, so that one makes products while the other one
makes norms or gates. One warp copies z and the weights, part by part, into a ring in shared memory, from which both
groups read; another one copies x, to where y leaves from.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .activations import sigmoid
from .launch import kernel
from .norm import load_factor
from .primitives import ceil_div

if TYPE_CHECKING:
    from .mlp import Half

# Channels that fit into a program's registers, and tokens: fewer take longer in one kernel than in its parts. On an
# H200, with ViG-T's channels, 4,096 take 20.7 us for 17.6, and 5,120 take 20.9 for 21.7.
WIDEST = 192
FEWEST = 5120

SIDE = gl.constexpr(64)  # tokens of a group, and the side of the pieces in which everything is multiplied
HIDDEN = gl.constexpr(32)  # hidden channels at a time
GROUPS = gl.constexpr(2)
STAGES = gl.constexpr(3)  # parts in the ring: as many as x leaves room for
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))
COLUMN = gl.constexpr(gl.SliceLayout(0, MMA))
ROW = gl.constexpr(gl.SliceLayout(1, MMA))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def place(n):
    """Where in the ring the n-th part goes, and the phase of its barriers."""
    return n % STAGES, n // STAGES & 1


@gluon.jit
def expect(full, empty, n, BYTES: gl.constexpr):
    """Waits for room for the n-th part, of BYTES."""
    at, phase = place(n)
    mbarrier.wait(empty.index(at), phase ^ 1)
    mbarrier.expect(full.index(at), BYTES)


@gluon.jit
def copy_rows(matrix, first, second, rows, full, n, P: gl.constexpr):
    """HIDDEN rows from `first` and from `second` on."""
    at = n % STAGES
    for p in gl.static_range(P):
        piece = rows.index(at * P + p)
        tma.async_copy_global_to_shared(matrix, [first, p * SIDE], full.index(at), piece.slice(0, HIDDEN))
        tma.async_copy_global_to_shared(matrix, [second, p * SIDE], full.index(at), piece.slice(HIDDEN, HIDDEN))


@gluon.jit
def copy_columns(matrix, first, columns, full, n, P: gl.constexpr):
    """HIDDEN columns from `first` on."""
    at = n % STAGES
    for p in gl.static_range(P):
        tma.async_copy_global_to_shared(matrix, [p * SIDE, first], full.index(at), columns.index(at * P + p))


@gluon.jit
def copy_factors(z, proj, fc1, fc2, ring, tiles, H, P: gl.constexpr):
    """The parts of the ring: z of each group, Wo, and with rows of W1 the columns of W2 for the rows before."""
    rows, columns, full, empty = ring
    ROWS: gl.constexpr = P * SIDE * SIDE * 2
    COLUMNS: gl.constexpr = P * SIDE * HIDDEN * 2
    n = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for group in gl.static_range(GROUPS):
            first = (tile * GROUPS + group) * SIDE
            expect(full, empty, n, ROWS)
            copy_rows(z, first, first + HIDDEN, rows, full, n, P)
            n += 1
        for p in gl.static_range(P):
            expect(full, empty, n, ROWS)
            copy_rows(proj, p * SIDE, p * SIDE + HIDDEN, rows, full, n, P)
            n += 1
        expect(full, empty, n, ROWS)
        copy_rows(fc1, 0, H, rows, full, n, P)
        n += 1
        for h in range(HIDDEN, H, HIDDEN):
            expect(full, empty, n, ROWS + COLUMNS)
            copy_rows(fc1, h, H + h, rows, full, n, P)
            copy_columns(fc2, h - HIDDEN, columns, full, n, P)
            n += 1
        expect(full, empty, n, COLUMNS)
        copy_columns(fc2, (H - 1) // HIDDEN * HIDDEN, columns, full, n, P)
        n += 1


@gluon.jit
def copy_stream(x, stream, tiles, P: gl.constexpr):
    """x of each group."""
    pieces, full, empty = stream
    BYTES: gl.constexpr = P * SIDE * SIDE * (x.dtype.primitive_bitwidth // 8)
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for group in gl.static_range(GROUPS):
            mbarrier.wait(empty.index(group), phase)
            mbarrier.expect(full.index(group), BYTES)
            for p in gl.static_range(P):
                at = [(tile * GROUPS + group) * SIDE, p * SIDE]
                tma.async_copy_global_to_shared(x, at, full.index(group), pieces.index(group * P + p))
        phase ^= 1


@gluon.jit
def wait_for(full, n):
    at, phase = place(n)
    mbarrier.wait(full.index(at), phase)


@gluon.jit
def release(empty, n):
    """The n-th part has been read."""
    gl.thread_barrier()
    mbarrier.arrive(empty.index(n % STAGES))


@gluon.jit
def multiply(x, rows, n, P: gl.constexpr):
    """x W^T of P pieces x and the rows of the n-th part; under way.  (SIDE, SIDE)"""
    acc = gl.zeros([SIDE, SIDE], gl.float32, MMA)
    for p in gl.static_range(P):
        w = rows.index(n % STAGES * P + p).permute((1, 0))
        acc = warpgroup_mma(x[p], w, acc, use_acc=p > 0, is_async=True)
    return acc


@gluon.jit
def add(u, acc, columns, n, P: gl.constexpr):
    """acc + u W^T with the columns of the n-th part; under way.  P x (SIDE, SIDE)"""
    out = ()
    for p in gl.static_range(P):
        w = columns.index(n % STAGES * P + p).permute((1, 0))
        out = out + (warpgroup_mma(u, w, acc[p], is_async=True),)
    return out


@gluon.jit
def finish(acc, u, later, P: gl.constexpr):
    """`acc` when all products are done, which read u, and `later`, which is there before they are waited for."""
    done = warpgroup_mma_wait(0, (u, later) + acc)
    acc = ()
    for p in gl.static_range(P):
        acc = acc + (done[2 + p],)
    return acc, done[1]


@gluon.jit
def gated(h, f, SCALED: gl.constexpr, HALF: gl.constexpr):
    """SiLU(a) b of products [a, b], times f, as the left factor of the next product.  (SIDE, HIDDEN)"""
    a, b = gl.split(gl.permute(gl.reshape(h, [SIDE, 2, HIDDEN]), (0, 2, 1)))
    u = a * sigmoid(a) * b
    if SCALED:
        u = u * gl.convert_layout(f, u.type.layout)
    return gl.convert_layout(u.to(HALF), LEFT)


@gluon.jit
def row_mean(x, C: gl.constexpr, P: gl.constexpr):
    total = gl.sum(x[0], 1)
    for p in gl.static_range(1, P):
        total += gl.sum(x[p], 1)
    return (total / C)[:, None]


@gluon.jit
def normalize(s, weight, bias, eps, HALF: gl.constexpr, CENTER: gl.constexpr, C: gl.constexpr, P: gl.constexpr):
    """The norm of P pieces of rows, as left factors."""
    c = gl.arange(0, SIDE, COLUMN)
    mean = 0.0
    if CENTER:
        mean = row_mean(s, C, P)
    squares = ()
    for p in gl.static_range(P):
        u = s[p]
        if CENTER:
            u = gl.where((p * SIDE + c < C)[None, :], u - mean, 0.0)
        squares = squares + (u * u,)
    r = gl.rsqrt(row_mean(squares, C, P) + eps)
    left = ()
    for p in gl.static_range(P):
        inside = p * SIDE + c < C
        u = s[p] * r
        if CENTER:  # not r times the differences of before, which would have to be kept
            u -= mean * r
        u *= gl.load(weight + p * SIDE + c, mask=inside, other=0.0).to(gl.float32)[None, :]
        if CENTER:
            u += gl.load(bias + p * SIDE + c, mask=inside, other=0.0).to(gl.float32)[None, :]
        left = left + (gl.convert_layout(u.to(HALF), LEFT),)
    return left


@gluon.jit
def compute(
    group, shared, sizes, C: gl.constexpr, P: gl.constexpr, CENTER: gl.constexpr,
    SCALED: gl.constexpr, FACTORS: gl.constexpr,
):  # fmt: skip
    """y of one group's tokens."""
    y, vectors, ring, stream, turns = shared
    tiles, M, L, H, eps = sizes
    norm_weight, norm_bias, scale, factors = vectors
    rows, columns, full, empty = ring
    pieces, x_full, x_empty = stream
    HALF: gl.constexpr = rows.dtype
    mine, other = turns.index(group), turns.index(1 - group)
    n = 0
    turn = 1 - group  # the first group's first one is now
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = (tile * GROUPS + group) * SIDE
        m = first + gl.arange(0, SIDE, ROW)
        # The sum
        wait_for(full, n)
        wait_for(full, n + 1)
        z = ()
        for p in gl.static_range(P):
            z = z + (rows.index((n + group) % STAGES * P + p).load(LEFT),)
        fence_async_shared()  # or the copy that follows overtakes loads under way
        release(empty, n)
        release(empty, n + 1)
        n += 2
        branch = ()
        for p in gl.static_range(P):
            wait_for(full, n)
            h = multiply(z, rows, n, P)
            if p == 0:  # the last tile's y has left by now
                tma.store_wait(0)
                gl.thread_barrier()  # some warp may have been the one that sent it
                mbarrier.arrive(x_empty.index(group), pred=tile != gl.program_id(0))
            branch = branch + (warpgroup_mma_wait(0, (h,)),)
            release(empty, n)
            n += 1
        if FACTORS:
            f = load_factor(factors, m, M, L)
        else:
            f = 1.0
        mbarrier.wait(x_full.index(group), phase)
        acc = ()
        for p in gl.static_range(P):
            acc = acc + (pieces.index(group * P + p).load(MMA).to(gl.float32) + branch[p] * f,)
        left = normalize(acc, norm_weight, norm_bias, eps, HALF, CENTER, C, P)
        if SCALED:
            f = load_factor(scale, m, M, L)
        # The MLP: while the products of some hidden channels are gated, those gated before them are multiplied.
        wait_for(full, n)
        mbarrier.wait(mine, turn)
        h = warpgroup_mma_wait(0, (multiply(left, rows, n, P),))
        mbarrier.arrive(other)
        turn ^= 1
        u = gated(h, f, SCALED, HALF)
        release(empty, n)
        n += 1
        for _ in range(HIDDEN, H, HIDDEN):
            wait_for(full, n)
            mbarrier.wait(mine, turn)
            h = multiply(left, rows, n, P)
            acc = add(u, acc, columns, n, P)
            h = warpgroup_mma_wait(P, (h,))
            mbarrier.arrive(other)
            turn ^= 1
            acc, u = finish(acc, u, gated(h, f, SCALED, HALF), P)
            release(empty, n)
            n += 1
        wait_for(full, n)
        acc, u = finish(add(u, acc, columns, n, P), u, u, P)
        release(empty, n)
        n += 1
        # Out where x came in
        for p in gl.static_range(P):
            pieces.index(group * P + p).store(acc[p].to(pieces.dtype))
        fence_async_shared()
        gl.thread_barrier()
        for p in gl.static_range(P):
            tma.async_copy_shared_to_global(y, [first, p * SIDE], pieces.index(group * P + p))
        phase ^= 1
    tma.store_wait(0)


@kernel(do_not_specialize=('M', 'L'), jit=gluon.jit)
def block_end_kernel(
    x, z, proj, fc1, fc2, y, norm_weight, norm_bias, scale, factors, M, L, H, eps,
    C: gl.constexpr, P: gl.constexpr,
    CENTER: gl.constexpr, SCALED: gl.constexpr, FACTORS: gl.constexpr,
):  # fmt: skip
    rows = gl.allocate_shared_memory(z.dtype, [STAGES * P, SIDE, SIDE], z.layout)
    columns = gl.allocate_shared_memory(z.dtype, [STAGES * P, SIDE, HIDDEN], fc2.layout)
    pieces = gl.allocate_shared_memory(x.dtype, [GROUPS * P, SIDE, SIDE], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    x_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    x_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    tiles = gl.cdiv(M, GROUPS * SIDE)
    vectors = norm_weight, norm_bias, scale, factors
    ring = rows, columns, full, empty
    stream = pieces, x_full, x_empty
    shared = y, vectors, ring, stream, turns
    sizes = tiles, M, L, H, eps
    gl.warp_specialize(
        [
            (compute, (0, shared, sizes, C, P, CENTER, SCALED, FACTORS)),
            (compute, (1, shared, sizes, C, P, CENTER, SCALED, FACTORS)),
            (copy_factors, (z, proj, fc1, fc2, ring, tiles, H, P)),
            (copy_stream, (x, stream, tiles, P)),
        ],
        [4, 1, 1],
        [240, 24, 24],  # registers of a thread; the first group gets what they leave of 504, 240 as well
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_block_end(z: Tensor, proj: Tensor, t: 'Half', eps: float) -> Tensor:
    """y (B, .., C), of the dtype of x; z (.., C) and the weights are of one in half precision.

    All are dense, and rows start at multiples of 16 bytes; t's branch is not looked at.
    """
    side, some = SIDE.value, HIDDEN.value
    C, H = t.fc2.shape
    M = t.x.numel() // C
    y = torch.empty_like(t.x)
    vectors = (t.norm_weight if v is None else v for v in (t.norm_weight, t.norm_bias, t.scale, t.factors))
    block_end_kernel[min(multiprocessors(t.x.device), ceil_div(M, GROUPS.value * side)),](
        descriptor(t.x.view(M, C), side), descriptor(z.view(M, C), some), descriptor(proj, some),
        descriptor(t.fc1, some), descriptor(t.fc2, side, some), descriptor(y.view(M, C), side), *vectors,
        M, M // t.x.shape[0], H, eps,
        C=C, P=max(2, ceil_div(C, side)), CENTER=t.norm_bias is not None, SCALED=t.scale is not None,
        FACTORS=t.factors is not None, num_warps=4,
    )  # fmt: skip
    return y


def descriptor(matrix: Tensor, height: int, width: int = SIDE.value) -> TensorDescriptor:
    """What is copied of a matrix at a time."""
    return TensorDescriptor.from_tensor(matrix, [height, width], shared_layout(8 * matrix.itemsize, width))


@functools.cache
def shared_layout(bits: int, width: int) -> gl.NVMMASharedLayout:
    """Where the rows of a piece lie, of numbers of so many bits."""
    return gl.NVMMASharedLayout(min(128, width * bits // 8), bits, 2)
