"""FLOPs: the operator's formula against what runs, known models, parts that sum up, and linear growth."""

import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from mmengine.config import ConfigDict
from torch.utils.flop_counter import FlopCounterMode

import bigla.api
import bigla.chunked
import bigla.reference
import mmvig  # noqa: F401
from mmvig.apis.flops import FORMULAS, bigla_flops, config_flops, count_flops
from mmvig.engine.settings import SetupError
from mmvig.models import ViG, ViGH
from mmvig.models.layers import block

ROW = 'B, L, nh, K, V'
SMALL = dict(embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.0)


def inputs(B, L, nh, K, V):
    q, k, g_fwd, g_bwd = (torch.zeros(B, L, nh, K) for _ in range(4))
    return q, k, torch.zeros(B, L, nh, V), g_fwd, g_bwd


def outer_product(a, b, *, out_shape):
    """k v^T, which the reference takes as a product of (B, nh, K, 1) and (B, nh, 1, V)."""
    is_outer = isinstance(b, tuple) and a[3:] == (1,) and b[2:3] == (1,)
    return 2 * math.prod(out_shape) if is_outer else 0


def counted(implementation, *shape):
    formulas = {**FORMULAS, torch.ops.aten.mul: outer_product}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        implementation.bigla(*inputs(*shape), 1.0)
    return counter.get_total_flops() // 2  # it counts two operations a multiply-add


@pytest.mark.parametrize(ROW, [(1, 1, 1, 2, 3), (2, 7, 3, 4, 8), (1, 40, 2, 16, 32)])
def test_recurrence_is_what_the_reference_does(B, L, nh, K, V):
    found = counted(bigla.reference, B, L, nh, K, V)
    assert bigla_flops((B, L, nh, K), (B, L, nh, V)) == found == 4 * B * L * nh * K * V


@pytest.mark.parametrize(
    ROW, [(2, 1, 1, 4, 4), (1, 20, 3, 16, 32), (2, 196, 3, 32, 64), (1, 513, 2, 8, 12), (1, 5000, 1, 4, 6)]
)
def test_chunked_is_what_the_chunks_do(B, L, nh, K, V):
    assert bigla_flops((B, L, nh, K), (B, L, nh, V), 'chunked') == counted(bigla.chunked, B, L, nh, K, V)


def test_unknown_form():
    with pytest.raises(ValueError, match="form must be one of .*'chunked'.*got 'parallel'"):
        bigla_flops((1, 1, 1, 1), (1, 1, 1, 1), 'parallel')


@pytest.mark.parametrize('form', ['recurrence', 'chunked'])
def test_model_counts_as_it_runs(form):
    """The operator in its place, in a model on the CPU, adds what its formula says to everything else."""
    model, image = ViGH(SMALL).eval(), torch.rand(1, 3, 64, 96)
    counts = count_flops(model, partial(model, image), form)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, torch.no_grad():
        model(image)  # through the products of the chunks
    tokens = [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    shapes = [((1, L, nh, 8), (1, L, nh, 16)) for L, nh in zip(tokens, SMALL['num_heads'])]
    assert counts.bigla == sum(bigla_flops(*shape, form) for shape in shapes)
    chunks = sum(bigla_flops(*shape, 'chunked') for shape in shapes)
    assert counts.flops - counts.bigla == counter.get_total_flops() // 2 - chunks
    assert block.bigla_block is bigla.block and not any('forward' in vars(module) for module in model.modules())


def test_meta_counts_as_cpu():
    counts = []
    for device in ('cpu', 'meta'):
        with torch.device(device):
            model = ViG(dict(embed_dims=32, depth=2, num_heads=2, act=True, drop_path_rate=0.0)).eval()
            counts.append(count_flops(model, partial(model, torch.zeros(1, 3, 32, 48))))
    assert counts[0].parts == counts[1].parts and counts[0].bigla == counts[1].bigla > 0
    assert counts[0].traffic == pytest.approx(counts[1].traffic, rel=0.01)  # a bias is an operator of its own on one


def test_kernels_count_as_what_they_compute(monkeypatch):
    """Where Triton would run, PyTorch's operators are counted."""
    net = ViG(dict(embed_dims=32, depth=1, num_heads=1, act=True, drop_path_rate=0.0)).eval()
    want = count_flops(net, partial(net, torch.rand(1, 3, 32, 32)))
    monkeypatch.setattr(bigla.api, '_choose', lambda *_: 'triton')
    assert count_flops(net, partial(net, torch.rand(1, 3, 32, 32))) == want


@pytest.mark.parametrize('kind', [ViG, ViGH])
def test_linear_in_the_pixels(kind):
    with torch.device('meta'):
        model = kind().eval()
        one, two = (count_flops(model, partial(model, torch.empty(1, 3, 224, width))) for width in (224, 448))
    # But for the position embedding's resizing, which is of none of the parts.
    counts = ([(part.name, part.flops) for part in count.parts if part.name != '(elsewhere)'] for count in (one, two))
    flops, wide = map(dict, counts)
    assert wide == {name: 2 * n for name, n in flops.items()} and two.bigla == 2 * one.bigla
    assert two.flops - sum(wide.values()) < 1e-3 * two.flops


class Odd(nn.Module):
    """Calls parts as detectors do: past `__call__`, and through methods of their own."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4)])

        def forward(self, x):
            return self.layers[0](x) @ torch.ones(8, 8)

        def predict(self, x):
            return self.layers[1](self.layers[0](x))

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused, self.no_params = self.Head(), nn.Linear(3, 3), nn.ReLU()
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        self.head.forward(x)
        return self.no_params(self.head.predict(x) @ self.scale)


def test_parts():
    model = Odd()
    counts = count_flops(model, lambda: model(torch.ones(10, 4)))
    parts = {part.name: (part.type, part.params, part.flops) for part in counts.parts}
    assert parts['head'] == ('Head', 76, 10 * (4 * 8 + 8 * 8 + 4 * 8 + 8 * 4))
    assert parts['unused'] == ('Linear', 12, 0)
    assert parts['(elsewhere)'] == ('Odd', 16, 10 * 4 * 4)
    assert len(parts) == 3 and counts.params == 104


def test_what_parts_share_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False)))
    model[1].append(model[0])
    model[1][0].forward = model[1][0].forward  # as tools that wrap modules leave it
    own = model[1][0].forward
    counts = count_flops(model, lambda: model(torch.ones(1, 4)))
    assert counts.params == 36 and counts.flops == 3 * 16 and len(counts.parts) == 2
    assert model[1][0].forward is own


def test_operators_that_the_counter_does_not_know():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()  # in one fused operator, were it not for us
    x = torch.rand(1, 5, 8)
    projections, products = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8
    assert count_flops(attention, lambda: attention(x, x, x)).flops == projections + products
    deformable = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)
    x, offset = torch.rand(1, 4, 5, 7), torch.zeros(1, 18, 5, 7)
    assert count_flops(deformable, lambda: deformable(x, offset)).flops == 6 * 4 * 9 * 5 * 7


def test_traffic():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.Conv1d(5, 3, 1, bias=False))
    x = torch.rand(1, 5, 4)
    assert count_flops(net, lambda: net(x)).traffic == (20 + 32 + 40) + (40 + 15 + 24)
    q = torch.rand(1, 2, 7, 4)
    assert count_flops(net, lambda: F.scaled_dot_product_attention(q, q, q)).traffic == 4 * q.numel()  # and no scores


def test_config_of_another_library():
    with pytest.raises(SetupError, match="default_scope must be one of .*'mmseg'.*got 'mmagic'"):
        config_flops(ConfigDict(default_scope='mmagic', model=dict()))
