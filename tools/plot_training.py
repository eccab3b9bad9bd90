"""Draws the training curves of work directories, resumed runs in one, and prints the time an iteration took.

    python tools/plot_training.py work_dirs/one                            loss, validation metrics, learning rate
    python tools/plot_training.py work_dirs/one work_dirs/other            runs against each other
    python tools/plot_training.py work_dirs/one --keys loss coco/bbox_mAP  of one or more runs, these quantities

It does the work of OpenMMLab's analyze_logs.py, plot_curve and cal_train_time.
"""

import argparse
import sys
from pathlib import Path

from mmvig.utils.training_plot import draw_comparison, draw_history, read_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dir', nargs='+', help='work directory of tools/train.py')
    parser.add_argument('--keys', nargs='+', metavar='KEY', help='draw these quantities, by their names in the log')
    parser.add_argument(
        '--out', help='the picture, its kind by its suffix (default: training.png in the first WORK_DIR)'
    )
    args = parser.parse_args()
    out = Path(args.out or Path(args.work_dir[0], 'training.png'))
    try:
        histories = dict(zip(run_names(args.work_dir), map(read_history, args.work_dir)))
        if len(histories) > 1 or args.keys:
            figure = draw_comparison(histories, args.keys)
        else:
            (title, history), *_ = histories.items()
            figure = draw_history(history, title)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f'{error}')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    for name, history in histories.items():
        print(f'{name}: {history.seconds:.4g} seconds an iteration')
    print(f'The training curves are in {out}.')


def run_names(work_dirs: list[str]) -> list[str]:
    """The names of the folders, or their paths where two have the same name."""
    names = [Path(work_dir).resolve().name for work_dir in work_dirs]
    return names if len(set(names)) == len(names) else work_dirs


if __name__ == '__main__':
    main()
