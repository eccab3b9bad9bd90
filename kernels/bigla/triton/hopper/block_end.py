"""The end of a block on Hopper, in Gluon: output projection, sum, norm, gated MLP and sum by one kernel.

With z what the mixer's heads gave::

    s = x + f Wo z      y = s + scale W2 (SiLU(a) b)      [a, b] = W1 norm(s)

and the norm of y, with which the next block begins.

What lies between x, z and y never leaves the registers of a group; see `parts.py`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..norm import load_factor
from .parts import (
    BY_ROWS,
    COLUMN,
    HIDDEN,
    LEFT,
    MMA,
    REGISTERS,
    ROW,
    SIDE,
    WARPS,
    add,
    allocate,
    copy_columns,
    copy_left,
    copy_own,
    copy_rows,
    descriptor,
    expect,
    finish,
    gated,
    groups,
    leave,
    load_left,
    make_room,
    multiply,
    pieces,
    place,
    programs,
    release,
    wait_for,
)

if TYPE_CHECKING:
    from ..mlp import Half
    from ..norm import Norm

STAGES = {1: 4, 2: 3}  # parts in the ring, by groups: as many as their x leaves room for


@gluon.jit
def copy_factors(z, proj, fc1, fc2, ring, tiles, H, P: gl.constexpr, G: gl.constexpr):
    """The parts of the ring: z of each group, Wo, and with rows of W1 the columns of W2 for the rows before."""
    rows, columns, full, empty = ring
    ROWS: gl.constexpr = P * SIDE * SIDE * 2
    COLUMNS: gl.constexpr = P * SIDE * HIDDEN * 2
    n = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        copy_left(z, tile, ring, n, P, G)
        n += G
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
def gated_left(h, f, SCALED: gl.constexpr, HALF: gl.constexpr):
    """`gated`, as the left factor of the next product.  (SIDE, HIDDEN)"""
    return gl.convert_layout(gated(h, f, SCALED, HALF), LEFT)


@gluon.jit
def row_mean(x, C: gl.constexpr, P: gl.constexpr):
    total = gl.sum(x[0], 1)
    for p in gl.static_range(1, P):
        total += gl.sum(x[p], 1)
    return (total / C)[:, None]


@gluon.jit
def normalize(s, weight, bias, eps, HALF: gl.constexpr, CENTER: gl.constexpr, C: gl.constexpr, P: gl.constexpr):
    """The norm of P pieces of rows.  P x (SIDE, SIDE)"""
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
    y = ()
    for p in gl.static_range(P):
        inside = p * SIDE + c < C
        u = s[p] * r
        if CENTER:  # not r times the differences of before, which would have to be kept
            u -= mean * r
        u *= gl.load(weight + p * SIDE + c, mask=inside, other=0.0).to(gl.float32)[None, :]
        if CENTER:
            u += gl.load(bias + p * SIDE + c, mask=inside, other=0.0).to(gl.float32)[None, :]
        y = y + (u.to(HALF),)
    return y


@gluon.jit
def as_left(x, P: gl.constexpr):
    """P pieces as left factors of products."""
    left = ()
    for p in gl.static_range(P):
        left = left + (gl.convert_layout(x[p], LEFT),)
    return left


@gluon.jit
def store_rows(x, y, first, M, C: gl.constexpr, P: gl.constexpr):
    """P pieces `x` to rows of y (M, C) from `first` on, piece by piece: another result leaves from shared memory."""
    m = first + gl.arange(0, SIDE, gl.SliceLayout(1, BY_ROWS))
    c = gl.arange(0, SIDE, gl.SliceLayout(0, BY_ROWS))
    at = y + m.to(gl.int64)[:, None] * C + c[None, :]
    for p in gl.static_range(P):
        inside = (m < M)[:, None] & (p * SIDE + c < C)[None, :]
        gl.store(at + p * SIDE, gl.convert_layout(x[p], BY_ROWS), mask=inside)


@gluon.jit
def compute(
    group, shared, sizes, C: gl.constexpr, P: gl.constexpr, G: gl.constexpr, CENTER: gl.constexpr,
    SCALED: gl.constexpr, FACTORS: gl.constexpr, NEXT: gl.constexpr, NEXT_CENTER: gl.constexpr,
):  # fmt: skip
    """y of one group's tokens, NEXT: and its norm."""
    y, normed, vectors, ring, own, turns = shared
    tiles, M, L, H, eps = sizes
    norm_weight, norm_bias, scale, factors, next_weight, next_bias = vectors
    rows, columns, full, empty = ring
    x, x_full, x_empty = own
    HALF: gl.constexpr = rows.dtype
    mine, other = turns.index(group), turns.index((group + 1) % G)
    n = 0
    turn = 1 - group  # the first group's first one is now
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = (tile * G + group) * SIDE
        m = first + gl.arange(0, SIDE, ROW)
        # The sum
        z = load_left(ring, n, group, P, G)
        n += G
        branch = ()
        for p in gl.static_range(P):
            wait_for(full, n)
            h = multiply(z, ring, n, P)
            if p == 0:
                make_room(own, group, tile)
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
            acc = acc + (x.index(group * P + p).load(MMA).to(gl.float32) + branch[p] * f,)
        left = as_left(normalize(acc, norm_weight, norm_bias, eps, HALF, CENTER, C, P), P)
        if SCALED:
            f = load_factor(scale, m, M, L)
        # The MLP: while the products of some hidden channels are gated, those gated before them are multiplied.
        wait_for(full, n)
        mbarrier.wait(mine, turn)
        h = warpgroup_mma_wait(0, (multiply(left, ring, n, P),))
        mbarrier.arrive(other)
        turn ^= 1
        u = gated_left(h, f, SCALED, HALF)
        release(empty, n)
        n += 1
        for _ in range(HIDDEN, H, HIDDEN):
            wait_for(full, n)
            mbarrier.wait(mine, turn)
            h = multiply(left, ring, n, P)
            acc = add(u, acc, columns, place(full, n)[0], True, P)
            h = warpgroup_mma_wait(P, (h,))
            mbarrier.arrive(other)
            turn ^= 1
            acc, later = finish(acc, u, (gated_left(h, f, SCALED, HALF),), P)
            u = later[0]
            release(empty, n)
            n += 1
        wait_for(full, n)
        acc, later = finish(add(u, acc, columns, place(full, n)[0], True, P), u, (u,), P)
        release(empty, n)
        n += 1
        leave(acc, y, own, group, first, P)
        if NEXT:
            following = normalize(acc, next_weight, next_bias, eps, HALF, NEXT_CENTER, C, P)
            store_rows(following, normed, first, M, C, P)
        phase ^= 1
    tma.store_wait(0)


@kernel(do_not_specialize=('M', 'L'), jit=gluon.jit)
def block_end_kernel(
    x, z, proj, fc1, fc2, y, normed, norm_weight, norm_bias, scale, factors, next_weight, next_bias, M, L, H, eps,
    C: gl.constexpr, P: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
    CENTER: gl.constexpr, SCALED: gl.constexpr, FACTORS: gl.constexpr, NEXT: gl.constexpr, NEXT_CENTER: gl.constexpr,
):  # fmt: skip
    ring, own, turns = allocate(z, fc2, x, STAGES, P, G)
    tiles = gl.cdiv(M, G * SIDE)
    begin(True)
    vectors = norm_weight, norm_bias, scale, factors, next_weight, next_bias
    shared = y, normed, vectors, ring, own, turns
    sizes = tiles, M, L, H, eps
    if G == 1:
        gl.warp_specialize(
            [
                (compute, (0, shared, sizes, C, P, G, CENTER, SCALED, FACTORS, NEXT, NEXT_CENTER)),
                (copy_factors, (z, proj, fc1, fc2, ring, tiles, H, P, G)),
                (copy_own, (x, own, tiles, P)),
            ],
            (WARPS[1], WARPS[2]),
            (REGISTERS[1], REGISTERS[2]),
        )
    else:
        gl.warp_specialize(
            [
                (compute, (0, shared, sizes, C, P, G, CENTER, SCALED, FACTORS, NEXT, NEXT_CENTER)),
                (compute, (1, shared, sizes, C, P, G, CENTER, SCALED, FACTORS, NEXT, NEXT_CENTER)),
                (copy_factors, (z, proj, fc1, fc2, ring, tiles, H, P, G)),
                (copy_own, (x, own, tiles, P)),
            ],
            WARPS,
            REGISTERS,
        )


def launch_block_end(
    z: Tensor, proj: Tensor, t: 'Half', eps: float, following: 'Norm | None' = None
) -> tuple[Tensor, Tensor | None]:
    """y (B, .., C), of the dtype of x, and its norm if there is one `following`, of z's.

    z (.., C) and the weights are of one dtype in half precision. All are dense, and rows start at multiples of 16
    bytes; t's branch is not looked at.
    """
    side, some = SIDE.value, HIDDEN.value
    C, H = t.fc2.shape
    M = t.x.numel() // C
    y = torch.empty_like(t.x)
    normed = None if following is None else torch.empty_like(t.x, dtype=z.dtype)
    G = groups(M, t.x.device)
    vectors = t.norm_weight, t.norm_bias, t.scale, t.factors, *(following or (None, None))
    block_end_kernel[programs(M, G, t.x.device),](
        descriptor(t.x.view(M, C), side), descriptor(z.view(M, C), some), descriptor(proj, some),
        descriptor(t.fc1, some), descriptor(t.fc2, side, some), descriptor(y.view(M, C), side),
        z if normed is None else normed, *(t.norm_weight if v is None else v for v in vectors),
        M, M // t.x.shape[0], H, eps,
        C=C, P=pieces(C), G=G, STAGES=STAGES[G], CENTER=t.norm_bias is not None, SCALED=t.scale is not None,
        FACTORS=t.factors is not None, NEXT=following is not None,
        NEXT_CENTER=following is not None and following.bias is not None, num_warps=4,
    )  # fmt: skip
    return y, normed
