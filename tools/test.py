"""Tests a checkpoint with the test set and metrics of its config, and prints the metrics."""

import argparse
import os

from mmengine.config import DictAction

import mmvig  # noqa: F401  before the config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.engine import settings


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='where the log goes (default: work_dirs/<config name>)')
    parser.add_argument('--out', help='metrics as FILE.json')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds each window of --show stays')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    from mmengine.fileio import dump
    from mmvig.engine import Runner

    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = settings.load_config(args.config, options=args.cfg_options, work_dir=args.work_dir, launcher=args.launcher)
    settings.set_dataloader_defaults(cfg)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        settings.use_visualization(cfg, show=args.show, show_dir=args.show_dir, wait_time=args.wait_time)
    if args.tta:
        settings.use_tta(cfg)
    metrics = Runner.from_cfg(cfg).test()
    for name, value in metrics.items():
        print(f'{name}: {value}')
    if args.out:
        dump(metrics, args.out)


if __name__ == '__main__':
    main()
