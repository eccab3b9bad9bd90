"""What BiGLA's kernels for Hopper share: a chunk of 64 tokens, as many as products have rows, in shared memory.

Sums over the tokens before or behind each are products with a triangle of ones, of numbers in two parts of half
precision; the same triangle selects the pairs of tokens that a direction has.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

from ..merge import Merge
from ..primitives import LONG, Gates, gate_rows, row, tile_decay

TOKENS = gl.constexpr(LONG[32].C)  # of a chunk: 64, for all widths
HALF = gl.constexpr(gl.bfloat16)


@gluon.constexpr_function
def by_rows(W: int) -> gl.BlockedLayout:
    """A program's threads on rows of W numbers, 16 bytes each."""
    return gl.BlockedLayout([1, 8], [256 // W, W // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def by_own_rows(W: int) -> gl.BlockedLayout:
    """The same, a warp on the 16 rows that it has of a product."""
    return gl.BlockedLayout([W // 16, 8], [256 // W, W // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def product(N: int) -> gl.NVMMADistributedLayout:
    """How a program's threads hold a product of N columns, a warp 16 rows of each 64."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])


@gluon.jit
def copy(to, p, stride, count, W: gl.constexpr):
    """`count` rows of W numbers, 0 behind them; under way."""
    BY: gl.constexpr = by_rows(W)
    r = gl.arange(0, to.shape[0], gl.SliceLayout(1, BY))
    w = gl.arange(0, W, gl.SliceLayout(0, BY))
    async_copy.async_copy_global_to_shared(to, p + (r[:, None] * stride + w[None, :]), (r < count)[:, None])


@gluon.jit
def copy_narrow(
    q, k, gates, q_s, k_s, gates_s, narrow, low, b, left, h, count, K: gl.constexpr, RANK: gl.constexpr
):  # fmt: skip
    """q, k, and of low-rank gates the decay of both directions; a group under way."""
    copy(narrow[0], row(q, q_s, b, left, h), q_s[1], count, K)
    copy(narrow[1], row(k, k_s, b, left, h), k_s[1], count, K)
    if RANK > 0:
        for D in gl.static_range(2):
            p, stride = gate_rows(gates, gates_s, b, left, h, D)
            copy(low[D], p, stride, count, RANK)
    async_copy.commit_group()


@gluon.jit
def state_at(state, i, D: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    """Pointer to state[i, D]."""
    return state + (i.to(gl.int64) * 2 + D) * (K * V)


@gluon.constexpr_function
def shared(W: int) -> gl.NVMMASharedLayout:
    """Where rows of W numbers lie in shared memory."""
    return gl.NVMMASharedLayout(W * 2 if W < 64 else 128, 16, 2)


@gluon.jit
def allocate(ROWS: gl.constexpr, W: gl.constexpr):
    """A tile (ROWS, W)."""
    return gl.allocate_shared_memory(HALF, [ROWS, W], shared(W))


@gluon.jit
def allocate_in_one(N: gl.constexpr, ROWS: gl.constexpr, W: gl.constexpr):
    """N tiles (ROWS, W) in one piece, of which one can be found by its number."""
    return gl.allocate_shared_memory(HALF, [N, ROWS, W], shared(W))


@gluon.jit
def allocate_tiles(ROWS: gl.constexpr, W: gl.constexpr, N: gl.constexpr):
    """N tiles (ROWS, W), each by itself: to parts of one piece the compiler lets no warp write before all have met."""
    tiles = ()
    for _ in gl.static_range(N):
        tiles = tiles + (allocate(ROWS, W),)
    return tiles


@gluon.jit
def allocate_row(W: gl.constexpr):
    """W numbers in float32."""
    return gl.allocate_shared_memory(gl.float32, [W], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def allocate_rows(N: gl.constexpr, W: gl.constexpr):
    """N times W numbers in float32, of which one row can be found by its number."""
    return gl.allocate_shared_memory(gl.float32, [N, W], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def put_ones(to, STRICT: gl.constexpr = False):
    """1 where the row is not before the column, or STRICT: behind it."""
    BY: gl.constexpr = by_rows(TOKENS)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, BY))[:, None]
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, BY))[None, :]
    to.store(gl.where(i > j if STRICT else i >= j, 1.0, 0.0).to(HALF))


@gluon.jit
def meet():
    """All warps have written what products read now, or have done the products that read what is written now."""
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def columns(p, W: gl.constexpr, LAYOUT: gl.constexpr):
    """W numbers at p, for all rows.  (1, W)"""
    return gl.load(p + gl.arange(0, W, gl.SliceLayout(0, LAYOUT))).to(gl.float32)[None, :]


@gluon.jit
def store(p, stride, x, count, W: gl.constexpr):
    """`count` rows of x."""
    BY: gl.constexpr = by_own_rows(W)
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, BY))
    w = gl.arange(0, W, gl.SliceLayout(0, BY))
    x = gl.convert_layout(x.to(p.dtype.element_ty), BY)
    gl.store(p + (r[:, None] * stride + w[None, :]), x, mask=(r < count)[:, None])


@gluon.jit
def put_in_parts(x, high, low):
    """x as a sum of two numbers of half precision, to two tiles; the first is cut, since rounding takes longer."""
    cut = (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)
    high.store(cut.to(HALF))
    low.store((x - cut).to(HALF))


@gluon.jit
def sums(ones, high, low, zero):
    """Sums over the rows of what `put_in_parts` put; under way."""
    acc = warpgroup_mma(ones, high, zero, use_acc=False, is_async=True)
    return warpgroup_mma(ones, low, acc, is_async=True)


@gluon.jit
def put_weight(gates, h, H, to, K: gl.constexpr, RANK: gl.constexpr):
    """What makes a head's gate logits of its low-rank decay, to a tile (K, RANK) of each direction."""
    BY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RANK, RANK // 4], [4, 1], [1, 0])
    kk = gl.arange(0, K, gl.SliceLayout(1, BY))
    rr = gl.arange(0, RANK, gl.SliceLayout(0, BY))
    for D in gl.static_range(2):
        at = ((D * H + h) * K + kk)[:, None] * RANK + rr[None, :]
        to[D].store(gl.load(gates[2] + at).to(HALF))


@gluon.jit
def gates_of(
    gates, gates_s, low, weight, b, left, h, H, r, m, zero,
    D: gl.constexpr, K: gl.constexpr, RANK: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Gates (TOKENS, K) as they are, or made of the low-rank decay."""
    if RANK == 0:
        p, stride = gate_rows(gates, gates_s, b, left, h, D)
        kk = gl.arange(0, K, gl.SliceLayout(0, KEYS))
        g = gl.load(p + (r[:, None] * stride + kk[None, :]), mask=m[:, None], other=0.0)
    else:
        g = warpgroup_mma(low[D], weight[D].permute((1, 0)), zero, use_acc=False)
        g = g + columns(gates[3] + (D * H + h) * K, K, KEYS)
    return g


@gluon.jit
def log_decays(
    gates, gates_s, low, weight, b, left, h, H, r, m, zero,
    D: gl.constexpr, K: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Log2 decays of direction D.  (TOKENS, K)"""
    return tile_decay(gates_of(gates, gates_s, low, weight, b, left, h, H, r, m, zero, D, K, RANK, KEYS), m, LOGITS)


@gluon.jit
def put_decays(
    gates, gates_s, low, weight, b, left, h, H, r, m, zero, parts,
    K: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """`log_decays` of both directions, and their parts, to four tiles."""
    f = log_decays(gates, gates_s, low, weight, b, left, h, H, r, m, zero, 0, K, LOGITS, RANK, KEYS)
    e = log_decays(gates, gates_s, low, weight, b, left, h, H, r, m, zero, 1, K, LOGITS, RANK, KEYS)
    put_in_parts(f, parts[0], parts[1])
    put_in_parts(e, parts[2], parts[3])
    return f, e


@gluon.jit
def half_total(total, index, D: gl.constexpr, K: gl.constexpr, LAYOUT: gl.constexpr):
    """Half the log2 decay over a chunk in direction D.  (1, K)"""
    return columns(total + (index.to(gl.int64) * 2 + D) * K, K, LAYOUT) / 2


@gluon.jit
def left_factor(x, LAYOUT: gl.constexpr):
    """x as the left factor of a product of that layout."""
    return gl.convert_layout(x.to(HALF), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def selected(x, ones, INSIDE: gl.constexpr):
    """x, of half precision, where `ones` are (INSIDE) or are not, and 0 elsewhere, two numbers at a time.

    The lower byte of a 1 has its highest bit set, and makes all bits of a mask.
    """
    if INSIDE:
        asm: gl.constexpr = '{ .reg .b32 m; prmt.b32 m, $2, 0, 0xAA88; and.b32 $0, $1, m; }'
    else:
        asm: gl.constexpr = '{ .reg .b32 m; prmt.b32 m, $2, 0, 0xAA88; lop3.b32 $0, $1, m, 0, 0x30; }'
    return gl.inline_asm_elementwise(asm, '=r,r,r', [x, ones], x.dtype, is_pure=True, pack=2)


def copyable(x: Tensor) -> Tensor:
    """`x` (B, L, nh, W), or a copy: 16 bytes of a row are copied at a time, and rows of two chunks lie within int32."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in x.stride()[:-1])
    if fits and x.stride(1) * 2 * TOKENS.value < 2**31:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # one that is contiguous may start anywhere


def prepared(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, merge: Merge | None = None
) -> tuple[Tensor, Tensor, Tensor, Gates, Merge | None]:
    """All `copyable` that is copied."""
    if gates.fwd.dtype == torch.bfloat16:
        gates = gates._replace(fwd=copyable(gates.fwd), bwd=copyable(gates.bwd))
    else:
        gates = gates.prepared(2 * TOKENS.value)
    if merge is not None:
        merge = merge._replace(local=copyable(merge.local), gate=copyable(merge.gate))
    return *(copyable(x) for x in (q, k, v)), gates, merge
