"""Times backbones against each other: one process, interleaved rounds, medians and a ratio to a baseline."""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import quantiles

import torch
import torch.nn as nn
from mmengine.registry import MODELS
from torch import Tensor

BACKBONES = {
    'vig-gla-tiny': dict(type='mmvig.ViG', arch='tiny'),
    'vig-gla-small': dict(type='mmvig.ViG', arch='small'),
    'vig-gla-base': dict(type='mmvig.ViG', arch='base'),
    'vigh-gla-tiny': dict(type='mmvig.ViGH', arch='tiny'),
    'vigh-gla-small': dict(type='mmvig.ViGH', arch='small'),
    'vigh-gla-base': dict(type='mmvig.ViGH', arch='base'),
    'swin-tiny': dict(type='mmpretrain.SwinTransformer', arch='tiny', out_indices=(0, 1, 2, 3)),
    'convnext-tiny': dict(
        type='mmpretrain.ConvNeXt', arch='tiny', out_indices=(0, 1, 2, 3), gap_before_final_norm=False
    ),
    'resnet-50': dict(type='mmpretrain.ResNet', depth=50, out_indices=(0, 1, 2, 3)),
    'deit-tiny': dict(
        type='mmpretrain.VisionTransformer', arch='deit-t', img_size=224, patch_size=16, out_type='featmap'
    ),
}
MODES = ('forward', 'train')


@dataclass(frozen=True)
class Row:
    """One measured setting: times in milliseconds; `ratio` is baseline median / this median."""

    model: str
    mode: str
    size: int
    batch: int
    p20: float
    p50: float
    p80: float
    ratio: float
    rounds: int


def environment() -> str:
    """The machine and versions that a table of times belongs to."""
    threads = torch.get_num_threads()
    return f'{_processor()}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}'


def benchmark(
    models: list[str],
    sizes: list[int],
    batch: int,
    modes: list[str],
    baseline: str,
    rounds: int,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Yields a row per size, mode and model, on the CPU in float32.

    Each round runs every model once, in turn, so that whatever else the machine does meets all of them alike. `train`
    is a forward and a backward pass of the sum of squares of all outputs, without an optimiser step.

    Args:
        models: names in `BACKBONES`; `baseline` must be among them.
        sizes: sides of square images in pixels.
        batch: images at a time.
        modes: of `MODES`.
        baseline: the model that ratios refer to.
        rounds: timed rounds, after one that is not counted; at least 2.
        tick: called after every round of a setting.

    Raises:
        ValueError: an unknown model or mode, or a baseline that is not measured.
    """
    for name in [*models, baseline]:
        if name not in BACKBONES or name not in models:
            raise ValueError(f'model {name!r} is unknown or not measured; choose from {list(BACKBONES)}')
    if wrong := set(modes) - set(MODES):
        raise ValueError(f'modes {sorted(wrong)} are unknown; choose from {list(MODES)}')
    nets = {name: MODELS.build(BACKBONES[name]) for name in models}
    for size in sizes:
        image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        for mode in modes:
            times = {name: [] for name in models}
            for round_ in range(rounds + 1):
                for name, net in nets.items():
                    elapsed = _once(net, image, mode)
                    if round_:
                        times[name].append(elapsed)
                tick()
            base = _percentiles(times[baseline])[1]
            for name in models:
                p20, p50, p80 = _percentiles(times[name])
                yield Row(name, mode, size, batch, p20, p50, p80, base / p50, rounds)


def _once(net: nn.Module, image: Tensor, mode: str) -> float:
    net.train(mode == 'train')
    start = time.perf_counter()
    with torch.set_grad_enabled(mode == 'train'):
        outs = net(image)
        if mode == 'train':
            sum(out.square().sum() for out in outs).backward()
    elapsed = (time.perf_counter() - start) * 1e3
    net.zero_grad(set_to_none=True)
    return elapsed


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    deciles = quantiles(times, n=10, method='inclusive')
    return deciles[1], deciles[4], deciles[7]


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as lines:
            return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        return platform.processor() or platform.machine()
