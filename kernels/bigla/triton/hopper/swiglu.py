"""The first layer of the gated MLP on Hopper, in Gluon: two products, of which one is the other's gate, by one kernel.

With factors of the sample or 1::

    u = scale SiLU(a) b      [a, b] = W1 x

or from du, without factors, u and the gradients of a and b::

    db = du SiLU(a)      da = du b SiLU'(a)

x of a program's tokens stays in registers, while W1 passes by, all of it or a share.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..norm import load_factor
from ..primitives import ceil_div
from .parts import (
    GATES,
    GROUPS,
    HIDDEN,
    MMA_HIDDEN,
    REGISTERS,
    ROW,
    SIDE,
    WARPS,
    allocate_ring,
    allocate_turns,
    copy_left,
    copy_rows,
    descriptor,
    expect,
    gate_grads,
    gated,
    leave_gates,
    load_left,
    multiply,
    multiprocessors,
    pieces,
    place,
    put,
    release,
    wait_for,
)

MOST = 8  # parts of the ring
SHARED = 224 << 10  # bytes of shared memory for the ring and for what leaves
OUT = gl.constexpr(2)  # places of each group for what leaves: u, or u, da and db
START = 3  # what x costs at the start of a share, in parts of W1


@gluon.jit
def hidden_channels(share, shares, H):
    """The first one of a share and the one behind it."""
    parts = gl.cdiv(gl.cdiv(H, HIDDEN), shares) * HIDDEN
    return share * parts, gl.minimum(share * parts + parts, H)


@gluon.jit
def copy_factors(x, fc1, du, ring, tiles, shares, H, P: gl.constexpr, GRAD: gl.constexpr):
    """The parts of the ring: x of each group, and rows of W1, GRAD: and each group's du for these channels."""
    rows, grads, full, empty = ring
    ROWS: gl.constexpr = P * SIDE * SIDE * 2
    n = 0
    for i in range(gl.program_id(0), tiles * shares, gl.num_programs(0)):
        copy_left(x, i // shares, ring, n, P, GROUPS)
        n += 2
        first, end = hidden_channels(i % shares, shares, H)
        for h in range(first, end, HIDDEN):
            if GRAD:
                expect(full, empty, n, ROWS + GROUPS * SIDE * HIDDEN * 2)
                at, _ = place(full, n)
                for group in gl.static_range(GROUPS):
                    token = (i // shares * GROUPS + group) * SIDE
                    tma.async_copy_global_to_shared(du, [token, h], full.index(at), grads.index(at * GROUPS + group))
            else:
                expect(full, empty, n, ROWS)
            copy_rows(fc1, h, H + h, rows, full, n, P)
            n += 1


@gluon.jit
def compute(group, results, scale, ring, out, turns, sizes, P: gl.constexpr, SCALED: gl.constexpr, GRAD: gl.constexpr):
    """What there is to give of one group's tokens."""
    u, dh = results
    tiles, shares, M, L, H = sizes
    rows, grads, full, empty = ring
    LEAVE: gl.constexpr = GATES if GRAD else 1  # pieces that leave at a time
    mine, other = turns.index(group), turns.index(1 - group)
    n = 0
    turn = 1 - group  # the first group's first one is now
    for i in range(gl.program_id(0), tiles * shares, gl.num_programs(0)):
        token = (i // shares * GROUPS + group) * SIDE
        left = load_left(ring, n, group, P, GROUPS)
        n += 2
        f = 1.0
        if SCALED:
            f = load_factor(scale, token + gl.arange(0, SIDE, ROW), M, L)
        first, end = hidden_channels(i % shares, shares, H)
        for h0 in range(first, end, HIDDEN):
            wait_for(full, n)
            mbarrier.wait(mine, turn)
            h = warpgroup_mma_wait(0, (multiply(left, ring, n, P),))
            mbarrier.arrive(other)
            turn ^= 1
            to = (group * OUT + n % OUT) * LEAVE
            tma.store_wait((OUT - 1) * LEAVE)
            if GRAD:
                at, _ = place(full, n)
                du = grads.index(at * GROUPS + group).load(MMA_HIDDEN).to(gl.float32)
                fence_async_shared()  # as in `load_left`
                release(empty, n)  # and all warps know that there is room for what leaves
                put(gate_grads(h, du, rows.dtype), out, to)
                leave_gates(u, dh, out, to, token, h0, H)
            else:
                release(empty, n)
                put((gated(h, f, SCALED, rows.dtype),), out, to)
                tma.async_copy_shared_to_global(u, [token, h0], out.index(to))
            n += 1
    tma.store_wait(0)


@kernel(do_not_specialize=('M', 'L', 'shares'), jit=gluon.jit)
def resident_swiglu_kernel(
    x, fc1, du, u, dh, scale, M, L, H, shares,
    P: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr, GRAD: gl.constexpr,
):  # fmt: skip
    rows, full, empty = allocate_ring(x, STAGES, P, GROUPS)
    grads = rows
    if GRAD:
        grads = gl.allocate_shared_memory(x.dtype, [STAGES * GROUPS, SIDE, HIDDEN], du.layout)
    turns = allocate_turns(GROUPS)
    LEAVE: gl.constexpr = GATES if GRAD else 1
    out = gl.allocate_shared_memory(x.dtype, [GROUPS * OUT * LEAVE, SIDE, HIDDEN], u.layout)
    ring = rows, grads, full, empty
    results = u, dh
    begin(not GRAD)
    tiles = gl.cdiv(M, GROUPS * SIDE)
    sizes = tiles, shares, M, L, H
    gl.warp_specialize(
        [
            (compute, (0, results, scale, ring, out, turns, sizes, P, SCALED, GRAD)),
            (compute, (1, results, scale, ring, out, turns, sizes, P, SCALED, GRAD)),
            (copy_factors, (x, fc1, du, ring, tiles, shares, H, P, GRAD)),
        ],
        (WARPS[0], WARPS[1]),
        (REGISTERS[0], REGISTERS[1]),
    )


def stages(P: int, grad: bool) -> int:
    """Parts of the ring that there is room for."""
    piece = SIDE.value * HIDDEN.value * 2
    leave = GROUPS.value * OUT.value * (GATES.value if grad else 1) * piece
    return min(MOST, (SHARED - leave) // (2 * P * piece + GROUPS.value * grad * piece))


def shares_of(tiles: int, H: int, programs: int) -> int:
    """Into how many shares to divide H hidden channels, so that so many programs are done soonest with all tiles."""
    parts = ceil_div(H, HIDDEN.value)
    return min(
        (n for n in (1, 2, 4, 8) if n <= parts),
        key=lambda n: ceil_div(tiles * n, programs) * (START + ceil_div(parts, n)),
    )


def launch_resident_swiglu(
    x: Tensor, fc1: Tensor, scale: Tensor | None = None, du: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u (M, H) of x (M, C) and W1 (2 H, C), dense and of one dtype, in half precision; of du (M, H) also dh (M, 2 H).

    scale (B,) are factors for M / B tokens each. Rows of all start at multiples of 16 bytes; with du, HIDDEN divides H.
    """
    M, C = x.shape
    H = len(fc1) // 2
    grad = du is not None
    u, dh = x.new_empty(M, H), x.new_empty(M if grad else 0, 2 * H)
    tiles, programs, P = ceil_div(M, GROUPS.value * SIDE.value), multiprocessors(x.device), pieces(C)
    shares = shares_of(tiles, H, programs)
    side, some = SIDE.value, HIDDEN.value
    to = descriptor(u, side, some)
    resident_swiglu_kernel[min(programs, tiles * shares),](
        descriptor(x, some), descriptor(fc1, some), descriptor(du, side, some) if grad else to, to,
        descriptor(dh, side, some) if grad else to, x if scale is None else scale,
        M, M if scale is None else M // len(scale), H, shares,
        P=P, STAGES=stages(P, grad), SCALED=scale is not None, GRAD=grad, num_warps=4,
    )  # fmt: skip
    return u, dh
