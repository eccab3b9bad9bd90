"""The outputs of BiGLA on Hopper, in Gluon: chunks of 64 tokens, as many as its products have rows.

Formulas and symbols are those of `..forward`. A program sends for all that a chunk needs at once, and works on both
directions together. Of many chunks the states come last: the scan that makes them may still be at work. Of few there is
none, and the program begins with adding up what these leave.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..merge import Merge, mixed
from ..primitives import Gates, ceil_div, locate, others, row, token_strides
from .chunks import (
    HALF,
    TOKENS,
    added_up,
    allocate,
    allocate_tiles,
    as_tile,
    columns,
    copy,
    copy_narrow,
    diagonal_scores,
    half_total,
    joined,
    left_factor,
    meet,
    product,
    put_decays,
    put_weight,
    rows_of,
    shared,
    state_at,
    store_tile,
    sums_of_both,
    wait,
)

REGISTERS = {16: 96, 32: 128}  # of a thread, by K: five programs run on a multiprocessor, or four


@gluon.jit
def put_keys(q, k, b, half_f, half_b, keys, parts):
    """Queries of both directions (TOKENS, K), and their keys to two tiles, split at half the total."""
    F, E = sums_of_both(parts, False, False)
    F, E = F - half_f, half_b + b - E
    keys[0].store((k * gl.exp2(-F)).to(HALF))
    keys[1].store((k * gl.exp2(-E)).to(HALF))
    return q * gl.exp2(F), q * gl.exp2(E)


@gluon.jit
def pairs(W: gl.constexpr):
    """Rows and columns of a left factor of products of W columns.  (TOKENS, 1), (1, TOKENS)"""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product(W), 2)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, LEFT))[:, None]
    return i, gl.arange(0, TOKENS, gl.SliceLayout(0, LEFT))[None, :]


@gluon.jit
def mask(condition):
    return gl.where(condition, 1.0, 0.0).to(HALF)


@gluon.jit
def masked_sums(first, second, x, y):
    """Sums over the rows of x where `first` is, and of y where `second` is, which `put_in_parts` put."""
    W: gl.constexpr = x.shape[1]
    acc = gl.zeros([TOKENS, W], gl.float32, product(W))
    acc = warpgroup_mma(mask(first), x, acc, use_acc=False)
    return joined(warpgroup_mma(mask(second), y, acc))


@gluon.jit
def scores_by_halvings(q, k, q_s, k_s, scale, count, keys, parts, V: gl.constexpr):
    """`diagonal_scores`, however strong the decay: by a tree of halvings in which every exponent is <= 0.

    At each level the two halves of a block of 2 s tokens meet in its middle. Nothing is ever subtracted. Queries and
    keys are loaded at each level, so that no registers of the usual way are spilled for them.
    """
    K: gl.constexpr = keys[0].shape[1]
    KEYS: gl.constexpr = product(K)
    VALUES: gl.constexpr = product(V)
    SCORES: gl.constexpr = product(TOKENS)
    none = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    i, j = pairs(2 * K)
    apart = gl.arange(0, TOKENS, gl.SliceLayout(1, SCORES))[:, None]
    apart = apart ^ gl.arange(0, TOKENS, gl.SliceLayout(0, SCORES))[None, :]
    qs, ks = keys[0], keys[1]
    a = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    for level in range(-1, 6):
        s = gl.where(level < 0, 0, 1 << gl.maximum(level, 0))  # at first the diagonal, on which no decay lies
        second = (i & s) != 0
        within = (i ^ j) < s
        # A query of the second half looks back, with f, and one of the first half ahead, with b; keys are met so, too.
        uq = masked_sums(within & second & (j <= i), within & ~second & (j >= i), parts[0], parts[1])
        uk = masked_sums(within & ~second & (j > i), within & second & (j < i), parts[0], parts[1])
        gl.thread_barrier()  # some warp may still multiply what the level before put there
        qs.store((rows_of(q, q_s, count, K, K, KEYS).to(gl.float32) * scale * gl.exp2(uq)).to(HALF))
        ks.store((rows_of(k, k_s, count, K, K, KEYS).to(gl.float32) * gl.exp2(uk)).to(HALF))
        meet()
        c = warpgroup_mma(qs, ks.permute((1, 0)), none, use_acc=False)
        a = gl.where((apart >= s) & (apart < gl.maximum(2 * s, 1)), gl.where(s == 0, 2 * c, c), a)
    return left_factor(a, VALUES)


@gluon.jit
def queries_from_end(q, q_s, scale, count, part, behind):
    """Queries as they have decayed since the end of the chunk that they are `behind`, however strong the decay."""
    W: gl.constexpr = part.shape[1]
    F = warpgroup_mma(behind, part, part.load(product(W)).to(gl.float32))  # by their own step, too
    return rows_of(q, q_s, count, W // 2, W // 2, product(W // 2)).to(gl.float32) * scale * gl.exp2(joined(F))


@gluon.jit
def merged(out, tiles, merge, h, eps, V: gl.constexpr, ACT: gl.constexpr):
    """What becomes of outputs: `..merge.finish`, its local tokens and gate being in two tiles."""
    VALUES: gl.constexpr = out.type.layout
    TO: gl.constexpr = merge[5].dtype.element_ty
    c, w, u = columns(merge[2] + h * V, V, VALUES), columns(merge[3], V, VALUES), columns(merge[4], V, VALUES)
    local, gate = tiles[0].load(VALUES).to(gl.float32), tiles[1].load(VALUES).to(gl.float32)
    return mixed(out, local, gate, c, w, u, eps, V, TO, ACT)


@kernel(do_not_specialize=('L', 'NT', 'N'), jit=gluon.jit)
def bigla_out_kernel(
    q, k, v, gates, state, total, hard, o, merge, q_s, k_s, v_s, gates_s, o_s, merge_s, scale, limit, L, NT, H, N, eps,
    K: gl.constexpr, V: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
    OTHERS: gl.constexpr, KEEP: gl.constexpr, MERGE: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """Outputs of one chunk. One whose decay passes the limit is marked by hard[i] = 1.

    The kernel in front makes the states, and has waited for whatever makes the rest. So has this one, then: it reads
    all else at once, and waits for nothing but the states, with which it begins to write, too. With OTHERS it has to
    add up the states, of sums that the kernel in front makes with their totals, and waits before it needs the latter.
    """
    KEYS: gl.constexpr = product(K)
    VALUES: gl.constexpr = product(V)
    narrow = allocate_tiles(TOKENS, K, 2)  # q, k; then S, R
    states = narrow[0]._reinterpret(HALF, [K, V], shared(V)), narrow[1]._reinterpret(HALF, [K, V], shared(V))
    keys = allocate_tiles(TOKENS, K, 2)  # of both directions
    values = allocate(TOKENS, V)
    end = allocate(TOKENS, V)  # what leaves
    low = None if RANK == 0 else allocate_tiles(TOKENS, RANK, 2)  # of both directions, as the weight; with a RANK alone
    weight = allocate_tiles(K, RANK if RANK > 0 else 16, 2)
    # Local tokens and gate, where the parts of f and b have been.
    late = allocate_tiles(TOKENS, 2 * K if 2 * K > V else V, 2)
    parts = as_tile(late[0], 2 * K), as_tile(late[1], 2 * K)
    late = as_tile(late[0], V), as_tile(late[1], V)
    index = N - 1 - gl.program_id(0)  # what the state kernel read last is read first: it is still in the cache
    b, c, h = locate(index, NT, H)
    left = c * TOKENS
    count = gl.minimum(L - left, TOKENS)
    copy_narrow(q, k, gates, q_s, k_s, gates_s, narrow, low, b, left, h, count, K, RANK)
    copy(values, row(v, v_s, b, left, h), v_s[1], count, V)
    async_copy.commit_group()
    if RANK > 0:
        put_weight(gates, h, H, weight, K, RANK)
        wait(1)
        meet()

    if OTHERS > 0:
        begin(True)
        S = added_up(state, total, index, c, NT, H, 0, False, OTHERS, K, V).to(HALF)
        R = added_up(state, total, index, c, NT, H, 1, False, OTHERS, K, V).to(HALF)
    f, e = put_decays(gates, gates_s, low, weight, b, left, h, H, count, parts, K, LOGITS, RANK)
    half_f, half_b = half_total(total, index, 0, K, KEYS), half_total(total, index, 1, K, KEYS)
    decayed = gl.min(gl.min(gl.minimum(half_f, half_b), 1), 0) < limit / 2
    wait(1)
    meet()
    if decayed:
        queries = row(q, q_s, b, left, h)
        a = scores_by_halvings(queries, row(k, k_s, b, left, h), q_s[1], k_s[1], scale, count, keys, parts, V)
        i, j = pairs(2 * K)
        qf = left_factor(queries_from_end(queries, q_s[1], scale, count, parts[0], mask(i > j)), VALUES)
        qb = left_factor(queries_from_end(queries, q_s[1], scale, count, parts[1], mask(i < j)), VALUES)
        wait(0)
        meet()
    else:
        q_, k_ = narrow[0].load(KEYS).to(gl.float32) * scale, narrow[1].load(KEYS).to(gl.float32)
        qf, qb = put_keys(q_, k_, e, half_f, half_b, keys, parts)
        wait(0)
        meet()
        # As they meet the states, which stay as they are: these are wider.
        qf_, qb_ = left_factor(qf * gl.exp2(half_f), VALUES), left_factor(qb * gl.exp2(half_b), VALUES)
        a = diagonal_scores(qf, qb, keys, V)
        qf, qb = qf_, qb_
    if MERGE:
        copy(late[0], row(merge[0], merge_s[0], b, left, h), merge_s[0][1], count, V)
        copy(late[1], row(merge[1], merge_s[1], b, left, h), merge_s[1][1], count, V)
    out = gl.zeros([TOKENS, V], gl.float32, VALUES)
    out = warpgroup_mma(a, values, out, use_acc=False, is_async=True)

    if OTHERS > 0:
        states[0].store(S)
        states[1].store(R)
    else:
        begin(True)
        for D in gl.static_range(2):
            copy(states[D], state_at(state, index, D, K, V), V, K, V)
    async_copy.commit_group()
    gl.store(hard + index, decayed.to(gl.int32))
    if index == N - 1:
        gl.store(hard + N, 0)
    wait(0)
    meet()
    out = warpgroup_mma(qf, states[0], out, is_async=True)
    out = warpgroup_mma(qb, states[1], out, is_async=True)
    out, a, qf, qb = warpgroup_mma_wait(0, (out, a, qf, qb))
    if KEEP:
        end.store(out.to(HALF))
        store_tile(row(o, o_s, b, left, h), o_s[1], end, count)
    if MERGE:
        z = merged(out, late, merge, h, eps, V, ACT)
        end.store(z.to(HALF))
        store_tile(row(merge[5], merge_s[2], b, left, h), merge_s[2][1], end, count)


def launch_bigla_out(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor, total: Tensor, hard: Tensor, o: Tensor,
    merge: Merge | None, keep: bool, scale: float, limit: float,
) -> None:  # fmt: skip
    """Outputs of all chunks of TOKENS, to o with `keep`, and what becomes of them if there is a `merge`.

    Other arguments as of `launch_forward`, `prepared`, and what its kernels leave; the last of these made the states,
    with nothing launched since.
    """
    B, L, H, K = q.shape
    NT = ceil_div(L, TOKENS.value)
    N = B * NT * H
    end, end_s, eps, act = (o,), (token_strides(o),), 0.0, False
    if merge is not None:
        end, end_s, eps, act = merge.arguments()
    strides = *(token_strides(x) for x in (q, k, v)), gates.strides(), token_strides(o), end_s
    bigla_out_kernel[N,](
        q, k, v, gates.pointers(), state, total, hard, o, end, *strides, scale / 2, limit, L, NT, H, N, eps,
        K=K, V=v.shape[-1], LOGITS=gates.logits, RANK=gates.options()['RANK'],
        OTHERS=others(NT), KEEP=keep, MERGE=merge is not None, ACT=act, num_warps=4, maxnreg=REGISTERS[K],
    )  # fmt: skip
