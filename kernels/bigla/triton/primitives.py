"""What the forward and the backward share: tiles, gates, dot operands, and the tuning table."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Decorated functions are bound to the interpreter, or not, when they are defined.
INTERPRETED = triton.knobs.runtime.interpret
# Whose compiled kernels are called directly, with the arguments that they take there, and whose switches are known.
KNOWN = triton.__version__.startswith('3.6.')
ON_CPU = tl.constexpr(INTERPRETED)  # where there is no inline assembly
LOG2E = tl.constexpr(1.4426950408889634)
# Log2 decays below this are this: 2^-160 is 0 in float32, so nothing changes, and -inf keeps out of sums.
FLOOR = tl.constexpr(-160.0)
# Warps that look through all chunks for hard ones, eight to an H200's multiprocessor, and chunks at a time.
SEARCHERS = 1056
SPAN = tl.constexpr(32)


class Gates(NamedTuple):
    """Where kernels find the gates: as they are, or in ViG's low-rank form, from which each program makes its own."""

    fwd: Tensor  # gates (B, L, nh, K), or the low-rank decay (B, L, nh, R), the same for all heads
    bwd: Tensor  # the same of the other direction
    logits: bool  # they are x of log decay = logsigmoid(x) / 16
    weight: Tensor | None = None  # (2 nh K, R), dense: the logits are weight low + bias, the forward direction's first
    bias: Tensor | None = None  # (2 nh K)

    def prepared(self, C: int) -> 'Gates':
        """With rows that a program can walk, C at a time."""
        return self._replace(fwd=rows(self.fwd, C), bwd=rows(self.bwd, C))

    def pointers(self) -> tuple[Tensor, ...]:
        return self.fwd, self.bwd, *(self.fwd if x is None else x for x in (self.weight, self.bias))

    def strides(self) -> tuple[tuple[int, ...], ...]:
        return token_strides(self.fwd), token_strides(self.bwd)

    def options(self) -> dict[str, int]:
        """Constants of the kernels that load them."""
        rank = 0 if self.weight is None else self.weight.shape[1]
        return dict(LOGITS=self.logits, RANK=rank, BR=block(rank) if rank else 0)


class Config(NamedTuple):
    """Tile sizes and launch options."""

    C: int  # tokens a chunk
    BV: int  # value columns a program, at most
    state_warps: int
    out_warps: int
    grad_warps: int
    out_registers: int | None = None  # at most so many a thread, where that lets more programs run at a time
    merge_warps: int | None = None  # of the output kernel with the end of the mixer in it, if other than without
    merge_registers: int | None = None
    exact_warps: int | None = None  # of the exact kernels, if other than of the gradients
    exact_grad_warps: int | None = None  # of that of the gradients, if other than of the outputs
    grad_walk: int = 1  # chunks that a program of the gradients takes one after the other, the next one read ahead
    scan_block: int = 128  # state elements a program of the scan, twice as many where there are MANY
    scan_ahead: int = 16  # chunks that the scan reads before it needs them
    scan_segment: int = 32  # chunks that a program of the scan takes where there are more than twice as many


# By dtype and block(K). Where four warps meet a dot of 64 rows or more, Triton takes Hopper's wgmma, with which 3.6
# gave wrong sums and illegal addresses in these kernels: chunks are shorter, and the states' dots, of block(K) rows,
# have two warps. One warp less than needed in the others, and ptxas spills everything (kilobytes of stack).
TABLE = {
    torch.bfloat16: {
        16: Config(32, 64, 1, 1, 2, out_registers=96, merge_warps=1, merge_registers=128, grad_walk=4),
        32: Config(32, 64, 1, 1, 2, out_registers=168, merge_warps=2, merge_registers=128),
        64: Config(32, 64, 2, 4, 4),
        128: Config(16, 32, 2, 4, 8),
        256: Config(16, 16, 2, 8, 8),
    },
    torch.float16: {
        16: Config(32, 64, 2, 2, 2),
        32: Config(32, 64, 2, 2, 2),
        64: Config(32, 64, 2, 4, 4),
        128: Config(16, 32, 2, 8, 8),
        256: Config(16, 16, 2, 8, 8),
    },
    torch.float32: {
        16: Config(32, 64, 2, 2, 2),
        32: Config(16, 64, 2, 2, 2),
        64: Config(16, 64, 2, 4, 4),
        128: Config(16, 32, 2, 8, 8),
        256: Config(16, 16, 2, 8, 8),
    },
}


# By block(K), in bfloat16: longer chunks have fewer states, which are written twice and read twice. `grad_kernel` would
# spill, and never sees them; Hopper has kernels of its own. For versions of Triton whose wgmma can be switched off.
LONG = {
    16: Config(64, 64, 1, 2, 2, out_registers=128, merge_registers=128, exact_warps=4),
    32: Config(64, 64, 2, 4, 4, out_registers=128, merge_registers=128, exact_warps=8, exact_grad_warps=4),
}
# For the kernels that all GPUs have: tokens of all sequences and heads, and of a sequence that is not long.
LONG_FROM = {16: 150_000, 32: 0}
SHORT = 512
# Tokens of a sequence up to which, without gradients, those serve better than Hopper's, by K.
SHORT_ON_HOPPER = {16: 64, 32: 128}
WHOLE = {32: (32, 256)}  # the same, of which Hopper has all in one program, without gradients: more than, and at most
WHOLE_FROM = 32  # such programs: fewer take longer than the many that work on parts of the sequences
OTHERS = 3  # chunks of a sequence whose states each chunk adds up itself on Hopper, beside its own; more have a scan
FEW = 1056  # chunks up to which the output kernel does hard ones itself
MANY = 8192  # programs of the scan
WALKED = 7  # chunks of a sequence up to which one program takes them one after the other, and no scan is needed
WALKERS = 264  # such programs, two to a multiprocessor: fewer would wait for the next chunk with nothing beside them


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # `triton.cdiv` and `next_power_of_2` take microseconds; a launch takes tens


def chunk_size(L: int, K: int, dtype: torch.dtype) -> int:
    """Tokens a chunk: the table's, or fewer where that holds all; a symbolic L takes the table's."""
    C = TABLE[dtype][block(K)].C
    return block(L) if isinstance(L, int) and L < C else C


def hopper_takes(q: Tensor, v: Tensor, gates: Gates) -> bool:
    """Whether these are sizes that kernels of `hopper` are made for, and the current GPU is one.

    Widths may be symbolic, but are known: kernels are made for each.
    """
    fits = int(q.shape[-1]) in LONG and v.shape[-1] in (32, 64) and gates.options()['RANK'] in (0, 16)
    return fits and KNOWN and q.dtype == torch.bfloat16 and capability() == 90 and not INTERPRETED


def is_whole(q: Tensor, v: Tensor, gates: Gates, keep: bool) -> bool:
    """Whether one program of `hopper` takes all of a sequence; it keeps nothing for gradients.

    For launchers, before they ask for a `longer_chunk`.
    """
    B, L, H, K = q.shape
    few, most = WHOLE.get(K, (0, 0))
    fits = few < L <= most and B * H >= WHOLE_FROM and gates.weight is None
    return not keep and fits and hopper_takes(q, v, gates)


def longer_chunk(C: int, q: Tensor, v: Tensor, gates: Gates, keep: bool) -> tuple[int, bool]:
    """C, or more tokens where `LONG` chunks serve better, and whether kernels of `hopper` take them.

    For launchers, which know all sizes. But for `hopper` there are no kernels for the gradients of such chunks, so that
    with `keep` these stay as they are.
    """
    B, L, H, K = q.shape
    if not KNOWN or q.dtype != torch.bfloat16:
        return C, False
    if hopper_takes(q, v, gates):
        short = C if keep else SHORT_ON_HOPPER[K]
        return (LONG[K].C, True) if short < L else (C, False)
    many = L > SHORT and LONG_FROM.get(block(K), math.inf) <= B * L * H
    return LONG[block(K)].C if many and not keep else C, False


def kept_chunk(C: int, q: Tensor, v: Tensor, gates: Gates) -> int:
    """Tokens of the chunks whose states are kept for gradients: `longer_chunk`, but the same for any L.

    Of no more than C tokens, which never exceeds `LONG`, there is one chunk either way. Other GPUs may differ: what a
    traced graph says of these states holds for the one that it was traced for.
    """
    return LONG[int(q.shape[-1])].C if hopper_takes(q, v, gates) else C


def others(NT: int) -> int:
    """Of how many chunks at most each of NT adds up the states itself, for kernels of `hopper`; 0: a scan does it."""
    return OTHERS if NT <= OTHERS + 1 else 0


@functools.cache
def config(C: int, K: int, V: int, dtype: torch.dtype) -> Config:
    """The table's entry, with fewer warps where the chunk is shorter than there."""
    entry = TABLE[dtype][block(K)]
    if C > entry.C:
        entry = LONG[block(K)]
    fewer = entry.C // C
    return entry._replace(
        C=C,
        BV=min(entry.BV, block(V)),
        state_warps=max(1, entry.state_warps // fewer),
        out_warps=max(1, entry.out_warps // fewer),
        merge_warps=max(1, (entry.merge_warps or entry.out_warps) // fewer),
        grad_warps=max(1, entry.grad_warps // fewer),
        exact_warps=max(1, (entry.exact_warps or entry.grad_warps) // fewer),
        exact_grad_warps=max(1, (entry.exact_grad_warps or entry.exact_warps or entry.grad_warps) // fewer),
    )


def block(width: int) -> int:
    """Columns of the tile that holds `width` of them: a power of two that `tl.dot` takes."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> tuple[str, float | None]:
    """How dots are done for tensors of `dtype`, and the log2 decay over a chunk below which it is hard; None: always.

    In bfloat16 the scaled operands keep their relative precision, and float32 sums hold 2^160. Float16 cannot hold the
    scaled operands: tf32 has its mantissa and float32's range. In float32 the rounding of the prefix sums would be the
    largest error, and the tree, which has none, costs no more.
    """
    limit = None if dtype == torch.float32 else -160.0
    if INTERPRETED:  # its dots are NumPy's, and wrong for bfloat16 (triton-lang/triton#11584)
        return 'ieee', limit
    return {torch.bfloat16: 'bf16', torch.float16: 'tf32', torch.float32: 'tf32x3'}[dtype], limit


def capability() -> int:
    """Of the GPU that kernels go to, 90 for 9.0; the interpreter's is that of the GPU that they were made for."""
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def plain_precision(dtype: torch.dtype) -> str:
    """How dots of tensors are done as they are: float32 by three of tf32, narrower ones natively."""
    return 'tf32x3' if dtype == torch.float32 and not INTERPRETED else 'ieee'


def rows(x: Tensor, C: int) -> Tensor:
    """`x` itself where a program can walk its rows: dense ones, C of which lie within int32. Otherwise a copy."""
    dense = x.shape[-1] == 1 or x.stride(-1) == 1
    return x if dense and x.stride(1) * C < 2**31 else x.contiguous()


def token_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


@triton.jit
def locate(i, NT, H):
    """Index i of a (batch, chunk, head), heads fastest: neighbours read the same rows of memory together."""
    return i // (NT * H), i // H % NT, i % H


@triton.jit
def any_hard(hard, i, step, N, ALL: tl.constexpr):
    """Whether one of the chunks i, i + step, .., SPAN of them, is hard."""
    if ALL:
        return True
    else:
        some = i + tl.arange(0, SPAN) * step
        return tl.max(tl.load(hard + some, mask=some < N, other=0), 0) > 0


@triton.jit
def is_hard(hard, i, N, ALL: tl.constexpr):
    if ALL:
        return i < N
    else:
        return tl.load(hard + i, mask=i < N, other=0) > 0


@triton.jit
def row(x, stride, b, t, h):
    """Pointer to x[b, t, h], computed in int64."""
    return x + b.to(tl.int64) * stride[0] + t.to(tl.int64) * stride[1] + h.to(tl.int64) * stride[2]


@triton.jit
def rows_at(p, stride, r, m, W: tl.constexpr, BW: tl.constexpr, w0):
    """Pointers (C, BW) to columns w0.. of the rows `r` after `p`, and which of them are inside `m` and W."""
    w = w0 + tl.arange(0, BW)
    m = m[:, None]
    if W % BW != 0:
        m = m & (w < W)[None, :]
    return p + r[:, None] * stride + w[None, :], m


@triton.jit
def load_rows(p, stride, r, m, W: tl.constexpr, BW: tl.constexpr, w0=0):
    p, m = rows_at(p, stride, r, m, W, BW, w0)
    return tl.load(p, mask=m, other=0.0)


@triton.jit
def store_rows(p, stride, x, r, m, W: tl.constexpr, BW: tl.constexpr, w0=0):
    p, m = rows_at(p, stride, r, m, W, BW, w0)
    tl.store(p, x.to(p.dtype.element_ty), mask=m)


@triton.jit
def load_total(total, i, d, K: tl.constexpr, BK: tl.constexpr):
    """Log2 decay over chunk i in direction d.  (BK)"""
    kk = tl.arange(0, BK)
    return tl.load(total + (i.to(tl.int64) * 2 + d) * K + kk, mask=kk < K, other=0.0)


@triton.jit
def store_total(total, i, d, x, K: tl.constexpr, BK: tl.constexpr):
    kk = tl.arange(0, BK)
    tl.store(total + (i.to(tl.int64) * 2 + d) * K + kk, x, mask=kk < K)


@triton.jit
def load_state(state, i, d, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, v0):
    """Columns v0.. of state[i, d], which is stored as it is, K x V.  (BK, BV)"""
    kk, vv = tl.arange(0, BK)[:, None], v0 + tl.arange(0, BV)[None, :]
    p = state + (i.to(tl.int64) * 2 + d) * (K * V) + (kk * V + vv)
    if K == BK and V % BV == 0:
        return tl.load(p).to(tl.float32)
    else:
        return tl.load(p, mask=(kk < K) & (vv < V), other=0.0).to(tl.float32)


@triton.jit
def store_state(state, i, d, x, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, v0):
    kk, vv = tl.arange(0, BK)[:, None], v0 + tl.arange(0, BV)[None, :]
    p = state + (i.to(tl.int64) * 2 + d) * (K * V) + (kk * V + vv)
    tl.store(p, x.to(state.dtype.element_ty), mask=(kk < K) & (vv < V))


@triton.jit
def gate_rows(gates, gates_s, b, t, h, d):
    """Pointer to gates of direction d from token t on, and the distance of tokens."""
    if d == 0:
        p = row(gates[0], gates_s[0], b, t, h)
        s = gates_s[0][1]
    else:
        p = row(gates[1], gates_s[1], b, t, h)
        s = gates_s[1][1]
    return p, s


@triton.jit
def expansion(gates, h, d, H, K: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr):
    """The weight (BR, BK) and the bias (BK) that make logits of the low-rank decay, 0 outside RANK and K."""
    kk = tl.arange(0, BK)
    rr = tl.arange(0, BR)
    first = (d * H + h) * K
    at = (first + kk)[None, :] * RANK + rr[:, None]
    weight = tl.load(gates[2] + at, mask=(kk < K)[None, :] & (rr < RANK)[:, None], other=0.0)
    return weight, tl.load(gates[3] + first + kk, mask=kk < K, other=0.0).to(tl.float32)


@triton.jit
def load_gates(
    gates, gates_s, b, left, h, d, H, r, m,
    K: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gates (C, BK) of rows r behind token `left`, as they are, or made of the low-rank decay (RANK > 0)."""
    p, s = gate_rows(gates, gates_s, b, left, h, d)
    if RANK == 0:
        return load_rows(p, s, r, m, K, BK)
    else:
        weight, bias = expansion(gates, h, d, H, K, BK, RANK, BR)
        low = load_rows(p, s, r, m, RANK, BR)
        return dot(operand(low, PREC), operand(weight, PREC), PREC) + bias[None, :]


@triton.jit
def load_gate(
    gates, gates_s, b, left, h, d, H, r, m,
    K: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One row (BK) of `load_gates`, 0 or a bias where not `m`."""
    p, s = gate_rows(gates, gates_s, b, left, h, d)
    kk = tl.arange(0, BK)
    if RANK == 0:
        return tl.load(p + r * s + kk, mask=(kk < K) & m, other=0.0)
    else:
        weight, bias = expansion(gates, h, d, H, K, BK, RANK, BR)
        rr = tl.arange(0, BR)
        low = tl.load(p + r * s + rr, mask=(rr < RANK) & m, other=0.0).to(tl.float32)
        return tl.sum(low[:, None] * weight.to(tl.float32), 0) + bias


@triton.jit
def log2(x):
    """By the hardware: `tl.log2` takes twenty instructions."""
    if ON_CPU:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise('lg2.approx.ftz.f32 $0, $1;', '=f,f', [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    if ON_CPU:
        return 1 / x
    else:
        return tl.inline_asm_elementwise('rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def decay(g, LOGITS: tl.constexpr):
    """Log2 decay of a loaded gate: log a, or x of ViG's log a = logsigmoid(x) / 16."""
    g = g.to(tl.float32) * LOG2E
    if LOGITS:
        g = (tl.minimum(g, 0.0) - log2(1 + tl.exp2(-tl.abs(g)))) * 0.0625
    return tl.maximum(g, FLOOR)


@triton.jit
def tile_decay(g, m, LOGITS: tl.constexpr):
    """`decay` of rows that were loaded under the mask `m`, 0 outside it: a log a of 0 is one, a logit of 0 is not."""
    g = decay(g, LOGITS)
    if LOGITS:
        g = tl.where(m[:, None], g, 0.0)
    return g


@triton.jit
def gate_grad(dg, g, LOGITS: tl.constexpr):
    """Gradient of what was loaded, from that of log a."""
    if LOGITS:
        dg = dg * 0.0625 * reciprocal(1 + tl.exp2(g.to(tl.float32) * LOG2E))
    return dg


@triton.jit
def operand(x, PREC: tl.constexpr):
    """`x` as it enters a dot. The tensor cores cut float32 to tf32's mantissa: round it first, to nearest."""
    if PREC == 'bf16':
        return x.to(tl.bfloat16)
    elif PREC == 'tf32':
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def dot(x, y, PREC: tl.constexpr, acc=None):
    if PREC == 'bf16':
        return tl.dot(x, y, acc)
    else:
        return tl.dot(x, y, acc, input_precision=PREC)


@triton.jit
def running_sum(x, BACK: tl.constexpr, PREC: tl.constexpr):
    """Sums over the rows up to each, or from each to the last (BACK).

    A scan from the last takes three times the shuffles. In bfloat16 the total less the rows before is as good.
    """
    if BACK and PREC == 'bf16':
        return tl.sum(x, 0)[None, :] - tl.cumsum(x, 0) + x
    else:
        return tl.cumsum(x, 0, reverse=BACK)


@triton.jit
def tree_start(f, b):
    """Sums over blocks of one row, the leaves of `tree_merge`.

    For log decays f and b: inclusive prefix and exclusive suffix of f, inclusive suffix and exclusive prefix of b, and
    the totals of both.  each (C, K)
    """
    return f, f * 0, b, b * 0, f, b


@triton.jit
def tree_merge(pf, sf, sb, pb, tf, tb, r, s):
    """The sums of `tree_start` over blocks of 2s rows from those over blocks of s rows. Nothing is ever subtracted."""
    other = (r ^ s)[:, None] + tl.zeros_like(tf).to(tl.int32)
    second = (r & s != 0)[:, None]
    of, ob = tl.gather(tf, other, 0), tl.gather(tb, other, 0)
    pf, pb = tl.where(second, pf + of, pf), tl.where(second, pb + ob, pb)
    sf, sb = tl.where(second, sf, sf + of), tl.where(second, sb, sb + ob)
    return pf, sf, sb, pb, tf + of, tb + ob


@triton.jit
def tree_factors(pf, sf, sb, pb, r, s):
    """Decays that pair the two halves of each block of 2s rows, as (queries, keys); the middle is the reference.

    A query of the second half looks back, with f, and one of the first half ahead, with b; keys are met the same way.
    """
    second = (r & s != 0)[:, None]
    return tl.exp2(tl.where(second, pf, sb)), tl.exp2(tl.where(second, pb, sf))


@triton.jit
def tree_pairs(r, s):
    """Whether row and column lie in different halves of one block of 2s.  (C, C)"""
    x = r[:, None] ^ r[None, :]
    return (x >= s) & (x < 2 * s)


@triton.jit
def tree_scores(q, k, f, b, r, C: tl.constexpr, PREC: tl.constexpr, TRANSPOSED: tl.constexpr):
    """All scores of a chunk with every exponent <= 0, and the sums over the chunk.

    A_ij = q_i . k_j 2^(f_{j+1} + .. + f_i) below the diagonal, 2^(b_i + .. + b_{j-1}) above, and twice q_i . k_i on it.
    """
    a = tl.where(r[:, None] == r[None, :], 2 * tl.sum(q * k, 1)[:, None], 0.0)
    pf, sf, sb, pb, tf, tb = tree_start(f, b)
    for level in range(tl.constexpr(C.bit_length() - 1)):
        s = 1 << level
        uq, uk = tree_factors(pf, sf, sb, pb, r, s)
        x, y = operand(q * uq, PREC), operand(k * uk, PREC)
        if TRANSPOSED:
            x, y = y, x
        a = tl.where(tree_pairs(r, s), dot(x, tl.trans(y), PREC), a)
        pf, sf, sb, pb, tf, tb = tree_merge(pf, sf, sb, pb, tf, tb, r, s)
    return a, pf, sf, sb, pb
