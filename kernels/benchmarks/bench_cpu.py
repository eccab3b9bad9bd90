"""How fast `bigla` is on a CPU: `chunked` against `reference`, forward and forward with backward, at real shapes.

    python kernels/benchmarks/bench_cpu.py --threads 2
    python kernels/benchmarks/bench_cpu.py --shapes 0 3 --dry-run

Each shape is first checked against `reference` in float64; one that is wrong leaves no row. Times are wall clock, of
single calls on warm memory, inputs as ViG's mixer passes them: q, k, v slices of one packed projection, float32.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from results import append
from torch import Tensor

from bigla import bigla

HERE = Path(__file__).parent
SHAPES = [  # B, nh, L, K, V
    (1, 3, 3136, 16, 32),  # ViG-H-T stage 1 at 224
    (4, 3, 4096, 16, 32),  # ViG-H-T stages 1 to 4 at 256, batch 4
    (4, 6, 1024, 16, 32),
    (4, 12, 256, 16, 32),
    (4, 24, 64, 16, 32),
    (2, 3, 4096, 32, 64),  # ViG-T at 1024, batch 2
    (1, 3, 67200, 16, 32),  # ViG-H-T stage 1 at 800 x 1344
    (8, 2, 2304, 16, 32),  # a small ViG-H's stage 1 at 192, batch 8
]
ERROR = 2e-6  # relative Frobenius, of the output and of each gradient
MODES = ('forward', 'forward+backward')


def make_inputs(B: int, nh: int, L: int, K: int, V: int) -> list[Tensor]:
    packed = torch.randn(B, L, nh * (2 * K + V))
    q, k, v = packed.split([nh * K, nh * K, nh * V], -1)
    g_fwd, g_bwd = (F.logsigmoid(torch.randn(B, L, 2 * nh * K)) / 16).chunk(2, -1)
    return [x.unflatten(-1, (nh, -1)).detach().requires_grad_() for x in (q, k, v, g_fwd, g_bwd)]


def call(impl: str, mode: str, inputs: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    if mode == 'forward':
        with torch.no_grad():
            return (bigla(*inputs, impl=impl),)
    out = bigla(*inputs, impl=impl)
    return (out.detach(), *torch.autograd.grad(out, inputs, do))


def worst_error(inputs: list[Tensor], do: Tensor) -> float:
    got = call('chunked', MODES[1], inputs, do)
    exact = call('reference', MODES[1], [x.detach().double().requires_grad_() for x in inputs], do.double())
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))


def measure(fn: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, sorted: one to warm up, then at least 3 and for `seconds`, at most 200."""
    fn()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


def machine() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'{models[0] if models else platform.processor()} x{os.cpu_count()}'


def commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(['git', '-C', HERE, *args], capture_output=True, text=True).stdout.strip()

    return git('rev-parse', '--short', 'HEAD') + (
        '+' if git('status', '--porcelain', '-uno', HERE.parent / 'bigla') else ''
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--shapes', type=int, nargs='+', default=range(len(SHAPES)), help='numbers in the list, from 0')
    parser.add_argument('--seconds', type=float, default=4, help='time to spend on each measurement')
    parser.add_argument('--out', type=Path, default=HERE / 'results_cpu.csv', help='rows are appended to it')
    parser.add_argument('--dry-run', action='store_true', help='append nothing')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    about = {
        'date': datetime.date.today().isoformat(),
        'commit': commit(),
        'machine': machine(),
        'load': f'{os.getloadavg()[0]:.1f}',
        'threads': args.threads,
        'torch': torch.__version__,
    }
    print(*(f'{name} {value}' for name, value in about.items()), sep=', ')
    wrong = False
    for n, shape in enumerate(SHAPES[i] for i in args.shapes):
        torch.manual_seed(0)
        inputs = make_inputs(*shape)
        do = torch.randn(inputs[2].shape)
        print(f'[{n + 1}/{len(args.shapes)}] B, nh, L, K, V = {shape}: checking ..', end='', flush=True)
        error = worst_error(inputs, do)
        print(f'\r[{n + 1}/{len(args.shapes)}] B, nh, L, K, V = {shape}: error {error:.1e}', flush=True)
        if not error < ERROR:
            print(f'    not measured: the error exceeds {ERROR}')
            wrong = True
            continue
        rows = []
        for mode in MODES:
            medians = {}
            for impl in ('reference', 'chunked'):
                print(f'    {mode:18}{impl:10}', end='', flush=True)
                times = measure(partial(call, impl, mode, inputs, do), args.seconds)
                p20, p50, p80 = (times[int(p * (len(times) - 1))] for p in (0.2, 0.5, 0.8))
                medians[impl] = p50
                ratio = medians['reference'] / p50
                print(f'{p50:10.2f} ms  ({p20:.2f} .. {p80:.2f}, {len(times)} calls)  {ratio:.1f}x', flush=True)
                rows.append(
                    about
                    | dict(zip(('B', 'nh', 'L', 'K', 'V'), shape, strict=True))
                    | {'dtype': 'float32', 'mode': mode, 'impl': impl}
                    | {'p20_ms': f'{p20:.3f}', 'p50_ms': f'{p50:.3f}', 'p80_ms': f'{p80:.3f}', 'calls': len(times)}
                    | {'reference_over_impl': f'{ratio:.2f}', 'error': f'{error:.1e}' if impl == 'chunked' else ''}
                )
        if not args.dry_run:
            append(rows, args.out)
    sys.exit(wrong)


if __name__ == '__main__':
    main()
