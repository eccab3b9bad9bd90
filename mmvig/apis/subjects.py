"""What is timed and profiled: a backbone, or the model of a config, with a batch and a step to take with it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import Tensor

from mmvig.apis.backbones import BACKBONES
from mmvig.engine.param_groups import merge_param_groups
from mmvig.engine.settings import load_config

__all__ = ['MODES', 'PRECISIONS', 'Setting', 'Subject', 'build_backbone']

MODES = ('forward', 'train')
PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclass(frozen=True)
class Setting:
    """The batch of `batch` images, what is done with it and the precision of autocast ('fp32' is without autocast)."""

    height: int
    width: int
    batch: int
    mode: str
    precision: str

    def __str__(self) -> str:
        return f'{self.height}x{self.width} b{self.batch} {self.mode} {self.precision}'


class Subject:
    """A model with fresh weights and a synthetic batch on a device.

    A backbone's 'train' step is the forward pass and the backward pass from given gradients of its outputs, laid out as
    these are, as a head's convolutions would give them; without a loss and an optimiser. The model of a config works
    end to end, from images in the host's memory on: 'forward' is its `test_step`, 'train' its `train_step` with the
    optimiser of the config, on ten boxes and masks an image.

    Args:
        model: a name in `BACKBONES`, or the file or address of an OpenMMLab config.
        setting: see `Setting`.
        device: where.

    Raises:
        SetupError: there is no such model.
    """

    def __init__(self, model: str, setting: Setting, device: torch.device) -> None:
        torch.manual_seed(0)
        self.setting, self.device = setting, device
        torch._dynamo.reset()  # else the shapes of earlier subjects count against the limit of recompilations
        if model in BACKBONES:
            self.model = self.backbone = build_backbone(model).to(device)
            image = torch.randn(setting.batch, 3, setting.height, setting.width, device=device)
            step = partial(self._backbone_step, image)
        else:
            self.model, step = self._whole(load_config(model, options=None, work_dir=None, launcher='none'))
            self.backbone = self.model.backbone
        self.model.train(setting.mode == 'train')
        self._step = step
        self._compiled = {}
        self._grads: list[Tensor] | None = None

    def step(self, mode: str | None = None) -> None:
        """Takes one step, with the backbone compiled for its one size in a `mode` of torch.compile; None: as it is."""
        if mode:
            if mode not in self._compiled:
                self._compiled[mode] = torch.compile(self.backbone.forward, dynamic=False, mode=mode)
            self.backbone.forward = self._compiled[mode]
        try:
            self._run()
        finally:
            if mode:
                del self.backbone.forward

    def _run(self) -> None:
        with (
            torch.set_grad_enabled(self.setting.mode == 'train'),
            torch.autocast(
                self.device.type, PRECISIONS[self.setting.precision], enabled=self.setting.precision != 'fp32'
            ),
        ):
            self._step()

    def reset(self) -> None:
        """Drops the gradients of a step: to be called before the next one."""
        self.model.zero_grad(set_to_none=True)

    def _backbone_step(self, image: Tensor) -> None:
        outs = self.backbone(image)
        if self.setting.mode == 'train':
            if self._grads is None:
                self._grads = [torch.randn_like(out) / out.numel() for out in outs]
            torch.autograd.backward(outs, self._grads)

    def _whole(self, cfg: Config) -> tuple[nn.Module, Callable[[], object]]:
        init_default_scope(cfg.default_scope)
        if 'data_preprocessor' in cfg:
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        model = MODELS.build(_without_checkpoints(cfg.model))
        model.init_weights()
        model.to(self.device)
        batch = _synthetic_batch(cfg.default_scope, self.setting)
        if self.setting.mode == 'forward':
            return model, partial(model.test_step, batch)
        wrapper = dict(type='OptimWrapper', optimizer=cfg.optim_wrapper.optimizer)  # `step` is under autocast already
        wrapper.update(
            {key: cfg.optim_wrapper[key] for key in ('constructor', 'paramwise_cfg') if key in cfg.optim_wrapper}
        )
        wrapper = build_optim_wrapper(model, wrapper)
        merge_param_groups(wrapper.optimizer)  # as our Runner does
        return model, partial(model.train_step, batch, wrapper)


def build_backbone(name: str) -> nn.Module:
    """One of `BACKBONES`, with fresh weights."""
    return MODELS.build(BACKBONES[name])


def _without_checkpoints(node: Any) -> Any:
    """A copy of a model's config in which nothing is initialised from a file."""
    if isinstance(node, dict):
        kept = {
            key: value
            for key, value in node.items()
            if key != 'pretrained'
            and not (key == 'init_cfg' and isinstance(value, dict) and value.type == 'Pretrained')
        }
        return ConfigDict({key: _without_checkpoints(value) for key, value in kept.items()})
    return [_without_checkpoints(value) for value in node] if isinstance(node, list) else node


def _synthetic_batch(scope: str, setting: Setting) -> dict:
    """Images and annotations as the data loader of `scope` delivers them; labels are 0 and 1."""
    height, width, batch = setting.height, setting.width, setting.batch
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        shapes = [(3, height, width)] * batch
        return demo_mm_inputs(batch, shapes, num_items=[10] * batch, num_classes=2, with_mask=True, device='cpu')
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
    sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), (height, width))
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(metainfo=sizes) for _ in range(batch)]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, height, width)))
        return dict(inputs=list(images), data_samples=samples)
    from mmpretrain.structures import DataSample

    samples = [DataSample(metainfo=sizes).set_gt_label(i % 2) for i in range(batch)]
    return dict(inputs=images, data_samples=samples)
