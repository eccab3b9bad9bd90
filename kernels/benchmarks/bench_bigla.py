"""How fast `bigla` is on a GPU, beside its peers, in one run: forward and forward with backward, eager and CUDA graph.

    PYTHONPATH=kernels python kernels/benchmarks/bench_bigla.py --out results.csv
    PYTHONPATH=kernels python kernels/benchmarks/bench_bigla.py --kernels --shapes 0 2

Peers: `chunk_gla` of flash-linear-attention on inputs flipped and concatenated (where it is installed), softmax
attention of 64-wide heads by each of PyTorch's backends, and the floor: a copy that moves every tensor of the call
once. Ours is checked first, against `chunked` in float64 and that against `reference` up to 4,096 tokens; a shape that
is wrong leaves no rows. Each implementation runs in a process of its own, so that none can take the others down.
`plot_bigla.py` draws the rows.

A time is that of one call among many in a row, over as many sets of inputs as exceed the L2 cache. `--kernels` times
ours kernel by kernel, for several tile sizes and warps.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from results import append
from torch import Tensor

HERE = Path(__file__).parent
SHAPES = [  # B, nh, L, K, V
    (16, 3, 4096, 32, 64),  # ViG-T at 1024
    (1, 3, 16384, 32, 64),  # ViG-T at 2048
    (2, 3, 67200, 16, 32),  # ViG-H-T stage 1 at 800 x 1344
    (128, 3, 196, 32, 64),  # ViG-T at 224
    (128, 12, 196, 16, 32),  # ViG-H-T stage 3 at 224
    (128, 3, 3136, 16, 32),  # ViG-H-T stage 1 at 224
]
MODES = ('fwd', 'fwd+bwd')
SDPA = ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION')
ROUNDING = 2.0**-8  # of bfloat16
CACHE = 120 * 2**20  # twice an H200's L2
# (C, warps of the state, the output, the gradients) that --kernels tries
CANDIDATES = [(16, 1, 1, 1), (32, 1, 1, 1), (32, 1, 1, 2), (32, 2, 2, 2), (64, 1, 2, 2)]
COLUMNS = ['impl', 'mode', 'launch', 'p20_us', 'p50_us', 'p80_us', 'extra_mb', 'error', 'peer_error']


def make_inputs(B: int, nh: int, L: int, K: int, V: int) -> list[Tensor]:
    """As ViG's mixer passes them: q, k, v slices of one packed projection, gates of another."""
    packed = torch.randn(B, L, nh * (2 * K + V), device='cuda', dtype=torch.bfloat16)
    gates = F.logsigmoid(torch.randn(B, L, 2 * nh * K, device='cuda', dtype=torch.bfloat16)) / 16
    parts = *packed.split([nh * K, nh * K, nh * V], -1), *gates.chunk(2, -1)
    return [x.unflatten(-1, (nh, -1)).detach().requires_grad_() for x in parts]


def sets_of_inputs(shape: tuple[int, ...], make: Callable) -> list[list[Tensor]]:
    first = make(*shape)
    size = sum(x.numel() * x.element_size() for x in first)
    return [first] + [make(*shape) for _ in range(min(7, CACHE // size))]


def step(fn: Callable[..., Tensor], mode: str, inputs: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    if mode == 'fwd':
        with torch.no_grad():
            return (fn(*inputs),)
    out = fn(*inputs)
    return out, *torch.autograd.grad(out, inputs, do)


def quantiles(run: Callable[[], object], calls: int, seconds: float) -> dict[str, float]:
    """p20, p50 and p80 of the microseconds a call takes, where `run` makes `calls` of them."""
    run()
    torch.cuda.synchronize()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / calls)
    times.sort()
    return {f'p{p}_us': round(times[p * (len(times) - 1) // 100], 2) for p in (20, 50, 80)}


def measure(fn: Callable[[list[Tensor]], object], sets: list[list[Tensor]], seconds: float) -> Iterator[dict]:
    """Rows of both ways to launch `fn(inputs)`."""
    fn(sets[0])
    torch.cuda.synchronize()
    begin = time.perf_counter()
    fn(sets[0])
    torch.cuda.synchronize()
    calls = min(8, max(1, int(0.02 / (time.perf_counter() - begin))))  # a slow one fills the GPU by itself

    def run() -> None:
        for i in range(calls):
            fn(sets[i % len(sets)])

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn(sets[0])
    extra = {'extra_mb': round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)}
    yield {'launch': 'eager'} | quantiles(run, calls, seconds) | extra
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fn(sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    yield {'launch': 'graph'} | quantiles(graph.replay, calls, seconds) | extra


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, want, strict=True)]


def check(shape: tuple[int, ...]) -> dict[str, float]:
    """Errors of ours and of `chunked` in bfloat16, where they are largest against what is allowed, or raise."""
    from bigla import chunked, reference, triton

    B, _, L, K, V = shape
    inputs = make_inputs(*shape)
    do = torch.randn_like(inputs[2])
    scale = K**-0.5
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = step(lambda *x: chunked.bigla(*x, scale), 'fwd+bwd', exact, do.double())
    if L <= 4096:
        first = [x[:1].detach().requires_grad_() for x in exact]
        oracle = step(lambda *x: reference.bigla(*x, scale), 'fwd+bwd', first, do[:1].double())
        if not max(errors([x[:1] for x in want], oracle)) < 1e-10:
            raise AssertionError('chunked in float64 is wrong')
    mine = errors(step(lambda *x: triton.bigla(*x, scale), 'fwd+bwd', inputs, do), want)
    peer = errors(step(lambda *x: chunked.bigla(*x, scale), 'fwd+bwd', inputs, do), want)
    worst = max(zip(mine, peer), key=lambda pair: pair[0] - 2 * pair[1])
    if not all(a <= 2 * b + ROUNDING for a, b in zip(mine, peer)):
        names = ['o', 'dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd']
        raise AssertionError(
            'error, chunked: ' + ', '.join(f'{n} {a:.1e} {b:.1e}' for n, a, b in zip(names, mine, peer))
        )
    return {'error': round(worst[0], 5), 'peer_error': round(worst[1], 5)}


def gradients_of(fn: Callable[..., Tensor], mode: str) -> Callable[[list[Tensor]], object]:
    def call(inputs: list[Tensor]) -> object:
        *inputs, do = inputs
        return step(fn, mode, inputs, do)

    return call


def with_do(*shape: int) -> list[Tensor]:
    inputs = make_inputs(*shape)
    return [*inputs, torch.randn_like(inputs[2])]


def bench_ours(shape: tuple[int, ...], seconds: float) -> Iterator[dict]:
    from bigla import triton

    start = time.perf_counter()
    triton.bigla(*make_inputs(*shape), 1.0).sum().backward()
    torch.cuda.synchronize()
    yield {'note': f'first call {time.perf_counter() - start:.1f} s'}
    about = {'impl': 'bigla'} | check(shape)
    torch.cuda.empty_cache()
    sets = sets_of_inputs(shape, with_do)
    for mode in MODES:
        for row in measure(gradients_of(lambda *x: triton.bigla(*x, 0.125), mode), sets, seconds):
            yield about | {'mode': mode} | row


def bench_floor(shape: tuple[int, ...], seconds: float) -> Iterator[dict]:
    """Copies of as many bytes as q, k, v, the gates and o have; and with do and the gradients, each once."""
    B, nh, L, K, V = shape
    for mode, size in zip(MODES, (8 * K + 4 * V, 16 * K + 8 * V)):
        half = B * nh * L * size // 2

        def make(*_, half: int = half) -> list[Tensor]:
            return [torch.ones(half, dtype=torch.uint8, device='cuda') for _ in range(2)]

        for row in measure(lambda x: x[0].copy_(x[1]), sets_of_inputs(shape, make), seconds):
            yield {'impl': 'copy', 'mode': mode} | row


def bench_sdpa(shape: tuple[int, ...], seconds: float) -> Iterator[dict]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, nh, L, _, _ = shape

    def make(*_) -> list[Tensor]:
        x = torch.randn(4, B, L, nh, 64, device='cuda', dtype=torch.bfloat16).transpose(2, 3)
        return [*(y.detach().requires_grad_() for y in x[:3]), x[3]]

    sets = sets_of_inputs(shape, make)
    for name in SDPA:

        def attend(*inputs: Tensor, name: str = name) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, name)):
                return F.scaled_dot_product_attention(*inputs)

        try:
            for mode in MODES:
                for row in measure(gradients_of(attend, mode), sets, seconds):
                    yield {'impl': f'sdpa {name.partition("_")[0].lower()}', 'mode': mode} | row
        except RuntimeError as error:
            yield {'note': f'sdpa {name}: {str(error).splitlines()[0][:100]}'}


def bench_fla(shape: tuple[int, ...], seconds: float) -> Iterator[dict]:
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as error:
        yield {'note': f'fla: {error}'}
        return

    def both(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> Tensor:
        q, k, v = (torch.cat([x, x.flip(1)]) for x in (q, k, v))
        o_fwd, o_bwd = chunk_gla(q, k, v, torch.cat([g_fwd, g_bwd.flip(1)]), scale=0.125)[0].chunk(2)
        return (o_fwd + o_bwd.flip(1)) / 2

    sets = sets_of_inputs(shape, with_do)
    for mode in MODES:
        for row in measure(gradients_of(both, mode), sets, seconds):
            yield {'impl': 'fla', 'mode': mode} | row


def bench_kernels(shape: tuple[int, ...], candidate: tuple[int, ...] | None) -> Iterator[dict]:
    """Microseconds of every kernel, by the profiler, with the table's or a candidate's tiles."""
    from torch.profiler import ProfilerActivity, profile

    from bigla import triton

    use(candidate, shape[3])
    sets = sets_of_inputs(shape, with_do)
    run = gradients_of(lambda *x: triton.bigla(*x, 0.125), 'fwd+bwd')
    for inputs in sets:
        run(inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(16):
            run(sets[i % len(sets)])
        torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total / 16 for e in profiler.key_averages() if e.key.endswith('_kernel')}
    yield {'kernels': times, 'candidate': candidate}


def use(candidate: tuple[int, ...] | None, K: int) -> None:
    from bigla.triton import primitives

    if candidate:
        primitives.LONG_FROM.clear()  # or many tokens would have other chunks
        primitives.hopper_takes = lambda *_: False
        C, *warps = candidate
        table = primitives.TABLE[torch.bfloat16]
        names = 'state_warps', 'out_warps', 'grad_warps'
        table[primitives.block(K)] = table[primitives.block(K)]._replace(C=C, **dict(zip(names, warps)))


def warm(shape: tuple[int, ...], candidate: tuple[int, ...] | None) -> Iterator[dict]:
    """Compile, on one sample, what the shape needs; Triton keeps it on the disk."""
    from bigla import triton

    use(candidate, shape[3])
    triton.bigla(*make_inputs(1, *shape[1:]), 1.0).sum().backward()
    torch.cuda.synchronize()
    yield {}


WORK = {'ours': bench_ours, 'copy': bench_floor, 'sdpa': bench_sdpa, 'fla': bench_fla}


def work(args: argparse.Namespace) -> None:
    """In a worker: a JSON line for every row, as soon as it is there."""
    for i in args.shapes:
        torch.manual_seed(i)
        if args.work in WORK:
            rows = partial(WORK[args.work], SHAPES[i], args.seconds)
        else:
            rows = partial({'kernels': bench_kernels, 'warm': warm}[args.work], SHAPES[i], args.candidate)
        try:
            for row in rows():
                print('ROW ' + json.dumps({'shape': i} | row), flush=True)
        except Exception:  # noqa: BLE001 - the next shape may well run
            note = f'{args.work}: {traceback.format_exc(limit=-2)[-600:]}'
            print('ROW ' + json.dumps({'shape': i, 'note': note}), flush=True)
        torch.cuda.empty_cache()


def start(name: str, shapes: list[int], seconds: float, candidate: tuple[int, ...] | None = None) -> subprocess.Popen:
    command = [sys.executable, __file__, '--work', name, '--shapes', *map(str, shapes), '--seconds', str(seconds)]
    command += ['--candidate', *map(str, candidate)] if candidate else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(name: str, worker: subprocess.Popen, timeout: float) -> list[dict]:
    """The worker's rows, as many as it got to; what stopped it is printed."""
    try:
        out, err = worker.communicate(timeout=timeout)
        failed = f'ended with {worker.returncode}: {err[-800:]}' if worker.returncode else ''
    except subprocess.TimeoutExpired:
        worker.kill()
        out, err = worker.communicate()
        failed = f'stopped after {timeout:.0f} s'
    if failed:
        print(f'  {name} {failed}')
    rows = [json.loads(line[4:]) for line in out.splitlines() if line.startswith('ROW ')]
    for row in rows:
        if 'note' in row:
            print(f'  {SHAPES[row["shape"]]} {row["note"]}')
    return [row for row in rows if 'note' not in row]


def print_kernels(rows: list[dict]) -> None:
    for row in rows:
        times = sorted(row['kernels'].items())
        label = 'table' if row['candidate'] is None else 'C{} w{},{},{}'.format(*row['candidate'])
        print(f'  {label:16}', '  '.join(f'{name.removesuffix("_kernel")} {us:.1f}' for name, us in times))


def print_table(rows: list[dict], i: int) -> None:
    rows = [row for row in rows if row['shape'] == i]
    ours = {(row['mode'], row['launch']): row['p50_us'] for row in rows if row['impl'] == 'bigla'}
    error = next((f', error {row["error"]:.1e}, chunked {row["peer_error"]:.1e}' for row in rows if 'error' in row), '')
    print(f'{SHAPES[i]} (B, nh, L, K, V){error}')
    print('  us, median            fwd eager     fwd graph         fwd+bwd eager     graph        extra MB')
    for impl in dict.fromkeys(row['impl'] for row in rows):
        line, extra = f'  {impl:16}', ''
        for mode in MODES:
            for launch in ('eager', 'graph'):
                us = [r['p50_us'] for r in rows if (r['impl'], r['mode'], r['launch']) == (impl, mode, launch)]
                mine = ours.get((mode, launch))
                line += f'{us[0]:10.1f}' if us else f'{"-":>10}'
                line += f' {us[0] / mine:5.2f}x' if us and mine else ' ' * 7
                extra = next((r['extra_mb'] for r in rows if r['impl'] == impl and r['mode'] == mode), extra)
        print(line, f'{extra:>8}')


def about() -> dict[str, str]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ''

    git = subprocess.run(['git', '-C', HERE, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    return {
        'date': datetime.date.today().isoformat(),
        'commit': os.environ.get('COMMIT', git.stdout.strip()),
        'gpu': torch.cuda.get_device_name(),
        'torch': torch.__version__,
        'triton': installed('triton'),
        'fla': installed('flash-linear-attention'),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', type=int, nargs='+', default=range(len(SHAPES)), help='numbers in the list, from 0')
    parser.add_argument('--seconds', type=float, default=0.3, help='time to spend on each measurement')
    parser.add_argument('--impls', nargs='+', default=list(WORK), choices=WORK)
    parser.add_argument('--timeout', type=float, default=150, help='seconds an implementation may take')
    parser.add_argument('--kernels', action='store_true', help='time our kernels one by one, and other tiles')
    parser.add_argument('--out', type=Path, default=HERE / 'results.csv', help='rows are appended to it')
    parser.add_argument('--work', help=argparse.SUPPRESS)
    parser.add_argument('--candidate', type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    begin = time.perf_counter()
    candidates = [None, *CANDIDATES] if args.kernels else [None]
    warming = [start('warm', [i], 0, candidate) for i in args.shapes for candidate in candidates]
    for process in warming:
        finish('warm', process, args.timeout)
    print(*(f'{name} {value}' for name, value in about().items()), sep=', ')
    print(f'compiled in {time.perf_counter() - begin:.0f} s, {len(warming)} processes', flush=True)
    if args.kernels:
        for i in args.shapes:
            print(f'{SHAPES[i]} (B, nh, L, K, V), us')
            for candidate in candidates:
                print_kernels(finish('kernels', start('kernels', [i], args.seconds, candidate), args.timeout))
                sys.stdout.flush()
        return
    rows = []
    for impl in args.impls:
        rows += finish(impl, start(impl, args.shapes, args.seconds), args.timeout)
        print(f'{impl} done at {time.perf_counter() - begin:.0f} s', flush=True)
    right = {row['shape'] for row in rows if row['impl'] == 'bigla'}
    names = 'B', 'nh', 'L', 'K', 'V'
    kept = [
        about() | dict(zip(names, SHAPES[row['shape']])) | {'dtype': 'bfloat16'} | {c: row.get(c, '') for c in COLUMNS}
        for row in rows
        if row['shape'] in right
    ]
    if kept:
        append(kept, args.out)
    for i in args.shapes:
        print_table(rows, i)


if __name__ == '__main__':
    main()
