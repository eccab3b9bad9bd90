"""Published, nested, bare and foreign files, into a backbone and into whole models."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint

import mmvig  # noqa: F401  makes MMEngine read such files
from mmvig.apis import convert_checkpoint
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.models import ViG, ViGH
from mmvig.models.checkpoints import is_published, normalise_checkpoint, rename_published, resize_pos_embed

ROOT = Path(__file__).parents[2]
KEYS = json.loads((ROOT / 'tests/reference/keys.json').read_text())


def published(model: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(shape) * 0.02 for name, shape in KEYS[model].items()}


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> dict[str, Path]:
    """ViG-T and ViG-H-T in every form that a user may hold."""
    folder = tmp_path_factory.mktemp('files')
    made = {}
    for model in ('vig-t', 'vig-h-t'):
        weights = published(model)
        for form, content in {
            'nested': {'model': weights},
            'bare': weights,
            'ours': {'state_dict': rename_published(weights)},
            'backbone': {
                name.removeprefix('backbone.'): value
                for name, value in rename_published(weights).items()
                if name.startswith('backbone.')
            },
        }.items():
            made[f'{model} {form}'] = folder / f'{model}_{form}.pth'
            torch.save(content, made[f'{model} {form}'])
    return made


def build(model: str, **kwargs):
    return (ViGH if model == 'vig-h-t' else ViG)('tiny', out_indices=-1, **kwargs)


@pytest.mark.parametrize('form', ['nested', 'bare', 'ours', 'backbone'])
@pytest.mark.parametrize('model', ['vig-t', 'vig-h-t'])
def test_init_cfg_loads_into_the_backbone(files, model, form):
    net = build(model, init_cfg=dict(type='Pretrained', checkpoint=str(files[f'{model} {form}'])))
    net.init_weights()
    want = rename_published(published(model))
    for name, value in net.state_dict().items():
        assert torch.equal(value, want[f'backbone.{name}']), name


@pytest.mark.parametrize('form', ['nested', 'ours'])
def test_prefix_and_deprecated_alias(files, form):
    path = str(files[f'vig-h-t {form}'])
    want = rename_published(published('vig-h-t'))['backbone.stem.0.conv.weight']
    with_prefix = build('vig-h-t', init_cfg=dict(type='Pretrained', checkpoint=path, prefix='backbone.'))
    alias = build('vig-h-t', pretrained=path)
    for net in (with_prefix, alias):
        net.init_weights()
        assert torch.equal(net.stem[0].conv.weight, want)


@pytest.mark.parametrize('form', ['nested', 'bare', 'ours'])
@pytest.mark.parametrize('model', ['vig-t', 'vig-h-t'])
def test_whole_classifier(files, model, form):
    """`load_from` fills backbone and head of mmpretrain's classifier."""
    from mmpretrain.utils import register_all_modules

    register_all_modules()
    kind, dims = ('mmvig.ViGH', 768) if model == 'vig-h-t' else ('mmvig.ViG', 192)
    classifier = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type=kind, arch='tiny', out_indices=(-1,)),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=1000, in_channels=dims),
        )
    )
    load_checkpoint(classifier, str(files[f'{model} {form}']))
    want = rename_published(published(model))
    assert want.keys() == classifier.state_dict().keys()
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, want[name]), name


def test_plain_torch_loading_renames_too():
    net = build('vig-h-t')
    result = net.load_state_dict(published('vig-h-t-backbone') | {'extra': torch.zeros(1)}, strict=False)
    assert set(result.unexpected_keys) == {'extra', 'norm0.weight', 'norm0.bias', 'norm1.weight', 'norm1.bias'} | {
        'norm2.weight',
        'norm2.bias',
    }
    assert not result.missing_keys


def test_missing_and_unexpected_are_listed(tmp_path, capsys):
    MMLogger.get_instance('test_missing_and_unexpected')  # writes to the stream that is captured here
    weights = published('vig-h-t')
    del weights['layers.2.blocks.1.mlp.fc1.weight']
    weights['spare'] = torch.zeros(1)
    torch.save({'model': weights}, tmp_path / 'odd.pth')
    build('vig-h-t', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'odd.pth'))).init_weights()
    said = ''.join(capsys.readouterr())
    assert 'stages.2.blocks.1.mlp.fc1.weight' in said
    assert 'spare' in said and 'head.fc.weight' in said


def test_nothing_matched_is_an_error(tmp_path):
    torch.save({'model': {'conv1.weight': torch.zeros(1), 'fc.bias': torch.zeros(1)}}, tmp_path / 'resnet.pth')
    for prefix in ({}, {'prefix': 'backbone.'}):
        net = build('vig-t', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'resnet.pth'), **prefix))
        with pytest.raises(
            (CheckpointError, AssertionError), match='nothing in the checkpoint fits ViG|backbone. is not in'
        ):
            net.init_weights()


def test_another_arch_is_an_error(files):
    path = str(files['vig-h-t nested'])
    net = ViGH('base', init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(CheckpointError, match='of another size than ViGH: 93 of 93 .* give the model the arch'):
        net.init_weights()


def test_position_embedding_of_another_grid(tmp_path):
    """Resized on loading, square or not, to what the same embedding gives in `forward`."""
    torch.save({'model': published('vig-t')}, tmp_path / 'vig.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'vig.pth'))
    made_for_224, wide = build('vig-t', init_cfg=init_cfg), build('vig-t', img_size=(96, 192), init_cfg=init_cfg)
    for net in (made_for_224, wide):
        net.init_weights()
    assert wide.pos_embed.shape == (1, 6, 12, 192)
    torch.testing.assert_close(wide.pos_embed, resize_pos_embed(made_for_224.pos_embed, (6, 12)))
    image = torch.rand(1, 3, 96, 192)
    torch.testing.assert_close(wide.eval()(image)[0], made_for_224.eval()(image)[0])
    copy.deepcopy(wide).load_state_dict(made_for_224.state_dict(), strict=True)


def test_resize_of_a_grid():
    """Constants stay, mirroring commutes, the same grid is returned as it is, bfloat16 is computed in float32."""
    grid = torch.rand(1, 14, 14, 3)
    assert resize_pos_embed(grid, (14, 14)) is grid
    torch.testing.assert_close(resize_pos_embed(torch.ones(1, 14, 14, 3), (9, 31)), torch.ones(1, 9, 31, 3))
    torch.testing.assert_close(resize_pos_embed(grid.flip(1), (25, 7)), resize_pos_embed(grid, (25, 7)).flip(1))
    half = grid.bfloat16()
    torch.testing.assert_close(resize_pos_embed(half, (20, 9)), resize_pos_embed(half.float(), (20, 9)).bfloat16())


def test_other_models_are_left_alone():
    resnet = {'state_dict': {'backbone.conv1.weight': torch.zeros(1)}, 'meta': {}}
    assert normalise_checkpoint(resnet) is resnet
    nested = normalise_checkpoint({'model': {'conv1.weight': torch.zeros(1)}, 'epoch': 3})
    assert nested.keys() == {'state_dict', 'epoch'} and list(nested['state_dict']) == ['conv1.weight']
    assert not is_published(nested['state_dict'])
    assert normalise_checkpoint({}) == {}


@pytest.mark.parametrize('model', [name for name in KEYS if not name.endswith('backbone')])
def test_convert(model, tmp_path):
    """Every published model is recognised and written under our names, values untouched."""
    weights = {name: torch.from_numpy(np.zeros(shape, np.float16)) for name, shape in KEYS[model].items()}
    torch.save({'model': weights}, tmp_path / 'in.pth')
    done = convert_checkpoint(tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert (done.model, done.arch[0]) == ('ViGH' if 'h' in model else 'ViG', model[-1])
    assert done.head and done.parameters == sum(w.numel() for w in weights.values())
    written = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert written['state_dict'].keys() == rename_published(weights).keys()
    assert not list(tmp_path.glob('*.part'))


def test_convert_refuses(tmp_path):
    cases = {
        'truncated weights': ({k: v for k, v in published('vig-h-t').items() if 'layers.3' not in k}, 'lacks'),
        'foreign': ({'conv1.weight': torch.zeros(1)}, 'holds no ViG'),
        'a list': ([1, 2], 'holds no ViG'),
    }
    for name, (content, words) in cases.items():
        torch.save(content, tmp_path / 'in.pth')
        with pytest.raises(ValueError, match=words):
            convert_checkpoint(tmp_path / 'in.pth', tmp_path / 'out.pth')
        assert not (tmp_path / 'out.pth').exists(), name


def test_convert_tool(files, tmp_path):
    def run(*args):
        command = [sys.executable, str(ROOT / 'tools/convert_checkpoint.py'), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    out = tmp_path / 'out.pth'
    first = run(files['vig-t nested'], out)
    assert first.returncode == 0 and "ViG arch='tiny', 5,834,536 parameters" in first.stdout
    again = run(files['vig-t nested'], out)
    assert again.returncode != 0 and '--force' in again.stderr
    (tmp_path / 'cut.pth').write_bytes(out.read_bytes()[:5000])
    cut = run(tmp_path / 'cut.pth', tmp_path / 'x.pth')
    assert cut.returncode != 0 and 'cut.pth' in cut.stderr and 'Traceback' not in cut.stderr


def test_resizing_is_bicubic_and_in_float32():
    grid = torch.randn(1, 14, 12, 5)
    want = F.interpolate(grid.permute(0, 3, 1, 2), size=(9, 31), mode='bicubic').permute(0, 2, 3, 1)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(resize_pos_embed(grid, (9, 31)), want)
    assert resize_pos_embed(grid.to('meta'), (9, 31)).shape == want.shape  # where operations are counted


def test_matrices_that_resize_are_kept(monkeypatch):
    """Whatever the mode in which they were made; stand-ins for tensors are not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = {}
    monkeypatch.setattr('mmvig.models.checkpoints._MATRICES', kept)
    grid = torch.randn(1, 6, 7, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert resize_pos_embed(torch.empty(1, 6, 7, 5), (9, 11)).shape == (1, 9, 11, 5)
    assert not kept
    with torch.inference_mode():
        want = resize_pos_embed(grid, (9, 11)).clone()
    assert set(kept) == {(6, 9, torch.device('cpu')), (7, 11, torch.device('cpu'))}
    before = dict(kept)
    grid.requires_grad_()
    got = resize_pos_embed(grid, (9, 11))
    got.sum().backward()
    assert got.detach().equal(want) and grid.grad.abs().max() > 0
    assert all(kept[key] is matrix for key, matrix in before.items()) and len(kept) == 2
