"""What the MLP's kernels for Hopper are made of: pieces in shared memory, a ring of parts, products under way.

A program stays on its multiprocessor, and its warps have roles. One or two groups of four multiply, for 64 tokens each.
Two take turns, so that one makes products while the other one makes what lies between them. One warp copies what all
tokens need, part by part, into a ring in shared memory, from which the groups read; another one, where there is any,
copies what is a group's own, to where results leave from.
"""

import functools

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

from ..activations import sigmoid
from ..primitives import ceil_div

SIDE = gl.constexpr(64)  # tokens of a group, and the side of the pieces in which everything is multiplied
HIDDEN = gl.constexpr(32)  # hidden channels at a time
GROUPS = gl.constexpr(2)  # at most
GATES = gl.constexpr(3)  # what leaves of a gradient: u, da and db
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
MMA_HIDDEN = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))
COLUMN = gl.constexpr(gl.SliceLayout(0, MMA))
ROW = gl.constexpr(gl.SliceLayout(1, MMA))
BY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # to store rows of a piece
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())
# Of the second group and of those that copy; the first group has 4 warps, too, and the registers of a thread that these
# leave of 504, 240 as well, or alone the most that there are.
WARPS = gl.constexpr((4, 1, 1))
REGISTERS = gl.constexpr((240, 24, 24))


@gluon.jit
def allocate_barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """NUM of them, at each of which COUNT arrive."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], BARRIER)
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    fence_async_shared()
    return barriers


@gluon.jit
def allocate_ring(left, STAGES: gl.constexpr, P: gl.constexpr, G: gl.constexpr):
    """STAGES parts of P pieces for G groups, and their barriers."""
    rows = gl.allocate_shared_memory(left.dtype, [STAGES * P, SIDE, SIDE], left.layout)
    return rows, allocate_barriers(STAGES, 1), allocate_barriers(STAGES, G)


@gluon.jit
def allocate_turns(G: gl.constexpr):
    return allocate_barriers(G, 1)


@gluon.jit
def allocate(left, fc2, x, STAGES: gl.constexpr, P: gl.constexpr, G: gl.constexpr):
    """The ring of rows and columns, the groups' own pieces of x, each with its barriers, and those of turns."""
    rows, full, empty = allocate_ring(left, STAGES, P, G)
    columns = gl.allocate_shared_memory(left.dtype, [STAGES * P, SIDE, HIDDEN], fc2.layout)
    own = gl.allocate_shared_memory(x.dtype, [G * P, SIDE, SIDE], x.layout)
    own_full, own_empty = allocate_barriers(G, 1), allocate_barriers(G, 1)
    return (rows, columns, full, empty), (own, own_full, own_empty), allocate_turns(G)


@gluon.jit
def place(barriers, n):
    """Where in the ring the n-th part goes, and the phase of its barriers."""
    return n % barriers.shape[0], n // barriers.shape[0] & 1


@gluon.jit
def expect(full, empty, n, BYTES: gl.constexpr):
    """Waits for room for the n-th part, of BYTES."""
    at, phase = place(full, n)
    mbarrier.wait(empty.index(at), phase ^ 1)
    mbarrier.expect(full.index(at), BYTES)


@gluon.jit
def copy_rows(matrix, first, second, rows, full, n, P: gl.constexpr):
    """HIDDEN rows from `first` and from `second` on."""
    at, _ = place(full, n)
    for p in gl.static_range(P):
        piece = rows.index(at * P + p)
        tma.async_copy_global_to_shared(matrix, [first, p * SIDE], full.index(at), piece.slice(0, HIDDEN))
        tma.async_copy_global_to_shared(matrix, [second, p * SIDE], full.index(at), piece.slice(HIDDEN, HIDDEN))


@gluon.jit
def copy_columns(matrix, first, columns, full, n, P: gl.constexpr):
    """HIDDEN columns from `first` on."""
    at, _ = place(full, n)
    for p in gl.static_range(P):
        tma.async_copy_global_to_shared(matrix, [p * SIDE, first], full.index(at), columns.index(at * P + p))


@gluon.jit
def copy_left(x, tile, ring, n, P: gl.constexpr, G: gl.constexpr):
    """x of each group, for `load_left`: G parts from the n-th on."""
    rows, columns, full, empty = ring
    for group in gl.static_range(G):
        first = (tile * G + group) * SIDE
        expect(full, empty, n + group, P * SIDE * SIDE * 2)
        copy_rows(x, first, first + HIDDEN, rows, full, n + group, P)


@gluon.jit
def copy_own(x, own, tiles, P: gl.constexpr):
    """x of each group."""
    pieces, full, empty = own
    G: gl.constexpr = full.shape[0]
    BYTES: gl.constexpr = P * SIDE * SIDE * (x.dtype.primitive_bitwidth // 8)
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for group in gl.static_range(G):
            mbarrier.wait(empty.index(group), phase)
            mbarrier.expect(full.index(group), BYTES)
            for p in gl.static_range(P):
                at = [(tile * G + group) * SIDE, p * SIDE]
                tma.async_copy_global_to_shared(x, at, full.index(group), pieces.index(group * P + p))
        phase ^= 1


@gluon.jit
def wait_for(full, n):
    at, phase = place(full, n)
    mbarrier.wait(full.index(at), phase)


@gluon.jit
def release(empty, n):
    """The n-th part has been read."""
    at, _ = place(empty, n)
    gl.thread_barrier()
    mbarrier.arrive(empty.index(at))


@gluon.jit
def load_left(ring, n, group, P: gl.constexpr, G: gl.constexpr):
    """The group's of G parts from the n-th on; all are released.  P x (SIDE, SIDE)"""
    rows, columns, full, empty = ring
    for i in gl.static_range(G):
        wait_for(full, n + i)
    at, _ = place(full, n + group)
    left = ()
    for p in gl.static_range(P):
        left = left + (rows.index(at * P + p).load(LEFT),)
    fence_async_shared()  # or the copy that follows overtakes loads under way
    for i in gl.static_range(G):
        release(empty, n + i)
    return left


@gluon.jit
def multiply(x, ring, n, P: gl.constexpr):
    """x W^T of P pieces x and the rows of the n-th part; under way.  (SIDE, SIDE)"""
    rows, columns, full, empty = ring
    at, _ = place(full, n)
    acc = gl.zeros([SIDE, SIDE], gl.float32, MMA)
    for p in gl.static_range(P):
        w = rows.index(at * P + p).permute((1, 0))
        acc = warpgroup_mma(x[p], w, acc, use_acc=p > 0, is_async=True)
    return acc


@gluon.jit
def halves(h):
    """a and b of products [a, b].  2 x (SIDE, HIDDEN)"""
    return gl.split(gl.permute(gl.reshape(h, [SIDE, 2, HIDDEN]), (0, 2, 1)))


@gluon.jit
def gated(h, f, SCALED: gl.constexpr, HALF: gl.constexpr):
    """SiLU(a) b of products [a, b], times f.  (SIDE, HIDDEN)"""
    a, b = halves(h)
    u = a * sigmoid(a, HALF) * b
    if SCALED:
        u = u * gl.convert_layout(f, u.type.layout)
    return u.to(HALF)


@gluon.jit
def gate_grads(h, du, HALF: gl.constexpr):
    """u = SiLU(a) b, da and db of products [a, b] and of du.  3 x (SIDE, HIDDEN)"""
    a, b = halves(h)
    du = gl.convert_layout(du, a.type.layout)
    s = sigmoid(a, HALF)
    silu = a * s
    return (silu * b).to(HALF), (du * b * (s + silu * (1 - s))).to(HALF), (du * silu).to(HALF)


@gluon.jit
def put(results, out, first):
    """Into shared memory, from the first place on, from which those before have left."""
    for i in gl.static_range(len(results)):
        out.index(first + i).store(results[i])
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def leave_gates(u, dh, out, at, first, h, H):
    """u, da and db to where the weights' gradients look for them."""
    tma.async_copy_shared_to_global(u, [first, h], out.index(at))
    tma.async_copy_shared_to_global(dh, [first, h], out.index(at + 1))
    tma.async_copy_shared_to_global(dh, [first, H + h], out.index(at + 2))


@gluon.jit
def add(x, acc, part, at, TRANSPOSED: gl.constexpr, P: gl.constexpr):
    """acc + x W, or x W^T, with the P pieces W at a place of the ring; under way.  P x (SIDE, SIDE)"""
    out = ()
    for p in gl.static_range(P):
        w = part.index(at * P + p)
        if TRANSPOSED:
            w = w.permute((1, 0))
        out = out + (warpgroup_mma(x, w, acc[p], is_async=True),)
    return out


@gluon.jit
def finish(acc, read, later, P: gl.constexpr):
    """`acc` when all products are done, which read `read`, and `later`, which is there before they are waited for."""
    done = warpgroup_mma_wait(0, acc + (read,) + later)
    acc = ()
    for p in gl.static_range(P):
        acc = acc + (done[p],)
    return acc, done[P + 1 :]


@gluon.jit
def make_room(own, group, tile):
    """For what is the group's own of a tile that is not the first: all that the group has sent has left by now."""
    pieces, full, empty = own
    tma.store_wait(0)
    gl.thread_barrier()  # some warp may have been the one that sent it
    mbarrier.arrive(empty.index(group), pred=tile != gl.program_id(0))


@gluon.jit
def leave(acc, y, own, group, first, P: gl.constexpr):
    """P pieces `acc` to rows of y from `first` on, out where the group's own came in."""
    pieces, full, empty = own
    for p in gl.static_range(P):
        pieces.index(group * P + p).store(acc[p].to(pieces.dtype))
    fence_async_shared()
    gl.thread_barrier()
    for p in gl.static_range(P):
        tma.async_copy_shared_to_global(y, [first, p * SIDE], pieces.index(group * P + p))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def groups(M: int, device: torch.device) -> int:
    """Of a program, for M tokens: one if there is a multiprocessor for every 64 of them, otherwise two."""
    return 1 if ceil_div(M, SIDE.value) <= multiprocessors(device) else GROUPS.value


def programs(M: int, G: int, device: torch.device) -> int:
    """For M tokens and G groups: as many as work at a time, or have a tile."""
    return min(multiprocessors(device), ceil_div(M, G * SIDE.value))


def pieces(C: int) -> int:
    """Across C channels; Triton keeps no tuple of one."""
    return max(2, ceil_div(C, SIDE.value))


def descriptor(matrix: Tensor, height: int, width: int = SIDE.value) -> TensorDescriptor:
    """What is copied of a matrix at a time."""
    return TensorDescriptor.from_tensor(matrix, [height, width], shared_layout(8 * matrix.itemsize, width))


@functools.cache
def shared_layout(bits: int, width: int) -> gl.NVMMASharedLayout:
    """Where the rows of a piece lie, of numbers of so many bits."""
    return gl.NVMMASharedLayout(min(128, width * bits // 8), bits, 2)
