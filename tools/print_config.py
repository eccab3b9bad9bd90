"""Prints a config with all that it inherits, as a config that could be run.

    python tools/print_config.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --backbone vigh-gla-tiny

What `--backbone` changes comes first, in comments.
"""

import argparse
import sys

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.engine import settings
from mmvig.engine.settings import SetupError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or the address of an installed one: mmdet::retinanet/...py')
    settings.add_cfg_options(parser)
    settings.add_swap_arguments(parser)
    args = parser.parse_args()
    try:
        cfg = settings.load_config(
            args.config,
            options=args.cfg_options,
            work_dir=None,
            launcher='none',
            backbone=args.backbone,
            undilate=args.undilate,
            say=lambda line: print(f'# {line}'),
        )
    except SetupError as error:
        sys.exit(f'{error}')
    print(cfg.pretty_text)


if __name__ == '__main__':
    main()
