"""A training run of milliseconds whose losses feel every source of randomness: for tests of engine and tools."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import nn


@DATASETS.register_module()
class ToyDataset(torch.utils.data.Dataset):
    """`size` vectors (4,), augmented with the random numbers of Python, NumPy and torch."""

    metainfo = dict(classes=('small', 'large'))

    def __init__(self, size: int = 22) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        noise = torch.randn(4) + float(np.random.rand()) + random.random()
        return dict(inputs=torch.full((4,), index / self.size) + 0.1 * noise, label=float(index % 2))


@MODELS.register_module()
class ToyModel(BaseModel):
    """Two layers, batch normalisation, dropout, and a drop path over the second layer."""

    def __init__(self, width: int = 8, drop_path_rate: float = 0.2, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.embed = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.2))
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 1)
        self.drop_path_rate = drop_path_rate

    def forward(self, inputs: list[torch.Tensor], label: list[float], mode: str = 'tensor'):
        x = self.embed(torch.stack(list(inputs)))
        keep = torch.rand(len(x), 1) >= self.drop_path_rate if self.training else 1.0
        y = self.head(x + keep * self.block(x).relu())[:, 0]
        if mode == 'predict':
            return [dict(score=float(value)) for value in y]
        return dict(loss=(y - torch.tensor(label)).square().mean(), loss_size=0.01 * y.square().mean())


@METRICS.register_module()
class ToyMetric(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch: dict, data_samples: list[dict]) -> None:
        self.results.extend(sample['score'] for sample in data_samples)

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        print('what pycocotools would print')
        return dict(mean=float(np.mean(results)))


@HOOKS.register_module()
class RecordLosses(Hook):
    """Appends 'iteration batch loss' to `losses.txt` of the work directory, the loss with all its bits."""

    def __init__(self, pause: float = 0.0, suffix: str = '') -> None:
        self.pause = pause
        self.name = f'losses{suffix}.txt'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        with Path(runner.work_dir, self.name).open('a') as file:
            file.write(f'{runner.iter} {batch_idx} {outputs["loss"].item().hex()}\n')
        time.sleep(self.pause)


@HOOKS.register_module()
class Signal(Hook):
    """Raises a signal in this process at one iteration of training, or of a validation."""

    def __init__(self, signum: int, train_iter: int = -1, val_iter: int = -1) -> None:
        self.signum, self.train_iter, self.val_iter = signum, train_iter, val_iter

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.train_iter:
            signal.raise_signal(self.signum)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if batch_idx == self.val_iter:
            signal.raise_signal(self.signum)


CONFIG = """
custom_imports = dict(imports=['toy_training'])
model = dict(type='ToyModel', width=8, drop_path_rate=0.2)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type='ToyDataset', size=22),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type='ToyDataset', size=10),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type='ToyMetric')
test_evaluator = val_evaluator
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9), accumulative_counts=3
)
param_scheduler = [dict(type='MultiStepLR', milestones=[1, 2])]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False),
)
custom_hooks = [dict(type='EMAHook', momentum=0.1), dict(type='RecordLosses', pause=0.0)]
randomness = dict(seed=0)
"""
