"""Draws what `bench_bigla.py` measured: each implementation's time over that of a copy, a panel a shape.

    python kernels/benchmarks/plot_bigla.py --out bigla.png

Of rows of one implementation, shape, mode and launch the last one in the file counts. Times are medians by CUDA graph,
or eager (hatched) where an implementation has no graph.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
MODES = ('fwd', 'fwd+bwd')


def read(path: Path) -> tuple[str, dict[tuple, dict[tuple, float]]]:
    """What ran where, and `times[shape][impl, mode, launch]` in microseconds."""
    times = {}
    about = ''
    with path.open(newline='') as file:
        for row in csv.DictReader(file):
            shape = tuple(int(row[name]) for name in ('B', 'nh', 'L', 'K', 'V'))
            times.setdefault(shape, {})[row['impl'], row['mode'], row['launch']] = float(row['p50_us'])
            about = f'{row["gpu"]}, torch {row["torch"]}, Triton {row["triton"]}, {row["dtype"]}, {row["date"]}'
    return about, times


def draw(about: str, times: dict[tuple, dict[tuple, float]], out: Path) -> None:
    fig, axes = plt.subplots(
        1, len(times), figsize=(3 * len(times), 4), sharey=True, squeeze=False, layout='constrained'
    )
    for axis, (shape, measured) in zip(axes[0], times.items()):
        impls = [impl for impl in dict.fromkeys(impl for impl, *_ in measured) if impl != 'copy']
        for n, mode in enumerate(MODES):
            for x, impl in enumerate(impls):
                launch = 'graph' if (impl, mode, 'graph') in measured else 'eager'
                if (impl, mode, launch) not in measured or ('copy', mode, 'graph') not in measured:
                    continue
                us = measured[impl, mode, launch]
                height = us / measured['copy', mode, 'graph']
                hatch = None if launch == 'graph' else '//'
                bar = axis.bar(x + 0.4 * n - 0.2, height, 0.4, color=f'C{n}', hatch=hatch, edgecolor='white')
                axis.bar_label(bar, [f'{us:.0f}'], fontsize=7)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_yscale('log')
        axis.set_xticks(range(len(impls)), impls, rotation=45, ha='right')
        axis.set_title('B {}, nh {}, L {}\nK {}, V {}'.format(*shape), fontsize=9)
    axes[0, 0].set_ylabel('time over that of a copy')
    patches = [matplotlib.patches.Patch(color=f'C{n}', label=mode) for n, mode in enumerate(MODES)]
    fig.legend(handles=patches, loc='outside lower center', ncols=2, frameon=False)
    fig.suptitle(f'Bidirectional gated linear attention; above the bars, microseconds\n{about}', fontsize=10)
    fig.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, nargs='?', default=HERE / 'results.csv')
    parser.add_argument('--out', type=Path, default=Path('bigla.png'))
    args = parser.parse_args()
    if not args.results.is_file():
        parser.error(f'results: there is no {args.results}; bench_bigla.py writes it on a GPU')
    draw(*read(args.results), args.out)
    print(f'drawn to {args.out}')


if __name__ == '__main__':
    main()
