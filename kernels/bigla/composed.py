"""The functions around BiGLA in ViG's blocks, out of PyTorch's own: any device, dtype and order of derivative."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MixerTensors(NamedTuple):
    """What `api.token_mixer` takes."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    conv_weight: Tensor
    qkv_weight: Tensor
    gate_weight: Tensor
    low_weight: Tensor
    decay_weight: Tensor
    decay_bias: Tensor
    gate_bias: Tensor
    out_norm_weight: Tensor
    local_norm_weight: Tensor
    proj_weight: Tensor

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """The weights of the packed projection."""
        return self.qkv_weight, self.gate_weight, self.low_weight

    @property
    def of_heads(self) -> tuple[Tensor, ...]:
        """What `api.bigla_mixer` takes besides the projection and the local tokens."""
        return self[7:12]


def mixer(
    bigla: Callable[..., Tensor], projected: Tensor, local: Tensor, decay_weight: Tensor, decay_bias: Tensor,
    gate_bias: Tensor, norm_weight: Tensor, local_norm_weight: Tensor, num_heads: int, eps: float, act: bool,
) -> Tensor:  # fmt: skip
    """`api.bigla_mixer` with `bigla(q, k, v, g_fwd, g_bwd, scale)` for the operator."""
    dims = local.shape[-1]
    wide = torch.promote_types(projected.dtype, torch.float32)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(heads(x).to(wide), weight.shape, weight.to(wide), eps)  # (B, L, nh, V)

    device = 'cpu' if projected.is_meta else projected.device.type  # the meta device knows no autocast
    with torch.autocast(device, enabled=False):
        q, k, v, gate, low = projected.split([dims // 2, dims // 2, dims, dims, projected.shape[-1] - 3 * dims], -1)
        logits = F.linear(low, decay_weight.to(low.dtype), decay_bias.to(low.dtype)).to(wide)
        gates = (heads(x) for x in (F.logsigmoid(logits) / 16).chunk(2, -1))
        q, k, v = heads(q), heads(k), heads(v)
        o = bigla(q, k, v, *gates, q.shape[-1] ** -0.5).flatten(2)
        gate = torch.sigmoid(heads(gate.to(wide) + gate_bias.to(wide)))
        y = torch.lerp(norm(local, local_norm_weight), norm(o, norm_weight), gate).flatten(2)
        return (F.silu(y) if act else y).to(local.dtype)


def depthwise_conv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    """`api.depthwise_conv` by the convolution that PyTorch has for the device."""
    with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):
        y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
        return F.silu(y) if act else y


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`api.add_norm` by PyTorch's norms."""
    total = x if branch is None else x + branch
    wide = torch.promote_types(total.dtype, torch.float32)
    with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):
        if bias is None:
            y = F.rms_norm(total.to(wide), weight.shape, weight.to(wide), eps)
        else:
            y = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total.to(sum_dtype or total.dtype), y.to(dtype)


def conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, stride: int, eps: float, act: str,
    inner: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.conv_norm` by the convolution that PyTorch has for the device, and its norm."""
    with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):
        x = x.to(inner).contiguous().permute(0, 3, 1, 2)  # (B, C, H, W) with channels-last strides, and so is p
        p = F.conv2d(x, weight.to(inner), bias.to(inner), stride, 1).permute(0, 2, 3, 1)
        wide = torch.promote_types(inner, torch.float32)
        z = F.layer_norm(p.to(wide), norm_weight.shape, norm_weight.to(wide), norm_bias.to(wide), eps).to(dtype)
        return getattr(F, act)(z) if act else z


def gated_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """`api.gated_mlp` by two products and what is between them."""
    with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):
        a, b = F.linear(x, fc1.to(x.dtype)).chunk(2, -1)
        return F.linear(F.silu(a) * b, fc2.to(x.dtype))


def norm_depthwise_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, act: bool, eps: float, inner: torch.dtype
) -> Tensor:
    """`api.norm_depthwise_conv` by the norm and the convolution above."""
    return depthwise_conv(add_norm(x, None, norm_weight, norm_bias, eps, inner)[1], weight, act)


def token_mixer(
    bigla: Callable[..., Tensor], t: MixerTensors, num_heads: int, act: bool, eps: float, head_eps: float,
    inner: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.token_mixer` by the norm, the convolution and the mixer above, `bigla` as in the latter."""
    local = norm_depthwise_conv(t.x, t.norm_weight, t.norm_bias, t.conv_weight, act, eps, inner).flatten(1, 2)
    with torch.autocast('cpu' if t.x.is_meta else t.x.device.type, enabled=False):
        projected = F.linear(local, torch.cat(t.packed).to(inner))
        y = mixer(bigla, projected, local, *t.of_heads, num_heads, head_eps, act)
        return F.linear(y, t.proj_weight.to(inner)).view(t.x.shape)


def residual_mlp(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale: Tensor | None, branch_scale: Tensor | None, eps: float, inner: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.residual_mlp` by the norm and the MLP above."""
    if branch_scale is not None:
        branch = (branch * by_sample(branch_scale, branch)).to(branch.dtype)
    total, y = add_norm(x, branch, norm_weight, norm_bias, eps, inner)
    z = gated_mlp(y, fc1, fc2)
    if scale is not None:
        z = z * by_sample(scale, z)
    return (total + z).to(total.dtype)


def block(
    bigla: Callable[..., Tensor], t: MixerTensors, norm_weight: Tensor, norm_bias: Tensor | None, fc1: Tensor,
    fc2: Tensor, scale: Tensor | None, branch_scale: Tensor | None, num_heads: int, act: bool, eps: float,
    head_eps: float, inner: torch.dtype,
) -> Tensor:  # fmt: skip
    """`api.block` by its halves."""
    branch = token_mixer(bigla, t, num_heads, act, eps, head_eps, inner)
    return residual_mlp(t.x, branch, norm_weight, norm_bias, fc1, fc2, scale, branch_scale, eps, inner)


def by_sample(scale: Tensor, like: Tensor) -> Tensor:
    """`scale` (B,) in a shape that multiplies `like` (B, ..., C)."""
    return scale.view(-1, *[1] * (like.ndim - 1))
