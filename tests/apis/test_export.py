"""Exported files against the models they were made of, at other sizes than they were traced with."""

import pytest
import torch
from mmengine.config import ConfigDict

from mmvig.apis.export import (
    ExportError,
    Maps,
    average_pool,
    build_exportable,
    export_program,
    save_onnx,
    save_program,
    worst_difference,
)
from mmvig.models import SimpleFPN, ViG, ViGAdapter
from mmvig.models.layers import Block, LayerNorm
from mmvig.models.layers.deformable_attention import DeformableAttention

VIGH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.1)
VIG = dict(embed_dims=16, depth=4, num_heads=2, act=True, drop_path_rate=0.1)
ADAPTER = dict(VIG, conv_dims=4, deform_heads=2, deform_points=1, deform_ratio=0.5, ffn_ratio=0.25)
# One group of tokens and several, sides that are no multiples of a stride, and the size of ViG's position embedding.
SIZES = [(224, 224), (96, 130), (61, 75), (300, 500)]
SEGMENTOR = ConfigDict(
    default_scope='mmseg',
    model=dict(
        type='EncoderDecoder',
        backbone=dict(type='mmvig.ViGH', arch=VIGH),
        decode_head=dict(
            type='UPerHead',
            in_channels=[8, 16, 24, 32],
            in_index=[0, 1, 2, 3],
            channels=16,
            num_classes=5,
            norm_cfg=dict(type='BN'),
            align_corners=False,
        ),
        test_cfg=dict(mode='whole'),
    ),
)
MODELS = dict(
    upernet=lambda: build_exportable(SEGMENTOR, None, 'model'),
    simple_fpn=lambda: Maps(ViG(VIG), SimpleFPN(16, 8, num_outs=5)),
    adapter=lambda: Maps(ViGAdapter(ADAPTER, norm_cfg=dict(type='BN'))),
)


class OneBlock(torch.nn.Module):
    """The operator inside a block, on the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(12, 3, LayerNorm, 8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.block(image.repeat(1, 4, 1, 1).permute(0, 2, 3, 1))


def test_the_operator(monkeypatch, tmp_path):
    """From less than a group of chunks to many; the groups are short, for the graph to be small."""
    monkeypatch.setattr('bigla.chunked.MAX_BITS', 2)
    monkeypatch.setattr('bigla.chunked.GROUP', 4)
    model = OneBlock().eval()
    save_program(export_program(model), tmp_path / 'block.pt2')
    sizes = [(2, 3), (4, 5), (16, 31), (16, 33)]
    assert worst_difference(tmp_path / 'block.pt2', model, sizes) < 1e-5


@pytest.mark.parametrize('bins', [(1, 1), (2, 5), (3, 3), (6, 6)])
@pytest.mark.parametrize('size', [(1, 1), (3, 5), (7, 8), (19, 32)])
def test_average_pool(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(average_pool(x, bins), torch.nn.functional.adaptive_avg_pool2d(x, bins))


class Pools(torch.nn.Module):
    """UperNet's pools of the image, brought back to its size."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        pools = [torch.nn.functional.adaptive_avg_pool2d(image, bins) for bins in (1, 2, 3, 6)]
        return sum(torch.nn.functional.interpolate(pool, image.shape[2:], mode='bilinear') for pool in pools)


def test_pools_of_any_size(tmp_path):
    """Traced with sides that leave other remainders, and larger ones, than those that it is run with."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, file = Pools().eval(), tmp_path / 'pools.onnx'
    save_onnx(export_program(model, (7, 8)), file)
    assert worst_difference(file, model, [(3, 5), (7, 8), (12, 6), (19, 32)]) < 1e-5


class Grids(torch.nn.Module):
    """Deformable attention of the image's pixels to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DeformableAttention(3, 1, num_levels=1, num_points=2, value_ratio=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens, grids = image.flatten(2).mT, [image.shape[2:]]
        return self.attention(tokens, tokens, grids, grids)


def test_grids_of_any_size(tmp_path):
    model = Grids().eval()
    save_program(export_program(model, (7, 8)), tmp_path / 'grids.pt2')
    assert worst_difference(tmp_path / 'grids.pt2', model, [(3, 5), (7, 8), (19, 32)]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_onnx(name, tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, file = MODELS[name]().eval(), tmp_path / 'model.onnx'
    save_onnx(export_program(model), file)
    assert worst_difference(file, model, SIZES) < 1e-4


def test_what_cannot_be_exported():
    detector = ConfigDict(SEGMENTOR, default_scope='mmdet')
    with pytest.raises(ExportError, match="part='model' is for mmseg and mmpretrain"):
        build_exportable(detector, None, 'model')
    with pytest.raises(ExportError, match="this model has none; take 'backbone'"):
        build_exportable(SEGMENTOR, None, 'neck')
    with pytest.raises(ExportError, match='must be of different sides'):
        export_program(OneBlock(), (64, 64))
