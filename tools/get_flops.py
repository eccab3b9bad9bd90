"""Counts parameters and FLOPs, a multiply-add being one FLOP: of a config's model, part by part, or of all backbones.

    python tools/get_flops.py configs/mmdet/vigh/mask-rcnn_vigh-gla-tiny_fpn_1x_coco.py --shape 800 1344
    python tools/get_flops.py --all

Products of matrices and convolutions count, elementwise work, norms, pooling and sampling do not.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.apis.flops import FORMS, Flops, config_flops, zoo_flops
from mmvig.engine.settings import SetupError, add_cfg_options, load_config

ZOO_SHAPES = ((224, 224), (800, 1344))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('config', nargs='?', help='config file, or an address: mmdet::retinanet/...py')
    what.add_argument('--all', action='store_true', help='the six backbones at 224 x 224 and 800 x 1344, in Markdown')
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='pixels, one number for a square (default: mmdet 800 1344, mmseg 512, mmpretrain 224)',
    )
    parser.add_argument(
        '--form',
        choices=FORMS,
        default='recurrence',
        help="how the operator bigla counts: its equation's two products a token and direction, or the products that "
        'its implementation in chunks of tokens carries out (default: recurrence)',
    )
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.all and (args.shape or args.cfg_options):
        parser.error('--shape and --cfg-options go with a config, not with --all')
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape takes one or two numbers of pixels, got {args.shape}')
    return args


def main() -> None:
    args = parse_args()
    if args.all:
        print(markdown(zoo_flops(*ZOO_SHAPES, form=args.form)))
        return
    try:
        cfg = load_config(args.config, options=args.cfg_options, work_dir=None, launcher='none')
        shape = None if args.shape is None else (args.shape[0], args.shape[-1])
        counts, shape = config_flops(cfg, shape, args.form)
    except SetupError as error:
        sys.exit(f'{error}')
    Console().print(table(counts, shape))
    print(f'Of these, {counts.bigla / 1e9:.3f} GFLOPs are those of bigla ({args.form}).')


def table(counts: Flops, shape: tuple[int, int]) -> Table:
    """A row a part and one for the whole model."""
    title = f'one image of {shape[0]} x {shape[1]} (height x width)'
    table = Table('part', 'type', 'parameters (M)', 'GFLOPs', title=title, show_footer=True)
    for part in counts.parts:
        table.add_row(part.name, part.type, f'{part.params / 1e6:.2f}', f'{part.flops / 1e9:.2f}')
    footers = 'whole model', '', f'{counts.params / 1e6:.2f}', f'{counts.flops / 1e9:.2f}'
    for column, footer in zip(table.columns, footers):
        column.footer = footer
    for column in table.columns[2:]:
        column.justify = 'right'
    return table


def markdown(counts: dict[str, list[Flops]]) -> str:
    """A row a backbone: its parameters, then its FLOPs at each of `ZOO_SHAPES`."""
    heads = ['backbone', 'parameters (M)', *(f'GFLOPs at {height} x {width}' for height, width in ZOO_SHAPES)]
    rows = [heads, ['---', *['---:'] * (len(heads) - 1)]]
    for name, at_shapes in counts.items():
        rows.append([name, f'{at_shapes[0].params / 1e6:.1f}', *(f'{count.flops / 1e9:.1f}' for count in at_shapes)])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


if __name__ == '__main__':
    main()
