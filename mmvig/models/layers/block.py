"""The residual block of both backbones."""

from collections.abc import Callable

import torch.nn as nn
from torch import Tensor
from torchvision.ops import StochasticDepth

from bigla import add_pos_embed
from bigla import block as bigla_block

from .gated_mlp import GatedMLP
from .mixer import BiGLAMixer
from .norm import LayerNorm, RMSNorm
from .precision import autocast_dtype


def is_whole(weight: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a vector of a block that is not at work is there: FSDP leaves it empty, or as a DTensor of its shape."""
    return weight.shape == shape and not hasattr(weight, 'to_local')


class Block(nn.Module):
    """x <- x + mixer(norm(x)), then x <- x + mlp(norm(x)) (paper section 3.4).

    All of it is one function of `bigla`, and the modules inside hold its parameters: what is put in their place, or
    hooked to them, is not called.

    Args:
        dims: channels C.
        num_heads: heads of the mixer.
        norm_layer: makes a norm of `mmvig.models.layers.norm` from its width.
        mlp_multiple: the hidden width of the MLP is rounded up to a multiple of this.
        act: use the SiLUs of the mixer.
        drop_path: chance in [0, 1) that training skips a branch for a sample.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        norm_layer: Callable[[int], LayerNorm | RMSNorm],
        mlp_multiple: int,
        act: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dims)
        self.mixer = BiGLAMixer(dims, num_heads, act)
        self.norm2 = norm_layer(dims)
        self.mlp = GatedMLP(dims, mlp_multiple)
        self.drop_path = StochasticDepth(drop_path, mode='row')

    def forward(
        self,
        x: Tensor,
        given: tuple[Tensor, Tensor | None] | None = None,
        following: 'Block | None' = None,
        handed: list[tuple[Tensor, Tensor | None] | None] | None = None,
    ) -> Tensor:
        """Maps (B, H, W, C) to (B, H, W, C).

        Args:
            given: what the block before this one left in `handed`, or this one's `add_pos_embed` returned: x and the
                norm that this one makes of it, which counts if nobody, such as a hook, has put another x in its place.
            following: the block after this one.
            handed: the list in which to leave what that is given, so that hooks get a tensor.
        """
        mixer, mlp = self.mixer, self.mlp
        if following is not None and not is_whole(following.norm1.weight, x.shape[-1:]):
            following = None
        y = bigla_block(
            x,
            self.norm1.weight,
            self.norm1.bias,
            mixer.conv.weight,
            mixer.qkv.weight,
            mixer.gate.weight,
            mixer.decay[0].weight,
            mixer.decay[1].weight,
            mixer.decay[1].bias,
            mixer.gate.bias,
            mixer.norm.weight,
            mixer.local_norm.weight,
            mixer.proj.weight,
            self.norm2.weight,
            self.norm2.bias,
            mlp.fc1.weight,
            mlp.fc2.weight,
            branch_scale=self.depth_factors(x),
            scale=self.depth_factors(x),
            normed=given[1] if given is not None and given[0] is x else None,
            next_norm_weight=None if following is None else following.norm1.weight,
            next_norm_bias=None if following is None else following.norm1.bias,
            num_heads=mixer.num_heads,
            act=mixer.act,
            eps=self.norm1.eps,
            head_eps=mixer.norm.eps,
            inner=autocast_dtype(x),
        )
        if following is not None:
            handed.append(y)
            y = y[0]
        return y

    def add_pos_embed(self, x: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor | None]:
        """What comes before the first block: x (B, H, W, C) + pos_embed (1, H, W, C), and its norm, for `given`."""
        weight, bias = self.norm1.weight, self.norm1.bias
        if not is_whole(weight, x.shape[-1:]):
            return x + pos_embed, None
        return add_pos_embed(x, pos_embed, weight, bias, eps=self.norm1.eps, inner=autocast_dtype(x))

    def depth_factors(self, x: Tensor) -> Tensor | None:
        """What stochastic depth multiplies a branch by, a factor for each sample (B,): 0, or 1 / (1 - its chance)."""
        return self.drop_path(x.new_ones(x.shape[0])) if self.training and self.drop_path.p > 0 else None
