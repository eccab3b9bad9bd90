"""Tries ViG-H as the backbone of every config of mmdet, mmseg and mmpretrain, and says which take it.

    python tools/census.py --out benchmarks/swap_census.csv

A config that was converted is built, and all that follows the backbone is run on its maps; nothing is downloaded.
"""

import argparse
import csv
import random
from pathlib import Path

from rich.console import Console
from rich.progress import track

import mmvig  # noqa: F401  before a config is read: today's stack is cared for
from mmvig.apis.census import Entry, find_configs, reasons, summary, take_census
from mmvig.apis.swap_backbone import BACKBONES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', choices=BACKBONES, default='vigh-gla-tiny')
    parser.add_argument('--sample', type=int, metavar='N', help='N configs, chosen at random (default: all)')
    parser.add_argument('--seed', type=int, default=0, help='of the choice (default: 0)')
    parser.add_argument('--workers', type=int, default=1, help='processes (default: 1)')
    parser.add_argument('--limit', type=int, default=60, help='seconds that one config may take (default: 60)')
    parser.add_argument('--out', type=Path, help='write a row for each config into this CSV file')
    args = parser.parse_args()
    configs = find_configs()
    if args.sample is not None:
        configs = sorted(random.Random(args.seed).sample(configs, min(args.sample, len(configs))))
    census = take_census(configs, args.backbone, workers=args.workers, limit=args.limit)
    entries = list(track(census, description='configs', total=len(configs)))
    if args.out is not None:
        with args.out.open('w', newline='') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(Entry._fields)
            writer.writerows(entries)
    Console().print(summary(entries), reasons(entries), sep='\n')


if __name__ == '__main__':
    main()
