import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmvig.engine.resume import latest_checkpoint

SETTINGS = {
    'train_dataloader.num_workers': 2,
    'train_dataloader.persistent_workers': True,
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 9,
}
# Trains a config file, and kills a worker after the fifth iteration, as a system that runs out of memory does.
TRAIN = """
import multiprocessing, sys
from mmengine.config import Config
from mmengine.hooks import Hook
from mmvig.engine import Runner

class KillWorker(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 4:
            multiprocessing.active_children()[0].kill()

runner = Runner.from_cfg(Config.fromfile(sys.argv[1]))
runner.register_hook(KillWorker())
runner.train()
"""


# A dead worker is told by its signal or by the broken pipe, whichever is first: on a busy machine at times the latter.
@pytest.mark.slow
def test_a_worker_that_dies_ends_training_which_can_go_on(toy, toy_config, train, tmp_path, monkeypatch):
    whole = train(toy_config('whole', **SETTINGS))
    cfg = toy_config('dying', **SETTINGS)
    cfg.dump(tmp_path / 'dying.py')
    monkeypatch.setenv('PYTHONPATH', str(Path(toy.__file__).parent), prepend=os.pathsep)
    # In a process of its own: once a worker is dead, the data loader raises wherever its process then is.
    command = [sys.executable, '-c', TRAIN, tmp_path / 'dying.py']
    died = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert died.returncode == 1
    assert re.search(r'RuntimeError: DataLoader worker \(pid.* (is killed by signal|exited unexpectedly)', died.stderr)
    cfg.load_from, cfg.resume = str(latest_checkpoint(cfg.work_dir)), True
    assert train(cfg) == whole
