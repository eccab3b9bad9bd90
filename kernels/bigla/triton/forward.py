"""Forward kernels of BiGLA and their launcher.

A sequence is cut into chunks of C tokens. With f, b the log2 decays of a chunk's tokens, F_i = f_0 + .. + f_i,
E_i = b_0 + .. + b_{i-1}, totals Ft, Bt, and S and R the states that enter from the left and from the right::

    o_i = sum_j A_ij v_j + s (q_i 2^F_i) S + s (q_i 2^(Bt-E_i)) R,                                s = scale / 2
    A_ij = s q_i . k_j 2^(F_i-F_j)  for i > j,    s q_i . k_j 2^(E_j-E_i)  for i < j,    2 s q_i . k_i  for i = j
    S' = 2^Ft S + sum_j (k_j 2^(Ft-F_j)) v_j^T           R' = 2^Bt R + sum_j (k_j 2^E_j) v_j^T

1. `state_kernel`: the sums of S' and R' of every chunk, and its totals.
2. `scan_kernel`: S and R of every chunk, in place of the sums; segment by segment where there are many chunks. Where
   there are few, but many sequences, `walk_kernel` does 1 and 2; on Hopper, where there are few, 3 does 2.
3. `out_kernel`: the outputs, both directions by one score matrix. It splits 2^(F_i-F_j) at half the total, so that
   neither factor leaves float32 before the total passes a limit; where it does, the chunk is hard.
4. `exact_out_kernel`: the hard chunks, by a tree of halvings in which every exponent is <= 0. In float32 all are hard.
   Where there are few chunks, 3 does it.

A sequence of one chunk has no states: 1 and 2 are left out. Hopper has kernels of its own for 1 and for 3 and 4 of long
chunks, and one for all of a short sequence without gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, kernel
from .merge import Merge, finish, launch_merge
from .primitives import (
    FEW,
    INTERPRETED,
    KNOWN,
    MANY,
    SEARCHERS,
    SPAN,
    WALKED,
    WALKERS,
    Config,
    Gates,
    any_hard,
    block,
    ceil_div,
    config,
    decay,
    dot,
    is_hard,
    is_whole,
    load_gate,
    load_gates,
    load_rows,
    load_state,
    load_total,
    locate,
    longer_chunk,
    operand,
    others,
    precision,
    row,
    rows,
    store_rows,
    store_state,
    store_total,
    tile_decay,
    token_strides,
    tree_scores,
)

if KNOWN and not INTERPRETED:  # Gluon is as new as that
    from . import hopper


@triton.jit
def chunk_sum(
    x, y, gates, x_s, y_s, gates_s, scale, L, b, c, h, d, H, v0,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GRAD: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One direction of chunk c: sum_r (x_r 2^G_r) y_r^T, rows in the order in which decays accumulate, and the total.

    Forward, x = k, y = v: a key decays by every step after it, in its direction. G is the exclusive sum that starts at
    the chunk's far end. Backward (GRAD), x = s q, y = do: a query has decayed by every step up to its own. G is the
    inclusive sum from the near end, and what is returned for the total, which is there, is no number of use.
    """
    left = c * C
    r = tl.arange(0, C)
    reverse = (d == 0) != GRAD
    t = tl.where(reverse, C - 1 - r, r)
    m = left + t < L

    # The gate of row r - 1, so that the plain sum is the exclusive one: subtracting the own gate would lose digits.
    tg = t
    mg = m
    if not GRAD:
        tg = tl.where(reverse, t + 1, t - 1)
        mg = (r > 0) & (left + tg < L)
    G = tile_decay(load_gates(gates, gates_s, b, left, h, d, H, tg, mg, K, BK, RANK, BR, PREC), mg, LOGITS)
    total = tl.zeros([BK], tl.float32)
    if not GRAD:
        last = tl.where(reverse, 0, C - 1)
        end = load_gate(gates, gates_s, b, left, h, d, H, last, left + last < L, K, BK, RANK, BR)
        total = tl.sum(G, 0) + tl.where(left + last < L, decay(end, LOGITS), 0.0)
    G = tl.cumsum(G, 0)

    a = load_rows(row(x, x_s, b, left, h), x_s[1], t, m, K, BK).to(tl.float32)
    if GRAD:
        a = a * scale
    a = operand(a * tl.exp2(G), PREC)
    w = operand(load_rows(row(y, y_s, b, left, h), y_s[1], t, m, V, BV, v0), PREC)
    return dot(tl.trans(a), w, PREC), total


@kernel(do_not_specialize=('L', 'NT'), wgmma=False)
def state_kernel(
    x, y, gates, state, total, x_s, y_s, gates_s, scale, L, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GRAD: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`chunk_sum` of one direction of one chunk to `state`; forward, the total is written too."""
    begin(not GRAD)
    i = tl.program_id(0) // 2
    d = tl.program_id(0) % 2
    v0 = tl.program_id(1) * BV
    b, c, h = locate(i, NT, H)
    u, decayed = chunk_sum(
        x, y, gates, x_s, y_s, gates_s, scale, L, b, c, h, d, H, v0, K, V, C, BK, BV, GRAD, LOGITS, RANK, BR, PREC
    )  # fmt: skip
    if not GRAD and v0 == 0:
        store_total(total, i, d, decayed, K, BK)
    store_state(state, i, d, u, K, V, BK, BV, v0)


@kernel(do_not_specialize=('L', 'NT'), wgmma=False)
def walk_kernel(
    x, y, gates, state, total, x_s, y_s, gates_s, scale, L, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GRAD: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What `state_kernel` and `scan_kernel` do, of one direction of a sequence of few chunks: X and totals of each."""
    begin(not GRAD)
    d = tl.program_id(0) % 2
    b, h = tl.program_id(0) // 2 // H, tl.program_id(0) // 2 % H
    v0 = tl.program_id(1) * BV
    right = (d == 0) != GRAD
    X = tl.zeros([BK, BV], tl.float32)
    for j in tl.range(0, NT, num_stages=1 if GRAD else 2):
        c = tl.where(right, j, NT - 1 - j)
        i = (b * NT + c) * H + h
        u, decayed = chunk_sum(
            x, y, gates, x_s, y_s, gates_s, scale, L, b, c, h, d, H, v0, K, V, C, BK, BV, GRAD, LOGITS, RANK, BR, PREC
        )  # fmt: skip
        if GRAD:
            decayed = load_total(total, i, d, K, BK)
        elif v0 == 0:
            store_total(total, i, d, decayed, K, BK)
        store_state(state, i, d, X, K, V, BK, BV, v0)
        X = tl.exp2(decayed)[:, None] * X + u


@triton.jit
def carry_on(x, y, p, t, p_step, t_step, m, mk, n, AHEAD: tl.constexpr, STORE: tl.constexpr):
    """`x` after n steps x <- 2^t x + p along p and t, and y plus the t; STORE: every p becomes the x before it.

    AHEAD steps are read before the first of them is done.
    """
    for c in range(0, n, AHEAD):
        u = ()
        a = ()
        for j in tl.static_range(AHEAD):
            a = a + (tl.load(t + j * t_step, mask=mk & (c + j < n), other=0.0),)
            u = u + (tl.load(p + j * p_step, mask=m & (c + j < n), other=0.0),)
        for j in tl.static_range(AHEAD):
            if STORE:
                tl.store(p + j * p_step, x.to(p.dtype.element_ty), mask=m & (c + j < n))
            x = tl.exp2(a[j])[:, None] * x + u[j].to(tl.float32)
            y += a[j]
        p += AHEAD * p_step
        t += AHEAD * t_step
    return x, y


@kernel(do_not_specialize=('NT', 'NS', 'segment'))
def scan_kernel(
    state, total, part, part_total, NT, NS, segment, H,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr,
    GRAD: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """X <- 2^total X + state[c] along the chunks, each state[c] replaced by the X that enters it.

    One program a slice (ROWS, COLS) of (K, V), direction, segment, head and sample. The states S and the gradients of R
    run to the right, the others to the left. A long sequence takes two launches over its NS segments: the first
    leaves the X of each, begun at 0, in `part`, the second begins with what these add up to (STORE).
    """
    begin(not GRAD)
    ACROSS: tl.constexpr = (V + COLS - 1) // COLS
    SLICES: tl.constexpr = (K + ROWS - 1) // ROWS * ACROSS
    here = tl.program_id(0) % SLICES
    d = tl.program_id(0) // SLICES % 2
    s = tl.program_id(0) // (2 * SLICES) % NS
    i = tl.program_id(0) // (2 * SLICES) // NS
    kk = here // ACROSS * ROWS + tl.arange(0, ROWS)
    vv = here % ACROSS * COLS + tl.arange(0, COLS)
    e = kk[:, None] * V + vv[None, :]
    m = (kk < K)[:, None] & (vv < V)[None, :]
    right = (d == 0) != GRAD
    first = (i // H).to(tl.int64) * NT * H + i % H
    first += tl.where(right, s * segment, NT - 1 - s * segment).to(tl.int64) * H
    step = tl.where(right, H, -H).to(tl.int64) * 2
    at = (i.to(tl.int64) * 2 + d) * NS
    x = tl.zeros([ROWS, COLS], tl.float32)
    y = tl.zeros([ROWS], tl.float32)
    if STORE:
        x, y = carry_on(x, y, part + at * (K * V) + e, part_total + at * K + kk, K * V, K, m, kk < K, s, AHEAD, False)
    n = tl.minimum(NT - s * segment, segment)
    p, t = state + (first * 2 + d) * (K * V) + e, total + (first * 2 + d) * K + kk
    x, y = carry_on(x, y, p, t, step * (K * V), step * K, m, kk < K, n, AHEAD, STORE)
    if not STORE:
        tl.store(part + (at + s) * (K * V) + e, x, mask=m)
        tl.store(part_total + (at + s) * K + kk, y, mask=kk < K)


@triton.jit
def load_chunk(
    q, k, gates, q_s, k_s, gates_s, scale, b, left, h, H, r, m,
    K: tl.constexpr, BK: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """s q, k and the log2 decays of both directions.  each (C, BK)"""
    q_ = load_rows(row(q, q_s, b, left, h), q_s[1], r, m, K, BK).to(tl.float32) * scale
    k_ = load_rows(row(k, k_s, b, left, h), k_s[1], r, m, K, BK).to(tl.float32)
    f = tile_decay(load_gates(gates, gates_s, b, left, h, 0, H, r, m, K, BK, RANK, BR, PREC), m, LOGITS)
    e = tile_decay(load_gates(gates, gates_s, b, left, h, 1, H, r, m, K, BK, RANK, BR, PREC), m, LOGITS)
    return q_, k_, f, e


@triton.jit
def leave_outputs(
    a, qf, qb, v, state, o, merge, v_s, o_s, merge_s, i, b, left, h, r, m, eps,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ONE: tl.constexpr, PREC: tl.constexpr,
    KEEP: tl.constexpr, MERGE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Stores what scores `a` make of values, and queries of states: o if KEEP, and what becomes of it if MERGE."""
    for v0 in range(0, V, BV):
        out = dot(a, operand(load_rows(row(v, v_s, b, left, h), v_s[1], r, m, V, BV, v0), PREC), PREC)
        if not ONE:
            out = dot(qf, operand(load_state(state, i, 0, K, V, BK, BV, v0), PREC), PREC, out)
            out = dot(qb, operand(load_state(state, i, 1, K, V, BK, BV, v0), PREC), PREC, out)
        if KEEP:
            store_rows(row(o, o_s, b, left, h), o_s[1], out, r, m, V, BV, v0)
        if MERGE:
            finish(out, merge, merge_s, eps, b, left, h, r, m, V, BV, ACT)


@triton.jit
def outputs_by_tree(
    q, k, v, gates, state, o, merge, q_s, k_s, v_s, gates_s, o_s, merge_s, scale, i, b, left, h, H, r, m, eps,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ONE: tl.constexpr,
    LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
    KEEP: tl.constexpr, MERGE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """The outputs of a chunk, however strong its decay."""
    q_, k_, f, e = load_chunk(
        q, k, gates, q_s, k_s, gates_s, scale, b, left, h, H, r, m, K, BK, LOGITS, RANK, BR, PREC
    )  # fmt: skip
    a, pf, sf, sb, pb = tree_scores(q_, k_, f, e, r, C, PREC, False)
    a, qf, qb = operand(a, PREC), operand(q_ * tl.exp2(pf), PREC), operand(q_ * tl.exp2(sb), PREC)
    leave_outputs(
        a, qf, qb, v, state, o, merge, v_s, o_s, merge_s, i, b, left, h, r, m, eps,
        K, V, BK, BV, ONE, PREC, KEEP, MERGE, ACT,
    )  # fmt: skip


@kernel(do_not_specialize=('L', 'NT', 'N'), wgmma=False)
def out_kernel(
    q, k, v, gates, state, total, hard, o, merge, q_s, k_s, v_s, gates_s, o_s, merge_s, scale, limit, L, NT, H, N, eps,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
    TREE: tl.constexpr, KEEP: tl.constexpr, MERGE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk. ONE: the chunk is the sequence.

    One whose decay passes the limit is marked by hard[i] = 1, and done here with TREE only.
    """
    begin(True)
    i = N - 1 - tl.program_id(0)  # what the state kernel read last is read first: it is still in the cache
    b, c, h = locate(i, NT, H)
    left = c * C
    r = tl.arange(0, C)
    m = left + r < L
    q_, k_, f, e = load_chunk(
        q, k, gates, q_s, k_s, gates_s, scale, b, left, h, H, r, m, K, BK, LOGITS, RANK, BR, PREC
    )  # fmt: skip
    if ONE:
        tf = tl.sum(f, 0)
        tb = tl.sum(e, 0)
    else:
        tf = load_total(total, i, 0, K, BK)
        tb = load_total(total, i, 1, K, BK)
    # From half the total on: no exponent passes 80.
    F = tl.cumsum(f, 0) - tf[None, :] / 2
    E = tb[None, :] / 2 + e - tl.cumsum(e, 0)
    decayed = tl.min(tl.minimum(tf, tb), 0) < limit
    tl.store(hard + i, decayed.to(tl.int32))
    if i == N - 1:
        tl.store(hard + N, 0)
    if not decayed:
        qf, qb = q_ * tl.exp2(F), q_ * tl.exp2(E)
        kf, kb = operand(k_ * tl.exp2(-F), PREC), operand(k_ * tl.exp2(-E), PREC)
        # Selected, not multiplied by a mask: the other half may be inf. The diagonal is in both.
        a = tl.where(r[:, None] >= r[None, :], dot(operand(qf, PREC), tl.trans(kf), PREC), 0.0)
        a += tl.where(r[:, None] <= r[None, :], dot(operand(qb, PREC), tl.trans(kb), PREC), 0.0)
        a = operand(a, PREC)
        # Queries as they meet the states, which stay as they are: these are wider.
        qf, qb = operand(qf * tl.exp2(tf / 2)[None, :], PREC), operand(qb * tl.exp2(tb / 2)[None, :], PREC)
        leave_outputs(
            a, qf, qb, v, state, o, merge, v_s, o_s, merge_s, i, b, left, h, r, m, eps,
            K, V, BK, BV, ONE, PREC, KEEP, MERGE, ACT,
        )  # fmt: skip
    elif TREE:  # which loads the chunk again, so that nothing is kept for it
        outputs_by_tree(
            q, k, v, gates, state, o, merge, q_s, k_s, v_s, gates_s, o_s, merge_s, scale, i, b, left, h, H, r, m, eps,
            K, V, C, BK, BV, ONE, LOGITS, RANK, BR, PREC, KEEP, MERGE, ACT,
        )  # fmt: skip


@kernel(do_not_specialize=('L', 'NT', 'N'), wgmma=False)
def exact_out_kernel(
    q, k, v, gates, state, hard, o, merge, q_s, k_s, v_s, gates_s, o_s, merge_s, scale, L, NT, H, N, eps,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
    ALL: tl.constexpr, KEEP: tl.constexpr, MERGE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Outputs of the hard chunks, found SPAN at a time by a grid that does not depend on their number; or of ALL."""
    begin(True)
    G = tl.num_programs(0)
    i0 = tl.program_id(0)
    r = tl.arange(0, C)
    while i0 < N:
        if any_hard(hard, i0, G, N, ALL):
            for j in range(SPAN):
                i = i0 + j * G
                if is_hard(hard, i, N, ALL):
                    b, c, h = locate(i, NT, H)
                    left = c * C
                    m = left + r < L
                    outputs_by_tree(
                        q, k, v, gates, state, o, merge, q_s, k_s, v_s, gates_s, o_s, merge_s,
                        scale, i, b, left, h, H, r, m, eps,
                        K, V, C, BK, BV, ONE, LOGITS, RANK, BR, PREC, KEEP, MERGE, ACT,
                    )  # fmt: skip
        i0 += SPAN * G


def buffers(q: Tensor, v: Tensor, NT: int, one: bool, keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels leave for each other and for the backward, empty; flat, each indexed by chunk i first.

    Without `keep` there is nothing of it, as is returned where there is to be no backward.

    The states (B NT nh, 2, K, V) that enter from both sides, or where there are `others` what the chunk adds to them,
    in bfloat16 where the tensors are and float32 otherwise, and the log2 totals (B NT nh, 2, K) in float32, or nothing
    of these where there is `one` chunk. Whether a chunk is hard (B NT nh) in int32, or nothing where all are; one to
    spare, since a symbolic size that might be 1 would make torch.export specialise L.
    """
    B, _, H, K = q.shape
    N = B * NT * H if keep else 0
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    return (
        q.new_empty(0 if one else N * 2 * K * v.shape[-1], dtype=dtype),
        q.new_empty(0 if one else N * 2 * K, dtype=torch.float32),
        q.new_empty(0 if precision(q.dtype)[1] is None or not keep else N + 1, dtype=torch.int32),
    )


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, C: int, one: bool, keep: bool = True,
    merge: Merge | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward.

    Args:
        q, k: (B, L, nh, K), any strides.
        v: (B, L, nh, V).
        gates: Of the width of q.
        scale: Factor on the scores.
        C: Tokens a chunk, from `chunk_size`; `longer_chunk` may take more, and sequences that are `is_whole` have none.
        one: A chunk holds all tokens; leave out what serves to join chunks.
        keep: There is to be a backward.
        merge: What becomes of o.

    Returns:
        o (B, L, nh, V) of v's dtype, or nothing where there is a `merge`, done by the same kernels, and no `keep`, and
        states, totals and flags as in `buffers`; with `keep` of as many chunks as `kept_chunk` makes of L.
    """
    B, L, H, K = q.shape
    V = v.shape[-1]
    if merge is None and is_whole(q, v, gates, keep):
        return launch_whole(q, k, v, gates, scale), *buffers(q, v, 0, one, False)
    C, by_hopper = longer_chunk(C, q, v, gates, keep)
    NT = ceil_div(L, C)
    state, total, hard = buffers(q, v, NT, one)
    N = B * NT * H
    cfg = config(C, K, V, q.dtype)
    fused = merge is not None and block(V) <= cfg.BV
    keep_o = keep or not fused
    o = v.new_empty((B, L, H, V) if keep_o else (0, 0, 0, 0))
    kept = (state, total, hard) if keep else buffers(q, v, NT, one, False)
    if N == 0:
        return o, *kept
    prec, limit = precision(q.dtype)
    if by_hopper:
        q, k, v, gates, merge = hopper.prepared(q, k, v, gates, merge)
    else:
        q, k, v, gates = (*(rows(x, C) for x in (q, k, v)), gates.prepared(C))
    tile = dict(K=K, V=V, C=C, BK=block(K), BV=cfg.BV, PREC=prec, num_stages=1, **gates.options())
    if not one:
        states(k, v, gates, state, total, 1.0, cfg, False, by_hopper, **tile)
    if by_hopper:
        hopper.launch_bigla_out(q, k, v, gates, state, total, hard, o, merge, keep_o, scale, limit)
        return o, *kept
    g, g_s = gates.pointers(), gates.strides()
    q_s, k_s, v_s, o_s = (token_strides(x) for x in (q, k, v, o))
    end, end_s, eps, act = merge.arguments() if fused else ((o,), (o_s,), 0.0, False)
    strides = q_s, k_s, v_s, g_s, o_s, end_s
    tile |= dict(ONE=one, KEEP=keep_o, MERGE=fused, ACT=act)
    tree = limit is not None and N <= FEW  # a launch for hard chunks would take longer than what they cost the others
    if limit is not None:
        out_kernel[N,](
            q, k, v, g, state, total, hard, o, end, *strides, scale / 2, limit, L, NT, H, N, eps,
            TREE=tree, num_warps=cfg.merge_warps if fused else cfg.out_warps,
            maxnreg=cfg.merge_registers if fused else cfg.out_registers, **tile,
        )  # fmt: skip
    if not tree:
        exact_out_kernel[min(N, SEARCHERS // cfg.exact_warps),](
            q, k, v, g, state, hard, o, end, *strides, scale / 2, L, NT, H, N, eps,
            ALL=limit is None, num_warps=cfg.exact_warps, **tile,
        )  # fmt: skip
    if merge is not None and not fused:
        launch_merge(o, merge)
    return o, *kept


def launch_whole(q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float) -> Tensor:
    """Launch the forward of sequences that one program takes (`is_whole`); arguments as of `launch_forward`.

    Returns:
        o (B, L, nh, V) of v's dtype; nothing is kept.
    """
    o = v.new_empty(v.shape)
    q, k, v, gates, _ = hopper.prepared(q, k, v, gates)
    hopper.launch_bigla_whole(q, k, v, gates, o, scale, precision(q.dtype)[1])
    return o


def walks(NT: int, B: int, H: int) -> bool:
    """Whether each program takes all NT chunks of a sequence, in one direction; Hopper's kernels never do."""
    return NT <= WALKED and 2 * B * H >= WALKERS


def states(
    x: Tensor, y: Tensor, gates: Gates, state: Tensor, total: Tensor, scale: float, cfg: Config, grad: bool,
    by_hopper: bool, **tile,
) -> None:  # fmt: skip
    """Launch what makes the states that enter each chunk, of x and y, or with `grad` their gradients.

    `tile` are constants of the kernels; `by_hopper`: those of `hopper` make the sums, for tensors that are `prepared`,
    and where there are `others` it stays at these.
    """
    B, L, H, K = x.shape
    V = y.shape[-1]
    NT = ceil_div(L, cfg.C)
    if by_hopper:
        hopper.launch_bigla_state(x, y, gates, state, total, scale, grad)
        if others(NT) > 0:
            return
    else:
        across = ceil_div(V, cfg.BV)
        strides = token_strides(x), token_strides(y), gates.strides()
        arguments = x, y, gates.pointers(), state, total, *strides, scale, L, NT, H
        tile |= dict(GRAD=grad, num_warps=cfg.state_warps)
        if walks(NT, B, H):
            walk_kernel[2 * B * H, across](*arguments, **tile)
            return
        state_kernel[2 * B * H * NT, across](*arguments, **tile)
    scan(state, total, B, NT, H, K, V, cfg, grad)


def scan(state: Tensor, total: Tensor, B: int, NT: int, H: int, K: int, V: int, cfg: Config, grad: bool) -> None:
    segment = cfg.scan_segment if 2 * cfg.scan_segment < NT else NT
    NS = ceil_div(NT, segment)
    elements = cfg.scan_block
    if 2 * NS * B * H * ceil_div(K * V, elements) >= MANY:
        elements *= 2
    COLS = min(elements, block(V))
    ROWS = min(elements // COLS, block(K))
    slices = ceil_div(K, ROWS) * ceil_div(V, COLS)
    part, part_total = (total.new_empty(B * H * 2 * NS * n) for n in (K * V, K))
    for store in (False, True) if NS > 1 else (True,):
        scan_kernel[slices * 2 * NS * B * H,](
            state, total, part, part_total, NT, NS, segment, H,
            K=K, V=V, ROWS=ROWS, COLS=COLS, AHEAD=cfg.scan_ahead, GRAD=grad, STORE=store, num_warps=1,
        )  # fmt: skip
