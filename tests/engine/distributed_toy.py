"""One process of a distributed toy run: python distributed_toy.py CONFIG WORK_DIR SIGNALLED_RANK [CHECKPOINT]."""

import signal
import sys

import torch.distributed
from mmengine.config import Config

from mmvig.engine import Interrupted, Runner

config, work_dir, signalled_rank, *checkpoint = sys.argv[1:]
torch.distributed.init_process_group('gloo')  # MMEngine's launchers would ask for a GPU
cfg = Config.fromfile(config)
cfg.work_dir, cfg.launcher = work_dir, 'pytorch'
cfg.train_cfg.max_epochs = 5  # the learning rate falls after the first, and later iterations feel it
cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
if int(signalled_rank) == torch.distributed.get_rank():
    cfg.custom_hooks.append(dict(type='Signal', signum=signal.SIGINT, train_iter=3))
if checkpoint:
    cfg.load_from, cfg.resume = checkpoint[0], True
# each process records its own losses
next(hook for hook in cfg.custom_hooks if hook['type'] == 'RecordLosses')['suffix'] = str(torch.distributed.get_rank())
status = 0
try:
    Runner.from_cfg(cfg).train()
except Interrupted as stop:
    status = stop.status
torch.distributed.barrier()  # gloo aborts a process whose partner has gone before
torch.distributed.destroy_process_group()
sys.exit(status)
