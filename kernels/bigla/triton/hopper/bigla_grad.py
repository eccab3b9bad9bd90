"""The gradients of BiGLA on Hopper, in Gluon: chunks of 64 tokens, as many as its products have rows.

Formulas and symbols are those of `..backward`. A program sends for all that a chunk needs at once, and works on both
directions together. The diagonal, on which no decay lies, is in both. What it adds to a query's side of the gates'
gradients and to a key's are made of the same rounded numbers, and their difference is float32's rounding.
"""

from collections.abc import Sequence

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..primitives import Gates, ceil_div, gate_grad, locate, others, row, token_strides
from .chunks import (
    HALF,
    TOKENS,
    added_up,
    allocate,
    allocate_row,
    allocate_tiles,
    as_tile,
    copy,
    copy_gates,
    copy_narrow,
    diagonal_scores,
    gates_of,
    half_total,
    left_factor,
    meet,
    product,
    put_decays,
    put_in_parts,
    put_weight,
    selected,
    state_at,
    state_pointers,
    store,
    store_tile,
    sums_of_both,
    total_pointers,
    wait,
)

REGISTERS = {16: 128, 32: 255}  # of a thread, by K: four programs run on a multiprocessor, with V = 2 K, or two


@gluon.jit
def carried(state, dstate, i, after, to, D: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    """sum_V S' dS' of a direction, whose state leaves the chunk and enters `after`.  (K)"""
    # At the end of the sequence there is none, and no gradient: dS' = 0.
    S = gl.load(state_pointers(state, after, D, K, V)).to(gl.float32)
    dS = gl.load(state_pointers(dstate, i, D, K, V)).to(gl.float32)
    to[D].store(gl.sum(S * dS, 1))


@gluon.jit
def put_added_up(
    state, dstate, total, i, c, NT, H, tiles, to,
    D: gl.constexpr, OTHERS: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """The state of a direction and its gradient, `added_up`, to their tiles, and what `carried` makes of both."""
    S = added_up(state, total, i, c, NT, H, D, False, OTHERS, K, V)
    dS = added_up(dstate, total, i, c, NT, H, D, True, OTHERS, K, V).to(HALF)
    decay = gl.exp2(gl.load(total_pointers(total, i, D, K, V)))[:, None]
    leaves = decay * S + gl.load(state_pointers(state, i, D, K, V)).to(gl.float32)
    to[D].store(gl.sum(leaves * dS.to(gl.float32), 1))
    tiles[D].store(S.to(HALF))
    tiles[2 + D].store(dS)


@gluon.jit
def put_factors(q, k, X, u, tiles, V: gl.constexpr):
    """q 2^X and k 2^-X to two tiles.

    Returns:
        k 2^-X, and k as it meets the states, wider than these, as a left factor.
    """
    tiles[0].store((q * gl.exp2(X)).to(HALF))
    k = k * gl.exp2(-X)
    tiles[1].store(k.to(HALF))
    return k, left_factor(k * u, product(V))


@gluon.jit
def put_gate_terms(tiles, x, y, to):
    """What tokens add to the gradients of the gates, of factors as they were rounded, so that terms that cancel do."""
    KEYS: gl.constexpr = x.type.layout
    put_in_parts(tiles[0].load(KEYS).to(gl.float32) * x - tiles[1].load(KEYS).to(gl.float32) * y, to)


@kernel(do_not_specialize=('L', 'NT'), jit=gluon.jit)
def bigla_grad_kernel(
    q, k, v, gates, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb,
    q_s, k_s, v_s, gates_s, do_s, dk_s, dv_s, dg_s, scale, L, NT, H,
    K: gl.constexpr, V: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr, OTHERS: gl.constexpr,
):  # fmt: skip
    """The five gradients of one chunk; those of a hard one are not stored. dq has dk's strides, and dgf dgb's."""
    KEYS: gl.constexpr = product(K)
    SCORES: gl.constexpr = product(TOKENS)
    narrow = allocate_tiles(TOKENS, K, 2)  # q, k
    # q and k times powers of 2, of both directions; then dq and dk, and the gradients of the gates.
    ahead, back = allocate_tiles(TOKENS, K, 2), allocate_tiles(TOKENS, K, 2)
    values = allocate_tiles(TOKENS, V, 2)  # v, do
    v_, do_ = values[0], values[1]
    # Parts of what the gates' gradients sum up, where v and do have been. Those of another width are not put there:
    # ptxas 12.8 made their descriptors of a register that it never set.
    terms = values if V == 2 * K else allocate_tiles(TOKENS, 2 * K, 2)
    states = allocate_tiles(K, V, 4)  # S, R, dS', dR'
    S, R, dS, dR = states[0], states[1], states[2], states[3]
    w = allocate_row(K), allocate_row(K)  # sum_V S' dS', R' dR'
    # The low-rank decay of both directions, and its weight; with a RANK alone. Where it has the width of keys, it is
    # in their place, and for its own gradients copied once more: four programs have room, and not with two tiles more.
    low = ahead if RANK == K else allocate_tiles(TOKENS, RANK, 2) if RANK > 0 else None
    # Gates as they are take this way beside states that are added up, whose loads they would wait for otherwise.
    copied = low if RANK > 0 else ahead if OTHERS > 0 else None
    weight = allocate_tiles(K, RANK if RANK > 0 else 16, 2)
    scores = allocate_tiles(TOKENS, TOKENS, 2)  # D of both directions, where the parts of f and b have been
    parts = as_tile(scores[0], 2 * K), as_tile(scores[1], 2 * K)
    out = allocate(TOKENS, V)  # dv
    begin(False)
    index = gl.program_id(0)
    b, c, h = locate(index, NT, H)
    left = c * TOKENS
    count = gl.minimum(L - left, TOKENS)
    stored = gl.where(gl.load(hard + index) == 0, count, 0)
    copy_narrow(q, k, gates, q_s, k_s, gates_s, narrow, copied, b, left, h, count, K, RANK)
    copy(v_, row(v, v_s, b, left, h), v_s[1], count, V)
    copy(do_, row(do, do_s, b, left, h), do_s[1], count, V)
    if OTHERS == 0:
        for D in gl.static_range(2):
            copy(states[D], state_at(state, index, D, K, V), V, K, V)
            copy(states[2 + D], state_at(dstate, index, D, K, V), V, K, V)
    async_copy.commit_group()
    if OTHERS > 0:
        for D in gl.static_range(2):
            put_added_up(state, dstate, total, index, c, NT, H, states, w, D, OTHERS, K, V)
    if RANK > 0:
        put_weight(gates, h, H, weight, K, RANK)
    if copied is not None:
        wait(1)
        meet()
    f, e = put_decays(gates, gates_s, copied, weight, b, left, h, H, count, parts, K, LOGITS, RANK)
    half_f, half_b = half_total(total, index, 0, K, KEYS), half_total(total, index, 1, K, KEYS)
    if OTHERS == 0:
        carried(state, dstate, index, gl.where(c + 1 < NT, index + H, index), w, 0, K, V)
        carried(state, dstate, index, gl.where(c > 0, index - H, index), w, 1, K, V)
    wait(1)
    meet()
    X, Y = sums_of_both(parts, False, False)
    # Of a query's 2^X and 2^Y, a key's having -X and -Y.
    X, Y = X - half_f, half_b + e - Y
    uf, ub = gl.exp2(half_f), gl.exp2(half_b)
    q_, k_ = narrow[0].load(KEYS).to(gl.float32) * scale, narrow[1].load(KEYS).to(gl.float32)
    kf, sf = put_factors(q_, k_, X, uf, ahead, V)
    kb, sb = put_factors(q_, k_, Y, ub, back, V)
    wait(0)
    meet()

    if RANK == K:
        low = narrow
        copy_gates(low, gates, gates_s, b, left, h, count, K, RANK)
        async_copy.commit_group()
    a = diagonal_scores(kb, kf, (back[0], ahead[0]), V)  # A^T
    dv_ = gl.zeros([TOKENS, V], gl.float32, product(V))
    dv_ = warpgroup_mma(a, do_, dv_, use_acc=False, is_async=True)
    dv_ = warpgroup_mma(sf, dS, dv_, is_async=True)
    dv_ = warpgroup_mma(sb, dR, dv_, is_async=True)
    dv_, a, sf, sb = warpgroup_mma_wait(0, (dv_, a, sf, sb))
    out.store(dv_.to(HALF))

    zero = gl.zeros([TOKENS, K], gl.float32, KEYS)
    d = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    d = warpgroup_mma(do_, v_.permute((1, 0)), d, use_acc=False, is_async=True)
    xf = warpgroup_mma(do_, S.permute((1, 0)), zero, use_acc=False, is_async=True)
    xb = warpgroup_mma(do_, R.permute((1, 0)), zero, use_acc=False, is_async=True)
    yf = warpgroup_mma(v_, dS.permute((1, 0)), zero, use_acc=False, is_async=True)
    yb = warpgroup_mma(v_, dR.permute((1, 0)), zero, use_acc=False, is_async=True)
    d, xf, xb, yf, yb = warpgroup_mma_wait(0, (d, xf, xb, yf, yb))
    df, db = selected(left_factor(d, KEYS), False), selected(left_factor(d, KEYS), True)
    scores[0].store(df)
    scores[1].store(db)
    xf = warpgroup_mma(df, ahead[1], xf * uf, is_async=True)
    xb = warpgroup_mma(db, back[1], xb * ub, is_async=True)
    meet()
    yf = warpgroup_mma(scores[0].permute((1, 0)), ahead[0], yf * uf, is_async=True)
    yb = warpgroup_mma(scores[1].permute((1, 0)), back[0], yb * ub, is_async=True)
    store_tile(row(dv, dv_s, b, left, h), dv_s[1], out, stored)
    xf, xb, yf, yb, df, db = warpgroup_mma_wait(0, (xf, xb, yf, yb, df, db))

    put_gate_terms(ahead, xf, yf, terms[0])
    put_gate_terms(back, xb, yb, terms[1])
    never = scale * 0.0  # a zero that no compiler knows: it would keep powers of 2 from above until here, and spill
    X += never
    Y += never
    x = (gl.exp2(X) * xf + gl.exp2(Y) * xb) * scale
    y = gl.exp2(-X) * yf + gl.exp2(-Y) * yb
    wait(0)
    meet()
    gf, gb = sums_of_both(terms, True, False)
    ahead[0].store(x.to(HALF))
    ahead[1].store(y.to(HALF))
    gf += w[0].load(gl.SliceLayout(0, KEYS))[None, :]
    gb += w[1].load(gl.SliceLayout(0, KEYS))[None, :]
    if LOGITS:
        gf = gate_grad(gf, gates_of(gates, gates_s, low, weight, b, left, h, H, count, 0, K, K, RANK), True)
        gb = gate_grad(gb, gates_of(gates, gates_s, low, weight, b, left, h, H, count, 1, K, K, RANK), True)
    if dgf.dtype.element_ty == HALF:
        back[0].store(gf.to(HALF))
        back[1].store(gb.to(HALF))
        store_tile(row(dgf, dg_s, b, left, h), dg_s[1], back[0], stored)
        store_tile(row(dgb, dg_s, b, left, h), dg_s[1], back[1], stored)
    else:
        store(row(dgf, dg_s, b, left, h), dg_s[1], gf, stored, K)
        store(row(dgb, dg_s, b, left, h), dg_s[1], gb, stored, K)
    store_tile(row(dq, dk_s, b, left, h), dk_s[1], ahead[0], stored)
    store_tile(row(dk, dk_s, b, left, h), dk_s[1], ahead[1], stored)


def launch_bigla_grad(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor, dstate: Tensor, total: Tensor,
    hard: Tensor, scale: float, into: Sequence[Tensor],
) -> None:  # fmt: skip
    """The gradients of all chunks of TOKENS that are not `hard`, to `into`.

    Arguments as of `launch_backward`, `prepared`.
    """
    B, L, H, K = q.shape
    NT = ceil_div(L, TOKENS.value)
    dq, dk, dv, dgf, dgb = into
    strides = [token_strides(x) for x in (do, dk, dv, dgf)]
    bigla_grad_kernel[B * NT * H,](
        q, k, v, gates.pointers(), do, state, dstate, total, hard, *into,
        *(token_strides(x) for x in (q, k, v)), gates.strides(), *strides, scale / 2, L, NT, H,
        K=K, V=v.shape[-1], LOGITS=gates.logits, RANK=gates.options()['RANK'], OTHERS=others(NT),
        num_warps=4, maxnreg=REGISTERS[K],
    )  # fmt: skip
