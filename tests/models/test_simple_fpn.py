"""The simple feature pyramid: scales, what each is made of, and a detector on top."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from mmvig.models import SimpleFPN

NANO = dict(embed_dims=32, depth=2, num_heads=2, act=True, drop_path_rate=0.0)


@pytest.mark.parametrize('num_outs', [4, 5, 6])
@pytest.mark.parametrize('size', [(1, 1), (2, 4), (5, 8), (7, 3), (14, 20)])
def test_outputs(size, num_outs):
    """4h, 2h, h and ceil(h/2) rows, then every second row, for even and odd maps and single pixels."""
    height, width = size
    outs = SimpleFPN(32, 16, num_outs)((torch.rand(2, 32, height, width),))
    sizes = [(4 * height, 4 * width), (2 * height, 2 * width), (height, width)]
    while len(sizes) < num_outs:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    assert isinstance(outs, tuple) and [out.shape for out in outs] == [(2, 16, *size) for size in sizes]
    assert all(out.isfinite().all() for out in outs)
    for finer, coarser in zip(outs[3:], outs[4:]):
        assert torch.equal(coarser, finer[:, :, ::2, ::2])


def test_it_takes_the_last_map():
    neck = SimpleFPN([8, 32], 16, num_outs=4)
    last = torch.rand(1, 32, 4, 6)
    for a, b in zip(neck((torch.rand(1, 8, 4, 6), last)), neck([last]), strict=True):
        assert torch.equal(a, b)


def test_levels_are_normalised_over_channels():
    """A LayerNorm is the last layer of each level: at every pixel mean 0 and variance 1 over channels."""
    for out in SimpleFPN(32, 64, num_outs=5)((torch.randn(2, 32, 5, 7),)):
        torch.testing.assert_close(out.mean(1), torch.zeros_like(out[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.var(1, unbiased=False), torch.ones_like(out[:, 0]), rtol=0, atol=2e-3)


def test_levels_are_local():
    """Stride 32 has the 2 x 2 maxima of the map; a part of the map gives, but for its borders, a part of each level."""
    neck = SimpleFPN(32, 16, num_outs=4).double()
    whole = torch.randn(1, 32, 16, 20, dtype=torch.double)
    outs = neck([whole])
    torch.testing.assert_close(outs[3], neck.levels[3][1:](F.max_pool2d(whole, 2)))
    for out, part, stride in zip(outs, neck([whole[:, :, 4:, 8:]]), (4, 8, 16, 32), strict=True):
        top, left = 4 * 16 // stride, 8 * 16 // stride
        torch.testing.assert_close(out[:, :, top + 1 :, left + 1 :], part[:, :, 1:, 1:])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    neck, x = SimpleFPN(32, 16, num_outs=5), torch.randn(1, 32, 6, 9)
    want = neck((x,))
    with torch.autocast('cpu', dtype):
        cast = neck((x,))
    whole = neck.to(dtype)((x.to(dtype),))
    for a, b, c in zip(want, cast, whole, strict=True):
        assert c.dtype == dtype
        assert (b.float() - a).norm() / a.norm() < 0.05 and (c.float() - a).norm() / a.norm() < 0.05


def test_every_parameter_gets_a_gradient():
    neck = MODELS.build(dict(type='mmvig.SimpleFPN', in_channels=32, out_channels=16, num_outs=5))
    sum((out * torch.rand_like(out)).sum() for out in neck((torch.rand(2, 32, 4, 4),))).backward()
    assert not [name for name, p in neck.named_parameters() if p.grad is None or not p.grad.any()]


def test_init_cfg_is_used():
    neck = SimpleFPN(32, 16, 4, init_cfg=dict(type='Constant', layer='Conv2d', val=0.5))
    neck.init_weights()
    assert (neck.levels[0][1].weight == 0.5).all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='num_outs=3 must be 4'):
        SimpleFPN(32, 16, num_outs=3)
    with pytest.raises(ValueError, match='in_channels=32, but the last map has 48'):
        SimpleFPN(32, 16, num_outs=4)([torch.rand(1, 48, 2, 2)])


def test_mask_rcnn_trains(mask_rcnn_step):
    """In place of FPN on ViG's last map; the strides of RPN and RoI heads are those of the levels."""
    losses, still = mask_rcnn_step(
        dict(type='mmvig.ViG', arch=NANO), dict(type='mmvig.SimpleFPN', in_channels=32, out_channels=16, num_outs=5)
    )
    assert all(value.isfinite() for value in losses.values()) and losses['loss'] > 0
    assert not still
