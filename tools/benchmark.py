"""Times models against each other in one run: prints a table, writes CSV, JSON and a picture.

    python tools/benchmark.py --preset deit --out benchmarks/deit.csv
    python tools/benchmark.py --models vigh-gla-tiny swin-tiny --baseline swin-tiny --sizes 800x1344 --batches 2
    python tools/benchmark.py --from benchmarks/resolution.csv --accuracy accuracies.csv --out figure.csv

Models are backbones by name, or whole models by the file or address of an OpenMMLab config (mmdet::swin/...py). A
backbone's training step is its forward pass and the backward pass from given gradients of its outputs, without a loss
and an optimiser; that of a config is its own, with both, on synthetic images. Compiled means the backbone alone.
"""

import argparse
import csv
import json
import os
import shlex
import sys
from dataclasses import asdict, fields
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import mmvig  # noqa: F401  before mmpretrain is imported
from mmvig.apis.backbones import BACKBONES
from mmvig.apis.benchmark import LAUNCHES, Row, benchmark, best_rows
from mmvig.apis.resolution_figure import draw, read_accuracies, series
from mmvig.apis.setting_figure import draw_settings
from mmvig.apis.subjects import MODES, PRECISIONS, Setting
from mmvig.apis.timing import clocks, environment, states

DEIT = ['deit-tiny', 'deit-tiny-timm'] if find_spec('timm') else ['deit-tiny']
SWIN = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
SIDES = [224, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
# Models, of which the first is ours and the others what it is compared with; baselines; settings; launches.
PRESETS = {
    'deit': (
        ['vig-gla-tiny', *DEIT],
        DEIT,
        [
            *[(224, 224, 128, 'forward'), (1024, 1024, 8, 'forward'), (2048, 2048, 2, 'forward')],
            *[(4096, 4096, 1, 'forward'), (1024, 1024, 1, 'forward')],
            *[(1024, 1024, 8, 'train'), (2048, 2048, 2, 'train')],
        ],
        list(LAUNCHES),
    ),
    'pyramid': (
        ['vigh-gla-tiny', 'swin-tiny', 'convnext-tiny', 'resnet-50'],
        ['swin-tiny'],
        [(800, 1344, 2, 'forward'), (800, 1344, 2, 'train'), (2048, 2048, 1, 'forward')],
        list(LAUNCHES),
    ),
    'mask-rcnn': (
        ['configs/mmdet/vigh/mask-rcnn_vigh-gla-tiny_fpn_1x_coco.py', SWIN],
        [SWIN],
        [(800, 1344, 2, 'train')],
        ['eager', 'compiled', 'compiled-graph'],
    ),
    'resolution': (
        ['vig-gla-tiny', 'vigh-gla-tiny', 'deit-tiny', 'swin-tiny'],
        ['deit-tiny'],
        [(side, side, 1, 'forward') for side in SIDES],
        ['eager', 'graph'],
    ),
}


def main() -> None:
    args = parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        accuracies = read_accuracies(args.accuracy) if args.accuracy else None
    except ValueError as error:
        sys.exit(f'--accuracy: {error}')
    if args.rows:
        rows, machine = read_rows(args.rows)
        picture(rows, args.out.with_suffix('.png'), accuracies, machine)
        return
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ['OMP_NUM_THREADS'] = str(args.threads)  # for the processes that measure
    report = dict(command=shlex.join(['python', *sys.argv]), environment=environment(device), states=states(), rows=[])
    if device.type == 'cuda':
        report['clocks before'] = clocks()
    for name in ('environment', 'states', 'clocks before'):
        console.print(name, report.get(name, 'of a CPU'), sep=': ')
    console.print('autocast:', ', '.join(sorted({setting.precision for setting in args.settings})), '(fp32: none)')
    rows = []
    try:
        for some in benchmark(
            args.models,
            args.settings,
            args.launches,
            args.baseline,
            device,
            seconds=args.seconds,
            rounds=args.rounds,
            jobs=args.jobs,
            timeout=args.timeout,
            tell=partial(console.print, markup=False, soft_wrap=True),
        ):
            rows += some
            if args.out:
                if device.type == 'cuda':
                    report['clocks after'] = clocks()
                write(rows, report, args.out)
    except ValueError as error:
        sys.exit(f'{error}')
    console.print(table(rows, args.baseline))
    if device.type == 'cuda':
        console.print('clocks now:', clocks())
    if args.out:
        picture(rows, args.out.with_suffix('.png'), accuracies, report['environment'])
        console.print(f'written to {args.out}, and beside it as .json and .png')


def picture(rows: list[Row], path: Path, accuracies: dict | None, machine: str) -> None:
    """Draws costs against resolution, where there are three or accuracies at some; else speeds setting by setting."""
    sizes = max(map(len, series(rows)[1].values()))
    if sizes > 2 or accuracies:
        draw(rows, path, accuracies, machine)
    else:
        draw_settings(rows, path, machine)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', choices=PRESETS, help='what to time; the options below replace parts of it')
    parser.add_argument('--models', nargs='+', metavar='MODEL', help=f'configs, or of {", ".join(BACKBONES)}')
    parser.add_argument('--baseline', nargs='+', metavar='MODEL', help='speed refers to the fastest of these models')
    parser.add_argument('--sizes', nargs='+', type=size, metavar='PIXELS', help='a side, or HEIGHTxWIDTH')
    parser.add_argument('--batches', nargs='+', type=int, metavar='IMAGES', help='(default: 1)')
    parser.add_argument('--modes', nargs='+', choices=MODES, help='(default: forward)')
    parser.add_argument('--precisions', nargs='+', choices=PRECISIONS, help='(default: bf16 on a GPU, fp32 on a CPU)')
    parser.add_argument(
        '--launches',
        nargs='+',
        choices=LAUNCHES,
        help='the fastest of them counts; graph: replayed as one CUDA graph, of a config the backbone alone, compiled '
        '(default: all on a GPU)',
    )
    parser.add_argument('--seconds', type=float, default=0.5, help='of timing for each row (default: 0.5)')
    parser.add_argument('--rounds', type=int, default=1, help='turns in which these seconds are spent (default: 1)')
    parser.add_argument('--jobs', type=int, help='models that build and compile at a time (default: all on a GPU)')
    parser.add_argument('--timeout', type=float, default=300, help='seconds after which a model is given up')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='of a CPU')
    parser.add_argument('--accuracy', type=Path, metavar='CSV', help='columns model, size, accuracy: a fourth panel')
    parser.add_argument('--from', dest='rows', type=Path, metavar='CSV', help='draw these rows instead of timing')
    parser.add_argument('--out', type=Path, metavar='CSV', help='write the rows here, and beside it .json and .png')
    args = parser.parse_args()
    if args.rows:
        if not args.out:
            parser.error('--from draws the picture beside --out: name one')
        return args
    gpu = args.device.startswith('cuda')
    preset = PRESETS.get(args.preset, (['vigh-gla-tiny', 'swin-tiny'], ['swin-tiny'], [], list(LAUNCHES)))
    precisions = args.precisions or ['bf16' if gpu else 'fp32']
    if args.preset and not (args.sizes or args.batches or args.modes):
        settings = preset[2]
    else:
        sides, batches = args.sizes or [(224, 224)], args.batches or [1]
        settings = [(*side, batch, mode) for mode, side, batch in product(args.modes or ['forward'], sides, batches)]
    args.settings = [Setting(*setting, precision) for precision in precisions for setting in settings]
    args.models = args.models or preset[0]
    args.baseline = args.baseline or [model for model in preset[1] if model in args.models] or args.models[-1:]
    args.launches = args.launches or (preset[3] if gpu else ['eager'])
    args.jobs = args.jobs or (len(args.models) if gpu else 1)
    if min(args.rounds, args.jobs, *(setting.batch for setting in args.settings)) < 1 or args.seconds <= 0:
        parser.error('--rounds, --jobs, --batches and --seconds must be positive')
    return args


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    return int(height), int(width or height)


def table(rows: list[Row], baselines: list[str]) -> Table:
    """Each model's fastest launch in each setting."""
    columns = ['p20', 'ms', 'p80', 'img/s', 'peak MB', 'GFLOPs', 'of its limit', 'speed', 'memory']
    table = Table('setting', 'model', 'launch', title=f'speed and memory: as a multiple of {" or ".join(baselines)}')
    for column in columns:
        table.add_column(column, justify='right')
    setting = None
    for row in best_rows(rows):
        if row.setting != setting and setting:
            table.add_section()
        cells = ['' if row.setting == setting else str(row.setting), row.model, row.launch]
        setting = row.setting
        if row.status != 'ok':
            table.add_row(*cells[:2], row.status)
            continue
        share = '' if row.share is None else f'{row.share:.0%} {row.limit}'
        numbers = [row.p20, row.p50, row.p80, row.images_per_second, row.peak_mb, row.gflops]
        texts = ['' if number is None else f'{number:.4g}' for number in numbers]
        ratios = ['' if ratio is None else f'{ratio:.2f}x' for ratio in (row.speed, row.memory)]
        table.add_row(*cells, *texts, share, *ratios)
    return table


def write(rows: list[Row], report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy = [
        {key: float(f'{value:.5g}') if isinstance(value, float) else value for key, value in asdict(row).items()}
        for row in rows
    ]
    with path.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, [*tidy[0], 'environment'], lineterminator='\n')
        writer.writeheader()
        writer.writerows({**row, 'environment': report['environment']} for row in tidy)
    path.with_suffix('.json').write_text(json.dumps({**report, 'rows': tidy}, indent=1) + '\n')


def read_rows(path: Path) -> tuple[list[Row], str]:
    """The rows that `write` wrote, and the machine that they are of."""
    try:
        report = json.loads(path.with_suffix('.json').read_text())
    except OSError as error:
        sys.exit(f'--from: {error}; it is written beside {path}, and holds what that does')
    names = {field.name for field in fields(Row)}
    return [Row(**{key: value for key, value in row.items() if key in names}) for row in report['rows']], report[
        'environment'
    ]


if __name__ == '__main__':
    main()
