"""Draws the training curves of a work directory: loss, validation metrics and learning rate, resumed runs in one."""

import argparse
import sys
from pathlib import Path

from mmvig.utils.training_plot import draw_history, read_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', help='work directory of tools/train.py')
    parser.add_argument('--out', help='the picture, its kind by its suffix (default: WORK_DIR/training.png)')
    args = parser.parse_args()
    out = Path(args.out or Path(args.work_dir, 'training.png'))
    try:
        history = read_history(args.work_dir)
    except FileNotFoundError as error:
        sys.exit(f'{error}')
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_history(history, title=Path(args.work_dir).resolve().name).savefig(out)
    print(f'The training curves are in {out}.')


if __name__ == '__main__':
    main()
