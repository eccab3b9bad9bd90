import itertools
import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop

from mmvig.engine import Runner

RUNS = itertools.count()


@pytest.fixture(autouse=True)
def _one_thread():
    """Equal losses are promised for an equal number of threads; and the toy is faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy(monkeypatch):
    """The module of the toy training run; it can be imported, as its config does, for the length of the test."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return import_module('toy_training')


@pytest.fixture
def toy_config(toy, tmp_path):
    """Makes the toy's config: work directory (below tmp_path), and settings by dotted key."""
    file = tmp_path / 'toy.py'
    file.write_text(toy.CONFIG)

    def make(work_dir='run', **settings) -> Config:
        cfg = Config.fromfile(file)
        # Unformatted: making the text of a config pretty would take most of the time, at each checkpoint.
        cfg = Config(cfg.to_dict(), filename=str(file), format_python_code=False)
        cfg.work_dir = str(tmp_path / work_dir)
        cfg.experiment_name = f'toy{next(RUNS)}'  # two runs within a second would share MMEngine's logger
        for key, value in settings.items():
            *path, name = key.split('.')
            node = cfg
            for part in path:
                node = node[int(part) if part.isdigit() else part]
            node[name] = value
        return cfg

    return make


@pytest.fixture
def train():
    """Trains a config and returns its losses: iteration -> (batch of the epoch, loss with all its bits)."""

    def run(cfg: Config) -> dict[int, tuple[str, str]]:
        runner = Runner.from_cfg(cfg)
        try:
            runner.train()
        finally:  # left to garbage collection, idle workers are waited for
            if isinstance(runner.train_loop, IterBasedTrainLoop):
                runner.train_loop.dataloader_iterator = None
            runner.train_dataloader._iterator = None
        return read_losses(cfg.work_dir)

    return run


def read_losses(work_dir: str) -> dict[int, tuple[str, str]]:
    lines = Path(work_dir, 'losses.txt').read_text().splitlines()
    return {int(iteration): (batch, loss) for iteration, batch, loss in map(str.split, lines)}


@pytest.fixture(name='read_losses')
def _read_losses():
    return read_losses


@pytest.fixture
def launch(toy):
    """Runs a script of this folder in two processes that can meet by torch.distributed: their exit statuses."""

    def run(script: str, *arguments: str, timeout: float = 120) -> list[int]:
        with socket.socket() as free:
            free.bind(('', 0))
            port = str(free.getsockname()[1])
        folder = Path(toy.__file__).parent
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': port}
        processes = [
            subprocess.Popen(
                [sys.executable, str(folder / script), *map(str, arguments)],
                cwd=folder.parents[1],
                env={**environment, 'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': '2'},
            )
            for rank in '01'
        ]
        try:
            return [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()

    return run
