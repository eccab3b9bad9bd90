"""Training on several GPUs beside one: are the losses those of one process, and how much faster is it?

    python benchmarks/distributed.py --out benchmarks/distributed.csv

Trains with MMEngine's runners on synthetic images, in one process and in --processes, prints a table and appends it to
a CSV file. Losses are compared in float32 on the same batches; speed is that of the mixed-precision configs of ImageNet
and COCO, with the same number of images *a process*. `--device cpu` takes the same steps with gloo and a toy's sizes,
without what needs GPUs (SyncBN, FSDP): a test of this script, no measurement.
"""

import argparse
import csv
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import FlexibleRunner
from rich.console import Console
from rich.table import Table

from mmvig.engine import Runner
from mmvig.engine.settings import load_config, set_dataloader_defaults

CONFIGS = dict(
    classification='mmvig::mmpretrain/vigh/vigh-gla-tiny_8xb128-amp_in1k.py',
    detection='mmvig::mmdet/vigh/mask-rcnn_vigh-gla-tiny_fpn_amp-1x_coco.py',
)
JOBS = ['DDP', 'SyncBN', 'FSDP', *CONFIGS]
NEED_GPUS = {'SyncBN', 'FSDP'}
SIZES = dict(classification=(224, 224), detection=(800, 1344))
TOY_SIZES = dict(classification=(64, 64), detection=(64, 96))
TOY = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.0)
BATCH, COMPARED = 16, 10  # images of all processes together; iterations whose losses are compared
# Iterations that are not timed; windows, whose median counts; iterations of a window.
PLANS = dict(cuda=(10, 3, 15), cpu=(1, 1, 1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    parser.add_argument('--processes', type=int, default=2, help='beside one (default: %(default)s)')
    parser.add_argument('--cls-batch', type=int, default=128, help='images a process, classification (%(default)s)')
    parser.add_argument('--det-batch', type=int, default=4, help='images a process, Mask R-CNN (%(default)s)')
    parser.add_argument('--jobs', nargs='+', choices=JOBS, help='default: all that the device can do')
    parser.add_argument('--out', type=Path, help='append the rows to this CSV file')
    args = parser.parse_args()
    args.jobs = args.jobs or [job for job in JOBS if args.device == 'cuda' or job not in NEED_GPUS]
    if args.device == 'cuda' and torch.cuda.device_count() < args.processes:
        parser.error(f'--processes {args.processes}: torch sees {torch.cuda.device_count()} GPUs; or --device cpu')
    if args.device == 'cpu':
        if needing := NEED_GPUS.intersection(args.jobs):
            parser.error(f'--jobs {" ".join(sorted(needing))}: they need --device cuda')
        args.cls_batch = args.det_batch = 1
    if BATCH % args.processes or args.processes < 2:
        parser.error(f'--processes {args.processes}: it must be 2 or more, and divide the batch of {BATCH} images')
    return args


def main() -> None:
    args = parse_args()
    one, many = (launch(world, args) for world in (1, args.processes))
    rows = [row for job in args.jobs for row in compare(job, one[job], many[job], args)]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=150).print(table)
    if args.out:
        append(rows, args.out)


def compare(job: str, one: list, many: list, args: argparse.Namespace) -> list[dict]:
    """The rows of a job from what each process of either run gave."""
    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'
    about = dict(device=device, torch=torch.__version__)
    if job not in CONFIGS:
        (alone,), together = one, [statistics.mean(losses) for losses in zip(*many)]
        worst = max(abs(a - b) / a for a, b in zip(alone, together, strict=True))
        losses = f'{alone[0]:.4f} .. {alone[-1]:.4f}'
        return [
            dict(case=job, processes=args.processes, images_per_second='', ratio='', losses_of_one=losses)
            | dict(worst_relative_difference=f'{worst:.1e}', **about)
        ]
    rates = {1: 1 / one[0], args.processes: args.processes / max(many)}
    batch = args.cls_batch if job == 'classification' else args.det_batch
    return [
        dict(case=f'{job}, {batch} images a process', processes=world, images_per_second=f'{batch * rate:.1f}')
        | dict(ratio=f'{rate / rates[1]:.3f}', losses_of_one='', worst_relative_difference='', **about)
        for world, rate in rates.items()
    ]


def append(rows: list[dict], path: Path) -> None:
    new = not path.exists()
    with path.open('a', newline='') as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerows(rows)


# Processes


def launch(world: int, args: argparse.Namespace) -> dict[str, list]:
    """Runs the jobs one after another in `world` processes; what each process gives, by job."""
    with socket.socket() as free:
        free.bind(('', 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, port, args, folder), nprocs=world)
        given = [json.loads(Path(folder, f'{rank}.json').read_text()) for rank in range(world)]
    return {job: [of_process[job] for of_process in given] for job in args.jobs}


def work(rank: int, world: int, port: int, args: argparse.Namespace, folder: str) -> None:
    if args.device == 'cuda':
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port))
        dist.init_process_group('nccl' if args.device == 'cuda' else 'gloo')
    given = {}
    for job in args.jobs:
        began = time.perf_counter()
        run = seconds if job in CONFIGS else losses
        given[job] = run(job, world, args, f'{folder}/{job}')
        if rank == 0:
            took = f'{time.perf_counter() - began:.0f} s'
            print(f'{job}, {world} processes: {given[job]}, in {took}', file=sys.stderr, flush=True)
    Path(folder, f'{rank}.json').write_text(json.dumps(given))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_settings(work_dir: str, world: int, args: argparse.Namespace, iterations: int) -> dict:
    """The settings of a runner that trains, and nothing else."""
    nothing = (f'{part}_{what}' for part in ('val', 'test') for what in ('cfg', 'dataloader', 'evaluator'))
    wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False)
    if args.device == 'cpu':
        wrapper['device_ids'] = None
    return dict(
        dict.fromkeys(nothing),
        work_dir=work_dir,
        experiment_name=work_dir.replace('/', '_'),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        param_scheduler=None,
        auto_scale_lr=None,
        default_hooks=dict(checkpoint=None, progress=None),
        custom_hooks=[],
        model_wrapper_cfg=wrapper,
        launcher='pytorch' if world > 1 else 'none',
        env_cfg=dict(),
        randomness=dict(seed=0),
        log_level='ERROR',
    )


def loader(dataset: dict, batch_size: int) -> dict:
    return dict(
        batch_size=batch_size, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False)
    )


# Losses


@DATASETS.register_module()
class Noise(torch.utils.data.Dataset):
    """`size` images of noise, each always the same."""

    def __init__(self, size: int, side: int) -> None:
        self.size, self.side = size, side

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        rng = torch.Generator().manual_seed(index)
        return dict(image=torch.rand(3, self.side, self.side, generator=rng), label=torch.tensor(index % 10))


@MODELS.register_module()
class MeanClassifier(BaseModel):
    """The last map of a backbone, averaged, decides between ten classes."""

    def __init__(self, backbone: dict) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = torch.nn.Linear(self.backbone.out_channels[-1], 10)

    def forward(self, image: list[torch.Tensor], label: list[torch.Tensor], mode: str) -> dict[str, torch.Tensor]:
        logits = self.head(self.backbone(torch.stack(image))[-1].mean((2, 3)))
        return dict(loss=torch.nn.functional.cross_entropy(logits, torch.stack(label)))


class Record(Hook):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.losses.append(outputs['loss'].item())


def losses(job: str, world: int, args: argparse.Namespace, work_dir: str) -> list[float]:
    """This process's losses of a classifier without anything random, in float32."""
    torch.backends.cudnn.allow_tf32 = False
    if job == 'SyncBN':  # a single process has plain batch norm, of the whole batch
        norm = dict(type='SyncBN' if world > 1 else 'BN')
        backbone = dict(type='mmvig.ViGAdapter', arch='tiny', out_indices=3, norm_cfg=norm, drop_path_rate=0.0)
    else:
        arch = TOY if args.device == 'cpu' else 'tiny'
        backbone = dict(type='mmvig.ViGH', arch=arch, out_indices=3, drop_path_rate=0.0)
    cfg = run_settings(work_dir, world, args, COMPARED) | dict(
        model=dict(type='MeanClassifier', backbone=backbone),
        train_dataloader=loader(
            dict(type='Noise', size=BATCH * COMPARED, side=48 if args.device == 'cpu' else 224), BATCH // world
        ),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
    )
    if job == 'FSDP':
        strategy = dict(type='FSDPStrategy', state_dict_cfg='full') if world > 1 else None
        runner = FlexibleRunner.from_cfg(cfg | dict(strategy=strategy, default_hooks=dict(checkpoint=None)))
    else:
        runner = Runner.from_cfg(cfg)
    runner.register_hook(record := Record())
    runner.train()
    return record.losses


# Speed


@DATASETS.register_module()
class Synthetic(torch.utils.data.Dataset):
    """One image of noise with its annotations, `size` times: its loading takes no time."""

    def __init__(self, case: str, shape: tuple[int, int], size: int) -> None:
        self.sample = dict(inputs=torch.randint(0, 256, (3, *shape), dtype=torch.uint8))
        self.sample['data_samples'] = classified() if case == 'classification' else annotated(*shape)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return self.sample


def classified():
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(3)


def annotated(height: int, width: int):
    """Eight objects on a diagonal."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    edges = torch.linspace(0, 0.8, 8)[:, None] * torch.tensor([width, height])
    boxes = torch.cat([edges, edges + 0.2 * torch.tensor([width, height])], 1)
    masks = torch.zeros(8, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    shape = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    masks = BitmapMasks(masks.numpy(), height, width)
    sample = DetDataSample(metainfo=dict(shape, img_id=0))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(8), masks=masks)
    return sample


class Clock(Hook):
    """Seconds an iteration, the median of the windows."""

    def __init__(self, device: str) -> None:
        self.warm_up, _, self.window = PLANS[device]
        self.wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
        self.times: list[float] = []

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        done = runner.iter + 1 - self.warm_up
        if done >= 0 and done % self.window == 0:
            self.wait()
            self.times.append(time.perf_counter())

    def seconds(self) -> float:
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:])) / self.window


def seconds(job: str, world: int, args: argparse.Namespace, work_dir: str) -> float:
    """Seconds an iteration of a config in this process."""
    toy = args.device == 'cpu'
    warm_up, windows, window = PLANS[args.device]
    iterations = warm_up + windows * window
    batch = args.cls_batch if job == 'classification' else args.det_batch
    cfg = load_config(CONFIGS[job], options=None, work_dir=work_dir, launcher='none')
    shape = (TOY_SIZES if toy else SIZES)[job]
    cfg.merge_from_dict(run_settings(work_dir, world, args, iterations))
    cfg.train_dataloader = loader(dict(type='Synthetic', case=job, shape=shape, size=world * batch * iterations), batch)
    cfg.train_cfg = ConfigDict(by_epoch=False, max_iters=iterations)
    cfg.model.backbone.init_cfg = None
    if toy:
        make_toy(cfg)
    set_dataloader_defaults(cfg)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(clock := Clock(args.device))
    runner.train()
    return clock.seconds()


def make_toy(cfg: ConfigDict) -> None:
    """The config for a CPU, whose processor has no mixed precision in MMEngine."""
    cfg.model.backbone.arch = TOY
    cfg.optim_wrapper = ConfigDict(optimizer=cfg.optim_wrapper.optimizer)
    if 'neck' in cfg.model and 'in_channels' in cfg.model.neck:
        cfg.model.neck.in_channels = list(TOY['embed_dims'])
    else:
        cfg.model.head.in_channels = TOY['embed_dims'][-1]


if __name__ == '__main__':
    main()
