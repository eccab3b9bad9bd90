import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook

from mmvig.engine import CheckpointHook, Runner, WriteError
from mmvig.engine.resume import latest_checkpoint

ROOT = Path(__file__).parents[2]
KEEP_ONE = dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='auto', rule='greater')


def spy_on_writes(monkeypatch, runner, act) -> None:
    """Calls `act(names of the complete checkpoints)` whenever one is about to be written."""
    put = LocalBackend.put

    def write(backend, content, filepath):
        act(sorted(path.name for path in Path(runner.work_dir).glob('*.pth')))
        put(backend, content, filepath)

    monkeypatch.setattr(LocalBackend, 'put', write)


def test_the_old_one_goes_after_the_new_one_is_there(toy_config, monkeypatch):
    runner = Runner.from_cfg(toy_config(**{'default_hooks.checkpoint': KEEP_ONE}))
    hook = next(hook for hook in runner.hooks if isinstance(hook, MMEngineCheckpointHook))
    assert type(hook) is CheckpointHook
    there = []
    spy_on_writes(monkeypatch, runner, there.append)
    runner.train()
    assert 'epoch_1.pth' not in there[0]
    assert all(any(name.startswith('epoch_') for name in names) for names in there[1:]), there
    best = [any(name.startswith('best_') for name in names) for names in there]
    assert best == sorted(best), 'the best one was away for a while'
    names = sorted(path.name for path in Path(runner.work_dir).glob('*.pth'))
    assert [name[:5] for name in names] == ['best_', 'epoch'] and names[1] == 'epoch_3.pth'


def test_without_a_setting_checkpoints_are_ours_too(toy_config):
    cfg = toy_config()
    del cfg.default_hooks['checkpoint']
    assert any(type(hook) is CheckpointHook for hook in Runner.from_cfg(cfg).hooks)


def test_a_write_that_fails_leaves_the_others(toy_config, monkeypatch):
    runner = Runner.from_cfg(toy_config(**{'default_hooks.checkpoint': KEEP_ONE, 'train_cfg.val_interval': 9}))

    def fill(names):
        if names:
            Path(runner.work_dir, 'checkpoint.part').write_bytes(b'PK')
            raise OSError(28, 'No space left on device')

    spy_on_writes(monkeypatch, runner, fill)
    with pytest.raises(
        WriteError, match=r'epoch_2.pth could not be written \(No space left.*free some space.*--resume'
    ):
        runner.train()
    assert [path.name for path in Path(runner.work_dir).glob('*.p*t*')] == ['epoch_1.pth']
    assert latest_checkpoint(runner.work_dir).name == 'epoch_1.pth'


def test_a_file_system_that_takes_no_more(toy, toy_config, train, read_losses, tmp_path):
    """tools/train.py, with a limit on the size of its files: it says what is wrong, and goes on once there is room."""
    toy_config()
    settings = {'model.width': 64, 'default_hooks.checkpoint.interval': 3, 'train_cfg.max_epochs': 1}
    command = [sys.executable, 'tools/train.py', str(tmp_path / 'toy.py'), '--work-dir', str(tmp_path / 'tool')]
    command += ['--resume', '--cfg-options', *(f'{key}={value}' for key, value in settings.items())]
    environment = {**os.environ, 'PYTHONPATH': str(Path(toy.__file__).parent), 'OMP_NUM_THREADS': '1'}

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run(command, cwd=ROOT, env=environment, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'iter_3.pth could not be written (File too large)' in done.stderr and 'Traceback' not in done.stderr
    assert not list((tmp_path / 'tool').glob('*.p*t*'))
    Path(tmp_path, 'tool/losses.txt').unlink()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_losses(tmp_path / 'tool')) == 6
