"""What the chunks of BiGLA add to its states on Hopper, in Gluon: both directions by one product of 64 rows.

Formulas and symbols are those of `..forward.chunk_sum`. The rows of the product are columns of keys as both directions
see them, 32 of each: of two chunks where K is 16, whose values lie beside each other, too. What one of these has with
the other's values is left there.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma

from ..launch import begin, kernel
from ..primitives import Gates, ceil_div, locate, row, token_strides
from .chunks import (
    HALF,
    TOKENS,
    allocate,
    allocate_tiles,
    beside,
    by_own_rows,
    copy,
    copy_gates,
    meet,
    product,
    put_decays,
    put_weight,
    sums_of_both,
    wait,
)

SIDE = gl.constexpr(32)  # columns of keys in each direction


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
    STATES: gl.constexpr = product(N * V)
    WIDTH: gl.constexpr = RANK if RANK > 0 else K  # of what there is of a gate
    given = allocate(TOKENS, SIDE)  # x
    copied = allocate_tiles(TOKENS, N * WIDTH, 2)  # gates of both directions, or their low-rank decay
    keys = allocate(TOKENS, 2 * SIDE)  # x times powers of 2, of both directions
    values = allocate(TOKENS, N * V)
    weight = allocate_tiles(SIDE, N * RANK if RANK > 0 else 16, 2)  # with a RANK alone
    parts = allocate_tiles(TOKENS, 2 * SIDE, 2)
    begin(not GRAD)
    b, c, h = locate(gl.program_id(0), gl.cdiv(NT, N), H)
    left = c * (N * TOKENS)
    index = (b * NT + c * N) * H + h
    chunks = gl.minimum(NT - c * N, N)
    count = L - left
    copy_gates(copied, gates, gates_s, b, left, h, count, K, RANK)
    copy(given, row(x, x_s, b, left, h), x_s[1], count, K)
    async_copy.commit_group()
    copy(values, row(y, y_s, b, left, h), y_s[1], count, V)
    async_copy.commit_group()
    if RANK > 0:
        put_weight(gates, h, H, weight, K, RANK)
    wait(1)
    meet()
    f, e = put_decays(gates, gates_s, copied, weight, b, left, h, H, count, parts, K, LOGITS, RANK)
    meet()
    # A key decays by steps other than its own. Backward, decays accumulate from the near end, the other way round.
    F, E = sums_of_both(parts, not GRAD, GRAD, not GRAD)
    if not GRAD:
        store_totals(total, index, F + f, 0, chunks, H, 0, K)
        store_totals(total, index, E + e, TOKENS - 1, chunks, H, 1, K)
    a = given.load(product(SIDE)).to(gl.float32)
    if GRAD:
        a = a * scale
    keys.store(beside(a * gl.exp2(F), a * gl.exp2(E)))
    wait(0)
    meet()
    u = gl.zeros([2 * SIDE, N * V], gl.float32, STATES)
    u = warpgroup_mma(keys.permute((1, 0)), values, u, use_acc=False)
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
