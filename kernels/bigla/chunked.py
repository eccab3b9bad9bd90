"""BiGLA by matrix products over chunks of tokens, in PyTorch alone: any device, float64 to float16."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def bigla(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float) -> Tensor:
    """`api.bigla`, chunk-parallel.

    Args:
        q, k, g_fwd, g_bwd: (B, L, nh, K).
        v: (B, L, nh, V).
        scale: Factor on the scores.

    Returns:
        o (B, L, nh, V), of v's dtype.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, g_fwd.dtype), torch.float32)
    B, L, nh, K = q.shape
    V = v.shape[-1]
    C = min(CHUNK, 1 << (L - 1).bit_length())
    NC = -(-L // C)

    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, NC * C - L))
        return x.transpose(1, 2).reshape(B * nh * NC, C, x.shape[-1])

    with torch.autocast(q.device.type, enabled=False):
        o = _attend(chunks(q) * (scale / 2), chunks(k), chunks(v), chunks(g_fwd), chunks(g_bwd), NC)
        return o.view(B, nh, NC * C, V)[:, :, :L].transpose(1, 2).to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, tot_f: Tensor, tot_b: Tensor, NC: int) -> Tensor:
    M, C, K = q.shape
    V = v.shape[-1]
    o = 2 * (q * k).sum(-1, keepdim=True) * v
    qf, qb, kf, kb = q * tot_f.exp(), q * tot_b.exp(), k, k
    s = 1
    while s < C:
        qf, qb, kf, kb = (x.reshape(-1, 2, s, K) for x in (qf, qb, kf, kb))
        tf, tb = tot_f.reshape(-1, 2, 1, K), tot_b.reshape(-1, 2, 1, K)
        vs = v.reshape(-1, 2, s, V)
        lower = qf[:, 1] @ kf[:, 0].mT @ vs[:, 0]
        upper = qb[:, 0] @ kb[:, 1].mT @ vs[:, 1]
        o = o + torch.stack([upper, lower], 1).view(M, C, V)
        qf = torch.stack([qf[:, 0], qf[:, 1] * tf[:, 0].exp()], 1)
        kf = torch.stack([kf[:, 0] * tf[:, 1].exp(), kf[:, 1]], 1)
        qb = torch.stack([qb[:, 0] * tb[:, 1].exp(), qb[:, 1]], 1)
        kb = torch.stack([kb[:, 0], kb[:, 1] * tb[:, 0].exp()], 1)
        tot_f, tot_b = tf.sum(1), tb.sum(1)
        s *= 2
    qf, qb, kf, kb = (x.reshape(M, C, K) for x in (qf, qb, kf, kb))
    U_f, U_b = ((x.mT @ v).view(-1, NC, K, V) for x in (kf, kb))
    a_f, a_b = (x.reshape(-1, NC, K, 1).exp() for x in (tot_f, tot_b))
    S, R = [torch.zeros_like(U_f[:, 0])], [torch.zeros_like(U_f[:, 0])]
    for c in range(NC - 1):
        S.append(a_f[:, c] * S[-1] + U_f[:, c])
        R.append(a_b[:, NC - 1 - c] * R[-1] + U_b[:, NC - 1 - c])
    S, R = torch.stack(S, 1).view(M, K, V), torch.stack(R[::-1], 1).view(M, K, V)
    return o + qf @ S + qb @ R
