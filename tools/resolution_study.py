"""Tests a checkpoint at each of several resolutions of the test images: how accuracy fares where it was not trained.

    python tools/resolution_study.py CONFIG CHECKPOINT --sizes 512 1024 2048 --name vigh-gla-tiny --out accuracies.csv

The file gets a row a size: model, size, accuracy and the name of the metric. Rows of other models stay in it: one file
makes a figure (`tools/benchmark.py --accuracy`).
"""

import argparse
import csv
import sys
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.apis.study import METRICS
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.engine import settings
from mmvig.engine.preflight import check_paths
from mmvig.engine.report import say
from mmvig.engine.runner import build_runner
from mmvig.engine.settings import SetupError

COLUMNS = ('model', 'size', 'accuracy', 'metric')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or the address of an installed one: mmdet::retinanet/...py')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--sizes', nargs='+', type=int, required=True, metavar='PIXELS', help='sides of a square')
    parser.add_argument('--name', help='of the model in the file (default: that of the config)')
    parser.add_argument('--out', type=Path, required=True, metavar='CSV', help='rows of other models in it stay')
    parser.add_argument('--work-dir', help='where the logs go (default: work_dirs/<config name>)')
    settings.add_cfg_options(parser)
    args = parser.parse_args()
    name = args.name or Path(args.config).stem
    rows = []
    try:
        cfg = settings.load_config(
            args.config, options=args.cfg_options, work_dir=args.work_dir, launcher='none', say=say
        )
        settings.set_dataloader_defaults(cfg)
        cfg.load_from, cfg.resume = args.checkpoint, False
        check_paths(cfg, 'test')
        for size in args.sizes:
            metrics = build_runner(at_size(cfg, size)).test()
            metric, accuracy = headline(metrics)
            rows.append(dict(model=name, size=size, accuracy=f'{accuracy:.4f}', metric=metric))
            say(f'{name}, {size} pixels: {metric} {accuracy:.4f}')
            write(rows, args.out)
    except (SetupError, CheckpointError) as error:
        sys.exit(f'{error}')
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def at_size(cfg: Config, size: int) -> Config:
    """The config, whose test images are resized to fit into a square of `size` pixels and padded to multiples of 32.

    Raises:
        SetupError: the size is below 32, or no step of the test pipeline resizes.
    """
    if size < 32:
        raise SetupError(f'--sizes must be at least 32 pixels, got {size}')
    cfg = Config(cfg.to_dict())
    steps = [step for step in cfg.test_dataloader.dataset.pipeline if step.type == 'Resize']
    if not steps:
        raise SetupError('test_dataloader.dataset.pipeline must have a Resize for --sizes to set, it has none')
    for step in steps:
        step.scale = (size, size)
    if 'pad_size_divisor' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.pad_size_divisor = 32
    cfg.experiment_name = f'{Path(cfg.filename or "test").stem}_{size}'
    return cfg


def headline(metrics: dict[str, float]) -> tuple[str, float]:
    """The first metric of `METRICS` that a library logged, and its value from 0 to 1."""
    for name, (key, perfect) in METRICS.items():
        if key in metrics:
            return name, metrics[key] / perfect
    raise SetupError(
        f'test_evaluator must log one of {", ".join(key for key, _ in METRICS.values())}, got {[*metrics]}'
    )


def write(rows: list[dict], path: Path) -> None:
    """Writes the rows and keeps those of other models."""
    others = []
    if path.exists():
        with path.open(newline='') as stream:
            others = [row for row in csv.DictReader(stream) if row['model'] != rows[0]['model']]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(others + rows)


if __name__ == '__main__':
    main()
