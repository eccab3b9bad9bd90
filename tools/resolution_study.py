"""Tests a checkpoint at each of several resolutions of the test images: how accuracy fares where it was not trained.

    python tools/resolution_study.py CONFIG CHECKPOINT --sizes 512 1024 2048 --name vigh-gla-tiny --out accuracies.csv

The file gets a row a size: model, size, accuracy and the name of the metric. Its other rows stay: one file makes a
figure (`tools/benchmark.py --accuracy`).
"""

import argparse
import copy
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
    parser.add_argument('--out', type=Path, required=True, metavar='CSV', help='its other rows stay')
    parser.add_argument('--work-dir', help='where the logs go (default: work_dirs/<config name>)')
    settings.add_cfg_options(parser)
    args = parser.parse_args()
    name = args.name or Path(args.config).stem
    try:
        rows = read(args.out)
        cfg = settings.load_config(
            args.config, options=args.cfg_options, work_dir=args.work_dir, launcher='none', say=say
        )
        settings.set_dataloader_defaults(cfg)
        cfg.load_from, cfg.resume = args.checkpoint, False
        check_paths(cfg, 'test')
        resized = {size: at_size(cfg, size) for size in args.sizes}
        for size, this in resized.items():
            this.experiment_name = f'{Path(args.config).stem}_{size}'
            metric, accuracy = headline(build_runner(this).test())
            say(f'{name}, {size} pixels: {metric} {accuracy:.4f}')
            rows = [row for row in rows if (row['model'], row['size']) != (name, str(size))]
            rows.append(dict(model=name, size=str(size), accuracy=f'{accuracy:.4f}', metric=metric))
            write(rows, args.out)
    except (SetupError, CheckpointError) as error:
        sys.exit(f'{error}')
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def at_size(cfg: Config, size: int) -> Config:
    """The config with other test images: resized to fit into a square of `size` pixels, and padded to multiples of 32.

    Where its pipeline crops a square from the middle, that has `size` pixels of a picture larger in proportion.

    Raises:
        SetupError: the size is below 32, or the test pipeline has neither Resize nor ResizeEdge and CenterCrop.
    """
    if size < 32:
        raise SetupError(f'--sizes must be at least 32 pixels, got {size}')
    cfg = copy.deepcopy(cfg)
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    steps = {step.type: step for step in dataset.get('pipeline', [])}
    if 'Resize' in steps:
        steps['Resize'].scale = (size, size)
    elif {'ResizeEdge', 'CenterCrop'} <= set(steps):
        edge, crop = steps['ResizeEdge'], steps['CenterCrop']
        edge.scale, crop.crop_size = round(size * edge.scale / crop.crop_size), size
    else:
        raise SetupError(
            f'test_dataloader.dataset.pipeline must have Resize, or ResizeEdge and CenterCrop, for --sizes to set: '
            f'it has {", ".join(map(str, steps)) or "no steps"}'
        )
    if 'pad_size_divisor' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.pad_size_divisor = 32
    return cfg


def headline(metrics: dict[str, float]) -> tuple[str, float]:
    """The first metric of `METRICS` that a library logged, and its value from 0 to 1."""
    if not metrics:  # so mmdet says that nothing was found
        return 'box AP', 0.0
    for name, (key, perfect) in METRICS.items():
        if key in metrics:
            return name, metrics[key] / perfect
    raise SetupError(
        f'test_evaluator must log one of {", ".join(key for key, _ in METRICS.values())}, got {[*metrics]}'
    )


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the file, none where there is none.

    Raises:
        SetupError: it is no file of this tool, or none can be there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return []
        with path.open(newline='') as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise SetupError(f'--out: {path} has the columns {reader.fieldnames}, not {COLUMNS}: name another file')
            return list(reader)
    except OSError as error:
        raise SetupError(f'--out: {path} cannot be written: {error}') from error


def write(rows: list[dict[str, str]], path: Path) -> None:
    """In place of the file, once all of it is written."""
    part = path.with_name(f'{path.name}.part')
    with part.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


if __name__ == '__main__':
    main()
