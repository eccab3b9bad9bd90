"""Times backbones against each other on the CPU, in one run, and prints a table.

python tools/benchmark.py --models vigh-gla-tiny swin-tiny convnext-tiny --out benchmarks/backbones_cpu.csv
"""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmvig  # noqa: F401  before mmpretrain is imported


def main() -> None:
    from mmpretrain.utils import register_all_modules

    from mmvig.apis.benchmark import BACKBONES, MODES, benchmark, environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=BACKBONES, default=['vigh-gla-tiny', 'swin-tiny'])
    parser.add_argument('--baseline', choices=BACKBONES, default='swin-tiny')
    parser.add_argument('--sizes', nargs='+', type=int, default=[224, 512], metavar='PIXELS')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES))
    parser.add_argument('--rounds', type=int, default=15, help='timed rounds of each setting (default: 15)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--out', type=Path, help='write the rows to this CSV file')
    args = parser.parse_args()
    if args.baseline not in args.models or args.rounds < 2:
        parser.error('--baseline must be one of --models, and --rounds at least 2')
    torch.set_num_threads(args.threads)
    register_all_modules()

    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task('timing', total=len(args.sizes) * len(args.modes) * (args.rounds + 1))
        rows = list(
            benchmark(
                args.models,
                args.sizes,
                args.batch,
                args.modes,
                args.baseline,
                args.rounds,
                tick=lambda: progress.advance(task),
            )
        )
    table = Table('model', 'mode', 'size', 'batch', 'p20 ms', 'median ms', 'p80 ms', f'speed / {args.baseline}')
    for row in rows:
        times = [f'{t:.0f}' for t in (row.p20, row.p50, row.p80)]
        table.add_row(row.model, row.mode, str(row.size), str(row.batch), *times, f'{row.ratio:.2f}')
    console.print(table)
    console.print(environment())
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open('w', newline='') as stream:
            writer = csv.DictWriter(stream, [*asdict(rows[0]), 'environment'], lineterminator='\n')
            writer.writeheader()
            writer.writerows({**_rounded(asdict(row)), 'environment': environment()} for row in rows)
        console.print(f'written to {args.out}')


def _rounded(row: dict) -> dict:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == '__main__':
    main()
