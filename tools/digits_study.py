"""ViG-H-T beside ResNet-50 and Swin-T on digit scenes, from scratch: writes the scenes, trains, tabulates and draws.

    python tools/digits_study.py                                   all twelve trainings, one at a time on each GPU
    python tools/digits_study.py --minutes 9                       as far as that gets; the next call goes on
    python tools/digits_study.py configs/mmdet/digits/*512px*.py   these configs alone

SIGTERM and Ctrl-C stop it: trainings save, and the next call goes on. What is complete is not trained again; the table
and the picture are made of all that is complete.
"""

import argparse
import csv
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

import mmvig  # noqa: F401  before a config is read: today's stack is cared for
from mmvig.apis.study import Training, draw, results, train_all
from mmvig.datasets.digit_scenes import Recipe, make_digit_scenes
from mmvig.engine.settings import key_value

ROOT = Path(__file__).resolve().parents[1]
BACKBONES = ('vigh-gla-tiny', 'r50', 'resnet50', 'swin')
CONFIGS = [
    path
    for pattern in ('mmpretrain/digits/*64px*', 'mmseg/digits/*', 'mmdet/digits/*512px*', 'mmdet/digits/*1536px*')
    for backbone in BACKBONES
    for path in sorted((ROOT / 'configs').glob(f'{pattern}.py'))
    if backbone in path.stem
]
DATA = {
    'data/digit_scenes': Recipe(),
    'data/digit_scenes_512': Recipe(train=1200, test=200, size=512),
    'data/digit_scenes_1536': Recipe(train=300, test=60, size=1536),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='*', type=Path, default=CONFIGS, help='files (default: those of the study)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/digits_study'), help='a folder a training')
    parser.add_argument('--minutes', type=float, default=1e6, help='then trainings save and stop (default: no limit)')
    parser.add_argument('--workers', type=int, default=8, help='processes that write scenes (default: 8)')
    parser.add_argument('--out', type=Path, help='the table (default: digits_study.csv in the work directory)')
    parser.add_argument('--picture', type=Path, help='the picture (default: digits_study.png in the work directory)')
    parser.add_argument(
        '--cfg-options', nargs='+', type=key_value, default=[], metavar='KEY=VALUE', help='for all: see tools/train.py'
    )
    args = parser.parse_args()
    trainings = [Training(path, args.work_dir) for path in args.config]
    settings = [repr(Config.fromfile(path).to_dict()) for path in args.config]
    for folder, recipe in DATA.items():
        if not Path(folder).exists() and any(re.search(f"{folder}['/]", text) for text in settings):
            print(f'Writing {recipe.train + recipe.test} scenes into {folder} ...', flush=True)
            make_digit_scenes(folder, recipe, workers=args.workers)
    signals = []
    with heeding(signals):
        failed = train_all(
            trainings,
            seconds=60 * args.minutes,
            options=args.cfg_options,
            say=lambda line: print(line, flush=True),
            stop=lambda: signals,
        )
    rows = [result.row() for result in results(trainings)]
    if rows:
        out = args.out or args.work_dir / 'digits_study.csv'
        picture = args.picture or args.work_dir / 'digits_study.png'
        with out.open('w', newline='') as file:
            writer = csv.DictWriter(file, rows[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        draw(trainings).savefig(picture)
        shown = [name for name in rows[0] if name not in ('device', 'torch', 'commit')]
        table = Table(*shown)
        for row in rows:
            table.add_row(*(str(row[name]) for name in shown))
        Console(width=200).print(table)
        print(f'{len(rows)} of {len(trainings)} trainings are complete: {out}, {picture}')
    if signals:
        sys.exit(128 + signals[0])
    if failed:
        sys.exit(f'{len(failed)} trainings failed: {", ".join(training.name for training in failed)}')


@contextmanager
def heeding(signals: list[int]) -> Iterator[None]:
    """Gathers SIGINT and SIGTERM: trainings are processes apart, which have to be told."""
    before = {
        number: signal.signal(number, lambda n, _: signals.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == '__main__':
    main()
