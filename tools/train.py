"""Trains the model of a config: a classifier, detector or segmentor, by the config's `default_scope`."""

import argparse
import os
import shlex
import sys

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.engine import Interrupted, WriteError, settings
from mmvig.engine.compile import use_compile
from mmvig.engine.preflight import check_paths, prepare_resume
from mmvig.engine.report import say
from mmvig.engine.runner import build_runner
from mmvig.engine.settings import SetupError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or the address of an installed one: mmdet::retinanet/...py')
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/<config name>)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a path, from the newest complete one in the work directory, if any',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--compile', action='store_true', help='compile the backbone (mmvig.CompileHook)')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size')
    parser.add_argument('--no-validate', action='store_true', help='do not validate during training')
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
        if args.amp:
            settings.use_amp(cfg)
        if args.compile:
            use_compile(cfg)
        if args.auto_scale_lr:
            settings.use_auto_scale_lr(cfg)
        if args.no_validate:
            cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        if args.progress != 'auto':
            settings.show_progress(cfg, args.progress)
        check_paths(cfg, 'train', 'val')
        if args.resume is not None:
            say(*prepare_resume(cfg, args.resume))
        say(f'Training {args.config}; log and checkpoints are in {cfg.work_dir}. Reading data, building the model ...')
        build_runner(cfg).train()
    except (SetupError, CheckpointError, WriteError) as error:
        sys.exit(f'{error}')
    except Interrupted as stop:
        say(f'{stop}. To go on:', f'  {resume_command(args)}')
        sys.exit(stop.status)
    except KeyboardInterrupt:
        say('Stopped before the first iteration; there is nothing to save.')
        sys.exit(130)


def resume_command(args: argparse.Namespace) -> str:
    """The command of this run with a bare `--resume`."""
    words = list(sys.argv[1:])
    for index, word in enumerate(words):
        if word.startswith('--resume'):
            del words[index : index + 1 + (word == '--resume' and args.resume != 'auto')]
            break
    return shlex.join(['python', sys.argv[0], *words, '--resume'])


if __name__ == '__main__':
    main()
