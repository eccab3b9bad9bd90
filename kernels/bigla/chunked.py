"""BiGLA by matrix products over chunks of tokens, in PyTorch alone: any device, float64 to float16, any gate <= 0.

Within a chunk one (C, C) matrix of scores holds both directions. Token i reads token j through the decays between
them, and a halving tree splits every such product at an edge: at level s = 1, 2, .., C/2 neighbouring blocks of s
tokens form a pair, and if i and j lie in different halves of one pair, the decay from j to i is (j to the middle) *
(middle to i). Both factors are at most 1, so nothing overflows, and their product underflows only where the decay
itself does. Between chunks the states of the recurrence carry over, one a direction. `kernels/README.md` derives it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# C = 2 ** MAX_BITS tokens a chunk and up to GROUP chunks a scan: the fastest of 16, 32, 64 and of 8, 16 over the shapes
# of benchmarks/bench_cpu.py (two Sapphire Rapids cores, float32; see benchmarks/NOTES.md).
MAX_BITS = 5
GROUP = 16


def bigla(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float) -> Tensor:
    """`api.bigla`, chunk-parallel; memory is linear in L, backward included. Differentiable once.

    Args:
        q, k, g_fwd, g_bwd: (B, L, nh, K).
        v: (B, L, nh, V).
        scale: Factor on the scores.

    Returns:
        o (B, L, nh, V), of v's dtype.
    """
    if torch.compiler.is_dynamo_compiling():
        return _operator(q, k, v, g_fwd, g_bwd, scale)[0]
    return _BiGLA.apply(q, k, v, g_fwd, g_bwd, scale)


class _Grid(NamedTuple):
    """The tokens of (B, L, nh, width) as chunks: a working tensor is (C, M, width), position in the chunk first.

    C = 2 ** bits positions come in bit-reversed order, so that at every level of the tree the blocks of all pairs and
    chunks are one contiguous run: products take them as a batch without a copy, elementwise work has long inner loops.
    M = R * G * B * nh counts chunks: chunk g * R + r of a sequence is the r-th of the g-th group.

    While `torch.export` traces, L may be symbolic. The grid then has the form that serves every length, whole groups of
    whole chunks, and `fixed` is False: no branch may look at what depends on L.

    `carries` says whether states carry over from chunk to chunk.
    """

    B: int
    L: int
    nh: int
    bits: int
    R: int
    G: int
    fixed: bool
    carries: bool

    @classmethod
    def of(cls, q: Tensor) -> '_Grid':
        B, L, nh, _ = q.shape
        if isinstance(L, torch.SymInt):
            return cls(B, L, nh, MAX_BITS, GROUP, _ceildiv(L, GROUP << MAX_BITS), False, True)
        bits = sum(1 << b < L for b in range(MAX_BITS))
        return cls._balanced(q, bits, carries=1 << bits < L)

    @classmethod
    def of_any(cls, q: Tensor) -> '_Grid':
        """The grid whose sizes are one expression in L, symbolic or not: chunks are whole and always carry."""
        return cls._balanced(q, MAX_BITS, carries=True)

    @classmethod
    def _balanced(cls, q: Tensor, bits: int, carries: bool) -> '_Grid':
        B, L, nh, _ = q.shape
        chunks = _ceildiv(L, 1 << bits)
        G = _ceildiv(chunks, GROUP)
        return cls(B, L, nh, bits, _ceildiv(chunks, G), G, True, carries)

    @property
    def C(self) -> int:
        return 1 << self.bits

    @property
    def M(self) -> int:
        return self.R * self.G * self.B * self.nh

    def pairs(self, x: Tensor, s: int) -> Tensor:
        """(.., C, M, K) -> (.., s, 2, pairs of blocks, M, K), or (.., 1, ..) of blocks' totals at s = 1."""
        return x.unflatten(-3, (s, 2, x.shape[-3] // (2 * s)))

    def load(self, x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """(B, L, nh, width), any strides -> contiguous (C, M, width) of dtype; tokens after the last are zeros."""
        B, L, nh, bits, R, G, fixed, _ = self
        width = x.shape[-1]
        if out is None:
            out = x.new_empty(self.C, self.M, width, dtype=dtype)
        if not fixed or R * G * self.C > L:
            x = F.pad(x, (0, 0, 0, 0, 0, R * G * self.C - L))
        # (B, G, R, highest bit, .., lowest bit, nh, width) -> (lowest bit, .., highest bit, R, G, B, nh, width)
        x = x.unflatten(1, (G, R, *[2] * bits)).permute(*range(bits + 2, 2, -1), 2, 1, 0, bits + 3, bits + 4)
        out.view(x.shape).copy_(x)
        return out

    def store(self, x: Tensor, like: Tensor) -> Tensor:
        """(C, M, width), any strides -> (B, L, nh, width) of like's dtype: the inverse of `load`."""
        B, L, nh, bits, R, G, *_ = self
        x = x.unflatten(1, (R, G, B, nh)).unflatten(0, (1, *[2] * bits)).squeeze(0)
        x = x.permute(bits + 2, bits + 1, bits, *range(bits - 1, -1, -1), bits + 3, bits + 4)
        out = like.new_empty(B, R * G * self.C, nh, x.shape[-1])
        out.view(x.shape).copy_(x)
        if self.fixed:
            return out[:, :L]
        return out.index_select(1, torch.arange(L, device=x.device))  # the length of a slice would be data-dependent


def _ceildiv(a: int, b: int) -> int:
    return (a + b - 1) // b  # of positive numbers only: ONNX divides towards 0


class _BiGLA(torch.autograd.Function):
    """What eager mode runs and `torch.export` sees through (with strict=True it runs dynamo, and gets `_operator`)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float
    ) -> Tensor:
        ctx.grid, ctx.scale = _Grid.of(q), scale
        o, *kept = _forward(ctx.grid, q, k, v, g_fwd, g_bwd, scale)
        ctx.save_for_backward(q, k, v, g_fwd, g_bwd, *kept)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx.grid, do, *ctx.saved_tensors, scale=ctx.scale), None


@torch.library.custom_op('bigla::chunked', mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `torch.compile` gets, one node: to trace all products takes minutes, and again for another grid."""
    return tuple(x.contiguous() for x in _forward(_Grid.of_any(q), q, k, v, g_fwd, g_bwd, scale))


@_operator.register_fake
def _(q, k, v, g_fwd, g_bwd, scale):
    grid, dtype = _Grid.of_any(q), _sum_dtype(q, g_fwd)
    A = q.new_empty(grid.M, grid.C, grid.C, dtype=dtype)
    S = (q.new_empty(grid.M, q.shape[-1], v.shape[-1], dtype=dtype) for _ in range(2))
    return v.new_empty(v.shape), A, *S


@torch.library.custom_op('bigla::chunked_backward', mutates_args=())
def _operator_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor,
    A: Tensor, S_fwd: Tensor, S_bwd: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _backward(_Grid.of_any(q), do, q, k, v, g_fwd, g_bwd, A, S_fwd, S_bwd, scale=scale)
    return tuple(x.contiguous() for x in grads)


@_operator_backward.register_fake
def _(do, q, k, v, g_fwd, g_bwd, A, S_fwd, S_bwd, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, *_):
    if do is None:
        return (None,) * 6
    return *_operator_backward(do, *ctx.saved_tensors, ctx.scale), None


_operator.register_autograd(_differentiate, setup_context=_setup_context)


def _forward(
    grid: _Grid, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """o, and what the backward needs: the scores A (M, C, C) and, if the grid carries, the states S (M, K, V) twice."""
    like = v
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = _load(grid, q, k, v, g_fwd, g_bwd, scale)
        x, y, d = _leaves(q, k, g)
        masks = _level_masks(grid, q)
        A = torch.diag_embed(2 * (q * k).sum(-1).t())  # a token and itself
        for level in range(grid.bits):
            rows, cols = _climb(grid, x, y, d, 1 << level)
            A.addcmul_(torch.bmm(_mats(rows), _mats(cols).mT), masks[level])
            g, d = _merge(g)
        o = torch.bmm(A, _mats(v))
        S = ()
        if grid.carries:
            U = [torch.bmm(_mats(y[i]).mT, _mats(v)) for i in range(2)]
            S = [_scan(grid, g[i, 0], U[i], reverse=i == 1) for i in range(2)]
            o.baddbmm_(_mats(x[0]), S[0]).baddbmm_(_mats(x[1]), S[1])
        return grid.store(_mats(o), like), A, *S


def _backward(
    grid: _Grid, do: Tensor, q_: Tensor, k_: Tensor, v_: Tensor, g_fwd: Tensor, g_bwd: Tensor, A: Tensor, *S: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, g_fwd and g_bwd; climbs the tree again instead of having stored its levels."""
    with torch.autocast(q_.device.type, enabled=False):
        q, k, v, g0 = _load(grid, q_, k_, v_, g_fwd, g_bwd, scale)
        do, v = _mats(grid.load(do, A.dtype)), _mats(v)
        g, levels = g0, []
        x, y, d = _leaves(q, k, g)
        for level in range(grid.bits):
            levels.append((*_climb(grid, x, y, d, 1 << level), d))
            g, d = _merge(g)

        dv = torch.bmm(A.mT, do)
        if grid.carries:
            dS = [torch.bmm(_mats(x[i]).mT, do) for i in range(2)]
            dU = [_scan(grid, g[i, 0], dS[i], reverse=i == 0) for i in range(2)]
            dv.baddbmm_(_mats(y[0]), dU[0]).baddbmm_(_mats(y[1]), dU[1])
            dx, dy = torch.empty_like(x), torch.empty_like(y)
            for i in range(2):
                _mats(dx[i]).copy_(torch.bmm(do, S[i].mT))
                _mats(dy[i]).copy_(torch.bmm(v, dU[i].mT))
            # Of the log decay of a chunk: the state that it lets pass, d S, times the gradient of what leaves it.
            dg = d * torch.stack([(S[i] * dU[i]).sum(-1) for i in range(2)]).unsqueeze(1)
        else:
            dx, dy, dg = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(g)

        dA = torch.bmm(do, v.mT)
        diagonal = 2 * dA.diagonal(dim1=1, dim2=2).t().unsqueeze(-1)  # (C, M, 1)
        masks = _level_masks(grid, q)
        for level in reversed(range(grid.bits)):
            rows, cols, d = levels.pop()
            dA_level = dA * masks[level]
            drows = _mats(torch.bmm(dA_level, _mats(cols)))
            dcols = _mats(torch.bmm(dA_level.mT, _mats(rows)))
            dg = _descend(grid, dx, dy, dg, rows, cols, drows, dcols, d, 1 << level)
        dx.mul_(g0.exp())
        dg.addcmul_(dx, q)
        dq = torch.addcmul(dx[0] + dx[1], diagonal, k).mul_(scale / 2)
        dk = torch.addcmul(dy[0] + dy[1], diagonal, q)
        return (
            grid.store(dq, like=q_),
            grid.store(dk, like=k_),
            grid.store(_mats(dv), like=v_),
            grid.store(dg[0], like=g_fwd),
            grid.store(dg[1], like=g_bwd),
        )


def _sum_dtype(q: Tensor, g: Tensor) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.promote_types(torch.promote_types(q.dtype, g.dtype), torch.float32)


def _load(
    grid: _Grid, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q * scale / 2, k, v and both gates as (2, C, M, K), all of `_sum_dtype`."""
    dtype = _sum_dtype(q, g_fwd)
    g = q.new_empty(2, grid.C, grid.M, q.shape[-1], dtype=dtype)
    grid.load(g_fwd, dtype, out=g[0])
    grid.load(g_bwd, dtype, out=g[1])
    return grid.load(q, dtype).mul_(scale / 2), grid.load(k, dtype), grid.load(v, dtype), g


def _mats(x: Tensor) -> Tensor:
    """(C, M, width) as M matrices (M, C, width), and back."""
    return x.transpose(0, 1)


def _leaves(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tree's first level, blocks of one token: x, y (2, C, M, K) and the blocks' decays d = exp(g).

    x[0] is q decayed from the left edge of its block on, that token included; x[1] from the right edge. y[0] is k
    decayed to the right edge of its block, that token excluded; y[1] to the left edge.
    """
    d = g.exp()
    return d * q, k.repeat(2, 1, 1, 1), d


def _climb(grid: _Grid, x: Tensor, y: Tensor, d: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """One level: what the scores between the halves of each pair need, then x and y in place from blocks s to 2s.

    Returns rows, cols (C, M, K): q_i decayed from the middle of the pair, k_j decayed to it. Forward, rows lie in the
    second half and cols in the first; backward the other way round: each token is needed for one direction.
    """
    x, y, d = grid.pairs(x, s), grid.pairs(y, s), grid.pairs(d, 1)[:, 0]
    rows = torch.stack((x[1, :, 0], x[0, :, 1]), 1).flatten(0, 2)
    cols = torch.stack((y[0, :, 0], y[1, :, 1]), 1).flatten(0, 2)
    for i in range(2):  # direction i carries half i to the other one
        x[i, :, 1 - i].mul_(d[i, i])
        y[i, :, i].mul_(d[i, 1 - i])
    return rows, cols


def _descend(
    grid: _Grid,
    dx: Tensor,
    dy: Tensor,
    dg: Tensor,
    rows: Tensor,
    cols: Tensor,
    drows: Tensor,
    dcols: Tensor,
    d: Tensor,
    s: int,
) -> Tensor:
    """The gradient of `_climb`: dx and dy in place from blocks 2s to s; returns the blocks' dg, given the pairs'.

    A block's log decay acts as part of its pair's, and alone on what crosses it to or from the pair's other half. Each
    term is a product with that decay, none a difference of running sums: a gate of -50 has as exact a gradient as any.
    """
    dx, dy, d = grid.pairs(dx, s), grid.pairs(dy, s), grid.pairs(d, 1)[:, 0]
    rows, cols, drows, dcols = (grid.pairs(t, s) for t in (rows, cols, drows, dcols))
    dg = dg.repeat(1, 2, 1, 1)
    dg_half = grid.pairs(dg, 1)[:, 0]
    for i in range(2):
        dx_half, dy_half = dx[i, :, 1 - i], dy[i, :, i]
        dg_half[i, i].add_((dx_half.mul_(d[i, i]) * rows[:, 1 - i]).sum(0))
        dg_half[i, 1 - i].add_((dy_half.mul_(d[i, 1 - i]) * cols[:, i]).sum(0))
        dx_half.add_(drows[:, 1 - i])
        dy_half.add_(dcols[:, i])
    return dg


def _merge(g: Tensor) -> tuple[Tensor, Tensor]:
    """Log decays of blocks (2, n, M, K) -> those of pairs (2, n/2, M, K), and their exponentials.

    From the gates' own sums at every level: a product of rounded exponentials would drift where gates are near 0.
    """
    half = g.shape[1] // 2
    g = g[:, :half] + g[:, half:]
    return g, g.exp()


def _level_masks(grid: _Grid, like: Tensor) -> Tensor:
    """(bits, C, C) of 0 and 1: the level at which the halving tree splits positions i and j; zero where i = j."""
    i = torch.arange(grid.C, device=like.device)
    differ = i ^ i.unsqueeze(-1)
    # The highest bit in which two tokens differ is the lowest one of their bit-reversed positions.
    bit = torch.tensor([grid.C >> 1 >> level for level in range(grid.bits)], device=like.device)
    return ((differ & -differ) == bit[:, None, None]).to(like.dtype)


def _scan(grid: _Grid, g: Tensor, U: Tensor, reverse: bool) -> Tensor:
    """The state entering every chunk, from the left or with `reverse` from the right; each is the other's adjoint.

    Args:
        g: Log decay over each chunk (M, K).
        U: What each chunk adds to a state (M, K, V).

    Returns:
        S (M, K, V): S_c = sum over c' < c of exp(sum of g over the chunks between) U_c'; with `reverse` over c' > c.
    """
    n, R, G = grid.B * grid.nh * g.shape[-1], grid.R, grid.G
    V = U.shape[-1]
    shape = U.shape
    g, U = g.reshape(R, G * n), U.view(R, G * n, V)
    S = _scan_rows(g, U, reverse)  # inside each group
    if grid.fixed and G == 1:
        return S.reshape(shape)
    last = 0 if reverse else R - 1
    U_group = torch.addcmul(U[last], g[last].exp().unsqueeze(-1), S[last])
    S_group = _scan_rows(g.view(R, G, n).sum(0), U_group.view(G, n, V), reverse)
    S_group = S_group.clone(memory_format=torch.contiguous_format).view(G * n, V)  # whether to copy is no branch either
    before = F.pad(g[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1)) if reverse else F.pad(g[:-1].cumsum(0), (0, 0, 1, 0))
    return (before.exp().unsqueeze(-1) * S_group).add_(S).view(shape)


def _scan_rows(g: Tensor, U: Tensor, reverse: bool) -> Tensor:
    """`_scan` along the first axis of g (R, n) and U (R, n, V)."""
    i = torch.arange(g.shape[0], device=g.device)
    after = i.unsqueeze(-1) - i  # (R, R)
    # E[i, j] = exp(sum of g over j < u < i) for j < i, else 0: summed as it stands, not by differences of prefix sums.
    E = torch.where(after > 1, F.pad(g, (0, 0, 1, 0))[:-1].t().unsqueeze(-1), 0)  # (n, R, R)
    E = E.cumsum(1).exp_().masked_fill_(after < 1, 0)
    return torch.bmm(E.mT if reverse else E, U.transpose(0, 1)).transpose(0, 1)
