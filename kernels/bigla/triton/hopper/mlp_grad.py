"""The gradient of the gated MLP on Hopper, in Gluon: all but the weights' own, by one kernel.

With [a, b] = W1 x, u = SiLU(a) b and y = W2 u::

    du = W2^T dy      db = du SiLU(a)      da = du b SiLU'(a)      dx = W1^T [da, db]

x and the gradient of x stay in registers; u, da and db pass by, and leave for the weights' gradients.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launch import begin, kernel
from .parts import (
    GATES,
    HIDDEN,
    LEFT,
    MMA,
    MMA_HIDDEN,
    REGISTERS,
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
    gate_grads,
    groups,
    leave,
    leave_gates,
    load_left,
    make_room,
    multiply,
    pieces,
    place,
    programs,
    put,
    release,
    wait_for,
)

STAGES = gl.constexpr(4)  # parts in the ring


@gluon.jit
def copy_factors(x, fc1, fc2, ring, tiles, H, P: gl.constexpr, G: gl.constexpr):
    """The parts of the ring: x of each group, and rows of W1 with the columns of W2 for the same hidden channels."""
    rows, columns, full, empty = ring
    ROWS: gl.constexpr = P * SIDE * SIDE * 2
    COLUMNS: gl.constexpr = P * SIDE * HIDDEN * 2
    n = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        copy_left(x, tile, ring, n, P, G)
        n += G
        for h in range(0, H, HIDDEN):
            expect(full, empty, n, ROWS + COLUMNS)
            copy_rows(fc1, h, H + h, rows, full, n, P)
            copy_columns(fc2, h, columns, full, n, P)
            n += 1


@gluon.jit
def multiply_hidden(dy, ring, n, group, P: gl.constexpr):
    """dy W of the group's P pieces dy and the columns of the n-th part; under way.  (SIDE, HIDDEN)"""
    rows, columns, full, empty = ring
    at, _ = place(full, n)
    acc = gl.zeros([SIDE, HIDDEN], gl.float32, MMA_HIDDEN)
    for p in gl.static_range(P):
        acc = warpgroup_mma(dy.index(group * P + p), columns.index(at * P + p), acc, use_acc=p > 0, is_async=True)
    return acc


@gluon.jit
def gates_and_left(h, du, HALF: gl.constexpr):
    """`gate_grads`, and [da, db] as the left factor of the next product."""
    u, da, db = gate_grads(h, du, HALF)
    dh = gl.reshape(gl.permute(gl.join(da, db), (0, 2, 1)), [SIDE, 2 * HIDDEN])
    return u, da, db, gl.convert_layout(dh, LEFT)


@gluon.jit
def compute(group, results, shared, tiles, H, P: gl.constexpr, G: gl.constexpr):
    """What there is to give of one group's tokens."""
    dx, u, dh = results
    ring, own, out, turns = shared
    rows, columns, full, empty = ring
    dy, own_full, own_empty = own
    HALF: gl.constexpr = rows.dtype
    mine, other = turns.index(group), turns.index((group + 1) % G)
    n = 0
    turn = 1 - group  # the first group's first one is now
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = (tile * G + group) * SIDE
        left = load_left(ring, n, group, P, G)
        n += G
        make_room(own, group, tile)
        mbarrier.wait(own_full.index(group), phase)
        wait_for(full, n)
        mbarrier.wait(mine, turn)
        h = multiply(left, ring, n, P)
        du = multiply_hidden(dy, ring, n, group, P)
        h, du = warpgroup_mma_wait(0, (h, du))
        mbarrier.arrive(other)
        turn ^= 1
        gu, ga, gb, factor = gates_and_left(h, du, HALF)
        put((gu, ga, gb), out, group * GATES)
        leave_gates(u, dh, out, group * GATES, first, 0, H)
        n += 1
        acc = ()
        for _ in gl.static_range(P):
            acc = acc + (gl.zeros([SIDE, SIDE], gl.float32, MMA),)
        # While the gradients of some hidden channels are made, those made before them are multiplied.
        for h0 in range(HIDDEN, H, HIDDEN):
            wait_for(full, n)
            mbarrier.wait(mine, turn)
            h = multiply(left, ring, n, P)
            du = multiply_hidden(dy, ring, n, group, P)
            acc = add(factor, acc, rows, place(full, n - 1)[0], False, P)
            h, du = warpgroup_mma_wait(P, (h, du))
            mbarrier.arrive(other)
            turn ^= 1
            acc, later = finish(acc, factor, gates_and_left(h, du, HALF), P)
            gu, ga, gb, factor = later
            tma.store_wait(0)
            release(empty, n - 1)
            put((gu, ga, gb), out, group * GATES)
            leave_gates(u, dh, out, group * GATES, first, h0, H)
            n += 1
        acc, later = finish(add(factor, acc, rows, place(full, n - 1)[0], False, P), factor, (factor,), P)
        release(empty, n - 1)
        leave(acc, dx, own, group, first, P)
        phase ^= 1
    tma.store_wait(0)


@kernel(do_not_specialize=('M',), jit=gluon.jit)
def mlp_grad_kernel(x, dy, fc1, fc2, dx, u, dh, M, H, P: gl.constexpr, G: gl.constexpr):
    ring, own, turns = allocate(x, fc2, dy, STAGES, P, G)
    out = gl.allocate_shared_memory(x.dtype, [G * GATES, SIDE, HIDDEN], u.layout)
    tiles = gl.cdiv(M, G * SIDE)
    begin(False)
    shared = ring, own, out, turns
    results = dx, u, dh
    if G == 1:
        gl.warp_specialize(
            [
                (compute, (0, results, shared, tiles, H, P, G)),
                (copy_factors, (x, fc1, fc2, ring, tiles, H, P, G)),
                (copy_own, (dy, own, tiles, P)),
            ],
            (WARPS[1], WARPS[2]),
            (REGISTERS[1], REGISTERS[2]),
        )
    else:
        gl.warp_specialize(
            [
                (compute, (0, results, shared, tiles, H, P, G)),
                (compute, (1, results, shared, tiles, H, P, G)),
                (copy_factors, (x, fc1, fc2, ring, tiles, H, P, G)),
                (copy_own, (dy, own, tiles, P)),
            ],
            WARPS,
            REGISTERS,
        )


def launch_mlp_grad(dy: Tensor, x: Tensor, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, C), u (M, H) and dh = [da, db] (M, 2 H) of x and dy (M, C), W1 (2 H, C) and W2 (C, H).

    All are dense and of one dtype, in half precision; rows start at multiples of 16 bytes, and HIDDEN divides H.
    """
    side, some = SIDE.value, HIDDEN.value
    M, C = x.shape
    H = fc2.shape[1]
    dx, u, dh = torch.empty_like(x), x.new_empty(M, H), x.new_empty(M, 2 * H)
    G = groups(M, x.device)
    mlp_grad_kernel[programs(M, G, x.device),](
        descriptor(x, some), descriptor(dy, side), descriptor(fc1, some), descriptor(fc2, side, some),
        descriptor(dx, side), descriptor(u, side, some), descriptor(dh, side, some), M, H,
        P=pieces(C), G=G, num_warps=4,
    )  # fmt: skip
    return dx, u, dh
