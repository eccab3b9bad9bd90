"""Times settings of the kernels around the operator: what the constants in `bigla.triton` rest on.

    python kernels/benchmarks/tune.py
    python kernels/benchmarks/tune.py --targets residual_mlp norm_grad --out settings.csv

Microseconds of a CUDA graph, median, of each setting and shape; settings are sorted by their time relative to the best
of each shape, behind what the modules hold now. One whose results differ from theirs, or that does not fit, is named
and left out; that theirs are right is what the tests say. bfloat16 inside a float32 stream, as autocast has it.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from results import append
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench_cudagraph

from bigla import residual_mlp
from bigla.triton import backward, decay, forward, merge, mixer, mlp, norm, primitives, stem
from bigla.triton.forward import launch_forward
from bigla.triton.sums import Sums

BF16 = torch.bfloat16
RANK = 16  # of the decays
ERROR = 1e-2  # relative Frobenius norm of the difference from what the present setting gives


class Target(NamedTuple):
    """A kernel, what is to be set for it, and on which shapes."""

    module: ModuleType
    settings: list[dict[str, object]]
    shapes: list[tuple[int, ...]]
    prepare: Callable[..., Callable[[], Tensor]]  # of a shape: makes the inputs, returns what is timed


def grid(**choices: tuple) -> list[dict[str, object]]:
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def tiles(name: str, BM: tuple, BH: tuple, warps: tuple, stages: tuple) -> list[dict[str, object]]:
    return [{name: mlp.Tile(*values)} for values in itertools.product(BM, BH, warps, stages)]


def by_triton(settings: list[dict[str, object]]) -> list[dict[str, object]]:
    """The same, without Hopper's kernels, which know nothing of them; what is held now has these."""
    return [setting | {'KNOWN': False} for setting in settings]


def normal(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=dtype, device='cuda') * scale


def prepare_residual_mlp(M: int, C: int, H: int) -> Callable[[], Tensor]:
    x, branch = normal(1, M, C, dtype=torch.float32), normal(1, M, C)
    vectors = normal(C, dtype=torch.float32), normal(C, dtype=torch.float32)
    weights = normal(2 * H, C, scale=C**-0.5), normal(C, H, scale=H**-0.5)
    return lambda: residual_mlp(x, branch, *vectors, *weights, inner=BF16, impl='triton') - x


def prepare_swiglu(M: int, C: int, H: int) -> Callable[[], Tensor]:
    x, fc1 = normal(M, C), normal(2 * H, C, scale=C**-0.5)
    return lambda: mlp.launch_swiglu(x, fc1)[0]


def prepare_swiglu_grad(M: int, C: int, H: int) -> Callable[[], Tensor]:
    x, dy, fc1, fc2 = normal(M, C), normal(M, C), normal(2 * H, C, scale=C**-0.5), normal(C, H, scale=H**-0.5)
    return lambda: mlp.launch_swiglu(x, fc1, dy, fc2)[1]


def prepare_norm(M: int, C: int) -> Callable[[], Tensor]:
    x, weight = normal(M, C, dtype=torch.float32), normal(C, dtype=torch.float32)
    return lambda: norm.launch_norm(x, None, weight, weight, 1e-6, BF16)[1]


def summed(launch: Callable, *args, **options) -> Any:
    """What a launch gives whose gradients are partly sums over tokens, with these."""
    with Sums() as sums:
        return launch(sums, *args, **options)


def prepare_norm_grad(M: int, C: int) -> Callable[[], Tensor]:
    x, dy = normal(M, C, dtype=torch.float32), normal(M, C, dtype=torch.float32)
    dn, branch, weight = normal(M, C), normal(M, C), normal(C, dtype=torch.float32)
    inputs = dy, dn, x, weight, weight
    return lambda: summed(norm.launch_norm_grad, *inputs, 1e-6, torch.float32, BF16, branch=branch)[0]


def prepare_merge_grad(B: int, L: int, nh: int, V: int) -> Callable[[], Tensor]:
    o = normal(B, L, nh, V)
    dy, local, gate, dgate = (normal(B, L, nh * V) for _ in range(4))
    bias, weight = normal(nh * V, dtype=torch.float32), normal(V, dtype=torch.float32)
    inputs = dy, o, local, gate, bias, weight, weight, dgate
    return lambda: summed(merge.launch_merge_grad, *inputs, 1e-6, True)[0]


def prepare_decay_grad(M: int, C: int) -> Callable[[], Tensor]:
    dlogits, rows, weight = normal(M, C), normal(M, 3 * C + RANK), normal(C, RANK, dtype=torch.float32)
    inputs = dlogits, rows[:, -RANK:], weight, torch.empty_like(rows)[:, -RANK:]
    return lambda: summed(decay.launch_decay_grad, *inputs)[0]


def prepare_stem(B: int, H: int, W: int, C: int, D: int, side: int, stride: int) -> Callable[[], Tensor]:
    x = normal(B, C, H, W, dtype=torch.float32).permute(0, 2, 3, 1) if C == 3 else normal(B, H, W, C)
    weight, vector = normal(D, C, side, side, dtype=torch.float32), normal(D, dtype=torch.float32)
    return lambda: stem.launch_conv_norm(x, weight, vector, vector, vector, stride, 1e-5, 'gelu', BF16, BF16)


def prepare_stem_grad(B: int, H: int, W: int, C: int, D: int, side: int, stride: int) -> Callable[[], Tensor]:
    x = normal(B, C, H, W, dtype=torch.float32).permute(0, 2, 3, 1)
    dp = normal(B, stem.out_side(H, side, stride), stem.out_side(W, side, stride), D)
    return lambda: summed(stem.launch_conv_weight_grad, dp, x, side, stride)


def prepare_mixer(B: int, L: int, nh: int, K: int) -> Callable[[], Tensor]:
    dims = 2 * K * nh
    tensors = normal(B, L, 3 * dims + RANK), normal(B, L, dims), normal(dims, RANK, dtype=torch.float32, scale=0.25)
    vectors = (normal(n, dtype=torch.float32) for n in (dims, dims, 2 * K, 2 * K))
    inputs, C = (*tensors, *vectors), primitives.chunk_size(L, K, BF16)
    return lambda: mixer.launch_mixer(*inputs, nh, 1e-6, True, C, False, False)[0]


def prepare_backward(B: int, L: int, nh: int, K: int) -> Callable[[], Tensor]:
    q, k, v, do = normal(B, L, nh, K), normal(B, L, nh, K), normal(B, L, nh, 2 * K), normal(B, L, nh, 2 * K)
    weight, bias = normal(2 * nh * K, RANK, dtype=torch.float32, scale=0.25), normal(2 * nh * K, dtype=torch.float32)
    gates = mixer.decays(normal(B, L, RANK), weight, bias, nh)
    C = primitives.chunk_size(L, K, BF16)
    saved = launch_forward(q, k, v, gates, 1.0, C, False)[1:]
    into = [torch.empty_like(x) for x in (q, k, v, q, q)]  # the last two are the logits'
    return lambda: backward.launch_backward(do, q, k, v, gates, *saved, 1.0, C, False, into)[1]


class Replaced:
    """`primitives.config` with other entries."""

    def __init__(self, **changes: int) -> None:
        self.changes = changes

    def __call__(self, *args) -> primitives.Config:
        return primitives.config(*args)._replace(**self.changes)

    def __repr__(self) -> str:
        return ', '.join(f'{name} {value}' for name, value in self.changes.items())


def configs(**choices: tuple) -> list[dict[str, object]]:
    return [{'config': Replaced(**changes)} for changes in grid(**choices)]


def registers(*numbers: int) -> list[dict[str, object]]:
    return [{'REGISTERS': dict.fromkeys(primitives.LONG, n)} for n in numbers]


MLPS = [(32768, 192, 512), (134400, 96, 256)]  # ViG-T at 1024, batch 8; ViG-H-T at 800 x 1344, batch 2, its first stage
TARGETS = {
    'residual_mlp': Target(
        mlp,
        [{'FEWEST': 10**9}]
        + [
            {'FEWEST': 0} | dict.fromkeys(('TILES', 'SMALL_TILES'), dict.fromkeys(mlp.TILES, mlp.Tile(*values)))
            for values in itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4))
        ],
        [*MLPS, (33600, 256, 704), *((M, 192, 512) for M in (4096, 8192, 16384))],
        prepare_residual_mlp,
    ),
    'swiglu': Target(
        mlp,
        by_triton(tiles('SWIGLU', (64, 128), (32, 64), (4, 8), (2, 3, 4))),
        [(4096, 192, 512), (8400, 384, 1024)],
        prepare_swiglu,
    ),
    'swiglu_grad': Target(
        mlp,
        by_triton(tiles('SWIGLU_GRAD', (64, 128), (32, 64), (4, 8), (2, 3, 4))),
        [*MLPS, (8400, 384, 1024), (2100, 768, 2048)],
        prepare_swiglu_grad,
    ),
    'norm': Target(norm, grid(TILE=(1024, 2048), WARPS=(2, 4)), [shape[:2] for shape in MLPS], prepare_norm),
    'norm_grad': Target(
        norm,
        grid(GRAD_TILE=(1024, 2048), GRAD_WARPS=(2, 4), WALK=(8, 16), AHEAD=(1, 2, 3)),
        [shape[:2] for shape in MLPS],
        prepare_norm_grad,
    ),
    'merge_grad': Target(
        merge,
        grid(GRAD_TILE=(1024, 2048), GRAD_WARPS=(2, 4), WALK=(4, 8, 16), AHEAD=(1, 2, 3)),
        [(8, 4096, 3, 64), (2, 67200, 3, 32)],
        prepare_merge_grad,
    ),
    'decay_grad': Target(
        decay,
        grid(TOKENS=(32, 64), CHANNELS=(32, 64), WARPS=(2, 4), PROGRAMS=(264, 396, 528)),
        [(32768, 192), (134400, 96), (8400, 384)],
        prepare_decay_grad,
    ),
    'stem': Target(
        stem,
        grid(TOKENS=(64, 128), TAPS=(32, 64), WARPS=(4, 8), STAGES=(1, 2, 3)),
        [(8, 1024, 1024, 3, 96, 9, 8), (2, 800, 1344, 3, 48, 3, 2), (2, 400, 672, 48, 96, 3, 2)],
        prepare_stem,
    ),
    'stem_grad': Target(
        stem,
        grid(GRAD_TOKENS=(64, 128), GRAD_TAPS=(32, 64), GRAD_WARPS=(4, 8), PROGRAMS=(512, 1024)),
        [(8, 1024, 1024, 3, 96, 9, 8), (2, 800, 1344, 3, 48, 3, 2)],
        prepare_stem_grad,
    ),
    'mixer 32': Target(
        forward,
        configs(merge_warps=(1, 2, 4), merge_registers=(96, 128, 168, 224)),
        [(400, 128, 3, 32)],  # more tokens are for Hopper's kernels
        prepare_mixer,
    ),
    'mixer 16': Target(
        forward, configs(merge_warps=(1, 2), merge_registers=(64, 96, 128, 152)), [(128, 196, 12, 16)], prepare_mixer
    ),
    'backward 32': Target(
        backward, configs(grad_warps=(1, 2, 4), grad_walk=(1, 2)), [(400, 128, 3, 32)], prepare_backward
    ),
    'backward 16': Target(
        backward, configs(grad_warps=(1, 2), grad_walk=(1, 2, 4)), [(400, 64, 12, 16)], prepare_backward
    ),
}
if primitives.KNOWN:
    from bigla.triton.hopper import bigla_grad, bigla_out

    TARGETS |= {
        'long mixer 32': Target(bigla_out, registers(96, 128, 168), [(8, 4096, 3, 32)], prepare_mixer),
        'long mixer 16': Target(bigla_out, registers(80, 96, 128), [(2, 67200, 3, 16)], prepare_mixer),
        'long backward 32': Target(bigla_grad, registers(168, 200, 232, 255), [(8, 4096, 3, 32)], prepare_backward),
        'long backward 16': Target(bigla_grad, registers(128, 168, 255), [(2, 67200, 3, 16)], prepare_backward),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--targets', nargs='+', choices=TARGETS, default=list(TARGETS), help='default: all')
    parser.add_argument('--jobs', type=int, default=8, help='processes that compile beforehand (default: %(default)s)')
    parser.add_argument('--milliseconds', type=int, default=20, help='of timing for a setting (default: %(default)s)')
    parser.add_argument('--out', type=Path, metavar='CSV', help='append the rows here')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('torch sees no GPU: there is nothing to time')
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(torch.cuda.get_device_name(), 'torch', torch.__version__)
    jobs = [(name, shape, i) for name in args.targets for shape in TARGETS[name].shapes
            for i in range(len(TARGETS[name].settings))]  # fmt: skip
    with get_context('spawn').Pool(args.jobs) as pool:
        for _ in track(pool.imap_unordered(compile_one, jobs), 'compiling', len(jobs), console=console):
            pass
    rows = []
    for name in args.targets:
        found = [row for shape in TARGETS[name].shapes for row in time_settings(name, shape, args, console.print)]
        console.print(ranking(name, found))
        rows += found
    if args.out:
        append(rows, args.out)


@contextmanager
def setting_of(target: Target, setting: dict[str, object]) -> Iterator[None]:
    before = {name: getattr(target.module, name) for name in setting}
    try:
        for name, value in setting.items():
            setattr(target.module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target.module, name, value)


def described(item: tuple[str, object]) -> str:
    name, value = item
    if isinstance(value, dict):  # by widths, the same for all of them
        value = next(iter(value.values()))
    return f'{name} {" x ".join(map(str, value)) if isinstance(value, mlp.Tile) else value}'


def compile_one(job: tuple[str, tuple[int, ...], int]) -> None:
    name, shape, i = job
    target = TARGETS[name]
    with torch.no_grad(), setting_of(target, target.settings[i]), suppress(Exception):  # told when it is to be timed
        target.prepare(*shape)()


def time_settings(
    name: str, shape: tuple[int, ...], args: argparse.Namespace, tell: Callable[[str], None]
) -> list[dict]:
    """A row for each setting that is right, the present one first."""
    target, rows = TARGETS[name], []
    torch.manual_seed(0)
    about = dict(device=torch.cuda.get_device_name(), target=name, shape=' x '.join(map(str, shape)))
    with torch.no_grad():
        run = target.prepare(*shape)
        want = run().float()
        for setting in [{}, *target.settings]:
            label = ', '.join(map(described, setting.items())) or 'present'
            with setting_of(target, setting):
                try:
                    error = ((run().float() - want).norm() / want.norm()).item()
                    us = 1000 * do_bench_cudagraph(run, rep=args.milliseconds, return_mode='median')
                except Exception as failure:  # registers or shared memory do not suffice
                    tell(f'{name}, {about["shape"]}, {label}: {str(failure).splitlines()[0][:80]}')
                    continue
            if not error <= ERROR:
                tell(f'{name}, {about["shape"]}, {label} is WRONG: it differs by {error:.1e}')
                continue
            rows.append(dict(about, setting=label, us=f'{us:.2f}', error=f'{error:.1e}'))
    return rows


def ranking(name: str, rows: list[dict]) -> Table:
    """Settings that serve all shapes, by the mean of their times relative to each shape's best; first, the present."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row['setting'], {})[row['shape']] = float(row['us'])
    shapes = list(dict.fromkeys(row['shape'] for row in rows))
    best = {shape: min(found[shape] for found in times.values() if shape in found) for shape in shapes}
    score = {
        setting: sum(found[shape] / best[shape] for shape in shapes) / len(shapes)
        for setting, found in times.items()
        if len(found) == len(shapes)
    }
    table = Table('setting', *shapes, 'to the best', title=name)
    for setting in sorted(score, key=lambda setting: (setting != 'present', score[setting])):
        table.add_row(setting, *(f'{times[setting][shape]:.1f}' for shape in shapes), f'{score[setting]:.3f}')
    return table


if __name__ == '__main__':
    main()
