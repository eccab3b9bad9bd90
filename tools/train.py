"""Trains the model of a config: classification, detection or segmentation, by the config's `default_scope`."""

import argparse
import os

from mmengine.config import DictAction

import mmvig  # noqa: F401  before the config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.engine import settings


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/<config name>)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint; without a path, from the newest complete one in the work directory',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size')
    parser.add_argument('--no-validate', action='store_true', help='do not validate during training')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_cfg.max_epochs=2 model.backbone.out_indices="[0,1]"',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    from mmvig.engine import Runner

    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = settings.load_config(args.config, options=args.cfg_options, work_dir=args.work_dir, launcher=args.launcher)
    settings.set_dataloader_defaults(cfg)
    if args.amp:
        settings.use_amp(cfg)
    if args.auto_scale_lr:
        settings.use_auto_scale_lr(cfg)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    main()
