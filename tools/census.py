"""Tries ViG-H as the backbone of every config of mmdet, mmseg and mmpretrain, and says which take it.

    python tools/census.py --out benchmarks/swap_census.csv

A config that was converted is built, and all that follows the backbone is run on its maps; nothing is downloaded. The
tables come from the rows of the file: a census that was stopped goes on, one that is complete is only printed.
"""

import argparse
import csv
import random
import sys
from pathlib import Path

from rich.console import Console

import mmvig  # noqa: F401  before a config is read: today's stack is cared for
from mmvig.apis.backbones import VIGH
from mmvig.apis.census import find_configs, read_entries, reasons, summary, take_census, write_entries
from mmvig.engine.progress import Display


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', choices=VIGH, default='vigh-gla-tiny')
    parser.add_argument('--sample', type=int, metavar='N', help='N configs, chosen at random (default: all)')
    parser.add_argument('--seed', type=int, default=0, help='of the choice (default: 0)')
    parser.add_argument('--workers', type=int, default=1, help='processes (default: 1)')
    parser.add_argument('--limit', type=float, default=60, help='seconds that one config may take (default: 60)')
    parser.add_argument('--out', type=Path, required=True, help='the CSV file that holds a row for each config')
    args = parser.parse_args()
    configs = find_configs()
    if args.sample is not None:
        configs = random.Random(args.seed).sample(configs, min(args.sample, len(configs)))
    try:
        found = {(entry.library, entry.config): entry for entry in read_entries(args.out)} if args.out.exists() else {}
    except ValueError as error:
        sys.exit(f'--out: {error}')
    write_entries(args.out, found.values())
    display = Display()
    display.open()
    missing = [config for config in configs if config not in found]
    census = take_census(missing, args.backbone, workers=args.workers, limit=args.limit)
    with args.out.open('a', newline='', buffering=1) as file:
        for done, (config, entry) in enumerate(zip(missing, census), start=len(configs) - len(missing) + 1):
            found[config] = entry
            csv.writer(file, lineterminator='\n').writerow(entry)
            display.tick('configs', done, len(configs))
    display.close()
    write_entries(args.out, sorted(found.values()))
    Console(width=160).print(summary(found.values()), reasons(found.values()), sep='\n')  # in Markdown


if __name__ == '__main__':
    main()
