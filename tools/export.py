"""Writes a model as a file that runs without mmvig, for images of any size: .onnx or .pt2 (torch.export).

    python tools/export.py CONFIG model.onnx --checkpoint weights.pth

The file is run on images of two other sizes and compared with the model. Its input are images as the model's
preprocessor leaves them, (batch, 3, H, W) in float32. The limits:

- Height and width are free; the batch is fixed, by --batch.
- Classifiers and segmentors are exported to their logits, without resizing or sliding windows before and without a
  choice of class behind; of detectors the backbone or the neck (--part), since what follows depends on what is found.
- The operator runs in its chunk-parallel PyTorch form, in groups of 512 tokens to which smaller maps are padded: the
  file has no Triton kernels, and small images cost as much as the group that they fill.
- torch reads .pt2 files of models with several strides slowly: it parses the formula of every tensor's size.
"""

import argparse
import sys
from pathlib import Path

import mmvig  # noqa: F401  before a config is read: `_base_ = 'mmvig::...'` resolves, and today's stack is cared for
from mmvig.apis import export
from mmvig.compat.checkpoint_loading import CheckpointError
from mmvig.engine.settings import SetupError, add_cfg_options, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or the address of an installed one: mmdet::retinanet/...py')
    parser.add_argument('out', type=Path, help='the file to write; its suffix, .onnx or .pt2, says what kind')
    parser.add_argument('--checkpoint', help='weights (default: fresh ones)')
    parser.add_argument(
        '--part',
        choices=['model', 'neck', 'backbone'],
        default='model',
        help='model: to the logits, for mmseg and mmpretrain; neck: backbone and neck (default: %(default)s)',
    )
    parser.add_argument('--size', nargs=2, type=int, default=[224, 256], metavar=('H', 'W'), help='traced with this')
    parser.add_argument('--batch', type=int, default=1, help='fixed in the file (default: %(default)s)')
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.out.suffix not in ('.onnx', '.pt2'):
        parser.error(f'out: {args.out} must end in .onnx or .pt2')
    try:
        cfg = load_config(args.config, options=args.cfg_options, work_dir=str(args.out.parent), launcher='none')
        model = export.build_exportable(cfg, args.checkpoint, args.part)
        program = export.export_program(model, args.size, args.batch)
    except (CheckpointError, FileNotFoundError, SetupError, export.ExportError) as error:
        sys.exit(f'{error}')
    save = export.save_onnx if args.out.suffix == '.onnx' else export.save_program
    save(program, args.out)
    height, width = args.size
    others = [(height + 32, width - 32), (2 * width, height)]
    worst = export.worst_difference(args.out, model, others, args.batch)
    print(f'{args.out}: differs from the model by at most {worst:.1e} of the largest value, at {others}')


if __name__ == '__main__':
    main()
