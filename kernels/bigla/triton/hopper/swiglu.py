"""The first layer of the gated MLP on Hopper, in Gluon: two products, of which one is the other's gate, by one kernel.

With factors of the sample or 1::

    u = scale SiLU(a) b      [a, b] = W1 x

x of a program's tokens stays in registers, while W1 passes by, all of it or a share.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..launch import begin, kernel
from ..norm import load_factor
from ..primitives import ceil_div
from .parts import (
    GROUPS,
    HIDDEN,
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
    gated,
    load_left,
    multiply,
    multiprocessors,
    pieces,
    release,
    wait_for,
)

RING = 24  # pieces of W1, and of x before it is in registers, that shared memory holds
OUT = gl.constexpr(2)  # pieces of u of each group: one leaves while the next one is made
START = 3  # what x costs at the start of a share, in parts of W1


@gluon.jit
def hidden_channels(share, shares, H):
    """The first one of a share and the one behind it."""
    parts = gl.cdiv(gl.cdiv(H, HIDDEN), shares) * HIDDEN
    return share * parts, gl.minimum(share * parts + parts, H)


@gluon.jit
def copy_factors(x, fc1, ring, tiles, shares, H, P: gl.constexpr):
    """The parts of the ring: x of each group, and rows of W1."""
    rows, columns, full, empty = ring
    n = 0
    for i in range(gl.program_id(0), tiles * shares, gl.num_programs(0)):
        copy_left(x, i // shares, ring, n, P)
        n += 2
        first, end = hidden_channels(i % shares, shares, H)
        for h in range(first, end, HIDDEN):
            expect(full, empty, n, P * SIDE * SIDE * 2)
            copy_rows(fc1, h, H + h, rows, full, n, P)
            n += 1


@gluon.jit
def compute(group, u, scale, ring, out, turns, sizes, P: gl.constexpr, SCALED: gl.constexpr):
    """u of one group's tokens."""
    tiles, shares, M, L, H = sizes
    rows, columns, full, empty = ring
    mine, other = turns.index(group), turns.index(1 - group)
    n = 0
    turn = 1 - group  # the first group's first one is now
    at = group * OUT
    for i in range(gl.program_id(0), tiles * shares, gl.num_programs(0)):
        token = (i // shares * GROUPS + group) * SIDE
        left = load_left(ring, n, group, P)
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
            tma.store_wait(OUT - 1)
            release(empty, n)  # and all warps know that there is room for u
            n += 1
            at = group * OUT + (at + 1) % OUT
            out.index(at).store(gated(h, f, SCALED).to(rows.dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(u, [token, h0], out.index(at))
    tma.store_wait(0)


@kernel(do_not_specialize=('M', 'L', 'shares'), jit=gluon.jit)
def resident_swiglu_kernel(
    x, fc1, u, scale, M, L, H, shares, P: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    rows, full, empty = allocate_ring(x, STAGES, P)
    turns = allocate_turns()
    out = gl.allocate_shared_memory(x.dtype, [GROUPS * OUT, SIDE, HIDDEN], u.layout)
    ring = rows, rows, full, empty  # of columns there are none
    begin(True)
    tiles = gl.cdiv(M, GROUPS * SIDE)
    sizes = tiles, shares, M, L, H
    gl.warp_specialize(
        [
            (compute, (0, u, scale, ring, out, turns, sizes, P, SCALED)),
            (compute, (1, u, scale, ring, out, turns, sizes, P, SCALED)),
            (copy_factors, (x, fc1, ring, tiles, shares, H, P)),
        ],
        (WARPS[0], WARPS[1]),
        (REGISTERS[0], REGISTERS[1]),
    )


def shares_of(tiles: int, H: int, programs: int) -> int:
    """Into how many shares to divide H hidden channels, so that so many programs are done soonest with all tiles."""
    parts = ceil_div(H, HIDDEN.value)
    return min(
        (n for n in (1, 2, 4, 8) if n <= parts),
        key=lambda n: ceil_div(tiles * n, programs) * (START + ceil_div(parts, n)),
    )


def launch_resident_swiglu(x: Tensor, fc1: Tensor, scale: Tensor | None) -> Tensor:
    """u (M, H) of x (M, C) and W1 (2 H, C), dense and of one dtype, in half precision.

    scale (B,) are factors for M / B tokens each. Rows, of u, too, start at multiples of 16 bytes.
    """
    M, C = x.shape
    H = len(fc1) // 2
    u = x.new_empty(M, H)
    tiles, programs, P = ceil_div(M, GROUPS.value * SIDE.value), multiprocessors(x.device), pieces(C)
    shares = shares_of(tiles, H, programs)
    some = HIDDEN.value
    resident_swiglu_kernel[min(programs, tiles * shares),](
        descriptor(x, some), descriptor(fc1, some), descriptor(u, SIDE.value, some), x if scale is None else scale,
        M, M if scale is None else M // len(scale), H, shares,
        P=P, STAGES=min(8, RING // P), SCALED=scale is not None, num_warps=4,
    )  # fmt: skip
    return u
