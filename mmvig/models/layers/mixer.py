"""The token mixer: bidirectional gated linear attention with 2D gating locality injection (paper section 3)."""

import torch.nn as nn

GATE_RANK = 16  # width of the low-rank projection that the gate logits come from


class BiGLAMixer(nn.Module):
    """The parameters of what mixes the tokens of a grid in linear time; a depthwise 3x3 convolution supplies locality.

    With `l = conv(norm(x))` as tokens, per head:

        q, k, v = Wqkv l        g_fwd, g_bwd = logsigmoid(Wb Wa l + b) / 16
        y = o G + norm(l) (1 - G)   where  o = norm(BiGLA(q, k, v, g_fwd, g_bwd)),  G = sigmoid(Wg l + c)

    and the output is `Wo y`: `bigla.token_mixer`, a part of `Block`'s one function. Heads own contiguous channels; keys
    are half as wide as values.

    Args:
        dims: channels C of input and output, a multiple of `2 * num_heads`.
        num_heads: heads nh; the key width is C / (2 nh), the value width C / nh.
        act: put a SiLU behind the convolution and before the output projection (ViG-T does).
    """

    def __init__(self, dims: int, num_heads: int, act: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.conv = nn.Conv2d(dims, dims, 3, padding=1, groups=dims, bias=False)
        self.act = act
        self.qkv = nn.Linear(dims, 2 * dims, bias=False)
        self.decay = nn.Sequential(nn.Linear(dims, GATE_RANK, bias=False), nn.Linear(GATE_RANK, dims))
        self.gate = nn.Linear(dims, dims)
        self.norm = nn.RMSNorm(dims // num_heads, eps=1e-6)
        self.local_norm = nn.RMSNorm(dims // num_heads, eps=1e-6)
        self.proj = nn.Linear(dims, dims, bias=False)
