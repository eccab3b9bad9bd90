"""Parity with the published models: `tests/reference/golden.py` says what the files hold."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.registry import MODELS

import bigla.api
from mmvig.models.checkpoints import rename_published

REFERENCE = Path(__file__).parents[1] / 'reference'
TOLERANCE = 1e-4  # relative Frobenius norm, float32

spec = importlib.util.spec_from_file_location('golden', REFERENCE / 'golden.py')
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)

KEYS = json.loads((REFERENCE / 'keys.json').read_text())  # names and shapes of the published models
ARCHS = {'t': 'tiny', 's': 'small', 'b': 'base'}


class Classifier(nn.Module):
    """Backbone, average over the map, linear: what mmpretrain's classifier computes, without its package."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Module()
        self.head.fc = nn.Linear(backbone.out_channels[-1], 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head.fc(self.backbone(image)[-1].mean((2, 3)))


def published(model: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in golden.state_dict(model).items()}


def backbone(model: str, **kwargs) -> nn.Module:
    kind = 'mmvig.ViGH' if model.startswith('vig-h') else 'mmvig.ViG'
    return MODELS.build(dict(type=kind, arch=ARCHS[model.split('-backbone')[0][-1]], **kwargs))


def image(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(golden.inputs(height * 10000 + width, (2, 3, height, width)))


def gap(ours: torch.Tensor, theirs: np.ndarray) -> float:
    theirs = torch.from_numpy(theirs)
    return float((ours.detach().cpu().double() - theirs.double()).norm() / theirs.double().norm())


CASES = sorted(path.stem.removeprefix('g_') for path in REFERENCE.glob('g_*.npz'))


def case(name: str) -> tuple[str, int, int, dict[str, np.ndarray]]:
    model, size = name.split('_')
    height, width = map(int, size.split('x'))
    return model, height, width, dict(np.load(REFERENCE / f'g_{name}.npz'))


def test_all_files_are_there():
    assert len(CASES) == 5


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('name', CASES)
def test_classifier(name, device, monkeypatch):
    """Logits in eval mode, logits in train mode and every parameter's gradient; on a GPU by the Triton kernels."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    model, height, width, want = case(name)
    net = Classifier(backbone(model, out_indices=-1, drop_path_rate=0.0)).to(device)
    renamed = rename_published(published(model))
    net.load_state_dict(renamed)  # strict
    images = image(height, width).to(device)

    with torch.no_grad():
        assert gap(net.eval()(images), want['logits']) < TOLERANCE
    logits = net.train()(images)
    assert gap(logits, want['train_logits']) < TOLERANCE

    (logits * torch.from_numpy(golden.inputs(7, (2, 1000))).to(device)).sum().backward()
    params = dict(net.named_parameters())
    assert len(params) == len(renamed)
    names = dict(zip(published(model), renamed, strict=True))
    measured = [key.removeprefix('grad_norm/') for key in want if key.startswith('grad_norm/')]
    assert len(measured) >= 7
    for theirs in measured:
        ours = names[theirs]
        assert gap(params[ours].grad.norm(), want[f'grad_norm/{theirs}']) < TOLERANCE, theirs
        assert gap(params[ours].grad.flatten()[:64], want[f'grad_head/{theirs}']) < TOLERANCE, theirs


@pytest.mark.gpu
@pytest.mark.filterwarnings('ignore:bigla runs on this GPU without its Triton kernels')
@pytest.mark.parametrize('size', [(224, 224), (513, 800), (1024, 1024)])
@pytest.mark.parametrize('model', ['vig-t', 'vig-h-t'])
def test_bfloat16_logits(model, size, monkeypatch):
    """The kernels' logits under autocast are at most twice as far from float64's as those of the same parts without."""
    net = Classifier(backbone(model, out_indices=-1)).cuda().eval()
    net.load_state_dict(rename_published(published(model)))
    images = image(*size).cuda()
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
        fused = net(images)
        monkeypatch.setattr(bigla.api, '_choose', lambda *_: 'chunked')
        composed = net(images)
        assert not torch.equal(fused, composed)
    with torch.no_grad():
        oracle = net.double()(images.double()).cpu().numpy()
    print(model, size, f'{gap(fused, oracle):.2e} of the kernels, {gap(composed, oracle):.2e} without')
    assert gap(fused, oracle) < 2 * gap(composed, oracle)


@pytest.mark.parametrize('name', [c for c in CASES if not c.startswith('vig-h')])
def test_blocks(name):
    """Tokens of ViG after single blocks, before any norm."""
    model, height, width, want = case(name)
    blocks = sorted(int(key.removeprefix('block')) for key in want if key.startswith('block'))
    net = backbone(model, out_indices=-1).eval()
    net.load_state_dict(published(model), strict=True)
    seen = {}
    for i in blocks:
        net.blocks[i].register_forward_hook(lambda _, __, out, i=i: seen.update({i: out.flatten(1, 2)}))
    with torch.no_grad():
        net(image(height, width))
    assert sorted(seen) == blocks and blocks
    for i in blocks:
        assert gap(seen[i], want[f'block{i}']) < TOLERANCE


@pytest.mark.parametrize('name', [c for c in CASES if c.startswith('vig-h')])
def test_stages(name):
    """The four normed maps of ViG-H's dense variant."""
    model, height, width, want = case(name)
    net = backbone(model).eval()
    net.load_state_dict(published(f'{model}-backbone'), strict=True)
    with torch.no_grad():
        outs = net(image(height, width))
    for i, out in enumerate(outs):
        assert out.shape == want[f'stage{i}'].shape
        assert gap(out, want[f'stage{i}']) < TOLERANCE


PUBLISHED_COUNTS = {  # SPEC of the published models: with the 1000-class head, and dense with four output norms
    'vig-t': (5_834_536, None),
    'vig-s': (22_615_144, None),
    'vig-b': (89_022_184, None),
    'vig-h-t': (28_600_680, 27_833_024),
    'vig-h-s': (50_051_688, 49_284_032),
    'vig-h-b': (88_904_360, 87_881_152),
}


@pytest.mark.parametrize('model', PUBLISHED_COUNTS)
def test_parameters(model):
    """Counts, names and shapes of all six models."""
    with torch.device('meta'):
        classifier = Classifier(backbone(model, out_indices=-1))
    as_classifier, as_dense = PUBLISHED_COUNTS[model]
    assert sum(p.numel() for p in classifier.parameters()) == as_classifier
    theirs = rename_published({k: torch.empty(s, device='meta') for k, s in KEYS[model].items()})
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in classifier.state_dict().items()}
    if as_dense:
        with torch.device('meta'):
            dense = backbone(model)
        assert sum(p.numel() for p in dense.parameters()) == as_dense
