"""BiGLA of a short sequence on Hopper, in Gluon: a program has all its tokens, a warpgroup 64 of them, and no states.

Formulas and symbols are those of `..forward`. What queries of one chunk have with keys of another is a product, too, of
queries that have decayed on the way between both: by a number for each column, which is never more than 1.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..primitives import Gates, ceil_div, row, token_strides
from .bigla_out import put_keys, queries_from_end, scores_by_halvings
from .chunks import (
    HALF,
    TOKENS,
    allocate_in_one,
    allocate_rows,
    copy,
    copy_gates,
    copy_narrow,
    diagonal_scores,
    joined,
    left_factor,
    meet,
    product,
    put_decays,
    put_ones,
    rows_of,
    store,
    sums,
    two_of,
    wait,
)
from .parts import allocate_barriers

MOST = gl.constexpr(4)  # chunks of a sequence, each with a warpgroup of its own
REGISTERS = gl.constexpr(128)  # of a thread: 16 warps run on a multiprocessor


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
    VALUES: gl.constexpr = product(values.shape[2])
    none = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    since = gl.zeros([q.shape[1]], gl.float32, COLUMNS)
    for n in range(others):
        J = group + (n + 1) * step
        left = left_factor(q * gl.exp2(since)[None, :], SCORES)
        a = warpgroup_mma(left, keys.index(J).permute((1, 0)), none, use_acc=False)
        out = warpgroup_mma(left_factor(a, VALUES), values.index(J), out)
        since += 2 * half.index(J).load(COLUMNS)
    return out


@gluon.jit
def compute(
    group: gl.constexpr, inputs, tiles, sizes,
    K: gl.constexpr, V: gl.constexpr, G: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, which are of no use if one of the sequence is hard."""
    KEYS: gl.constexpr = product(K)
    q, k, v, gates, o, q_s, k_s, v_s, gates_s, o_s = inputs
    narrow, keys, values, pieces, half, ready, done = tiles
    scale, limit, L, H = sizes
    b, h, left = gl.program_id(0) // H, gl.program_id(0) % H, gl.to_tensor(group * TOKENS)
    count = gl.minimum(L - left, TOKENS)
    own, parts = (keys[0].index(group), keys[1].index(group)), (pieces[0].index(group), pieces[1].index(group))
    q_, k_ = narrow[0].index(group), narrow[1].index(group)
    copy_narrow(q, k, gates, q_s, k_s, gates_s, (q_, k_), own, b, left, h, count, K, 0)
    copy(values.index(group), row(v, v_s, b, left, h), v_s[1], count, V)
    async_copy.commit_group()
    wait(1)
    meet()
    f, e = put_decays(gates, gates_s, own, None, b, left, h, H, count, parts, K, LOGITS, 0)
    half_f, half_b = gl.reduce((f / 2, e / 2), 0, add_both)
    half[0].index(group).store(half_f)
    half[1].index(group).store(half_b)
    meet()
    q_, k_ = q_.load(KEYS).to(gl.float32) * scale, k_.load(KEYS).to(gl.float32)
    qf, qb = put_keys(q_, k_, e, half_f[None, :], half_b[None, :], own, parts)
    wait(0)
    meet()
    mbarrier.arrive(ready)
    a = diagonal_scores(qf, qb, own, V)
    out = gl.zeros([TOKENS, V], gl.float32, product(V))
    mbarrier.wait(ready, 0)
    out = warpgroup_mma(a, values.index(group), out, use_acc=False, is_async=True)
    out, a = add_pairs(out, a, qf, keys[0], values, half[0], group, group, -1)
    out, a = add_pairs(out, a, qb, keys[1], values, half[1], group, G - 1 - group, 1)
    out, a = warpgroup_mma_wait(0, (out, a))
    store(row(o, o_s, b, left, h), o_s[1], out, count, V)
    gl.thread_barrier()
    mbarrier.arrive(done)
    if group == 0:
        mbarrier.wait(done, 0)
        least = 0.0
        for c in gl.static_range(G):
            for D in gl.static_range(2):
                least = gl.minimum(least, gl.min(half[D].index(c).load(gl.SliceLayout(0, KEYS)), 0))
        if least < limit / 2:
            compute_hard(inputs, tiles, sizes, K, V, G, LOGITS)


@gluon.jit
def decays_again(inputs, own, parts, b, left, h, H, count, K: gl.constexpr, LOGITS: gl.constexpr):
    """`put_decays` of a chunk, by way of two tiles."""
    gates, gates_s = inputs[3], inputs[8]
    copy_gates(own, gates, gates_s, b, left, h, count, K, 0)
    async_copy.commit_group()
    wait(0)
    meet()
    put_decays(gates, gates_s, own, None, b, left, h, H, count, parts, K, LOGITS, 0)


@gluon.jit
def compute_hard(
    inputs, tiles, sizes,
    K: gl.constexpr, V: gl.constexpr, G: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """The outputs of all chunks, one after the other, however strong the decay: no exponent is ever above 0."""
    KEYS: gl.constexpr = product(K)
    q, k, v, gates, o, q_s, k_s, v_s, gates_s, o_s = inputs
    narrow, keys, values, pieces, half, ready, done = tiles
    scale, limit, L, H = sizes
    b, h = gl.program_id(0) // H, gl.program_id(0) % H
    parts, own, behind = (pieces[0].index(0), pieces[1].index(0)), two_of(pieces[0].index(1), K), pieces[1].index(1)
    # In shared memory: of a left factor in registers that is the same in each turn of a loop, ptxas 12.8 left out parts
    # in the first one.
    put_ones(behind)
    for group in range(G):  # keys, as they have decayed until the chunk's ends
        left = group * TOKENS
        count = gl.minimum(L - left, TOKENS)
        gl.thread_barrier()  # some warp may still multiply what the chunk before had
        decays_again(inputs, own, parts, b, left, h, H, count, K, LOGITS)
        meet()
        uf, ub = warpgroup_mma_wait(0, (sums(behind.permute((1, 0)), parts[0]), sums(behind, parts[1])))
        uf, ub = joined(uf), joined(ub)
        rows = rows_of(row(k, k_s, b, left, h), k_s[1], count, K, K, KEYS).to(gl.float32)
        keys[0].index(group).store((rows * gl.exp2(uf)).to(HALF))
        keys[1].index(group).store((rows * gl.exp2(ub)).to(HALF))
    for group in range(G):
        left = group * TOKENS
        count = gl.minimum(L - left, TOKENS)
        gl.thread_barrier()
        decays_again(inputs, own, parts, b, left, h, H, count, K, LOGITS)
        meet()
        queries, rows = row(q, q_s, b, left, h), row(k, k_s, b, left, h)
        a = scores_by_halvings(queries, rows, q_s[1], k_s[1], scale, count, own, parts, V)
        out = gl.zeros([TOKENS, V], gl.float32, product(V))
        out = warpgroup_mma(a, values.index(group), out, use_acc=False)
        qf = queries_from_end(queries, q_s[1], scale, count, parts[0], behind)
        out = add_hard_pairs(out, qf, keys[0], values, half[0], group, group, -1)
        qb = queries_from_end(queries, q_s[1], scale, count, parts[1], behind.permute((1, 0)))
        out = add_hard_pairs(out, qb, keys[1], values, half[1], group, G - 1 - group, 1)
        store(row(o, o_s, b, left, h), o_s[1], out, count, V)


@kernel(do_not_specialize=('L',), jit=gluon.jit)
def bigla_whole_kernel(
    q, k, v, gates, o, q_s, k_s, v_s, gates_s, o_s, scale, limit, L, H,
    K: gl.constexpr, V: gl.constexpr, G: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """Outputs of one sequence of G chunks."""
    gl.static_assert(G <= MOST and 2 * K == TOKENS and V <= TOKENS)  # what takes another's place has its size
    narrow = allocate_in_one(G, TOKENS, K), allocate_in_one(G, TOKENS, K)  # q, k
    keys = allocate_in_one(G, TOKENS, K), allocate_in_one(G, TOKENS, K)  # of both directions
    values = allocate_in_one(G, TOKENS, V)
    pieces = allocate_in_one(G, TOKENS, 2 * K), allocate_in_one(G, TOKENS, 2 * K)  # parts of f, of b
    half = allocate_rows(G, K), allocate_rows(G, K)  # of the log2 total over each chunk
    ready, done = allocate_barriers(1, G).index(0), allocate_barriers(1, G).index(0)
    begin(True)
    inputs = q, k, v, gates, o, q_s, k_s, v_s, gates_s, o_s
    tiles = narrow, keys, values, pieces, half, ready, done
    sizes = scale, limit, L, H
    gl.warp_specialize(
        [
            (compute, (0, inputs, tiles, sizes, K, V, G, LOGITS)),
            (compute, (1, inputs, tiles, sizes, K, V, G, LOGITS)),
            (compute, (2, inputs, tiles, sizes, K, V, G, LOGITS)),
            (compute, (3, inputs, tiles, sizes, K, V, G, LOGITS)),
        ][:G],
        (4, 4, 4)[: G - 1],
        (REGISTERS, REGISTERS, REGISTERS)[: G - 1],
    )


def launch_bigla_whole(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, o: Tensor, scale: float, limit: float
) -> None:  # fmt: skip
    """Outputs of sequences of at most MOST chunks of TOKENS to o.

    Other arguments as of `launch_forward`, `prepared`; gates that are not of low rank.
    """
    B, L, H, K = q.shape
    strides = *(token_strides(x) for x in (q, k, v)), gates.strides(), token_strides(o)
    G = max(2, ceil_div(L, TOKENS.value))  # roles have warps beside those that begin; the second chunk may be empty
    bigla_whole_kernel[B * H,](
        q, k, v, gates.pointers(), o, *strides, scale / 2, limit, L, H,
        K=K, V=v.shape[-1], G=G, LOGITS=gates.logits, num_warps=4, maxnreg=REGISTERS.value,
    )  # fmt: skip
