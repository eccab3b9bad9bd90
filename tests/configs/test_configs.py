"""Every config of the project: it parses, is named and listed as it should be, fits its backbone, builds, has the
optimizer of its recipe, and trains a step and predicts on digit scenes at a reduced size."""

import copy
import re
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import mmengine.config.utils
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torchvision.ops import StochasticDepth

import mmvig  # noqa: F401  resolves what the configs name
from mmvig.apis.measure import build
from mmvig.apis.zoo import find_model
from mmvig.datasets.digit_layout import CLASSES, SEG_CLASSES
from mmvig.engine.layer_decay import find_backbones
from mmvig.engine.runner import build_runner
from mmvig.engine.settings import set_dataloader_defaults

ROOT = Path(__file__).parents[2]
LIBRARIES = ('mmdet', 'mmpretrain', 'mmseg')
LEAVES = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)
FOLDERS = sorted({path.parent for path in LEAVES})
TO_TRAIN = [path for path in LEAVES if not re.search(r'in1k-\d+px$', path.stem)]
AMP = [path for path in TO_TRAIN if re.search(r'[_-]amp[_-]', path.stem)]
SIDE = 128  # pixels of a scene, reduced
CROP_SIDE = 64  # of a crop with one digit


read_once = cache(mmengine.config.utils.load)  # MMEngine reads all metafiles of a library for each `library::...`


def ids(path: Path) -> str:
    return path.stem


@cache
def parsed(path: Path) -> Config:
    with mock.patch.object(mmengine.config.utils, 'load', read_once):
        return Config.fromfile(path)


def load(path: Path, amp: bool = False) -> Config:
    """The config with its default scope set, without weights to download and, unless `amp`, mixed precision."""
    cfg = copy.deepcopy(parsed(path))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if 'optim_wrapper' in cfg and not amp:
        cfg.optim_wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            cfg.optim_wrapper.pop(key, None)
    set_dataloader_defaults(cfg)
    return cfg


@cache
def skeleton(path: Path) -> torch.nn.Module:
    """The model without memory for its parameters: made in no time, whatever its size."""
    return build(load(path))


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('scenes') / 'data'
    command = [sys.executable, ROOT / 'tools/make_digit_scenes.py', out, '--train', 4, '--test', 2, '--workers', 1]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return out


# ---- files


def test_there_are_configs_of_every_library():
    counts = Counter(path.parts[-3] for path in LEAVES)
    assert counts.keys() == set(LIBRARIES) and min(counts.values()) >= 10


@pytest.mark.parametrize('path', LEAVES, ids=ids)
def test_leaves_are_short(path):
    assert len(path.read_text().splitlines()) <= 25


MODEL = r'vigh?-gla-(nano|tiny|small|base)(-adapter)?'
RIVAL = r'r50|resnet50|swin-t-p4-w7|swin-tiny|swin-tiny-patch4-window7'  # on digits alone, to compare
NAMES = dict(
    # algorithm_backbone[_neck][_settings]_dataset
    mmdet=rf'[a-z0-9-]+_({MODEL}|{RIVAL})_((simple-)?fpn_)?([a-z0-9-]+_)*(coco|digits)',
    # model_gpus x batch[-settings]_dataset[-pixels]
    mmpretrain=rf'({MODEL}|{RIVAL})_\d+xb\d+(-amp)?_(in1k|digits)(-\d+px)?',
    # backbone and algorithm, in whatever order, gpus x batch[-amp]-schedule, dataset-crop
    mmseg=rf'(({MODEL}|{RIVAL})_[a-z0-9]+|[a-z0-9]+_{MODEL})_\d+xb\d+-(amp-)?\d+k_(ade20k|cityscapes|digits)-\d+x\d+',
)


def test_names():
    """Basenames are unique, since mim finds configs by them, and have the fields of the libraries' conventions."""
    assert not [name for name, count in Counter(path.stem for path in LEAVES).items() if count > 1]
    assert not [path.stem for path in LEAVES if not re.fullmatch(NAMES[path.parts[-3]], path.stem)]


@pytest.mark.parametrize('path', LEAVES, ids=ids)
def test_names_tell_the_settings(path):
    cfg, name = parsed(path), path.stem
    assert cfg.default_scope == path.parts[-3]
    if arch := re.search(r'gla-(tiny|small|base)', name):
        assert cfg.model.backbone.arch == arch[1]
        kind = 'ViGH' if 'vigh-' in name else 'ViGAdapter' if '-adapter' in name else 'ViG'
        assert cfg.model.backbone.type == f'mmvig.{kind}'
    if path in TO_TRAIN:
        assert cfg.optim_wrapper.get('type', 'OptimWrapper') == ('AmpOptimWrapper' if path in AMP else 'OptimWrapper')
    if batch := re.search(r'_(\d+)xb(\d+)', name):
        loader = cfg.train_dataloader or cfg.test_dataloader
        assert loader.batch_size == int(batch[2])
        if path in TO_TRAIN and 'digits' not in name:
            assert cfg.auto_scale_lr.base_batch_size == int(batch[1]) * int(batch[2])
    if crop := re.search(r'-(\d+)x(\d+)$', name):
        assert tuple(cfg.model.data_preprocessor.size) == (int(crop[1]), int(crop[2]))
        assert cfg.get('crop_size', cfg.get('image_scale')) == cfg.model.data_preprocessor.size
    if pixels := re.search(r'-(\d+)px$', name):
        sizes = [step.get('crop_size', step.get('scale')) for step in cfg.test_dataloader.dataset.pipeline]
        assert {int(pixels[1]), (int(pixels[1]),) * 2} & set(sizes)
    if schedule := re.search(r'(\d)x_coco|(\d+)e_coco', name):
        epochs = 12 * int(schedule[1]) if schedule[1] else int(schedule[2])
        assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end == epochs
    if schedule := re.search(r'-(\d+)k_', name):
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == 1000 * int(schedule[1])


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: '-'.join(folder.parts[-2:]))
def test_readme_and_metafile_list_the_configs(folder):
    leaves = {path.name for path in LEAVES if path.parent == folder}
    assert set(re.findall(r'\]\(\./([\w.-]+\.py)\)', (folder / 'README.md').read_text())) == leaves
    entries = mmengine.load(folder / 'metafile.yml')['Models']
    assert sorted(entry['Config'] for entry in entries) == sorted(
        (folder / name).relative_to(ROOT).as_posix() for name in leaves
    )
    for entry in entries:
        backbone = parsed(ROOT / entry['Config']).model.backbone
        if 'Weights' in entry:
            arch = f'{"vig_h" if backbone.type == "mmvig.ViGH" else "vig"}_{backbone.arch[0]}_'
            assert entry['Weights'].split('/')[-1].startswith(arch)
            assert entry['Name'].startswith(Path(entry['Config']).stem.split('_')[0] + '_3rdparty_in1k')
        else:
            assert entry['Name'] == Path(entry['Config']).stem
        assert 'Results' not in entry  # none was measured


@pytest.mark.parametrize('path', sorted((ROOT / 'configs/_base_').glob('*.py')), ids=ids)
def test_the_address_of_the_weights_is_that_of_the_metafile(path):
    cfg = parsed(path)
    (backbone,) = cfg.values()
    assert path.stem.endswith(backbone.arch)
    assert backbone.init_cfg.checkpoint == find_model(f'{path.stem}_3rdparty_in1k').weights


def test_model_index():
    listed = mmengine.load(ROOT / 'model-index.yml')['Import']
    assert listed == [(folder / 'metafile.yml').relative_to(ROOT).as_posix() for folder in FOLDERS]
    metafiles = [mmengine.load(ROOT / file) for file in listed]
    models = [model for metafile in metafiles for model in metafile['Models']]
    assert len({model['Name'] for model in models}) == len(models) == len(LEAVES)
    collections = {collection['Name'] for metafile in metafiles for collection in metafile.get('Collections', ())}
    assert {model['In Collection'] for model in models if 'In Collection' in model} == collections


# ---- models


@cache
def outputs(backbone: str) -> tuple[list[int], list[int]]:
    """Channels and strides of the maps that a backbone, its config as text, really makes."""
    model = MODELS.build(literal_eval(backbone))
    model.eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 64, 64))
    return [x.shape[1] for x in maps], [64 // x.shape[3] for x in maps]


@pytest.mark.parametrize('path', LEAVES, ids=ids)
def test_builds_with_the_widths_of_its_backbone(path):
    cfg = load(path)
    skeleton(path)
    channels, strides = outputs(repr(cfg.model.backbone.to_dict()))
    if cfg.default_scope == 'mmpretrain':
        assert [cfg.model.head.in_channels] == channels
        assert strides == [16 if cfg.model.backbone.type == 'mmvig.ViG' else 32]
    elif cfg.default_scope == 'mmdet':
        widths = cfg.model.neck.in_channels
        assert (widths if isinstance(widths, list) else [widths]) == channels
        assert strides == ([16] if cfg.model.neck.type == 'mmvig.SimpleFPN' else [4, 8, 16, 32][-len(channels) :])
    else:
        assert strides == [4, 8, 16, 32]
        assert cfg.model.decode_head.in_channels == channels
        if 'auxiliary_head' in cfg.model:
            assert cfg.model.auxiliary_head.in_channels == channels[cfg.model.auxiliary_head.in_index]


# The published learning rate (scaled to the batch of 1024), weight decay and drop path of each classifier, and what
# Vision-RWKV trains its ViT-Adapters with: learning rate, weight decay, layer-wise decay, drop path.
IMAGENET = {
    'vig-gla-tiny': (2e-3, 0.05, 0.0),
    'vig-gla-small': (1e-3, 0.1, 0.2),
    'vig-gla-base': (2e-3, 0.05, 0.5),
    'vigh-gla-tiny': (1.6e-3, 0.05, 0.2),
    'vigh-gla-small': (1e-3, 0.05, 0.3),
    'vigh-gla-base': (1e-3, 0.05, 0.6),
}
PLAIN = {
    ('mmdet', 'tiny'): (2e-4, 0.01, 0.85, 0.1),
    ('mmdet', 'small'): (1e-4, 0.05, 0.85, 0.2),
    ('mmdet', 'base'): (1e-4, 0.05, 0.85, 0.3),
    ('mmseg', 'tiny'): (1.2e-4, 0.01, 0.95, 0.1),
    ('mmseg', 'small'): (6e-5, 0.01, 0.85, 0.2),
    ('mmseg', 'base'): (6e-5, 0.01, 0.8, 0.3),
}


def recipe(path: Path) -> dict[str, float]:
    """lr and weight decay, of backbone and head relative to lr, rate of the layer-wise decay, drop path if not None."""
    library, name = path.parts[-3], path.stem
    plain = dict(backbone=1.0, head=1.0, rate=1.0, drop_path=None)
    if 'digits' in name:
        lr = 1e-3 if 'quickstart' in name else 2e-4 if '1536px' in name else 4e-4
        lr = dict(mmdet=lr, mmpretrain=3e-4, mmseg=4e-4)[library]
        return plain | dict(lr=lr, decay=0.05, drop_path=0.0 if 'gla' in name else None)
    if library == 'mmpretrain':
        lr, decay, drop_path = IMAGENET[name.split('_')[0]]
        return plain | dict(lr=lr, decay=decay, drop_path=drop_path)
    arch = re.search(r'gla-(tiny|small|base)', name)[1]
    drop_path = IMAGENET[f'vigh-gla-{arch}'][2]
    if 'vig-gla' in name:
        lr, decay, rate, drop_path = PLAIN[library, arch]
        return plain | dict(lr=lr, decay=decay, rate=rate, drop_path=drop_path)
    if name.startswith('dino'):
        return plain | dict(lr=1e-4, decay=1e-4, backbone=0.1, drop_path=drop_path)
    if name.startswith('mask2former'):
        return plain | dict(lr=1e-4, decay=0.05, backbone=0.1, drop_path=drop_path)
    if 'segformer' in name:
        return plain | dict(lr=6e-5, decay=0.01, head=10.0, drop_path=drop_path)
    lr, decay = dict(mmdet=(1e-4, 0.05), mmseg=(6e-5, 0.01))[library]
    return plain | dict(lr=lr, decay=decay, drop_path=drop_path)


@pytest.mark.parametrize('path', TO_TRAIN, ids=ids)
def test_parameter_groups_are_those_of_the_recipe(path):
    """Also: norms, biases and every other vector of the backbone are free of decay; matrices and kernels are not."""
    cfg, wanted = load(path), recipe(path)
    model = skeleton(path)
    if wanted['drop_path'] is not None:
        rates = [module.p for module in model.backbone.modules() if isinstance(module, StochasticDepth)]
        assert max(rates) == pytest.approx(wanted['drop_path'])
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    given = {p: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    layers = find_backbones(model)['backbone.'] if wanted['rate'] < 1 else None
    own_rules = ('query_embed', 'query_feat', 'level_embed')  # Mask2Former's: embeddings without decay
    for name, p in model.named_parameters():
        lr, decay = wanted['lr'], 0.0 if p.dim() <= 1 else wanted['decay']
        if name.startswith('backbone.'):
            lr *= wanted['backbone']
            if layers is not None:
                depth, num_layers = layers.get_layer_depth(name, 'backbone.')
                lr *= wanted['rate'] ** (num_layers - 1 - depth)
        elif name.startswith('decode_head.'):
            lr *= wanted['head']
            if any(key in name for key in own_rules):
                decay = 0.0
        assert given[p] == (pytest.approx(lr), decay), name


@pytest.mark.parametrize('path', LEAVES, ids=ids)
def test_high_resolution_recomputes(path):
    high = re.search(r'1536-1x|1024x1024', path.stem)
    assert parsed(path).model.backbone.get('with_cp', False) == bool(high)


# ---- training and prediction


def steps(node: Any) -> Iterator[dict]:
    """Every transform of a pipeline, those inside others too."""
    if isinstance(node, dict):
        if 'type' in node:
            yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from steps(value)


def shrink(cfg: Config, scenes: Path) -> None:
    """Digit scenes for the config's data, small images, few proposals; the rest stays: pipeline, model, optimizer."""
    side = CROP_SIDE if cfg.default_scope == 'mmpretrain' else SIDE
    for split, loader in (('train', cfg.train_dataloader), ('test', cfg.test_dataloader)):
        if loader is None:
            continue
        pipeline = loader.dataset.pipeline
        for step in steps(pipeline):
            for key, small in (
                ('scale', (side, side)),
                ('scales', [(side, side * 3 // 4), (side, side)]),
                ('crop_size', (side, side)),
                ('max_size', side),
            ):
                if key in step:
                    step[key] = small
            if step.type == 'RandomChoiceResize' and 'max_size' in step:  # of the short side alone
                step.scales = [side // 2, side]
            if step.type in ('RandomResizedCrop', 'ResizeEdge', 'CenterCrop'):
                step.update({key: side for key in ('scale', 'crop_size') if key in step})
        loader.dataset = data(cfg.default_scope, split, scenes) | dict(pipeline=pipeline)
        zero_is_ignored = [step.reduce_zero_label for step in steps(pipeline) if 'reduce_zero_label' in step]
        if zero_is_ignored:
            loader.dataset.reduce_zero_label = zero_is_ignored[0]
        loader.update(batch_size=2 if split == 'train' else 1, num_workers=0, persistent_workers=False)
    model = cfg.model
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = (side, side)
        if model.test_cfg.mode == 'slide':
            model.test_cfg.update(crop_size=(side, side), stride=(side * 2 // 3,) * 2)
    if cfg.default_scope == 'mmdet':
        model.data_preprocessor.pad_size_divisor = 32
        if 'rpn_head' in model:
            model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=50)
            model.test_cfg.rpn.update(nms_pre=200, max_per_img=20)
            for stage in model.train_cfg.rcnn if isinstance(model.train_cfg.rcnn, list) else [model.train_cfg.rcnn]:
                stage.sampler.num = 32
            model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
        if 'num_queries' in model:
            model.num_queries = model.test_cfg.max_per_img = 50


def data(library: str, split: str, scenes: Path) -> dict:
    if library == 'mmpretrain':
        return dict(type='CustomDataset', data_root=str(scenes), data_prefix=f'crops/{split}', classes=list(CLASSES))
    if library == 'mmdet':
        return dict(
            type='CocoDataset',
            data_root=str(scenes),
            metainfo=dict(classes=CLASSES),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'images/{split}/'),
            test_mode=split == 'test',
        )
    return dict(
        type='BaseSegDataset',
        data_root=str(scenes),
        metainfo=dict(classes=SEG_CLASSES, palette=[[20 * i] * 3 for i in range(11)]),
        img_suffix='.jpg',
        data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
        test_mode=split == 'test',
    )


def first_batch(loader: dict) -> dict:
    return next(iter(Runner.build_dataloader(loader, seed=0)))


def train_a_step(model: torch.nn.Module, wrapper: OptimWrapper, batch: dict) -> None:
    """Losses are finite, and every parameter of the backbone that trains has a gradient, and it is finite."""
    with mock.patch.object(wrapper, 'zero_grad'):  # the gradients are looked at afterwards
        losses = model.train().train_step(batch, wrapper)
    assert losses['loss'] > 0 and all(torch.isfinite(torch.as_tensor(loss)).all() for loss in losses.values())
    trained = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert any(p.grad.any() for p in trained.values())


def predict(model: torch.nn.Module, batch: dict) -> None:
    """The scores are finite, whatever they score."""
    with torch.no_grad():
        results = model.eval().test_step(batch)
    for result in results:
        if 'pred_score' in result:
            assert result.pred_score.sum().item() == pytest.approx(1, abs=1e-3)
        elif 'seg_logits' in result:
            assert result.seg_logits.data.isfinite().all()
            assert result.pred_sem_seg.data.shape[-2:] == result.ori_shape
        else:
            assert result.pred_instances.scores.isfinite().all() and result.pred_instances.bboxes.isfinite().all()


# One of each kind; a config in mixed precision does on a CPU what its twin does.
STEP_IN_CI = re.compile(
    r'mask-rcnn_vigh-gla-tiny_fpn_(1x|1536-1x|ms-crop-3x)_coco|mask-rcnn_vig-gla-tiny(_simple|-adapter_)?.*(?<!amp)-?1x_coco'
    r'|retinanet.*|.*nano.*|(vig-gla-small|vigh?-gla-tiny)_.*in1k.*|vigh-gla-tiny_(upernet|segformer)_8xb2-160k.*'
    r'|vig-gla-tiny-adapter_upernet.*'
)


def fast_or_slow(path: Path):
    fast = STEP_IN_CI.fullmatch(path.stem) and (path not in AMP or path.parts[-3] == 'mmpretrain')
    return pytest.param(path, id=path.stem, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize('path', [fast_or_slow(path) for path in LEAVES])
def test_a_training_step_and_a_prediction_on_digit_scenes(path, scenes):
    cfg = load(path)
    step_and_predict(cfg, scenes, device='cpu')


class StopAtTheSecond(Hook):
    """A schedule as long as the config has it, and no more of it than two iterations."""

    class Enough(Exception):
        pass

    def after_train_iter(self, runner: Runner, batch_idx: int, **_) -> None:
        if runner.iter == 1:
            raise self.Enough


OWN_SCHEDULES = (
    'mmdet/vigh/mask-rcnn_vigh-gla-tiny_fpn_1x_coco.py',
    'mmdet/vigh/dino-4scale_vigh-gla-tiny_8xb2-12e_coco.py',
    'mmpretrain/vig/vig-gla-tiny_8xb128_in1k.py',
    'mmseg/vigh/vigh-gla-tiny_upernet_8xb2-160k_ade20k-512x512.py',
)


@pytest.mark.slow
@pytest.mark.parametrize('name', OWN_SCHEDULES, ids=lambda name: Path(name).stem)
def test_trains_by_our_runner_with_the_schedule_of_its_library(name, scenes, tmp_path):
    cfg = load(ROOT / 'configs' / name)
    shrink(cfg, scenes)
    cfg.work_dir = str(tmp_path)
    for key in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{key}_{part}'] = None
    runner = build_runner(cfg)
    runner.register_hook(StopAtTheSecond())
    before = {key: value.clone() for key, value in runner.model.backbone.state_dict().items()}
    with pytest.raises(StopAtTheSecond.Enough):
        runner.train()
    assert any(not before[key].equal(value) for key, value in runner.model.backbone.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize('path', AMP, ids=ids)
def test_a_step_in_half_precision(path, scenes):
    cfg = load(path, amp=True)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 128.0)  # a dynamic one starts where the first gradients may overflow
    step_and_predict(cfg, scenes, device='cuda')


def step_and_predict(cfg: Config, scenes: Path, device: str) -> None:
    shrink(cfg, scenes)
    if cfg.model.backbone.type.startswith('mmvig.'):
        cfg.model.backbone.drop_path_rate = 0.0  # a block that is skipped for every image has no gradient
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device)
    if cfg.get('train_dataloader') is not None:
        train_a_step(model, build_optim_wrapper(model, cfg.optim_wrapper), first_batch(cfg.train_dataloader))
    predict(model, first_batch(cfg.test_dataloader))
