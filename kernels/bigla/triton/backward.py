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

1. `state_kernel` and `scan_kernel` of the forward, other way round: dS' and dR' of every chunk.
2. `grad_kernel`: the five gradients, by one writer each.  3. `exact_grad_kernel`: those of the hard chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import scan, state_kernel, token_strides
from .primitives import (
    SEARCHERS,
    SPAN,
    any_hard,
    block,
    ceil_div,
    config,
    dot,
    gate_grad,
    is_hard,
    load_rows,
    load_state,
    load_total,
    locate,
    operand,
    precision,
    row,
    rows,
    store_rows,
    tile_decay,
    tree_factors,
    tree_merge,
    tree_pairs,
    tree_scores,
    tree_start,
)


@triton.jit
def store_dv(
    at, kf, kb, uf, ub, dstate, do_p, do_s, dv_p, dv_s, i, r, m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ONE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dv of a chunk. `uf`, `ub` (BK) scale the states to what the keys refer to."""
    for v0 in range(0, V, BV):
        do = operand(load_rows(do_p, do_s[1], r, m, V, BV, v0), PREC)
        dv = dot(at, do, PREC)
        if not ONE:
            dv += dot(kf, operand(load_state(dstate, i, 0, K, V, BK, BV, v0) * uf[:, None], PREC), PREC)
            dv += dot(kb, operand(load_state(dstate, i, 1, K, V, BK, BV, v0) * ub[:, None], PREC), PREC)
        store_rows(dv_p, dv_s[1], dv, r, m, V, BV, v0)


@triton.jit
def sums_over_values(
    u, state, dstate, v_p, v_s, do_p, do_s, i, c, NT, H, r, m, DIR: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sums over V for one direction, of which the state is `u` times the stored one.

    D and D^T (C, C), do S^T and v dS'^T (C, BK), and S' dS' (BK).
    """
    d = tl.zeros([C, C], tl.float32)
    dt = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    w = tl.zeros([BK], tl.float32)
    for v0 in range(0, V, BV):
        v = operand(load_rows(v_p, v_s[1], r, m, V, BV, v0), PREC)
        do = operand(load_rows(do_p, do_s[1], r, m, V, BV, v0), PREC)
        d += dot(do, tl.trans(v), PREC)
        dt += dot(v, tl.trans(do), PREC)
        if not ONE:
            S = load_state(state, i, DIR, K, V, BK, BV, v0)
            dq += dot(do, tl.trans(operand(S * u[:, None], PREC)), PREC)
            dS = load_state(dstate, i, DIR, K, V, BK, BV, v0)
            dk += dot(v, tl.trans(operand(dS * u[:, None], PREC)), PREC)
            # The state that leaves the chunk is the one that enters its neighbour. At the end nothing waits: dS' = 0.
            if DIR == 0:
                S = load_state(state, tl.where(c + 1 < NT, i + H, i), 0, K, V, BK, BV, v0)
            else:
                S = load_state(state, tl.where(c > 0, i - H, i), 1, K, V, BK, BV, v0)
            w += tl.sum(S * dS, 1)
    return d, dt, dq, dk, w


@triton.jit(do_not_specialize=['L', 'NT', 'N'])
def grad_kernel(
    q, k, v, gf, gb, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb,
    q_s, k_s, v_s, gf_s, gb_s, do_s, dk_s, dv_s, scale, L, NT, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE: tl.constexpr, LOGITS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The five gradients of one chunk that is not hard."""
    i = N - 1 - tl.program_id(0)
    b, c, h = locate(i, NT, H)
    left = c * C
    r = tl.arange(0, C)
    m = left + r < L
    if tl.load(hard + i) == 0:
        q_ = load_rows(row(q, q_s, b, left, h), q_s[1], r, m, K, BK).to(tl.float32) * scale
        k_ = load_rows(row(k, k_s, b, left, h), k_s[1], r, m, K, BK).to(tl.float32)
        f = tile_decay(load_rows(row(gf, gf_s, b, left, h), gf_s[1], r, m, K, BK), m, LOGITS, PREC)
        e = tile_decay(load_rows(row(gb, gb_s, b, left, h), gb_s[1], r, m, K, BK), m, LOGITS, PREC)
        if ONE:
            mf = tl.sum(f, 0) / 2
            mb = tl.sum(e, 0) / 2
        else:
            mf = load_total(total, i, 0, K, BK) / 2
            mb = load_total(total, i, 1, K, BK) / 2
        F = tl.cumsum(f, 0) - mf[None, :]
        E = tl.cumsum(e, 0) - e - mb[None, :]
        qf = operand(q_ * tl.exp2(F), PREC)
        kf = operand(k_ * tl.exp2(-F), PREC)
        qb = operand(q_ * tl.exp2(-E), PREC)
        kb = operand(k_ * tl.exp2(E), PREC)
        at = tl.where(r[:, None] <= r[None, :], dot(kf, tl.trans(qf), PREC), 0.0)
        at += tl.where(r[:, None] >= r[None, :], dot(kb, tl.trans(qb), PREC), 0.0)
        uf, ub = tl.exp2(mf), tl.exp2(mb)
        v_p, do_p = row(v, v_s, b, left, h), row(do, do_s, b, left, h)
        dv_p = row(dv, dv_s, b, left, h)
        store_dv(
            operand(at, PREC), kf, kb, uf, ub, dstate, do_p, do_s, dv_p, dv_s, i, r, m, K, V, BK, BV, ONE, PREC
        )  # fmt: skip

        # No decay lies on the diagonal: it goes to dq and dk, and its rounding stays out of the gates' gradients.
        lower = r[:, None] > r[None, :]
        upper = r[:, None] < r[None, :]
        d, dt, dqf, dkf, w = sums_over_values(
            uf, state, dstate, v_p, v_s, do_p, do_s, i, c, NT, H, r, m, 0, K, V, C, BK, BV, ONE, PREC
        )
        dqf += dot(operand(tl.where(lower, d, 0.0), PREC), kf, PREC)
        dkf += dot(operand(tl.where(upper, dt, 0.0), PREC), qf, PREC)
        dg = tl.cumsum(qf.to(tl.float32) * dqf - kf.to(tl.float32) * dkf, 0, reverse=True) + w[None, :]
        g = load_rows(row(gf, gf_s, b, left, h), gf_s[1], r, m, K, BK)
        store_rows(row(dgf, dk_s, b, left, h), dk_s[1], gate_grad(dg, g, LOGITS), r, m, K, BK)
        dii = 2 * tl.sum(tl.where(r[:, None] == r[None, :], d, 0.0), 1)[:, None]
        dq_ = tl.exp2(F) * (dqf + dii * kf.to(tl.float32))
        dk_ = tl.exp2(-F) * (dkf + dii * qf.to(tl.float32))

        d, dt, dqb, dkb, w = sums_over_values(
            ub, state, dstate, v_p, v_s, do_p, do_s, i, c, NT, H, r, m, 1, K, V, C, BK, BV, ONE, PREC
        )
        dqb += dot(operand(tl.where(upper, d, 0.0), PREC), kb, PREC)
        dkb += dot(operand(tl.where(lower, dt, 0.0), PREC), qb, PREC)
        dg = tl.cumsum(qb.to(tl.float32) * dqb - kb.to(tl.float32) * dkb, 0) + w[None, :]
        g = load_rows(row(gb, gb_s, b, left, h), gb_s[1], r, m, K, BK)
        store_rows(row(dgb, dk_s, b, left, h), dk_s[1], gate_grad(dg, g, LOGITS), r, m, K, BK)
        store_rows(row(dq, dk_s, b, left, h), dk_s[1], (dq_ + tl.exp2(-E) * dqb) * scale, r, m, K, BK)
        store_rows(row(dk, dk_s, b, left, h), dk_s[1], dk_ + tl.exp2(E) * dkb, r, m, K, BK)


@triton.jit(do_not_specialize=['L', 'NT', 'N'])
def exact_grad_kernel(
    q, k, v, gf, gb, do, state, dstate, hard, dq, dk, dv, dgf, dgb,
    q_s, k_s, v_s, gf_s, gb_s, do_s, dk_s, dv_s, scale, L, NT, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ALL: tl.constexpr, ONE: tl.constexpr, LOGITS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The five gradients of the hard chunks, found as in `exact_out_kernel`; or of ALL.

    A query refers to the chunk's near end and a key to its far end, so the states enter unscaled; within the chunk each
    level of the tree has references of its own, and its terms go to the direction that its halves look in.
    """
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
                    f = tile_decay(load_rows(row(gf, gf_s, b, left, h), gf_s[1], r, m, K, BK), m, LOGITS, PREC)
                    e = tile_decay(load_rows(row(gb, gb_s, b, left, h), gb_s[1], r, m, K, BK), m, LOGITS, PREC)
                    at, pf, sf, sb, pb = tree_scores(q_, k_, f, e, r, C, PREC, True)
                    qf = operand(q_ * tl.exp2(pf), PREC)
                    kf = operand(k_ * tl.exp2(sf), PREC)
                    qb = operand(q_ * tl.exp2(sb), PREC)
                    kb = operand(k_ * tl.exp2(pb), PREC)
                    one = tl.full([BK], 1.0, tl.float32)
                    v_p, do_p = row(v, v_s, b, left, h), row(do, do_s, b, left, h)
                    dv_p = row(dv, dv_s, b, left, h)
                    store_dv(
                        operand(at, PREC), kf, kb, one, one, dstate, do_p, do_s, dv_p, dv_s, i, r, m,
                        K, V, BK, BV, ONE, PREC,
                    )  # fmt: skip
                    d, dt, dx, dy, wf = sums_over_values(
                        one, state, dstate, v_p, v_s, do_p, do_s, i, c, NT, H, r, m, 0, K, V, C, BK, BV, ONE, PREC
                    )
                    df = qf.to(tl.float32) * dx - kf.to(tl.float32) * dy
                    dq_ = tl.exp2(pf) * dx
                    dk_ = tl.exp2(sf) * dy
                    d, dt, dx, dy, wb = sums_over_values(
                        one, state, dstate, v_p, v_s, do_p, do_s, i, c, NT, H, r, m, 1, K, V, C, BK, BV, ONE, PREC
                    )
                    db = qb.to(tl.float32) * dx - kb.to(tl.float32) * dy
                    dq_ += tl.exp2(sb) * dx
                    dk_ += tl.exp2(pb) * dy
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
                    f = load_rows(row(gf, gf_s, b, left, h), gf_s[1], r, m, K, BK)
                    e = load_rows(row(gb, gb_s, b, left, h), gb_s[1], r, m, K, BK)
                    store_rows(row(dgf, dk_s, b, left, h), dk_s[1], gate_grad(df, f, LOGITS), r, m, K, BK)
                    store_rows(row(dgb, dk_s, b, left, h), dk_s[1], gate_grad(db, e, LOGITS), r, m, K, BK)
                    store_rows(row(dq, dk_s, b, left, h), dk_s[1], dq_ * scale, r, m, K, BK)
                    store_rows(row(dk, dk_s, b, left, h), dk_s[1], dk_, r, m, K, BK)
        i0 += SPAN * G


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor,
    state: Tensor, total: Tensor, hard: Tensor, scale: float, gate_logits: bool, C: int, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward.

    Args:
        do: Gradient of o (B, L, nh, V), any strides.
        q, k, v, g_fwd, g_bwd, scale, gate_logits, C, one: What `launch_forward` got.
        state, total, hard: What it returned besides o.

    Returns:
        Gradients of q, k, v, g_fwd and g_bwd, each contiguous and of its input's dtype.
    """
    B, L, H, K = q.shape
    V = v.shape[-1]
    NT = ceil_div(L, C)
    N = B * NT * H
    dq, dk, dgf, dgb = (x.new_empty(B, L, H, K) for x in (q, k, g_fwd, g_bwd))
    dv = v.new_empty(B, L, H, V)
    if N == 0:
        return dq, dk, dv, dgf, dgb
    cfg = config(C, K, V, q.dtype)
    prec, limit = precision(q.dtype)
    q, k, v, gf, gb, do = (rows(x, C) for x in (q, k, v, g_fwd, g_bwd, do))
    q_s, k_s, v_s, gf_s, gb_s, do_s, dk_s, dv_s = (token_strides(x) for x in (q, k, v, gf, gb, do, dk, dv))
    tile = dict(K=K, V=V, C=C, BK=block(K), BV=cfg.BV, LOGITS=gate_logits, PREC=prec)
    dstate = state
    if not one:
        dstate = torch.empty_like(state)
        state_kernel[2 * N, ceil_div(V, cfg.BV)](
            q, do, gf, gb, dstate, total, q_s, do_s, gf_s, gb_s, scale / 2, L, NT, H,
            GRAD=True, num_warps=cfg.state_warps, num_stages=1, **tile,
        )  # fmt: skip
        scan(dstate, total, B, NT, H, K, V, cfg, True)
    strides = q_s, k_s, v_s, gf_s, gb_s, do_s, dk_s, dv_s
    launch = dict(ONE=one, num_warps=cfg.grad_warps, num_stages=1)
    if limit is not None:
        grad_kernel[N,](
            q, k, v, gf, gb, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb, *strides, scale / 2, L, NT, H, N,
            **launch, **tile,
        )  # fmt: skip
    exact_grad_kernel[min(N, SEARCHERS),](
        q, k, v, gf, gb, do, state, dstate, hard, dq, dk, dv, dgf, dgb, *strides, scale / 2, L, NT, H, N,
        ALL=limit is None, **launch, **tile,
    )  # fmt: skip
    return dq, dk, dv, dgf, dgb
