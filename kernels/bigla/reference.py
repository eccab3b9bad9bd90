"""BiGLA as its equation reads, one token a step: the oracle of every other implementation."""

import torch
from torch import Tensor


def bigla(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float) -> Tensor:
    """`api.bigla` by its recurrence, in float32 or wider, with autograd to any order.

    Args:
        q, k, g_fwd, g_bwd: (B, L, nh, K).
        v: (B, L, nh, V).
        scale: Factor on the scores.

    Returns:
        o (B, L, nh, V), of v's dtype.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, g_fwd.dtype), torch.float32)
    # A cast does not stop autocast from casting back: the products below must stay in `dtype`.
    with torch.autocast(q.device.type, enabled=False):
        q, k, v_, g_fwd, g_bwd = (x.to(dtype) for x in (q, k, v, g_fwd, g_bwd))
        last = q.shape[1] - 1
        o_fwd = _scan(q, k, v_, g_fwd, range(0, last + 1))
        o_bwd = _scan(q, k, v_, g_bwd, range(last, -1, -1))
        return (scale / 2 * (o_fwd + o_bwd.flip(1))).to(v.dtype)


def _scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, order: range) -> Tensor:
    """`q_t S_t` for S_t = diag(exp g_t) S_{before t} + k_t v_t^T, over the tokens in `order`: (B, L, nh, V)."""
    B, _, nh, K = q.shape
    S = q.new_zeros(B, nh, K, v.shape[-1])
    out = []
    for t in order:
        S = g[:, t].exp().unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)  # (B, nh, K, V)
        out.append(torch.einsum('bhk,bhkv->bhv', q[:, t], S))
    return torch.stack(out, dim=1)
