"""What the chunks of BiGLA add to its states on Hopper, in Gluon: both directions by one product of 64 rows.

Formulas and symbols are those of `..forward.chunk_sum`. The rows of the product are columns of keys as both directions
see them, 32 of each: of two chunks where K is 16, whose values lie beside each other, too. What one of these has with
the other's values is left there.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from ..launch import begin, kernel
from ..primitives import Gates, ceil_div, decay, gate_rows, locate, row, token_strides
from .chunks import (
    HALF,
    TOKENS,
    allocate,
    allocate_in_one,
    allocate_tiles,
    by_own_rows,
    by_rows,
    meet,
    product,
    put_in_parts,
    put_ones,
    shared,
    sums,
)

SIDE = gl.constexpr(32)  # columns of keys in each direction


@gluon.jit
def copy_columns(to, p, stride, count, W: gl.constexpr):
    """W numbers of each of `count` rows to columns of their own for each TOKENS of these, 0 behind them; under way."""
    BY: gl.constexpr = by_rows(to.shape[1])
    w = gl.arange(0, to.shape[1], gl.SliceLayout(0, BY))[None, :]
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, BY))[:, None] + w // W * TOKENS
    async_copy.async_copy_global_to_shared(to, p + (r * stride + w % W), r < count)


@gluon.jit
def put_weights(gates, h, H, to, K: gl.constexpr, RANK: gl.constexpr):
    """What makes a head's gate logits of its low-rank decay, to a tile (SIDE, ..) of each direction.

    Of several chunks' decay, as `copy_columns` leaves it, each has columns of its own.
    """
    W: gl.constexpr = to[0].shape[1]
    BY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // W, W // 4], [4, 1], [1, 0])
    kk = gl.arange(0, SIDE, gl.SliceLayout(1, BY))[:, None]
    rr = gl.arange(0, W, gl.SliceLayout(0, BY))[None, :]
    for D in gl.static_range(2):
        p = gates[2] + (((D * H + h) * K + kk % K) * RANK + rr % RANK)
        to[D].store(gl.load(p, mask=kk // K == rr // RANK, other=0.0).to(HALF))


@gluon.jit
def decays(
    gates, gates_s, low, weight, b, left, h, H, count, zero,
    D: gl.constexpr, K: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """Log2 decays of direction D.  (TOKENS, SIDE)"""
    KEYS: gl.constexpr = zero.type.layout
    w = gl.arange(0, SIDE, gl.SliceLayout(0, KEYS))[None, :]
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, KEYS))[:, None] + w // K * TOKENS
    if RANK > 0:
        g = warpgroup_mma(low[D], weight[D].permute((1, 0)), zero, use_acc=False)
        g = g + gl.load(gates[3] + ((D * H + h) * K + w % K)).to(gl.float32)
    elif gates[0].dtype.element_ty == HALF:
        g = low[D].load(KEYS)
    else:
        p, stride = gate_rows(gates, gates_s, b, left, h, D)
        g = gl.load(p + (r * stride + w % K), mask=r < count, other=0.0)
    g = decay(g, LOGITS)
    if LOGITS:  # a log a of 0 is none, a logit of 0 is one
        g = gl.where(r < count, g, 0.0)
    return g


@gluon.jit
def store_totals(total, index, x, end, chunks, H, D: gl.constexpr, K: gl.constexpr):
    """Row `end` of x to the totals of `chunks` chunks from `index` on.  x (TOKENS, SIDE)"""
    w = gl.arange(0, SIDE, gl.SliceLayout(0, x.type.layout))[None, :]
    r = gl.arange(0, TOKENS, gl.SliceLayout(1, x.type.layout))[:, None]
    here = (r == end) & (w // K < chunks)
    p = total + (index.to(gl.int64) * 2 + D) * K
    gl.store(p + gl.where(here, w // K * (2 * K * H) + w % K, 0), x, mask=here)


@gluon.jit
def store_states(state, index, x, chunks, H, K: gl.constexpr, V: gl.constexpr):
    """x to the states of `chunks` chunks from `index` on.  x (2 SIDE, SIDE / K V)"""
    W: gl.constexpr = x.shape[1]
    BY: gl.constexpr = by_own_rows(W)
    r = gl.arange(0, 2 * SIDE, gl.SliceLayout(1, BY))[:, None]
    w = gl.arange(0, W, gl.SliceLayout(0, BY))[None, :]
    chunk = r % SIDE // K
    p = state + index.to(gl.int64) * (2 * K * V)
    at = chunk * (2 * K * V * H) + (r // SIDE * K + r % K) * V + w % V
    gl.store(p + at, gl.convert_layout(x.to(HALF), BY), mask=(chunk == w // V) & (chunk < chunks))


@kernel(do_not_specialize=('L', 'NT'), jit=gluon.jit)
def bigla_state_kernel(
    x, y, gates, state, total, x_s, y_s, gates_s, scale, L, NT, H,
    K: gl.constexpr, V: gl.constexpr, GRAD: gl.constexpr, LOGITS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """`..forward.chunk_sum` of both directions of one chunk, or of neighbouring ones, to `state` and `total`."""
    N: gl.constexpr = SIDE // K  # chunks
    WIDTH: gl.constexpr = RANK if RANK > 0 else K  # of what there is of a gate
    KEYS: gl.constexpr = product(SIDE)
    STATES: gl.constexpr = product(N * V)
    keys = allocate_in_one(2, TOKENS, SIDE)  # x; then x times powers of 2, of both directions
    values = allocate(TOKENS, N * V)
    ones = allocate(TOKENS, TOKENS)
    low = allocate_tiles(TOKENS, N * WIDTH, 2)
    weight = allocate_tiles(SIDE, N * RANK if RANK > 0 else 16, 2)
    parts = allocate_tiles(TOKENS, SIDE, 4)
    put_ones(ones, not GRAD)  # a key decays by steps other than its own
    begin(not GRAD)
    b, c, h = locate(gl.program_id(0), gl.cdiv(NT, N), H)
    left = c * (N * TOKENS)
    index = (b * NT + c * N) * H + h
    chunks = gl.minimum(NT - c * N, N)
    count = L - left
    copy_columns(keys.index(0), row(x, x_s, b, left, h), x_s[1], count, K)
    if RANK > 0 or gates[0].dtype.element_ty == HALF:
        for D in gl.static_range(2):
            p, stride = gate_rows(gates, gates_s, b, left, h, D)
            copy_columns(low[D], p, stride, count, WIDTH)
    async_copy.commit_group()
    copy_columns(values, row(y, y_s, b, left, h), y_s[1], count, V)
    async_copy.commit_group()
    if RANK > 0:
        put_weights(gates, h, H, weight, K, RANK)
    async_copy.wait_group(1)
    meet()
    zero = gl.zeros([TOKENS, SIDE], gl.float32, KEYS)
    f = decays(gates, gates_s, low, weight, b, left, h, H, count, zero, 0, K, LOGITS, RANK)
    e = decays(gates, gates_s, low, weight, b, left, h, H, count, zero, 1, K, LOGITS, RANK)
    put_in_parts(f, parts[0], parts[1])
    put_in_parts(e, parts[2], parts[3])
    meet()
    # Backward, decays accumulate from the near end, the other way round.
    till, since = (ones, ones.permute((1, 0))) if GRAD else (ones.permute((1, 0)), ones)
    F = sums(till, parts[0], parts[1], zero)
    E = sums(since, parts[2], parts[3], zero)
    F, E = warpgroup_mma_wait(0, (F, E))
    if not GRAD:
        store_totals(total, index, F + f, 0, chunks, H, 0, K)
        store_totals(total, index, E + e, TOKENS - 1, chunks, H, 1, K)
    a = keys.index(0).load(KEYS).to(gl.float32)
    if GRAD:
        a = a * scale
    keys.index(0).store((a * gl.exp2(F)).to(HALF))
    keys.index(1).store((a * gl.exp2(E)).to(HALF))
    async_copy.wait_group(0)
    meet()
    both = keys._reinterpret(HALF, [TOKENS, 2 * SIDE], shared(SIDE))
    u = gl.zeros([2 * SIDE, N * V], gl.float32, STATES)
    u = warpgroup_mma(both.permute((1, 0)), values, u, use_acc=False)
    store_states(state, index, u, chunks, H, K, V)


def launch_bigla_state(
    x: Tensor, y: Tensor, gates: Gates, state: Tensor, total: Tensor, scale: float, grad: bool
) -> None:
    """Sums of all chunks of TOKENS to `state`, and without `grad` their totals.

    Arguments as of `..forward.states`, `prepared`.
    """
    B, L, H, K = x.shape
    NT = ceil_div(L, TOKENS.value)
    bigla_state_kernel[B * ceil_div(NT, SIDE.value // K) * H,](
        x, y, gates.pointers(), state, total, token_strides(x), token_strides(y), gates.strides(), scale, L, NT, H,
        K=K, V=y.shape[-1], GRAD=grad, LOGITS=gates.logits, RANK=gates.options()['RANK'], num_warps=4,
    )  # fmt: skip
