"""One process of several that train small ViG models in float64, by gloo: python distributed_vig.py FOLDER CASE ...

Of every case each process leaves its losses in FOLDER/CASE/losses<rank>.txt, and the first one a checkpoint.
"""

import sys

import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import FlexibleRunner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_training import RecordLosses  # noqa: F401  registers it

from mmvig.engine import Runner
from mmvig.models import ViG, ViGAdapter, ViGH

SCENES = 16
VIGH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.0)
VIG = dict(embed_dims=16, depth=4, num_heads=2, act=True, drop_path_rate=0.0)
ADAPTER = dict(VIG, conv_dims=4, deform_heads=2, deform_points=1, deform_ratio=0.5, ffn_ratio=0.25)
CASES = dict(
    ddp={},
    accumulation=dict(accumulative_counts=2),
    checkpointing=dict(with_cp=True),
    flexible=dict(flexible=True),
    compiled=dict(compile=True),
)


@DATASETS.register_module()
class NoiseImages(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, index: int) -> dict:
        rng = torch.Generator().manual_seed(index)
        return dict(inputs=torch.rand(3, 40, 56, generator=rng, dtype=torch.float64), label=index % 3)


@MODELS.register_module()
class Classifier(BaseModel):
    """The maps of a ViG-H, averaged, decide between three classes; `short` looks at the first stage of one corner."""

    def __init__(self, with_cp: bool, short: bool) -> None:
        super().__init__()
        self.backbone = ViGH(VIGH, out_indices=0 if short else (0, 1, 2, 3), with_cp=with_cp)
        self.head = nn.Linear(sum(self.backbone.out_channels), 3)
        self.short = short
        self.double()

    def forward(self, inputs: list[Tensor], label: Tensor, mode: str = 'tensor') -> dict[str, Tensor]:
        images = torch.stack(list(inputs))
        maps = self.backbone(images[:, :, :16, :16] if self.short else images)
        logits = self.head(torch.cat([x.mean((2, 3)) for x in maps], 1))
        return dict(loss=nn.functional.cross_entropy(logits, torch.as_tensor(label)))


def train(
    work_dir: str,
    world: int = 1,
    accumulative_counts: int = 1,
    with_cp: bool = False,
    flexible: bool = False,
    compile: bool = False,
) -> None:
    """Two epochs; a process of `world` takes its part of every batch of 4.

    `compile`, which takes long, is of a short model; it is left to several processes, for one to be compared with.
    """
    cfg = dict(
        model=dict(type='Classifier', with_cp=with_cp, short=compile),
        work_dir=work_dir,
        experiment_name=work_dir.replace('/', '_'),
        train_dataloader=dict(
            batch_size=4 // world,
            num_workers=0,
            dataset=dict(type='NoiseImages'),
            sampler=dict(type='DefaultSampler', shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            # MMEngine compiles the optimizer too, and a compiled AdamW corrects its bias in float32 for any weights
            optimizer=dict(type='SGD', lr=0.1, momentum=0.9) if compile else dict(type='AdamW', lr=1e-3),
            accumulative_counts=accumulative_counts,
            clip_grad=dict(max_norm=0.1),
        ),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2, save_optimizer=False)),
        custom_hooks=[dict(type='RecordLosses', suffix=str(dist.get_rank()) if world > 1 else '')],
        launcher='pytorch' if world > 1 else 'none',
        env_cfg=dict(),  # else FlexibleRunner takes None apart
        randomness=dict(seed=0),
        compile=dict(backend='aot_eager') if compile and world > 1 else False,
    )
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    if flexible:
        strategy = dict(type='DDPStrategy', model_wrapper=wrapper) if world > 1 else None
        runner = FlexibleRunner.from_cfg(dict(cfg, strategy=strategy))
    else:
        runner = Runner.from_cfg(dict(cfg, model_wrapper_cfg=wrapper))
    runner.train()


def check_subsets() -> None:
    """Two iterations under DDP with one output and with all: a parameter without a gradient makes the second raise."""
    for out_indices in (0, 1, 2, 3, (0, 1, 2, 3)):  # tests/models looks at more choices, in one process
        step_twice(ViGH(VIGH, out_indices=out_indices))
        step_twice(ViG(VIG, out_indices=out_indices))
        step_twice(ViGAdapter(ADAPTER, out_indices=out_indices, norm_cfg=dict(type='BN')))
    model = ViGH(VIGH)
    model.unused = nn.Parameter(torch.zeros(1))
    try:
        step_twice(model)
    except RuntimeError as error:
        assert 'find_unused_parameters=True' in str(error)
    else:
        raise AssertionError('the check finds nothing')


def step_twice(model: nn.Module) -> None:
    model = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):
        sum(x.square().mean() for x in model(torch.rand(1, 3, 64, 64))).backward()


if __name__ == '__main__':
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group('gloo')  # MMEngine's launchers would ask for a GPU
    for name in names:
        if name == 'subsets':
            check_subsets()
        else:
            train(f'{folder}/{name}', dist.get_world_size(), **CASES[name])
    dist.barrier()  # gloo aborts a process whose partner has gone before
    dist.destroy_process_group()
