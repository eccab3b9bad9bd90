"""Draws what training sees: images of a config's training set with their boxes, masks, label maps or classes."""

import argparse
import sys
from pathlib import Path

import matplotlib

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.engine.preflight import check_paths
from mmvig.engine.progress import Display
from mmvig.engine.settings import SetupError, add_cfg_options, load_config
from mmvig.utils.dataset_browser import MODES, build_training_set, draw_samples


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or an address: mmdet::retinanet/...py')
    parser.add_argument('--out-dir', help='folder for the pictures (default: work_dirs/<config name>/browse)')
    parser.add_argument('--number', type=int, default=20, metavar='N', help='only the first N images (default: 20)')
    parser.add_argument(
        '--mode',
        choices=MODES,
        default='transformed',
        help='as they are read, or as the model gets them, augmented (default: transformed)',
    )
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.number < 1:
        parser.error(f'--number must be at least 1, got {args.number}')
    return args


def main() -> None:
    args = parse_args()
    matplotlib.use('Agg')  # nothing is shown
    try:
        cfg = load_config(args.config, options=args.cfg_options, work_dir=None, launcher='none')
        out_dir = Path(args.out_dir or Path(cfg.work_dir, 'browse'))
        cfg.work_dir, cfg.load_from, cfg.model = str(out_dir), None, {}  # what is looked for: pictures need no weights
        check_paths(cfg, 'train')
        dataset = build_training_set(cfg, args.mode)
    except SetupError as error:
        sys.exit(f'{error}')

    total = min(args.number, len(dataset))
    display = Display()
    display.open()
    try:
        for done, _ in enumerate(draw_samples(dataset, cfg.default_scope, total, out_dir), start=1):
            display.tick('images', done, total)
    except SetupError as error:
        sys.exit(f'{error}')
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        display.close()
    print(f'{total} of {len(dataset)} training images are in {out_dir}.')


if __name__ == '__main__':
    main()
