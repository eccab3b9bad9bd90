"""Write the digit-scenes data set: COCO boxes and masks, ADE20K-style label maps, ImageNet-style crops."""

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool

try:
    from joblib import cpu_count
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmvig.datasets.digit_layout import expected_layout
    from mmvig.datasets.digit_scenes import Recipe, make_digit_scenes
except ModuleNotFoundError as error:
    sys.exit(f"make_digit_scenes.py: the package {error.name} is missing: pip install 'mmvig[digits]' brings it")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('out', help='folder to write; one that holds the same data set already is left as it is')
    parser.add_argument('--train', type=int, default=Recipe.train, metavar='N', help='scenes to train on')
    parser.add_argument('--test', type=int, default=Recipe.test, metavar='N', help='held-out scenes')
    parser.add_argument(
        '--size',
        type=int,
        default=Recipe.size,
        metavar='PX',
        help='nominal size, 128 to 2048: the longer side of a scene is 0.8 to 1.0 of it. The smallest digits keep '
        'their 24 pixels, the largest digits and the number of digits grow with it',
    )
    parser.add_argument('--seed', type=int, default=Recipe.seed, help='same seed, same data')
    parser.add_argument('--workers', type=int, default=min(cpu_count(), 16), metavar='W', help='processes')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        recipe = Recipe(args.train, args.test, args.size, args.seed)
        with Progress(*columns) as progress:
            task = progress.add_task('digit scenes', total=recipe.train + recipe.test, visible=False)
            made = make_digit_scenes(
                args.out,
                recipe,
                workers=args.workers,
                on_scene=lambda: progress.update(task, advance=1, visible=True),
            )
    except (OSError, ValueError) as error:
        sys.exit(f'make_digit_scenes.py: {error}')
    except BrokenProcessPool:
        sys.exit('make_digit_scenes.py: a process was killed, perhaps for lack of memory: try fewer --workers')
    except KeyboardInterrupt:
        print(f'interrupted: nothing is left at {args.out}', file=sys.stderr)
        sys.exit(130)
    print(expected_layout(args.out))
    print('written' if made else 'it was there already, complete and made by the same arguments: left as it is')


if __name__ == '__main__':
    main()
