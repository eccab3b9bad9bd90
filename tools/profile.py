"""Names each kernel of a model's step with its time, its share and its floor; prints a table and writes CSV.

    python tools/profile.py vig-gla-tiny --size 1024 --batch 8 --mode train --compiled --out vig-t_1024_train.csv

The floor of an operator is its inputs and outputs, each once, at the rate of a copy, or its FLOPs at the rate of a
matrix product, whichever takes longer; both rates are measured first. On a CPU operators take the place of kernels.
"""

import importlib.util
import sys
import sysconfig

if __name__ == 'profile':
    # The standard library's cProfile, which torch imports, imports its neighbour of this name, and finds this file
    # where the folder of the tools comes first: hand it the one that it means.
    spec = importlib.util.spec_from_file_location('profile', f'{sysconfig.get_path("stdlib")}/profile.py')
    sys.modules['profile'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules['profile'])

import argparse
import csv
import logging
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    import torch
    from mmpretrain.utils import register_all_modules
    from rich.console import Console

    from mmvig.apis.backbones import BACKBONES
    from mmvig.apis.profile import by_category, profile
    from mmvig.apis.subjects import MODES, PRECISIONS, Setting, Subject
    from mmvig.apis.timing import Limits, environment, sample
    from mmvig.engine.settings import SetupError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help=f'a config, or one of {", ".join(BACKBONES)}')
    parser.add_argument('--size', default='224', metavar='PIXELS', help='a side, or HEIGHTxWIDTH (default: 224)')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--mode', choices=MODES, default='forward')
    parser.add_argument('--precision', choices=PRECISIONS, help='(default: bf16 on a GPU, fp32 on a CPU)')
    parser.add_argument('--compiled', action='store_true', help='with the backbone compiled')
    parser.add_argument('--steps', type=int, default=5, help='profiled steps (default: 5)')
    parser.add_argument('--rows', type=int, default=30, help='kernels to print (default: 30)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, metavar='CSV', help='write all kernels here')
    args = parser.parse_args()

    register_all_modules(init_default_scope=False)
    logging.getLogger('mmengine').setLevel('ERROR')
    device = torch.device(args.device)
    precision = args.precision or ('fp32' if device.type == 'cpu' else 'bf16')
    height, _, width = args.size.partition('x')
    setting = Setting(int(height), int(width or height), args.batch, args.mode, precision)
    limits = Limits.measure(device, PRECISIONS[precision])
    try:
        subject = Subject(args.model, setting, device)
    except SetupError as error:
        sys.exit(f'{error}')
    mode = 'default' if args.compiled else None
    kernels = profile(subject, mode, limits, args.steps)
    times = sample(lambda: subject.step(mode), 0.5, device, subject.reset)

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    total, floor = sum(kernel.ms for kernel in kernels), sum(kernel.floor_ms or 0 for kernel in kernels)
    launch = 'compiled' if args.compiled else 'eager'
    console.print(f'{args.model}, {setting}, {launch}. {environment(device)}')
    console.print(
        f'a copy moves {limits.copy / 1e9:.0f} GB/s, a matrix product does {limits.matmul / 1e12:.4g} TFLOP/s'
    )
    console.print(
        f'a step takes {sorted(times)[len(times) // 2]:.3f} ms without the profiler; its kernels take {total:.3f} ms, '
        f'their floors {floor:.3f} ms'
    )
    console.print(table(by_category(kernels), names=False), table(kernels[: args.rows], names=True))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open('w', newline='') as stream:
            facts = dict(
                model=args.model, setting=str(setting), launch=launch, copy_gbs=f'{limits.copy / 1e9:.1f}',
                matmul_tflops=f'{limits.matmul / 1e12:.5g}', environment=environment(device),
            )  # fmt: skip
            writer = csv.DictWriter(stream, [*asdict(kernels[0]), *facts], lineterminator='\n')
            writer.writeheader()
            for kernel in kernels:
                row = {k: f'{v:.5g}' if isinstance(v, float) else v for k, v in asdict(kernel).items()}
                writer.writerow({**row, **facts})
        console.print(f'written to {args.out}')


def table(kernels: list, names: bool):
    from rich.table import Table

    table = Table('category', *(['kernel', 'operator'] if names else []))
    for column in ('calls', 'ms', 'share', 'floor ms', 'time / floor'):
        table.add_column(column, justify='right')
    for kernel in kernels:
        cells = [kernel.category, *([kernel.name[:70], kernel.operator] if names else [])]
        floor = kernel.floor_ms
        gap = f'{kernel.ms / floor:.1f}x' if floor else ''
        numbers = (
            f'{kernel.calls:.0f}',
            f'{kernel.ms:.4f}',
            f'{kernel.share:.1%}',
            '' if floor is None else f'{floor:.4f}',
        )
        table.add_row(*cells, *numbers, gap)
    return table


if __name__ == '__main__':
    import mmvig  # noqa: F401  before mmpretrain is imported

    main()
