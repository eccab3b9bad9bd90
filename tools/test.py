"""Tests a checkpoint on the test set of a config and prints the metrics."""

import argparse
import os
import sys

from mmengine.fileio import dump
from rich.console import Console

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.engine import settings
from mmvig.engine.compile import use_compile
from mmvig.engine.preflight import check_paths
from mmvig.engine.report import is_first, metrics_table, say
from mmvig.engine.runner import build_runner
from mmvig.engine.settings import SetupError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or the address of an installed one: mmdet::retinanet/...py')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='where the log goes (default: work_dirs/<config name>)')
    parser.add_argument(
        '--out',
        help='write the metrics (FILE.json), the predictions (FILE.pkl) or, with mmseg, the label maps (a folder)',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds for which --show shows each (default: 2)')
    parser.add_argument('--compile', action='store_true', help='compile the backbone (mmvig.CompileHook)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--progress',
        choices=['auto', 'bar', 'lines', 'log'],
        default='auto',
        help="a live bar, plain lines, or MMEngine's log on the console (default: a bar on a terminal, else lines)",
    )
    settings.add_cfg_options(parser)
    settings.add_swap_arguments(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        cfg = settings.load_config(
            args.config,
            options=args.cfg_options,
            work_dir=args.work_dir,
            launcher=args.launcher,
            backbone=args.backbone,
            undilate=args.undilate,
            say=say,
        )
        settings.set_dataloader_defaults(cfg)
        cfg.load_from, cfg.resume = args.checkpoint, False
        if args.show or args.show_dir:
            settings.use_visualization(cfg, show=args.show, show_dir=args.show_dir, wait_time=args.wait_time)
        if args.tta:
            settings.use_tta(cfg)
        if args.compile:
            use_compile(cfg)
        if args.out and not args.out.endswith('.json'):
            settings.save_predictions(cfg, args.out)
        if args.progress != 'auto':
            settings.show_progress(cfg, args.progress)
        check_paths(cfg, 'test')
        metrics = build_runner(cfg).test()
    except (SetupError, CheckpointError) as error:
        sys.exit(f'{error}')
    except KeyboardInterrupt:
        sys.exit(130)
    if is_first():
        Console().print(metrics_table(metrics) if metrics else 'The metrics are empty: the model found nothing.')
        if args.out and args.out.endswith('.json'):
            dump(metrics, args.out)


if __name__ == '__main__':
    main()
