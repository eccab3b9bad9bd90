"""BiGLA of a short sequence on Hopper, in Gluon: a program has all its tokens, a warpgroup 64 of them, and no states.

Formulas and symbols are those of `..forward`. What queries of one chunk have with keys of another is a product, too, of
queries that have decayed on the way between both: by a number for each column, which is never more than 1.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..merge import Merge
from ..primitives import Gates, ceil_div, row, token_strides
from .bigla_out import diagonal_scores, merged, put_keys, rows_of, scores_by_halvings, two_of
from .chunks import (
    HALF,
    TOKENS,
    allocate,
    allocate_in_one,
    allocate_tiles,
    copy,
    copy_narrow,
    left_factor,
    log_decays,
    meet,
    product,
    put_in_parts,
    put_ones,
    put_weight,
    shared,
    store,
    sums,
)
from .parts import allocate_barriers

MOST = 4  # chunks of a sequence, each with a warpgroup of its own
REGISTERS = gl.constexpr(128)  # of a thread: 16 warps run on a multiprocessor


@gluon.jit
def allocate_rows(G: gl.constexpr, W: gl.constexpr):
    """W numbers in float32 of each of G chunks."""
    return gl.allocate_shared_memory(gl.float32, [G, W], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def add_both(x, y, more_x, more_y):
    return x + more_x, y + more_y


@gluon.jit
def add_pairs(
    out, held, q, keys, values, half, group: gl.constexpr, others: gl.constexpr, step: gl.constexpr
):  # fmt: skip
    """out and what the queries q have with `others` chunks, `step` chunks apart, the nearest one first; under way.

    Over a chunk a number decays by 2^(2 half): queries have done so since half way through theirs, keys until then.
    `held` is the left factor of the product under way.
    """
    COLUMNS: gl.constexpr = gl.SliceLayout(0, q.type.layout)
    SCORES: gl.constexpr = product(TOKENS)
    VALUES: gl.constexpr = product(values.shape[2])
    none = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    since = half.index(group).load(COLUMNS)
    for n in gl.static_range(others):
        J = group + (n + 1) * step
        between = half.index(J).load(COLUMNS)
        left = left_factor(q * gl.exp2(since + between)[None, :], SCORES)
        a = warpgroup_mma(left, keys.index(J).permute((1, 0)), none, use_acc=False, is_async=True)
        a, left, out, held = warpgroup_mma_wait(0, (a, left, out, held))
        held = left_factor(a, VALUES)
        out = warpgroup_mma(held, values.index(J), out, is_async=True)
        since += 2 * between
    return out, held


@gluon.jit
def add_hard_pairs(out, q, keys, values, half, group, others, step):
    """The same, but queries have decayed since their chunk's end, and keys until theirs."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, q.type.layout)
    SCORES: gl.constexpr = product(TOKENS)
    none = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    since = gl.zeros([q.shape[1]], gl.float32, COLUMNS)
    for n in range(others):
        J = group + (n + 1) * step
        left = left_factor(q * gl.exp2(since)[None, :], SCORES)
        a = warpgroup_mma(left, keys.index(J).permute((1, 0)), none, use_acc=False)
        out = add_values(out, a, values.index(J))
        since += 2 * half.index(J).load(COLUMNS)
    return out


@gluon.jit
def add_values(out, scores, values):
    VALUES: gl.constexpr = out.type.layout
    return warpgroup_mma(left_factor(scores, VALUES), values, out)


@gluon.jit
def parts_of(late, group, K: gl.constexpr):
    """A chunk's parts of f and b, of which two lie where later local tokens or a gate come."""
    return two_of(late[0].index(group), K) + two_of(late[1].index(group), K)


@gluon.jit
def put_decays(inputs, low, weight, parts, at, H, K: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr):
    """Log2 decays (TOKENS, K) of both directions, and their parts."""
    KEYS: gl.constexpr = product(K)
    gates, gates_s = inputs[3], inputs[7]
    b, left, h, count = at
    zero = gl.zeros([TOKENS, K], gl.float32, KEYS)
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, KEYS))
    m = r < count
    f = log_decays(gates, gates_s, low, weight, b, left, h, H, r, m, zero, 0, K, LOGITS, RANK, KEYS)
    e = log_decays(gates, gates_s, low, weight, b, left, h, H, r, m, zero, 1, K, LOGITS, RANK, KEYS)
    put_in_parts(f, parts[0], parts[1])
    put_in_parts(e, parts[2], parts[3])
    return f, e


@gluon.jit
def copy_merged(late, merge, merge_s, at, V: gl.constexpr):
    """Local tokens and gate; a group under way."""
    b, left, h, count = at
    tiles = late[0]._reinterpret(HALF, [TOKENS, V], shared(V)), late[1]._reinterpret(HALF, [TOKENS, V], shared(V))
    copy(tiles[0], row(merge[0], merge_s[0], b, left, h), merge_s[0][1], count, V)
    copy(tiles[1], row(merge[1], merge_s[1], b, left, h), merge_s[1][1], count, V)
    async_copy.commit_group()
    return tiles


@gluon.jit
def leave(out, late, end, at, eps, V: gl.constexpr, MERGE: gl.constexpr, ACT: gl.constexpr):
    """Outputs to o, or what becomes of them: local tokens and gate are under way to `late`."""
    o, merge, o_s, merge_s = end
    b, left, h, count = at
    if MERGE:
        async_copy.wait_group(0)
        gl.thread_barrier()
        out = merged(out, late, merge, h, eps, V, ACT)
        store(row(merge[5], merge_s[2], b, left, h), merge_s[2][1], out, count, V)
    else:
        store(row(o, o_s, b, left, h), o_s[1], out, count, V)


@gluon.jit
def compute(
    group: gl.constexpr, inputs, end, tiles, sizes,
    K: gl.constexpr, V: gl.constexpr, G: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
    MERGE: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, which are of no use if one of the sequence is hard."""
    q, k, v, gates, q_s, k_s, v_s, gates_s = inputs
    keys, values, low, weight, late, ones, half, ready, done = tiles
    scale, limit, L, H, eps = sizes
    b, h, left = gl.program_id(0) // H, gl.program_id(0) % H, gl.to_tensor(group * TOKENS)
    count = gl.minimum(L - left, TOKENS)
    at = b, left, h, count
    narrow, low = (keys[0].index(group), keys[1].index(group)), (low[0].index(group), low[1].index(group))
    parts, late = parts_of(late, group, K), (late[0].index(group), late[1].index(group))
    copy_narrow(q, k, gates, q_s, k_s, gates_s, narrow, low, b, left, h, count, K, RANK)
    copy(values.index(group), row(v, v_s, b, left, h), v_s[1], count, V)
    async_copy.commit_group()
    if RANK > 0:
        async_copy.wait_group(1)
        meet()

    f, e = put_decays(inputs, low, weight, parts, at, H, K, LOGITS, RANK)
    half_f, half_b = gl.reduce((f / 2, e / 2), 0, add_both)
    half[0].index(group).store(half_f)
    half[1].index(group).store(half_b)
    async_copy.wait_group(1)
    meet()
    zero = gl.zeros([TOKENS, K], gl.float32, product(K))
    qf, qb = put_keys(scale, e, half_f[None, :], half_b[None, :], narrow, parts, ones, zero)
    async_copy.wait_group(0)
    meet()
    mbarrier.arrive(ready)
    if MERGE:
        late = copy_merged(late, end[1], end[3], at, V)
    a = diagonal_scores(qf, qb, narrow, ones, V)
    out = gl.zeros([TOKENS, V], gl.float32, product(V))
    mbarrier.wait(ready, 0)
    out = warpgroup_mma(a, values.index(group), out, use_acc=False, is_async=True)
    out, a = add_pairs(out, a, qf, keys[0], values, half[0], group, group, -1)
    out, a = add_pairs(out, a, qb, keys[1], values, half[1], group, G - 1 - group, 1)
    out, a = warpgroup_mma_wait(0, (out, a))
    leave(out, late, end, at, eps, V, MERGE, ACT)
    gl.thread_barrier()
    mbarrier.arrive(done)
    if group == 0:
        mbarrier.wait(done, 0)
        least = 0.0
        for c in gl.static_range(G):
            for D in gl.static_range(2):
                least = gl.minimum(least, gl.min(half[D].index(c).load(gl.SliceLayout(0, product(K))), 0))
        if least < limit / 2:
            compute_hard(inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)


@gluon.jit
def compute_hard(
    inputs, end, tiles, sizes,
    K: gl.constexpr, V: gl.constexpr, G: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
    MERGE: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """The outputs of all chunks, one after the other, however strong the decay: no exponent is ever above 0."""
    KEYS: gl.constexpr = product(K)
    q, k, v, gates, q_s, k_s, v_s, gates_s = inputs
    keys, values, low, weight, late, ones, half, ready, done = tiles
    scale, limit, L, H, eps = sizes
    b, h = gl.program_id(0) // H, gl.program_id(0) % H
    zero = gl.zeros([TOKENS, K], gl.float32, KEYS)
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, KEYS))
    parts, scratch = parts_of(late, 0, K), (late[0].index(1), late[1].index(1))
    # In shared memory: of a left factor in registers that is the same in each turn of a loop, ptxas 12.8 left out parts
    # in the first one.
    behind = scratch[1]
    put_ones(behind, True)
    for group in range(G):  # keys, as they have decayed until the chunk's ends
        left = group * TOKENS
        at = b, left, h, gl.minimum(L - left, TOKENS)
        gl.thread_barrier()  # some warp may still multiply what the chunk before had
        put_decays(inputs, (low[0].index(group), low[1].index(group)), weight, parts, at, H, K, LOGITS, RANK)
        meet()
        uf = sums(behind.permute((1, 0)), parts[0], parts[1], zero)
        ub = sums(behind, parts[2], parts[3], zero)
        uf, ub = warpgroup_mma_wait(0, (uf, ub))
        rows = rows_of(row(k, k_s, b, left, h), k_s[1], r < at[3], K, KEYS)
        keys[0].index(group).store((rows * gl.exp2(uf)).to(HALF))
        keys[1].index(group).store((rows * gl.exp2(ub)).to(HALF))
    for group in range(G):
        left = group * TOKENS
        at = b, left, h, gl.minimum(L - left, TOKENS)
        m = r < at[3]
        gl.thread_barrier()
        put_decays(inputs, (low[0].index(group), low[1].index(group)), weight, parts, at, H, K, LOGITS, RANK)
        meet()
        queries, rows = row(q, q_s, b, left, h), row(k, k_s, b, left, h)
        narrow = two_of(scratch[0], K)
        a = scores_by_halvings(queries, rows, q_s[1], k_s[1], scale, m, narrow, parts, zero, V)
        out = gl.zeros([TOKENS, V], gl.float32, product(V))
        out = warpgroup_mma(a, values.index(group), out, use_acc=False)
        F = sums(ones, parts[0], parts[1], zero)
        E = sums(ones.permute((1, 0)), parts[2], parts[3], zero)
        F, E = warpgroup_mma_wait(0, (F, E))
        rows = rows_of(queries, q_s[1], m, K, KEYS) * scale
        out = add_hard_pairs(out, rows * gl.exp2(F), keys[0], values, half[0], group, group, -1)
        out = add_hard_pairs(out, rows * gl.exp2(E), keys[1], values, half[1], group, G - 1 - group, 1)
        gl.thread_barrier()  # as above, the halvings
        local = scratch
        if MERGE:
            local = copy_merged(scratch, end[1], end[3], at, V)
        leave(out, local, end, at, eps, V, MERGE, ACT)


@kernel(do_not_specialize=('L',), jit=gluon.jit)
def bigla_whole_kernel(
    q, k, v, gates, o, merge, q_s, k_s, v_s, gates_s, o_s, merge_s, scale, limit, L, H, eps,
    K: gl.constexpr, V: gl.constexpr, G: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
    MERGE: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """Outputs of one sequence of G chunks, to o, or what becomes of them."""
    gl.static_assert(2 * K == TOKENS and V <= TOKENS)  # what takes the place of something else has its size
    keys = allocate_in_one(G, TOKENS, K), allocate_in_one(G, TOKENS, K)  # q, k; then keys of both directions
    values = allocate_in_one(G, TOKENS, V)
    # Of both directions, as the weight; with a RANK alone.
    low = allocate_in_one(G, TOKENS, RANK if RANK > 0 else 16), allocate_in_one(G, TOKENS, RANK if RANK > 0 else 16)
    weight = allocate_tiles(K, RANK if RANK > 0 else 16, 2)
    # Local tokens and gate, where the parts of f and b have been.
    late = allocate_in_one(G, TOKENS, 2 * K), allocate_in_one(G, TOKENS, 2 * K)
    ones = allocate(TOKENS, TOKENS)
    half = allocate_rows(G, K), allocate_rows(G, K)  # of the log2 total over each chunk
    ready, done = allocate_barriers(1, G).index(0), allocate_barriers(1, G).index(0)
    put_ones(ones)
    begin(True)
    if RANK > 0:
        put_weight(gates, gl.program_id(0) % H, H, weight, K, RANK)
    meet()
    inputs, end = (q, k, v, gates, q_s, k_s, v_s, gates_s), (o, merge, o_s, merge_s)
    tiles = keys, values, low, weight, late, ones, half, ready, done
    sizes = scale, limit, L, H, eps
    if G == 2:
        gl.warp_specialize(
            [
                (compute, (0, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
                (compute, (1, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
            ],
            (4,),
            (REGISTERS,),
        )
    elif G == 3:
        gl.warp_specialize(
            [
                (compute, (0, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
                (compute, (1, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
                (compute, (2, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
            ],
            (4, 4),
            (REGISTERS, REGISTERS),
        )
    else:
        gl.warp_specialize(
            [
                (compute, (0, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
                (compute, (1, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
                (compute, (2, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
                (compute, (3, inputs, end, tiles, sizes, K, V, G, LOGITS, RANK, MERGE, ACT)),
            ],
            (4, 4, 4),
            (REGISTERS, REGISTERS, REGISTERS),
        )


def launch_bigla_whole(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, o: Tensor, merge: Merge | None, scale: float, limit: float
) -> None:
    """Outputs of sequences of at most MOST chunks to o, or what becomes of them if there is a `merge`.

    Other arguments as of `launch_forward`, `prepared`.
    """
    B, L, H, K = q.shape
    end, end_s, eps, act = (o,), (token_strides(o),), 0.0, False
    if merge is not None:
        end, end_s, eps, act = merge.arguments()
    strides = *(token_strides(x) for x in (q, k, v)), gates.strides(), token_strides(o), end_s
    bigla_whole_kernel[B * H,](
        q, k, v, gates.pointers(), o, end, *strides, scale / 2, limit, L, H, eps,
        K=K, V=v.shape[-1], G=max(2, ceil_div(L, TOKENS.value)), LOGITS=gates.logits, RANK=gates.options()['RANK'],
        MERGE=merge is not None, ACT=act, num_warps=4, maxnreg=REGISTERS.value,
    )  # fmt: skip
