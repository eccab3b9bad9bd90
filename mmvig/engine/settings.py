"""From a config file and command-line switches to the config that a Runner is built from."""

import os
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device

__all__ = ['load_config', 'set_dataloader_defaults', 'use_amp', 'use_auto_scale_lr', 'use_tta', 'use_visualization']


def load_config(path: str, *, options: dict | None, work_dir: str | None, launcher: str) -> Config:
    """Reads a config file, merges `--cfg-options` into it and decides where the run writes.

    `work_dir`: the argument, else the config's own, else `work_dirs/<name of the config file>`.
    """
    cfg = Config.fromfile(path)
    cfg.launcher = launcher
    if options:
        cfg.merge_from_dict(options)
    cfg.work_dir = work_dir or cfg.get('work_dir') or os.path.join('work_dirs', Path(path).stem)
    return cfg


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


def use_amp(cfg: Config) -> None:
    """Trains in mixed precision with a dynamic loss scale.

    Raises:
        ValueError: no device for it, or an `optim_wrapper` that is neither OptimWrapper nor AmpOptimWrapper.
    """
    if get_device() in ('cpu', 'mps'):
        raise ValueError(
            f"--amp: MMEngine's mixed precision runs on CUDA, NPU, MLU and MUSA devices and this machine has only "
            f"'{get_device()}'; run without --amp."
        )
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ValueError(
            f"--amp: optim_wrapper.type is '{wrapper}', and only 'OptimWrapper' can be exchanged for 'AmpOptimWrapper'."
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def use_auto_scale_lr(cfg: Config) -> None:
    """Scales the learning rate by (actual batch size) / `auto_scale_lr.base_batch_size`.

    Raises:
        ValueError: the config names no `auto_scale_lr.base_batch_size`.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise ValueError(
            '--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the batch size its learning rate was '
            'chosen for; add it: --cfg-options auto_scale_lr.base_batch_size=16.'
        )
    cfg.auto_scale_lr.enable = True


def use_tta(cfg: Config) -> None:
    """Tests with the config's `tta_pipeline` and `tta_model`; mmdet and mmpretrain default to adding the mirror image.

    Raises:
        ValueError: neither the config nor its library says how to augment at test time.
    """
    scope = cfg.get('default_scope')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        if scope == 'mmdet':
            cfg.tta_model = dict(
                type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
            )
        elif scope == 'mmpretrain':
            cfg.tta_model = dict(type='AverageClsScoreTTA')
        else:
            raise ValueError(f"--tta: the config has no tta_model, and scope '{scope}' has no default; add one.")
    if 'tta_pipeline' not in cfg:
        if scope not in ('mmdet', 'mmpretrain'):
            raise ValueError(f"--tta: the config has no tta_pipeline, and scope '{scope}' has no default; add one.")
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
        ValueError: the config has no visualization hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(
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
