"""Times the tiles of `residual_mlp`'s kernel beside the kernels of its parts: what `mlp.TILES` and `FEWEST` rest on.

    python kernels/benchmarks/tune_residual_mlp.py
    python kernels/benchmarks/tune_residual_mlp.py --shapes 32768x192x512 --out tiles.csv

Microseconds of a CUDA graph, median. A tile that is wrong, or that does not fit, is named and left out. bfloat16 inside
a float32 stream, as autocast has it.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from results import append
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench_cudagraph

from bigla import residual_mlp
from bigla.triton import mlp

# Tokens, channels, hidden channels.
SHAPES = [
    (32768, 192, 512),  # ViG-T at 1024, batch 8
    (134400, 96, 256),  # ViG-H-T at 800 x 1344, batch 2, its first stage
    (33600, 192, 512),  # its second
    (33600, 256, 704),
    *((tokens, 192, 512) for tokens in (4096, 8192, 12288, 16384, 25088)),
]
GRID = dict(BM=(64, 128), BH=(32, 64), num_warps=(4, 8), num_stages=(2, 3, 4))
ERROR = 1e-2  # relative Frobenius, of what the network adds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', type=shape, default=SHAPES, metavar='TOKENSxCHANNELSxHIDDEN')
    parser.add_argument('--out', type=Path, metavar='CSV', help='append the rows here')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('torch sees no GPU: there is nothing to time')
    console, rows = Console(), []
    console.print(torch.cuda.get_device_name(), 'torch', torch.__version__)
    for tokens, channels, hidden in args.shapes:
        found = time_tiles(tokens, channels, hidden, console.print)
        table = Table('tile', 'us', title=f'{tokens} tokens, {channels} channels, {hidden} hidden')
        for row in sorted(found, key=lambda row: row['us']):
            table.add_row(row['tile'], f'{row["us"]:.1f}')
        console.print(table)
        rows += found
    if args.out:
        append(rows, args.out)


def shape(text: str) -> tuple[int, int, int]:
    tokens, channels, hidden = map(int, text.split('x'))
    return tokens, channels, hidden


def time_tiles(tokens: int, channels: int, hidden: int, tell) -> list[dict]:
    """A row for the parts, and one for each tile that is right."""
    torch.manual_seed(0)
    x, branch = torch.randn(2, 1, tokens, channels, device='cuda')
    weight, bias = torch.randn(2, channels, device='cuda')
    fc1 = torch.randn(2 * hidden, channels, device='cuda') / channels**0.5
    fc2 = torch.randn(channels, hidden, device='cuda') / hidden**0.5
    inputs = x, branch.bfloat16(), weight, bias, fc1.bfloat16(), fc2.bfloat16()
    want = residual_mlp(*inputs, inner=torch.bfloat16, impl='reference') - x - inputs[1]
    about = dict(device=torch.cuda.get_device_name(), tokens=tokens, channels=channels, hidden=hidden)
    chosen = mlp.FEWEST, mlp.TILES, mlp.SMALL_TILES
    rows = []
    try:
        for tile in [None, *(mlp.Tile(*values) for values in itertools.product(*GRID.values()))]:
            mlp.FEWEST = 0 if tile else tokens + 1
            mlp.TILES = mlp.SMALL_TILES = dict.fromkeys(mlp.TILES, tile)
            name = ' x '.join(map(str, tile)) if tile else 'parts'
            try:
                us, error = measure(inputs, want)
            except Exception as failure:  # registers or shared memory do not suffice
                tell(f'{name}: {type(failure).__name__}: {str(failure).splitlines()[0][:80]}')
                continue
            if not error <= ERROR:
                tell(f'{name} is WRONG: relative error {error:.1e}')
                continue
            rows.append(dict(about, tile=name, us=us, error=f'{error:.1e}'))
    finally:
        mlp.FEWEST, mlp.TILES, mlp.SMALL_TILES = chosen
    return rows


def measure(inputs: tuple[Tensor, ...], want: Tensor) -> tuple[float, float]:
    with torch.no_grad():

        def run() -> Tensor:
            return residual_mlp(*inputs, inner=torch.bfloat16, impl='triton')

        error = (run() - inputs[0] - inputs[1] - want).norm() / want.norm()
        return 1000 * do_bench_cudagraph(run, return_mode='median'), error.item()


if __name__ == '__main__':
    main()
