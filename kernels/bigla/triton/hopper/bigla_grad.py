"""The gradients of BiGLA on Hopper, in Gluon: chunks of 64 tokens, as many as its products have rows.

Formulas and symbols are those of `..backward`. A program sends for all that a chunk needs at once, and goes through one
direction after the other.
"""

from collections.abc import Sequence

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..primitives import Gates, ceil_div, gate_grad, locate, row, token_strides
from .chunks import (
    HALF,
    TOKENS,
    allocate,
    allocate_row,
    allocate_tiles,
    by_rows,
    copy,
    copy_narrow,
    gates_of,
    half_total,
    left_factor,
    log_decays,
    meet,
    product,
    put_in_parts,
    put_ones,
    put_weight,
    selected,
    state_at,
    store,
    sums,
)

REGISTERS = {16: 168, 32: 255}  # of a thread, by K: three programs run on a multiprocessor, or two


@gluon.jit
def carried(state, dstate, i, after, to, D: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    """sum_V S' dS' of a direction, whose state leaves the chunk and enters `after`.  (K)"""
    BY: gl.constexpr = by_rows(V)
    kk = gl.arange(0, K, gl.SliceLayout(1, BY))
    vv = gl.arange(0, V, gl.SliceLayout(0, BY))
    at = kk[:, None] * V + vv[None, :]
    # At the end of the sequence there is none, and no gradient: dS' = 0.
    S = gl.load(state_at(state, after, D, K, V) + at).to(gl.float32)
    dS = gl.load(state_at(dstate, i, D, K, V) + at).to(gl.float32)
    to[D].store(gl.sum(S * dS, 1))


@gluon.jit
def exponents(
    inputs, at, low, weight, H, high, rest, ones, r, m, zero,
    D: gl.constexpr, K: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Of a query's 2^X in direction D (TOKENS, K), a key's having -X, and half the log2 total (1, K)."""
    gates, gates_s, total = inputs
    index, b, h, left, _, _ = at
    g = log_decays(gates, gates_s, low, weight, b, left, h, H, r, m, zero, D, K, LOGITS, RANK, KEYS)
    if D == 1:
        gl.thread_barrier()  # some warp may still multiply what the first direction put there
    put_in_parts(g, high, rest)
    async_copy.wait_group(1)
    meet()
    X = sums(ones, high, rest, zero)
    X = warpgroup_mma_wait(0, (X,))
    half = half_total(total, index, D, K, KEYS)
    return X - half if D == 0 else half + g - X, half


@gluon.jit
def add_value_grads(dv, qs, ks, s, do, dS, since, D: gl.constexpr, V: gl.constexpr):
    """dv (TOKENS, V) and what direction D adds, A^T do + s dS'; `s` are keys as they meet the state that leaves."""
    VALUES: gl.constexpr = product(V)
    SCORES: gl.constexpr = product(TOKENS)
    a = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    a = warpgroup_mma(ks, qs.permute((1, 0)), a, use_acc=False)
    # Selected, not multiplied by a mask: the other half may be inf. The diagonal is in both directions.
    a = selected(left_factor(a, VALUES), since.load(gl.DotOperandLayout(0, VALUES, 2)), True)
    if D == 0:
        dv = gl.zeros([TOKENS, V], gl.float32, VALUES)
    dv = warpgroup_mma(a, do, dv, use_acc=D > 0, is_async=True)
    dv = warpgroup_mma(s, dS, dv, is_async=True)
    dv, a, s = warpgroup_mma_wait(0, (dv, a, s))
    return dv


@gluon.jit
def direction_grads(
    D: gl.constexpr, dv, inputs, dgates, dg_s, tiles, at, scale, H,
    K: gl.constexpr, V: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """What direction D adds to dq / s and dk, and dv with what it adds to that; stores the gradient of its gates.

    dq and dk of the diagonal, on which no decay lies, come with the forward direction.
    """
    KEYS: gl.constexpr = product(K)
    VALUES: gl.constexpr = product(V)
    SCORES: gl.constexpr = product(TOKENS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, KEYS, 2)
    gates, gates_s, total = inputs
    narrow, values, states, own, ones, w, low, weight = tiles
    index, b, h, left, count, stored = at
    q, k, v, do, S, dS = (
        narrow[0], narrow[1], values[0], values[1], states[D], states[2 + D]
    )  # fmt: skip
    qs, ks, high, rest = own[0], own[1], own[2], own[3]
    till, since = ones, ones.permute((1, 0))  # i >= j and i <= j, in the order that the direction has
    if D == 1:
        till, since = since, till
    zero = gl.zeros([TOKENS, K], gl.float32, KEYS)
    scores = gl.zeros([TOKENS, TOKENS], gl.float32, SCORES)
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, KEYS))
    m = r < count

    X, half = exponents(inputs, at, low, weight, H, high, rest, ones, r, m, zero, D, K, LOGITS, RANK, KEYS)
    qs.store((q.load(KEYS).to(gl.float32) * scale * gl.exp2(X)).to(HALF))
    ks.store((k.load(KEYS).to(gl.float32) * gl.exp2(-X)).to(HALF))
    async_copy.wait_group(0)
    meet()

    d = warpgroup_mma(do, v.permute((1, 0)), scores, use_acc=False, is_async=True)
    x = warpgroup_mma(do, S.permute((1, 0)), zero, use_acc=False, is_async=True)
    d, x = warpgroup_mma_wait(0, (d, x))
    if D == 0:
        i = gl.arange(0, TOKENS, gl.SliceLayout(1, SCORES))[:, None]
        j = gl.arange(0, TOKENS, gl.SliceLayout(0, SCORES))[None, :]
        diagonal = 2 * gl.convert_layout(gl.sum(gl.where(i == j, d, 0.0), 1), gl.SliceLayout(1, KEYS))[:, None]
    d = selected(left_factor(d, KEYS), since.load(LEFT), False)
    u = gl.exp2(half)
    x = warpgroup_mma(d, ks, x * u, is_async=True)
    x, d = warpgroup_mma_wait(0, (x, d))
    dt = warpgroup_mma(v, do.permute((1, 0)), scores, use_acc=False, is_async=True)
    y = warpgroup_mma(v, dS.permute((1, 0)), zero, use_acc=False, is_async=True)
    dt, y = warpgroup_mma_wait(0, (dt, y))
    dt = selected(left_factor(dt, KEYS), till.load(LEFT), False)
    y = warpgroup_mma(dt, qs, y * u, is_async=True)
    y, dt = warpgroup_mma_wait(0, (y, dt))

    X += scale * 0.0  # a zero that no compiler knows: it would keep 2^X and 2^-X from above until here, and spill
    # The operands as they were rounded, so that terms that cancel do.
    put_in_parts(qs.load(KEYS).to(gl.float32) * x - ks.load(KEYS).to(gl.float32) * y, high, rest)
    # Keys as they meet the states, which stay as they are: these are wider.
    s = left_factor(k.load(KEYS).to(gl.float32) * gl.exp2(-X) * u, VALUES)
    x = gl.exp2(X) * x
    y = gl.exp2(-X) * y
    if D == 0:
        x += diagonal * k.load(KEYS).to(gl.float32)
        y += diagonal * (q.load(KEYS).to(gl.float32) * scale)
    meet()
    dg = sums(since, high, rest, zero)
    dg, s, x, y = warpgroup_mma_wait(0, (dg, s, x, y))
    g = gates_of(gates, gates_s, low, weight, b, left, h, H, r, m, zero, D, K, RANK, KEYS)
    dg = gate_grad(dg + w[D].load(gl.SliceLayout(0, KEYS))[None, :], g, LOGITS)
    store(row(dgates, dg_s, b, left, h), dg_s[1], dg, stored, K)
    return x, y, add_value_grads(dv, qs, ks, s, do, dS, since, D, V)


@kernel(do_not_specialize=('L', 'NT'), jit=gluon.jit)
def bigla_grad_kernel(
    q, k, v, gates, do, state, dstate, total, hard, dq, dk, dv, dgf, dgb,
    q_s, k_s, v_s, gates_s, do_s, dk_s, dv_s, dg_s, scale, L, NT, H,
    K: gl.constexpr, V: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """The five gradients of one chunk; those of a hard one are not stored. dq has dk's strides, and dgf dgb's."""
    narrow = allocate_tiles(TOKENS, K, 2)  # q, k
    values = allocate_tiles(TOKENS, V, 2)  # v, do
    states = allocate_tiles(K, V, 4)  # S, R, dS', dR'
    ones = allocate(TOKENS, TOKENS)
    w = allocate_row(K), allocate_row(K)  # sum_V S' dS', R' dR'
    low = allocate_tiles(TOKENS, RANK if RANK > 0 else 16, 2)  # of both directions, as the weight; with a RANK alone
    weight = allocate_tiles(K, RANK if RANK > 0 else 16, 2)
    own = allocate_tiles(TOKENS, K, 4)  # a direction's q and k times powers of 2, and the parts of what is summed up
    put_ones(ones)
    begin(False)
    index = gl.program_id(0)
    b, c, h = locate(index, NT, H)
    left = c * TOKENS
    count = gl.minimum(L - left, TOKENS)
    stored = gl.where(gl.load(hard + index) == 0, count, 0)
    copy_narrow(q, k, gates, q_s, k_s, gates_s, narrow, low, b, left, h, count, K, RANK)
    copy(values[0], row(v, v_s, b, left, h), v_s[1], count, V)
    copy(values[1], row(do, do_s, b, left, h), do_s[1], count, V)
    for D in gl.static_range(2):
        copy(states[D], state_at(state, index, D, K, V), V, K, V)
        copy(states[2 + D], state_at(dstate, index, D, K, V), V, K, V)
    async_copy.commit_group()
    if RANK > 0:
        put_weight(gates, h, H, weight, K, RANK)
    carried(state, dstate, index, gl.where(c + 1 < NT, index + H, index), w, 0, K, V)
    carried(state, dstate, index, gl.where(c > 0, index - H, index), w, 1, K, V)
    if RANK > 0:
        async_copy.wait_group(1)
        meet()
    inputs = gates, gates_s, total
    tiles = narrow, values, states, own, ones, w, low, weight
    at = index, b, h, left, count, stored
    x, y, dv_ = direction_grads(0, 0, inputs, dgf, dg_s, tiles, at, scale, H, K, V, LOGITS, RANK)
    x_, y_, dv_ = direction_grads(1, dv_, inputs, dgb, dg_s, tiles, at, scale, H, K, V, LOGITS, RANK)
    store(row(dq, dk_s, b, left, h), dk_s[1], (x + x_) * scale, stored, K)
    store(row(dk, dk_s, b, left, h), dk_s[1], y + y_, stored, K)
    store(row(dv, dv_s, b, left, h), dv_s[1], dv_, stored, V)


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
        K=K, V=v.shape[-1], LOGITS=gates.logits, RANK=gates.options()['RANK'], num_warps=4, maxnreg=REGISTERS[K],
    )  # fmt: skip
