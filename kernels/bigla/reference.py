"""BiGLA as its equation reads, one token a step, and what is around it as its equations: the oracles."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .composed import MixerTensors, by_sample, mixer


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
        # One (B, nh, width) slice a token. `unbind` and not indexing: its gradient is linear in L.
        q, k, u, g_fwd, g_bwd = (x.to(dtype).unbind(1) for x in (q, k, v, g_fwd, g_bwd))
        o_fwd = _scan(q, k, u, g_fwd)
        o_bwd = _scan(q[::-1], k[::-1], u[::-1], g_bwd[::-1])
        return (scale / 2 * (torch.stack(o_fwd, 1) + torch.stack(o_bwd[::-1], 1))).to(v.dtype)


def _scan(q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
    """q_t S_t for S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, one (B, nh, V) a token."""
    S = 0.0
    out = []
    for q_t, k_t, v_t, g_t in zip(q, k, v, g, strict=True):
        S = g_t.exp().unsqueeze(-1) * S + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)  # (B, nh, K, V)
        out.append((q_t.unsqueeze(-2) @ S).squeeze(-2))
    return out


def depthwise_conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    """`api.depthwise_conv` by its sum over nine neighbours, in float32 or wider."""
    H, W = x.shape[1:3]
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    padded = F.pad(x.to(dtype), (0, 0, 1, 1, 1, 1))
    weight = weight.to(dtype)
    y = sum(padded[:, i : i + H, j : j + W] * weight[:, 0, i, j] for i in range(3) for j in range(3))
    return (y * torch.sigmoid(y) if act else y).to(x.dtype)


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`api.add_norm` by its equations, in float32 or wider."""
    total = x if branch is None else x + branch
    u = total.to(torch.promote_types(total.dtype, torch.float32))
    if bias is not None:
        u = u - u.mean(-1, keepdim=True)
    y = u / (u.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return total.to(sum_dtype or total.dtype), (y if bias is None else y + bias).to(dtype)


def conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, eps: float, act: str,
    inner: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.conv_norm` as a sum over the taps, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(inner, weight.dtype), torch.float32)
    side = weight.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        padded = F.pad(x.to(wide), (0, 0, 1, 1, 1, 1))
        H, W = ((n - side) // stride * stride + 1 for n in padded.shape[1:3])
        p = bias.to(wide) + sum(
            padded[:, i : i + H : stride, j : j + W : stride] @ weight[:, :, i, j].to(wide).mT
            for i in range(side)
            for j in range(side)
        )
        z = add_norm(p, None, norm_weight, norm_bias, eps, wide)[1]
        return {'': lambda z: z, 'silu': F.silu, 'gelu': F.gelu}[act](z).to(dtype)


def gated_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """`api.gated_mlp` by its equations, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(x.dtype, fc1.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        a, b = (x.to(wide) @ fc1.to(wide).mT).chunk(2, -1)
        return (a * torch.sigmoid(a) * b @ fc2.to(wide).mT).to(x.dtype)


def norm_depthwise_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, act: bool, eps: float, inner: torch.dtype
) -> Tensor:
    """`api.norm_depthwise_conv` by its equations, in float32 or wider, `inner` too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return depthwise_conv(add_norm(x, None, norm_weight, norm_bias, eps, wide)[1], weight, act).to(inner)


def token_mixer(t: MixerTensors, num_heads: int, act: bool, eps: float, head_eps: float, inner: torch.dtype) -> Tensor:
    """`api.token_mixer` by its equations, in float32 or wider, `inner` too."""
    wide = torch.promote_types(torch.promote_types(t.x.dtype, t.qkv_weight.dtype), torch.float32)
    local = norm_depthwise_conv(t.x.to(wide), t.norm_weight, t.norm_bias, t.conv_weight, act, eps, wide).flatten(1, 2)
    with torch.autocast(t.x.device.type, enabled=False):
        projected = local @ torch.cat(t.packed).to(wide).mT
        y = mixer(bigla, projected, local, *t.of_heads, num_heads, head_eps, act)
        return (y @ t.proj_weight.to(wide).mT).view(t.x.shape).to(inner)


def residual_mlp(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale: Tensor | None, branch_scale: Tensor | None, eps: float, inner: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.residual_mlp` by its equations, in float32 or wider, `inner` too."""
    wide = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32)
    z = branch.to(wide)
    if branch_scale is not None:
        z = z * by_sample(branch_scale, z)
    total, y = add_norm(x.to(wide), z, norm_weight, norm_bias, eps, wide)
    z = gated_mlp(y, fc1, fc2)
    if scale is not None:
        z = z * by_sample(scale, z)
    return (total + z).to(torch.promote_types(x.dtype, branch.dtype))


def block(
    t: MixerTensors, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor, scale: Tensor | None,
    branch_scale: Tensor | None, num_heads: int, act: bool, eps: float, head_eps: float, inner: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.block` by its equations, in float32 or wider, `inner` too."""
    wide = torch.promote_types(torch.promote_types(t.x.dtype, inner), torch.float32)
    branch = token_mixer(t, num_heads, act, eps, head_eps, wide)
    y = residual_mlp(t.x, branch, norm_weight, norm_bias, fc1, fc2, scale, branch_scale, eps, inner)
    return y.to(torch.promote_types(t.x.dtype, inner))
