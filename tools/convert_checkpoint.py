"""Writes a published ViG or ViG-H checkpoint in the names of mmvig, ready for any OpenMMLab config.

    python tools/convert_checkpoint.py vig_h_t_82p8acc.pth vigh-gla-tiny_in1k.pth

The published files also load as they are; a converted one needs no mmvig code to be read.
"""

import argparse
import pickle
import sys
from pathlib import Path

from mmvig.apis import convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='the checkpoint to read')
    parser.add_argument('target', type=Path, help='the file to write')
    parser.add_argument('--force', action='store_true', help='overwrite the target if it is there')
    args = parser.parse_args()
    if args.target.exists() and not args.force:
        sys.exit(f'{args.target} is there already; name another target or add --force')
    try:
        done = convert_checkpoint(args.source, args.target)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f'error: {error}')
    print(f'{args.target}: {done.model} arch={done.arch!r}, {done.parameters:,} parameters, head: {done.head}')


if __name__ == '__main__':
    main()
