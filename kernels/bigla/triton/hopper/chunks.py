"""What BiGLA's kernels for Hopper share: a chunk of 64 tokens, as many as products have rows, in shared memory.

Sums over the tokens before or behind each are products with a triangle of ones, of numbers in two parts of half
precision; the same triangle selects the pairs of tokens that a direction has. A thread makes its part of it of its own
number: what shared memory has to deliver is what these kernels wait for.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..merge import Merge
from ..primitives import LONG, Gates, decay, gate_rows, row

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
def rows_at(p, stride, count, ROWS: gl.constexpr, N: gl.constexpr, W: gl.constexpr, LAYOUT: gl.constexpr):
    """Pointers (ROWS, N) to rows of W numbers at p, and which of these are among `count` rows.

    Where N is a multiple of W, chunks of TOKENS rows lie beside each other.
    """
    r = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    w = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))[None, :]
    if N > W:
        return p + ((r + w // W * TOKENS) * stride + w % W), r + w // W * TOKENS < count
    else:
        return p + (r * stride + w), r < count


@gluon.jit
def copy(to, p, stride, count, W: gl.constexpr):
    """Rows of W numbers, as `rows_at` has them, 0 behind `count`; under way."""
    p, m = rows_at(p, stride, count, to.shape[0], to.shape[1], W, by_rows(to.shape[1]))
    async_copy.async_copy_global_to_shared(to, p, m)


@gluon.jit
def rows_of(p, stride, count, N: gl.constexpr, W: gl.constexpr, LAYOUT: gl.constexpr):
    """The same in registers.  (TOKENS, N)"""
    p, m = rows_at(p, stride, count, TOKENS, N, W, LAYOUT)
    return gl.load(p, mask=m, other=0.0)


@gluon.jit
def state_at(state, i, D: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    """Pointer to state[i, D]."""
    return state + (i.to(gl.int64) * 2 + D) * (K * V)


@gluon.constexpr_function
def by_states(K: int, V: int) -> gl.BlockedLayout:
    """A program's threads on a state (K, V), each number once."""
    n = min(K * V // 128, 8)
    return gl.BlockedLayout([1, n], [32 * n // V, V // n], [4, 1], [1, 0])


@gluon.jit
def state_pointers(state, i, D: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    """To state[i, D].  (K, V)"""
    BY: gl.constexpr = by_states(K, V)
    kk = gl.arange(0, K, gl.SliceLayout(1, BY))[:, None]
    vv = gl.arange(0, V, gl.SliceLayout(0, BY))[None, :]
    return state_at(state, i, D, K, V) + (kk * V + vv)


@gluon.jit
def total_pointers(total, i, D: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    """To total[i, D], for the rows of a state.  (K)"""
    kk = gl.arange(0, K, gl.SliceLayout(1, by_states(K, V)))
    return total + ((i.to(gl.int64) * 2 + D) * K + kk)


@gluon.jit
def added_up(
    state, total, i, c, NT, H,
    D: gl.constexpr, GRAD: gl.constexpr, OTHERS: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """The state of direction D that enters chunk c of NT, the i-th of all, or with GRAD its gradient.  (K, V)

    Of what each chunk adds to it, OTHERS of them at most::

        S = sum_{n >= 1} 2^(total_1 + .. + total_{n-1}) state_n            total_n, state_n: of the n-th chunk from here
    """
    RIGHT: gl.constexpr = (D == 0) != GRAD  # it comes from the left
    count = c if RIGHT else NT - 1 - c
    step = (-2 if RIGHT else 2) * H  # a chunk has two states
    x = gl.zeros([K, V], gl.float32, by_states(K, V))
    since = gl.zeros([K], gl.float32, gl.SliceLayout(1, by_states(K, V)))
    for n in gl.static_range(OTHERS):
        at = (n + 1) * step
        u = gl.load(state_pointers(state, i, D, K, V) + at * (K * V), mask=n < count, other=0.0)
        x += gl.exp2(since)[:, None] * u.to(gl.float32)
        since += gl.load(total_pointers(total, i, D, K, V) + at * K, mask=n < count, other=0.0)
    return x


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
def as_tile(tile, W: gl.constexpr):
    """A tile (TOKENS, W) in the place of one."""
    return tile._reinterpret(HALF, [TOKENS, W], shared(W))


@gluon.jit
def two_of(tile, W: gl.constexpr):
    """Two tiles (TOKENS, W) in the place of one."""
    both = tile._reinterpret(HALF, [2, TOKENS, W], shared(W))
    return both.index(0), both.index(1)


@gluon.constexpr_function
def keep_triangle(UPPER: bool, STRICT: bool) -> str:
    """Instructions for `selected`, $0 to $15 of $16 to $31.

    Of 16 rows and columns each, a thread has two neighbours in row r and from column c on, those 8 rows behind, those 8
    columns behind, and those behind in both. Where the columns are the warp's own rows, the first and the last two
    depend on r and c; all others on whether the columns are before the rows, or are these.
    """
    one, two = ('le', 'lt') if UPPER else ('ge', 'ge')
    first = (-1 if UPPER else 1) if STRICT else 0
    # e1 to e3: whether the warp's rows are, of 16 each, the k-th or behind it; for the other triangle, before it.
    e = ['0', 'e1', 'e2', 'e3', '-1'] if UPPER else ['-1', 'e1', 'e2', 'e3', '0']
    lines = [
        '.reg .b32 w, d, p, h, m, e1, e2, e3',
        'mov.u32 w, %tid.x',
        'bfe.u32 d, w, 2, 3',
        'and.b32 h, w, 3',
        'mad.lo.s32 d, h, -2, d',  # r - c
        'bfe.u32 w, w, 5, 2',
        f'set.{one}.u32.s32 p, d, {first}',
        f'set.{one}.u32.s32 h, d, {first + 1}',
        'prmt.b32 p, p, h, 0x7610',
        *(f'set.{two}.u32.s32 e{k}, w, {k}' for k in (1, 2, 3)),
    ]
    for k in range(4):
        off, at = (e[k], e[k + 1]) if UPPER else (e[k + 1], e[k])
        lines += [f'and.b32 m, {at}, p', f'or.b32 m, m, {off}']
        masks = ('m', off, at, 'm') if UPPER else ('m', at, off, 'm')
        lines += [f'and.b32 ${4 * k + n}, ${4 * k + n + 16}, {mask}' for n, mask in enumerate(masks)]
    return '{ ' + '; '.join(lines) + '; }'


@gluon.jit
def selected(x, UPPER: gl.constexpr, STRICT: gl.constexpr = False):
    """x (TOKENS, TOKENS) in the lower triangle, or the UPPER one, with its diagonal or STRICT: without; 0 elsewhere.

    x is of half precision, a product or a left factor.
    """
    registers: gl.constexpr = '=r,' * 16 + 'r,' * 15 + 'r'
    asm: gl.constexpr = keep_triangle(UPPER, STRICT)
    return gl.inline_asm_elementwise(asm, registers, [x], x.dtype, is_pure=True, pack=32)


@gluon.jit
def ones(W: gl.constexpr, UPPER: gl.constexpr, STRICT: gl.constexpr = False):
    """1 where `selected`, as the left factor of products of W columns."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product(W), 2)
    return selected(gl.full([TOKENS, TOKENS], 1.0, HALF, LEFT), UPPER, STRICT)


@gluon.jit
def put_ones(to):
    """1 where the row is behind the column."""
    BY: gl.constexpr = by_rows(TOKENS)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, BY))[:, None]
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, BY))[None, :]
    to.store(gl.where(i > j, 1.0, 0.0).to(HALF))


@gluon.jit
def wait(N: gl.constexpr):
    """Until all but N groups of a thread's copies are there; `meet` has to follow, before anyone reads them.

    `async_copy.wait_group` has a barrier of its own, and that is one more.
    """
    asm: gl.constexpr = f'cp.async.wait_group {N}; mov.b32 $0, $1;'
    gl.inline_asm_elementwise(asm, '=r,r', [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)


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
def store_tile(p, stride, x, count):
    """`count` rows of x, a tile."""
    W: gl.constexpr = x.shape[1]
    BY: gl.constexpr = by_own_rows(W)
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, BY))
    w = gl.arange(0, W, gl.SliceLayout(0, BY))
    gl.store(p + (r[:, None] * stride + w[None, :]), x.load(BY), mask=(r < count)[:, None])


@gluon.jit
def beside(x, y):
    """x and y (TOKENS, W), rounded to half precision, beside each other.  (TOKENS, 2 W)"""
    W: gl.constexpr = x.shape[1]
    both = gl.join(x.to(HALF), y.to(HALF)).permute((0, 2, 1)).reshape([TOKENS, 2 * W])
    return gl.convert_layout(both, product(2 * W))


@gluon.jit
def put_in_parts(x, to):
    """x as a sum of two numbers of half precision, beside each other; the first is cut, since rounding takes longer."""
    cut = (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)
    to.store(beside(cut, x - cut))


@gluon.jit
def sums(triangle, parts):
    """Sums over the rows of what `put_in_parts` put, beside each other; under way. `triangle`: of `ones`, or a tile."""
    W: gl.constexpr = parts.shape[1]
    zero = gl.zeros([TOKENS, W], gl.float32, product(W))
    return warpgroup_mma(triangle, parts, zero, use_acc=False, is_async=True)


@gluon.jit
def sums_of_both(parts, UPPER: gl.constexpr, OTHER: gl.constexpr, STRICT: gl.constexpr = False):
    """`sums` of two tiles, of which each row has those where `selected`: UPPER of the first, OTHER of the second.

    (TOKENS, W) each
    """
    W: gl.constexpr = parts[0].shape[1]
    a = ones(W, UPPER, STRICT)
    x, a = warpgroup_mma_wait(0, (sums(a, parts[0]), a))  # one after the other, for want of registers
    x = joined(x)
    if UPPER != OTHER:
        a = ones(W, OTHER, STRICT)
    y, a = warpgroup_mma_wait(0, (sums(a, parts[1]), a))
    return x, joined(y)


@gluon.jit
def joined(x):
    """The sum of what lies beside each other.  (TOKENS, W), of (TOKENS, 2 W)"""
    W: gl.constexpr = x.shape[1] // 2
    first, second = x.reshape([TOKENS, 2, W]).permute((0, 2, 1)).split()
    return gl.convert_layout(first + second, product(W))


@gluon.jit
def put_weight(gates, h, H, to, K: gl.constexpr, RANK: gl.constexpr):
    """What makes a head's gate logits of its low-rank decay, to a tile (N, N / K RANK) of each direction.

    Where N is a multiple of K, chunks have rows and columns of their own.
    """
    N: gl.constexpr = to[0].shape[0]
    W: gl.constexpr = to[0].shape[1]
    BY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // W, W // 4], [4, 1], [1, 0])
    kk = gl.arange(0, N, gl.SliceLayout(1, BY))[:, None]
    rr = gl.arange(0, W, gl.SliceLayout(0, BY))[None, :]
    for D in gl.static_range(2):
        p = gates[2] + (((D * H + h) * K + kk % K) * RANK + rr % RANK)
        if N > K:
            to[D].store(gl.load(p, mask=kk // K == rr // RANK, other=0.0).to(HALF))
        else:
            to[D].store(gl.load(p).to(HALF))


@gluon.jit
def copy_gates(to, gates, gates_s, b, left, h, count, K: gl.constexpr, RANK: gl.constexpr):
    """Gates of both directions, or their low-rank decay, to two tiles; under way. Gates in float32 stay."""
    if RANK > 0 or gates[0].dtype.element_ty == HALF:
        for D in gl.static_range(2):
            p, stride = gate_rows(gates, gates_s, b, left, h, D)
            copy(to[D], p, stride, count, RANK if RANK > 0 else K)


@gluon.jit
def copy_narrow(
    q, k, gates, q_s, k_s, gates_s, narrow, copied, b, left, h, count, K: gl.constexpr, RANK: gl.constexpr
):  # fmt: skip
    """q and k to two tiles, and gates to two others, as `copy_gates` does, or (None) not; a group under way."""
    if copied is not None:
        copy_gates(copied, gates, gates_s, b, left, h, count, K, RANK)
    copy(narrow[0], row(q, q_s, b, left, h), q_s[1], count, K)
    copy(narrow[1], row(k, k_s, b, left, h), k_s[1], count, K)
    async_copy.commit_group()


@gluon.jit
def gates_of(
    gates, gates_s, copied, weight, b, left, h, H, count,
    D: gl.constexpr, N: gl.constexpr, K: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """Gates (TOKENS, N) of direction D, made of the low-rank decay that `copy_gates` `copied` and `weight`; or as they
    are, copied or (None) not.
    """
    KEYS: gl.constexpr = product(N)
    if RANK > 0:
        zero = gl.zeros([TOKENS, N], gl.float32, KEYS)
        w = gl.arange(0, N, gl.SliceLayout(0, KEYS))
        g = warpgroup_mma(copied[D], weight[D].permute((1, 0)), zero, use_acc=False)
        g = g + gl.load(gates[3] + ((D * H + h) * K + w % K)).to(gl.float32)[None, :]
    elif copied is not None and gates[0].dtype.element_ty == HALF:
        g = copied[D].load(KEYS)
    else:
        p, stride = gate_rows(gates, gates_s, b, left, h, D)
        g = rows_of(p, stride, count, N, K, KEYS)
    return g


@gluon.jit
def log_decays(
    gates, gates_s, copied, weight, b, left, h, H, count,
    D: gl.constexpr, N: gl.constexpr, K: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """Log2 decays of direction D.  (TOKENS, N)"""
    g = decay(gates_of(gates, gates_s, copied, weight, b, left, h, H, count, D, N, K, RANK), LOGITS)
    if LOGITS:  # a logit of 0, as there is behind `count`, is a decay
        _, m = rows_at(0, 1, count, TOKENS, N, K, product(N))
        g = gl.where(m, g, 0.0)
    return g


@gluon.jit
def put_decays(
    gates, gates_s, copied, weight, b, left, h, H, count, parts,
    K: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """`log_decays` of both directions, and their parts, to two tiles."""
    N: gl.constexpr = parts[0].shape[1] // 2
    f = log_decays(gates, gates_s, copied, weight, b, left, h, H, count, 0, N, K, LOGITS, RANK)
    e = log_decays(gates, gates_s, copied, weight, b, left, h, H, count, 1, N, K, LOGITS, RANK)
    put_in_parts(f, parts[0])
    put_in_parts(e, parts[1])
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
def diagonal_scores(x, y, tiles, V: gl.constexpr):
    """Scores of rows x and y with those of two tiles, at or before each and at or behind it; a left factor.

    Of queries with keys A, of keys in the other order with queries A^T.  (TOKENS, TOKENS)
    """
    VALUES: gl.constexpr = product(V)
    SCORES: gl.constexpr = product(TOKENS)
    none = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    x, y = left_factor(x, SCORES), left_factor(y, SCORES)
    # One after the other, for want of registers. Selected, not multiplied by a mask: the other half may be inf. The
    # diagonal is in both.
    a = warpgroup_mma(x, tiles[0].permute((1, 0)), none, use_acc=False, is_async=True)
    a, x, y = warpgroup_mma_wait(0, (a, x, y))
    a = selected(left_factor(a, VALUES), False)
    c = warpgroup_mma(y, tiles[1].permute((1, 0)), none, use_acc=False, is_async=True)
    c, y = warpgroup_mma_wait(0, (c, y))
    a += selected(left_factor(c, VALUES), True)
    return a


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
