"""Backward kernels of BiGLA and their launcher; symbols as in `forward`.

With dS' and dR' the gradients of the states that leave a chunk, D = do v^T and D_f, D_b its parts i > j and i < j::

    dS = 2^Ft dS' + sum_i (s q_i 2^F_i) do_i^T            dR = 2^Bt dR' + sum_i (s q_i 2^(Bt-E_i)) do_i^T
    dqf = D_f kf + do (2^mf S)^T     dkf = D_f^T qf + v (2^mf dS')^T     qf = s q 2^(F-mf), kf = k 2^(mf-F), mf = Ft/2
    dqb = D_b kb + do (2^mb R)^T     dkb = D_b^T qb + v (2^mb dR')^T     qb = s q 2^(mb-E), kb = k 2^(E-mb), mb = Bt/2
    dq_i = s (2^(F-mf) dqf + 2^(mb-E) dqb)_i + 2 s D_ii k_i
    dk_i =   (2^(mf-F) dkf + 2^(E-mb) dkb)_i + 2 s D_ii q_i
    dv = A^T do + kf (2^mf dS') + kb (2^mb dR')
    d log a_f at t = sum_{u >= t} (qf dqf - kf dkf)_u + sum_V S' dS'
    d log a_b at t = sum_{u <= t} (qb dqb - kb dkb)_u + sum_V R' dR'

The sums of the last two lines end at the chunk, so that rounding does not grow with L, and use the operands as they
were rounded for the dots, so that terms which cancel do. A^T and D^T come from dots of their own: Triton 3.4 to 3.6
miscompiles a dot whose operand is a transposed result on Hopper (fla-org/flash-linear-attention#640).

1. `states` of the forward, other way round: dS' and dR' of every chunk, or what these are sums of.
2. `grad_kernel`: the five gradients, by one writer each; of long chunks `hopper.launch_bigla_grad`.
3. `exact_grad_kernel`: those of the hard chunks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import states
from .launch import KNOWN, begin, kernel
from .primitives import (
    INTERPRETED,
    SEARCHERS,
    SPAN,
    Gates,
    any_hard,
    block,
    ceil_div,
    config,
    dot,
    gate_grad,
    is_hard,
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
    running_sum,
    store_rows,
    tile_decay,
    token_strides,
    tree_factors,
    tree_merge,
    tree_pairs,
    tree_scores,
    tree_start,
)

if KNOWN and not INTERPRETED:  # as in `mlp`
    from . import hopper

MOST_REGISTERS = 255  # where the exact kernel asks for more, and is not told so, ptxas gives it 32


@triton.jit
def direction_grads(
    qs, ks, X, u, g, v_p, v_s, do_p, do_s, state, dstate, i, after, r, m,
    D: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE: tl.constexpr, LOGITS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What direction D contributes to dq / s and dk, and the gradient of its gates. `u` (BK) is 2^mf or 2^mb."""
    d = tl.zeros([C, C], tl.float32)
    dt = tl.zeros([C, C], tl.float32)
    x = tl.zeros([C, BK], tl.float32)
    y = tl.zeros([C, BK], tl.float32)
    w = tl.zeros([BK], tl.float32)
    for v0 in range(0, V, BV):
        v = operand(load_rows(v_p, v_s, r, m, V, BV, v0), PREC)
        do = operand(load_rows(do_p, do_s, r, m, V, BV, v0), PREC)
        d = dot(do, tl.trans(v), PREC, d)
        dt = dot(v, tl.trans(do), PREC, dt)
        if not ONE:
            S = load_state(state, i, D, K, V, BK, BV, v0)
            x = dot(do, tl.trans(operand(S, PREC)), PREC, x)
            dS = load_state(dstate, i, D, K, V, BK, BV, v0)
            y = dot(v, tl.trans(operand(dS, PREC)), PREC, y)
            # The state that leaves the chunk is the one that enters its neighbour. At the end nothing waits: dS' = 0.
            S = load_state(state, after, D, K, V, BK, BV, v0)
            w += tl.sum(S * dS, 1)
    x = x * u[None, :]
    y = y * u[None, :]
    # No decay lies on the diagonal: it goes to dq and dk, and its rounding stays out of the gates' gradients.
    if D == 0:
        sees = r[:, None] > r[None, :]
        seen = r[:, None] < r[None, :]
    else:
        sees = r[:, None] < r[None, :]
        seen = r[:, None] > r[None, :]
    ks_ = ks.to(tl.float32)
    x = dot(operand(tl.where(sees, d, 0.0), PREC), ks, PREC, x)
    y = dot(operand(tl.where(seen, dt, 0.0), PREC), qs, PREC, y)
    qs_ = qs.to(tl.float32)
    dg = running_sum(qs_ * x - ks_ * y, D == 0, PREC) + w[None, :]
    if D == 0:
        dii = 2 * tl.sum(tl.where(r[:, None] == r[None, :], d, 0.0), 1)[:, None]
        x += dii * ks_
        y += dii * qs_
    return tl.exp2(X) * x, tl.exp2(-X) * y, gate_grad(dg, g, LOGITS)


@kernel(do_not_specialize=('L', 'NT', 'N'), wgmma=False)
def grad_kernel(
    q, k, v, gates, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb,
    q_s, k_s, v_s, gates_s, do_s, dk_s, dv_s, dg_s, scale, L, NT, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
    WALK: tl.constexpr,
):  # fmt: skip
    """The five gradients of WALK neighbouring chunks, one after the other; those of hard chunks are not stored."""
    begin(False)
    r = tl.arange(0, C)
    b, c0, h = locate(tl.program_id(0), (NT + WALK - 1) // WALK, H)
    for j in tl.range(0, WALK, num_stages=2):
        c = c0 * WALK + j
        left = c * C
        m = left + r < L
        i = tl.minimum((b * NT + c) * H + h, N - 1)
        f = load_gates(gates, gates_s, b, left, h, 0, H, r, m, K, BK, RANK, BR, PREC)
        e = load_gates(gates, gates_s, b, left, h, 1, H, r, m, K, BK, RANK, BR, PREC)
        F = tile_decay(f, m, LOGITS)
        E = tile_decay(e, m, LOGITS)
        f, e = f.to(gates[0].dtype.element_ty), e.to(gates[1].dtype.element_ty)  # kept in half the registers
        if ONE:
            mf = tl.sum(F, 0) / 2
            mb = tl.sum(E, 0) / 2
        else:
            mf = load_total(total, i, 0, K, BK) / 2
            mb = load_total(total, i, 1, K, BK) / 2
        F = tl.cumsum(F, 0) - mf[None, :]
        E = mb[None, :] + E - tl.cumsum(E, 0)
        q_ = load_rows(row(q, q_s, b, left, h), q_s[1], r, m, K, BK).to(tl.float32) * scale
        k_ = load_rows(row(k, k_s, b, left, h), k_s[1], r, m, K, BK).to(tl.float32)
        qf, kf = operand(q_ * tl.exp2(F), PREC), operand(k_ * tl.exp2(-F), PREC)
        qb, kb = operand(q_ * tl.exp2(E), PREC), operand(k_ * tl.exp2(-E), PREC)
        uf, ub = tl.exp2(mf), tl.exp2(mb)
        # Selected, not multiplied by a mask: the other half may be inf. The diagonal is in both.
        at = tl.where(r[:, None] <= r[None, :], dot(kf, tl.trans(qf), PREC), 0.0)
        at += tl.where(r[:, None] >= r[None, :], dot(kb, tl.trans(qb), PREC), 0.0)
        at = operand(at, PREC)
        soft = m & (tl.load(hard + i) == 0)
        v_p, do_p = row(v, v_s, b, left, h), row(do, do_s, b, left, h)
        # Keys as they meet the states, which stay as they are: these are wider.
        sf = operand(k_ * tl.exp2(mf[None, :] - F), PREC)
        sb = operand(k_ * tl.exp2(mb[None, :] - E), PREC)
        for v0 in range(0, V, BV):
            dv_ = dot(at, operand(load_rows(do_p, do_s[1], r, m, V, BV, v0), PREC), PREC)
            if not ONE:
                dv_ = dot(sf, operand(load_state(dstate, i, 0, K, V, BK, BV, v0), PREC), PREC, dv_)
                dv_ = dot(sb, operand(load_state(dstate, i, 1, K, V, BK, BV, v0), PREC), PREC, dv_)
            store_rows(row(dv, dv_s, b, left, h), dv_s[1], dv_, r, soft, V, BV, v0)
        dqf, dkf, df = direction_grads(
            qf, kf, F, uf, f, v_p, v_s[1], do_p, do_s[1], state, dstate, i, tl.where(c + 1 < NT, i + H, i), r, m,
            0, K, V, C, BK, BV, ONE, LOGITS, PREC,
        )  # fmt: skip
        store_rows(row(dgf, dg_s, b, left, h), dg_s[1], df, r, soft, K, BK)
        dqb, dkb, db = direction_grads(
            qb, kb, E, ub, e, v_p, v_s[1], do_p, do_s[1], state, dstate, i, tl.where(c > 0, i - H, i), r, m,
            1, K, V, C, BK, BV, ONE, LOGITS, PREC,
        )  # fmt: skip
        store_rows(row(dgb, dg_s, b, left, h), dg_s[1], db, r, soft, K, BK)
        store_rows(row(dq, dk_s, b, left, h), dk_s[1], (dqf + dqb) * scale, r, soft, K, BK)
        store_rows(row(dk, dk_s, b, left, h), dk_s[1], dkf + dkb, r, soft, K, BK)


@triton.jit
def load_entering(
    state, total, i, c, NT, H, v0,
    D: tl.constexpr, GRAD: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Columns v0.. of the state of direction D that enters chunk c of NT, the i-th of all, or with GRAD its gradient.

    Where `state` has SUMS, of what each chunk adds to it.
    """
    if not SUMS:
        return load_state(state, i, D, K, V, BK, BV, v0)
    else:
        RIGHT: tl.constexpr = (D == 0) != GRAD  # it comes from the left
        step = H if RIGHT else -H
        at = i - (c if RIGHT else NT - 1 - c) * step
        X = tl.zeros([BK, BV], tl.float32)
        while at != i:
            X = tl.exp2(load_total(total, at, D, K, BK))[:, None] * X + load_state(state, at, D, K, V, BK, BV, v0)
            at += step
        return X.to(state.dtype.element_ty).to(tl.float32)


@kernel(do_not_specialize=('L', 'NT', 'N'), wgmma=False)
def exact_grad_kernel(
    q, k, v, gates, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb,
    q_s, k_s, v_s, gates_s, do_s, dk_s, dv_s, dg_s, scale, L, NT, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE: tl.constexpr, LOGITS: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
    SUMS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The five gradients of the hard chunks, found as in `exact_out_kernel`; or of ALL.

    A query refers to the chunk's near end and a key to its far end, so the states enter unscaled; within the chunk each
    level of the tree has references of its own, and its terms go to the direction that its halves look in. The
    diagonal, on which no decay lies, goes to dq and dk alone.
    """
    begin(False)
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
                    q_ = load_rows(row(q, q_s, b, left, h), q_s[1], r, m, K, BK).to(tl.float32) * scale
                    k_ = load_rows(row(k, k_s, b, left, h), k_s[1], r, m, K, BK).to(tl.float32)
                    f = tile_decay(load_gates(gates, gates_s, b, left, h, 0, H, r, m, K, BK, RANK, BR, PREC), m, LOGITS)
                    e = tile_decay(load_gates(gates, gates_s, b, left, h, 1, H, r, m, K, BK, RANK, BR, PREC), m, LOGITS)
                    at, pf, sf, sb, pb = tree_scores(q_, k_, f, e, r, C, PREC, True)
                    at = operand(at, PREC)
                    d = tl.zeros([C, C], tl.float32)
                    dt = tl.zeros([C, C], tl.float32)
                    dq_ = tl.zeros([C, BK], tl.float32)
                    dk_ = tl.zeros([C, BK], tl.float32)
                    df = tl.zeros([C, BK], tl.float32)
                    db = tl.zeros([C, BK], tl.float32)
                    wf = tl.zeros([BK], tl.float32)
                    wb = tl.zeros([BK], tl.float32)
                    for v0 in range(0, V, BV):
                        v_ = operand(load_rows(row(v, v_s, b, left, h), v_s[1], r, m, V, BV, v0), PREC)
                        do_ = operand(load_rows(row(do, do_s, b, left, h), do_s[1], r, m, V, BV, v0), PREC)
                        dv_ = dot(at, do_, PREC)
                        d += dot(do_, tl.trans(v_), PREC)
                        dt += dot(v_, tl.trans(do_), PREC)
                        if not ONE:
                            for D in tl.static_range(2):
                                S = load_entering(state, total, i, c, NT, H, v0, D, False, K, V, BK, BV, SUMS)
                                dS = load_entering(dstate, total, i, c, NT, H, v0, D, True, K, V, BK, BV, SUMS)
                                uq = tl.exp2(pf if D == 0 else sb)
                                uk = tl.exp2(sf if D == 0 else pb)
                                x, y = operand(q_ * uq, PREC), operand(k_ * uk, PREC)
                                dv_ += dot(y, operand(dS, PREC), PREC)
                                dx = dot(do_, tl.trans(operand(S, PREC)), PREC)
                                dy = dot(v_, tl.trans(operand(dS, PREC)), PREC)
                                dq_ += uq * dx
                                dk_ += uk * dy
                                dx = x.to(tl.float32) * dx
                                dy = y.to(tl.float32) * dy
                                # sum_V S' dS', with S' = 2^total S + sum_u (k_u 2^..) v_u^T
                                w = tl.exp2(tl.sum(f if D == 0 else e, 0)) * tl.sum(S * dS, 1) + tl.sum(dy, 0)
                                if D == 0:
                                    df += dx - dy
                                    wf += w
                                else:
                                    db += dx - dy
                                    wb += w
                        store_rows(row(dv, dv_s, b, left, h), dv_s[1], dv_, r, m, V, BV, v0)
                    dii = 2 * tl.sum(tl.where(r[:, None] == r[None, :], d, 0.0), 1)[:, None]
                    dq_ += dii * k_
                    dk_ += dii * q_
                    pf, sf, sb, pb, tf, tb = tree_start(f, e)
                    for level in range(tl.constexpr(C.bit_length() - 1)):
                        s = 1 << level
                        uq, uk = tree_factors(pf, sf, sb, pb, r, s)
                        x, y = operand(q_ * uq, PREC), operand(k_ * uk, PREC)
                        pairs = tree_pairs(r, s)
                        dx = dot(operand(tl.where(pairs, d, 0.0), PREC), y, PREC)
                        dy = dot(operand(tl.where(pairs, dt, 0.0), PREC), x, PREC)
                        dq_ += uq * dx
                        dk_ += uk * dy
                        dx = x.to(tl.float32) * dx
                        dy = y.to(tl.float32) * dy
                        second = (r & s != 0)[:, None]
                        df += tl.where(second, dx, -dy)
                        db += tl.where(second, -dy, dx)
                        pf, sf, sb, pb, tf, tb = tree_merge(pf, sf, sb, pb, tf, tb, r, s)
                    df = tl.cumsum(df, 0, reverse=True) + wf[None, :]
                    db = tl.cumsum(db, 0) + wb[None, :]
                    f = load_gates(gates, gates_s, b, left, h, 0, H, r, m, K, BK, RANK, BR, PREC)
                    e = load_gates(gates, gates_s, b, left, h, 1, H, r, m, K, BK, RANK, BR, PREC)
                    store_rows(row(dgf, dg_s, b, left, h), dg_s[1], gate_grad(df, f, LOGITS), r, m, K, BK)
                    store_rows(row(dgb, dg_s, b, left, h), dg_s[1], gate_grad(db, e, LOGITS), r, m, K, BK)
                    store_rows(row(dq, dk_s, b, left, h), dk_s[1], dq_ * scale, r, m, K, BK)
                    store_rows(row(dk, dk_s, b, left, h), dk_s[1], dk_, r, m, K, BK)
        i0 += SPAN * G


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor, total: Tensor, hard: Tensor,
    scale: float, C: int, one: bool, into: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """Launch the backward.

    Args:
        do: Gradient of o (B, L, nh, V), any strides.
        q, k, v, gates, scale, C, one: What `launch_forward` got.
        state, total, hard: What it returned besides o.
        into: Where the five gradients go: tensors of the inputs' shapes and dtypes, dense in the last dimension; the
            first two have the same strides, and the last two. Those of gates in low-rank form are the logits'.

    Returns:
        Gradients of q, k, v and both gates: `into`, or new tensors.
    """
    B, L, H, K = q.shape
    V = v.shape[-1]
    C, by_hopper = longer_chunk(C, q, v, gates, True)
    NT = ceil_div(L, C)
    N = B * NT * H
    if into is None:
        into = [x.new_empty(x.shape) for x in (q, k, v, gates.fwd, gates.bwd)]
    dq, dk, dv, dgf, dgb = into
    if N == 0:
        return into
    cfg = config(C, K, V, q.dtype)
    prec, limit = precision(q.dtype)
    if by_hopper:
        q, k, v, gates, _ = hopper.prepared(q, k, v, gates)
        do = hopper.copyable(do)
    else:
        q, k, v, do, gates = (*(rows(x, C) for x in (q, k, v, do)), gates.prepared(C))
    g, g_s = gates.pointers(), gates.strides()
    q_s, k_s, v_s, do_s, dk_s, dv_s, dg_s = (token_strides(x) for x in (q, k, v, do, dk, dv, dgf))
    tile = dict(K=K, V=V, C=C, BK=block(K), BV=cfg.BV, PREC=prec, num_stages=1, **gates.options())
    dstate = state
    if not one:
        dstate = torch.empty_like(state)
        states(q, do, gates, dstate, total, scale / 2, cfg, True, by_hopper, **tile)
    strides = q_s, k_s, v_s, g_s, do_s, dk_s, dv_s, dg_s
    if by_hopper:
        hopper.launch_bigla_grad(do, q, k, v, gates, state, dstate, total, hard, scale, into)
    elif limit is not None:
        walk = min(cfg.grad_walk, NT)
        grad_kernel[B * ceil_div(NT, walk) * H,](
            q, k, v, g, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb, *strides,
            scale / 2, L, NT, H, N, ONE=one, WALK=walk, num_warps=cfg.grad_warps, **tile,
        )  # fmt: skip
    exact_grad_kernel[min(N, SEARCHERS // cfg.exact_grad_warps),](
        q, k, v, g, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb, *strides, scale / 2, L, NT, H, N,
        ONE=one, SUMS=by_hopper and others(NT) > 0, ALL=limit is None,
        num_warps=cfg.exact_grad_warps, maxnreg=MOST_REGISTERS, **tile,
    )  # fmt: skip
    return into
