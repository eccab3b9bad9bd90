"""Applies a trained model to an image or a folder of images: annotated pictures and one JSON file an image."""

import argparse
import sys
from pathlib import Path

from mmengine.device import get_device

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.engine.progress import Display
from mmvig.engine.settings import SetupError, add_cfg_options, load_config
from mmvig.utils.image_demo import build_predictor, find_images, output_names, predict_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('image', help='an image, or a folder of images')
    parser.add_argument('--out-dir', required=True, help='folder for the pictures and JSON files')
    parser.add_argument('--device', default=get_device(), help='default: %(default)s')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out detections below (default: 0.3)')
    parser.add_argument('--limit', type=int, metavar='N', help='only the first N images of the folder')
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=100_000_000,
        help='skip larger images, unread: a small file can unpack to any size (default: %(default)s)',
    )
    add_cfg_options(parser)
    args = parser.parse_args()
    if not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr must be between 0 and 1, got {args.score_thr}')
    for name in ('limit', 'max_pixels'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}')
    return args


def main() -> None:
    args = parse_args()
    try:
        images = find_images(args.image)[: args.limit]
        cfg = load_config(args.config, options=args.cfg_options, work_dir=args.out_dir, launcher='none')
        if not Path(args.checkpoint).is_file() and '://' not in args.checkpoint:
            raise SetupError(f'checkpoint: there is no file {args.checkpoint}.')
        predictor = build_predictor(cfg, args.checkpoint, args.device, args.score_thr)
    except (CheckpointError, FileNotFoundError, SetupError) as error:
        sys.exit(f'{error}')

    failed = {}
    display = Display()
    display.open()
    try:
        for done, (path, name) in enumerate(zip(images, output_names(images, args.image)), start=1):
            try:
                predict_file(predictor, path, Path(args.out_dir, name), args.max_pixels)
            except Exception as error:  # whatever is wrong with one image, the others go on
                failed[path] = f'{type(error).__name__}: {error}'
                display.note(f'Skipped {path}: {failed[path]}')
            display.tick('images', done, len(images))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        display.close()
    print(f'{len(images) - len(failed)} of {len(images)} images are in {args.out_dir}.')
    if failed:
        print(f'{len(failed)} skipped:', *(f'  {path}: {reason}' for path, reason in failed.items()), sep='\n')
    if len(failed) == len(images):
        sys.exit(1)


if __name__ == '__main__':
    main()
