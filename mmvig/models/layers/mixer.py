"""The token mixer: bidirectional gated linear attention with 2D gating locality injection (paper section 3)."""

import torch
import torch.nn as nn
from torch import Tensor

from bigla import bigla

GATE_RANK = 16  # width of the low-rank projection that the gate logits come from


class BiGLAMixer(nn.Module):
    """Mixes the tokens of a grid in linear time; a depthwise 3x3 convolution supplies the locality.

    With `l = conv(x)` as tokens, per head:

        q, k, v = Wqkv l        g_fwd, g_bwd = logsigmoid(Wb Wa l + b) / 16
        y = o G + norm(l) (1 - G)   where  o = norm(BiGLA(q, k, v, g_fwd, g_bwd)),  G = sigmoid(Wg l + c)

    and the output is `Wo y`. Heads own contiguous channels; keys are half as wide as values.

    Args:
        dims: channels C of input and output, a multiple of `2 * num_heads`.
        num_heads: heads nh; the key width is C / (2 nh), the value width C / nh.
        act: put a SiLU behind the convolution and before the output projection (ViG-T does).
    """

    def __init__(self, dims: int, num_heads: int, act: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.conv = nn.Conv2d(dims, dims, 3, padding=1, groups=dims, bias=False)
        self.act = nn.SiLU() if act else nn.Identity()
        self.qkv = nn.Linear(dims, 2 * dims, bias=False)
        self.decay = nn.Sequential(nn.Linear(dims, GATE_RANK, bias=False), nn.Linear(GATE_RANK, dims))
        self.gate = nn.Linear(dims, dims)
        self.norm = nn.RMSNorm(dims // num_heads, eps=1e-6)
        self.local_norm = nn.RMSNorm(dims // num_heads, eps=1e-6)
        self.proj = nn.Linear(dims, dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, H, W, C)."""
        grid, dims = x.shape[1:3], x.shape[3]
        local = self.act(self.conv(x.permute(0, 3, 1, 2)))
        local = local.permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, C)

        q, k, v = self.heads(self.qkv(local), dims // 2, dims // 2, dims)  # (B, L, nh, K), same, (B, L, nh, V)
        g_fwd, g_bwd = self.heads(self.decay(local), dims // 2, dims // 2)  # (B, L, nh, K) each
        mixed = self.norm(bigla(q, k, v, g_fwd, g_bwd, gate_logits=True))  # (B, L, nh, V)

        (gate,) = self.heads(torch.sigmoid(self.gate(local)), dims)
        (local,) = self.heads(local, dims)
        y = torch.lerp(self.local_norm(local), mixed, gate)
        return self.proj(self.act(y.flatten(2))).unflatten(1, grid)

    def heads(self, x: Tensor, *widths: int) -> list[Tensor]:
        """Cuts (B, L, sum(widths)) into views (B, L, nh, width / nh)."""
        return [part.unflatten(-1, (self.num_heads, -1)) for part in x.split(widths, dim=-1)]
