"""From a config file and command-line switches to the config that a Runner is built from."""

import inspect
import os
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.runner import Runner

from mmvig.apis.backbones import VIGH
from mmvig.apis.swap_backbone import swap_backbone
from mmvig.engine.config_diff import compare, parse

__all__ = [
    'SetupError',
    'add_cfg_options',
    'add_swap_arguments',
    'key_value',
    'load_config',
    'merge_options',
    'set_dataloader_defaults',
    'use_amp',
    'save_predictions',
    'show_progress',
    'use_auto_scale_lr',
    'use_tta',
    'use_visualization',
]

# What a Runner looks for at the top of a config, which need not spell it out. It objects to wrong contents itself.
RUNNER_SETTINGS = {
    *inspect.signature(Runner.__init__).parameters,
    'activation_checkpointing',
    'compile',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'sync_bn',
}


class SetupError(ValueError):
    """A run that cannot start as it was asked for; the message says what would work."""


def key_value(text: str) -> str:
    """The argparse type of one `--cfg-options` word, as mmengine.config.DictAction goes on to split it."""
    if '=' not in text:
        raise ArgumentTypeError(f'{text!r} is not of the form KEY=VALUE (without blanks)')
    return text


def add_cfg_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        type=key_value,
        metavar='KEY=VALUE',
        help='override settings of the config, train_cfg.max_epochs=2 model.backbone.out_indices="[0,1]"; '
        'a plus adds one that the config does not spell out: +model.backbone.with_cp=True',
    )


def add_swap_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--backbone', metavar='NAME', help=f'put this backbone into the config: {", ".join(VIGH)}')
    parser.add_argument(
        '--undilate',
        action='store_true',
        help='with --backbone: take maps of strides 4 to 32 in place of dilated ones, where the heads allow it',
    )


def load_config(
    path: str,
    *,
    options: dict[str, Any] | None,
    work_dir: str | None,
    launcher: str,
    backbone: str | None = None,
    undilate: bool = False,
    say: Callable[[str], None] = print,
) -> Config:
    """Reads a config, puts `backbone` into it, merges `--cfg-options` and decides where the run writes.

    `path`: a file, or an address among the configs of an installed package, `mmdet::retinanet/...py`.
    `backbone`: see `swap_backbone`; `say` is told what that changes.
    `work_dir`: the argument, else the config's own, else `work_dirs/<name of the config file>`, with the backbone's
    name at its end.

    Raises:
        SetupError: there is no such file, the config does not take the backbone, or see `merge_options`.
    """
    cfg = _read_config(path)
    if backbone is not None:
        cfg = _swap(cfg, backbone, undilate, say)
    elif undilate:
        raise SetupError('--undilate: this is about exchanging the backbone; add --backbone.')
    cfg.launcher = launcher
    merge_options(cfg, options or {})
    name = Path(path).stem + (f'_{backbone}' if backbone else '')
    cfg.work_dir = work_dir or cfg.get('work_dir') or os.path.join('work_dirs', name)
    return cfg


def _read_config(path: str) -> Config:
    if '::' in path:
        package, _, address = path.partition('::')
        try:
            return get_config(path)
        except (AssertionError, FileNotFoundError, ImportError) as error:
            raise SetupError(f'config: {package} has no config {address}: {error}') from error
    if not os.path.isfile(path):
        raise SetupError(f'config: there is no file {path} in {os.getcwd()}.')
    return Config.fromfile(path)


def _swap(cfg: Config, backbone: str, undilate: bool, say: Callable[[str], None]) -> Config:
    try:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter('always')
            swapped = swap_backbone(cfg, backbone, undilate=undilate)
    except ValueError as error:
        raise SetupError(f'--backbone: {error}') from error
    say(f'With {backbone} for its backbone, the config changes:')
    for name, (before, after) in compare(parse(cfg.pretty_text), swapped).items():
        say(f'  {name}: {before} -> {after}')
    for notice in notices:
        if notice.category is UserWarning:
            say(f'Note: {notice.message}.')
    return swapped


def merge_options(cfg: Config, options: dict[str, Any]) -> None:
    """Overrides settings of `cfg` by dotted key; `+key` adds one that the config does not spell out.

    MMEngine's merge adds misspelt keys, which nothing reads.

    Raises:
        SetupError: a key without `+` matches nothing in the config.
    """
    tree = cfg.to_dict()
    for key in options:
        if not key.startswith('+') and key.split('.')[0] not in RUNNER_SETTINGS - tree.keys():
            _require(tree, key)
    cfg.merge_from_dict({key.removeprefix('+'): value for key, value in options.items()})


def _require(tree: dict, key: str) -> None:
    node = tree
    for part in key.split('.'):
        children = _children(node)
        if part not in children:
            names = list(_names(tree))
            similar = [name for name in names if name.endswith(f'.{key}')] + get_close_matches(key, names, 3)
            hint = f' Did you mean {" or ".join(dict.fromkeys(similar[:3]))}?' if similar else ''
            raise SetupError(
                f'--cfg-options: {key} matches nothing in the config.{hint} To add a setting that the config does not '
                f'spell out, put a plus before it: +{key}=...'
            )
        node = children[part]


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, dict):
        return {str(key): value for key, value in node.items()}
    return {str(index): value for index, value in enumerate(node)} if isinstance(node, (list, tuple)) else {}


def _names(node: Any, prefix: str = '') -> Iterator[str]:
    """The dotted name of every setting."""
    for key, value in _children(node).items():
        yield prefix + key
        yield from _names(value, f'{prefix}{key}.')


def set_dataloader_defaults(cfg: Config) -> None:
    """mmpretrain's configs leave the collate function to its tools; those of the other two libraries state it."""
    if cfg.get('default_scope') != 'mmpretrain':
        return
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name) is not None:
            loader = cfg[name]
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
            loader.setdefault('pin_memory', torch.cuda.is_available())


def show_progress(cfg: Config, style: str) -> None:
    """Chooses the display: 'bar' and 'lines' as in ProgressHook, 'log' for MMEngine's console output."""
    hook = None if style == 'log' else dict(type='mmvig.ProgressHook', style=style)
    cfg.default_hooks = dict(cfg.get('default_hooks') or {}, progress=hook)


def use_amp(cfg: Config) -> None:
    """Trains in mixed precision with a dynamic loss scale.

    Raises:
        SetupError: no device for it, or an `optim_wrapper` that is neither OptimWrapper nor AmpOptimWrapper.
    """
    if get_device() in ('cpu', 'mps'):
        raise SetupError(
            f"--amp: MMEngine's mixed precision runs on CUDA, NPU, MLU and MUSA devices and this machine has only "
            f"'{get_device()}'; run without --amp."
        )
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise SetupError(
            f"--amp: optim_wrapper.type is '{wrapper}', and only 'OptimWrapper' can be exchanged for 'AmpOptimWrapper'."
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def use_auto_scale_lr(cfg: Config) -> None:
    """Scales the learning rate by (actual batch size) / `auto_scale_lr.base_batch_size`.

    Raises:
        SetupError: the config names no `auto_scale_lr.base_batch_size`.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise SetupError(
            '--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the batch size its learning rate was '
            'chosen for; add it: --cfg-options auto_scale_lr.base_batch_size=16.'
        )
    cfg.auto_scale_lr.enable = True


def use_tta(cfg: Config) -> None:
    """Tests with the config's `tta_pipeline` and `tta_model`; mmdet and mmpretrain default to adding the mirror image.

    Raises:
        SetupError: neither the config nor its library says how to augment at test time, or how to merge what is found.
    """
    scope = cfg.get('default_scope')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        if scope == 'mmdet' and (cfg.model.get('mask_head') or cfg.model.get('roi_head', {}).get('mask_head')):
            raise SetupError("--tta: mmdet's DetTTAModel merges boxes, and this model also predicts masks; leave it.")
        if scope == 'mmdet':
            cfg.tta_model = dict(
                type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
            )
        elif scope == 'mmpretrain':
            cfg.tta_model = dict(type='AverageClsScoreTTA')
        else:
            raise SetupError(f"--tta: the config has no tta_model, and scope '{scope}' has no default; add one.")
    if 'tta_pipeline' not in cfg:
        if scope not in ('mmdet', 'mmpretrain'):
            raise SetupError(f"--tta: the config has no tta_pipeline, and scope '{scope}' has no default; add one.")
        *loading, packing = dataset.pipeline
        if scope == 'mmdet':  # merging the boxes of both images needs to know which one was mirrored
            keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
            packing = dict(type='PackDetInputs', meta_keys=keys)
        mirror = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        cfg.tta_pipeline = [*loading, dict(type='TestTimeAug', transforms=[mirror, [packing]])]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def use_visualization(cfg: Config, *, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Draws the predictions: in a window (`show`, each for `wait_time` seconds) and as files in `show_dir`.

    Raises:
        SetupError: the config has no visualization hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise SetupError(
            '--show, --show-dir: the config has no default_hooks.visualization; add '
            "default_hooks=dict(visualization=dict(type='DetVisualizationHook')) or your library's equivalent."
        )
    hook.update(show=show, wait_time=wait_time)
    if cfg.get('default_scope') == 'mmpretrain':
        hook.update(enable=True, out_dir=show_dir)
    else:
        hook.draw = True
        if show_dir is not None and cfg.get('default_scope') == 'mmdet':
            hook.test_out_dir = show_dir
        elif show_dir is not None:  # mmseg's hook writes through the visualizer
            cfg.visualizer.save_dir = show_dir


def save_predictions(cfg: Config, path: str) -> None:
    """Also writes the predictions on the test set: a pickle, or label maps as images into a folder (mmseg alone).

    Raises:
        SetupError: a folder, and a config that is not mmseg's.
    """
    scope = cfg.get('default_scope')
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if path.endswith(('.pkl', '.pickle')):
        kind = 'mmdet.DumpDetResults' if scope == 'mmdet' else 'mmengine.DumpResults'
        cfg.test_evaluator = [*metrics, dict(type=kind, out_file_path=path)]
    elif scope == 'mmseg':
        for metric in metrics:
            metric.update(output_dir=path, keep_results=True)
    else:
        raise SetupError(
            f"--out: '{path}' is neither FILE.json, for the metrics, nor FILE.pkl, for the predictions. It can be a "
            'folder, for predicted label maps, with mmseg alone.'
        )
