import os
import re
import shlex
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from mmvig.engine import Interrupted, InterruptHook, Runner

ROOT = Path(__file__).parents[2]
HOOKS = [dict(type='EMAHook', momentum=0.1), dict(type='RecordLosses')]


def with_signal(**signal_settings) -> list[dict]:
    return [*HOOKS, dict(type='Signal', **signal_settings)]


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_the_iteration(toy_config, train, signum, capfd):
    whole = train(toy_config())
    with pytest.raises(Interrupted) as stop:
        train(toy_config('stopped', custom_hooks=with_signal(signum=signum, train_iter=9)))
    assert stop.value.status == 128 + signum
    assert 'once more to stop at once' in capfd.readouterr().err
    cfg = toy_config('stopped', load_from=str(stop.value.checkpoint), resume=True)
    assert stop.value.checkpoint == Path(cfg.work_dir, 'interrupted.pth')
    assert Path(cfg.work_dir, 'last_checkpoint').read_text() == str(stop.value.checkpoint)
    assert train(cfg) == whole  # the file holds the losses of both parts
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)


def test_a_signal_in_validation_saves_the_trained_weights_and_resuming_validates(toy_config, train, read_losses):
    whole = train(toy_config())
    stopping = with_signal(signum=signal.SIGINT, val_iter=1)
    with pytest.raises(Interrupted) as stop:
        train(toy_config('stopped', custom_hooks=stopping))
    cfg = toy_config('stopped', load_from=str(stop.value.checkpoint), resume=True)
    assert sorted(read_losses(cfg.work_dir)) == list(range(6))
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert read_losses(cfg.work_dir) == whole
    assert len(runner.message_hub.get_scalar('val/toy/mean').data[0]) == 3


def test_a_second_signal_is_not_held_back(toy_config, train):
    """After the first one the handlers are the usual ones; SIGINT's kills, as C code would not see an exception."""
    seen = []

    def spy(hook, runner, batch_idx, data_batch=None, outputs=None):
        seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    cfg = toy_config(custom_hooks=with_signal(signum=signal.SIGINT, train_iter=2))
    runner = Runner.from_cfg(cfg)
    recorder = next(hook for hook in runner.hooks if type(hook).__name__ == 'RecordLosses')
    recorder.after_train_iter = spy.__get__(recorder)
    with pytest.raises(Interrupted):
        runner.train()
    assert seen[-1] == (signal.SIG_DFL, signal.SIG_DFL)
    assert signal.SIG_DFL not in seen[-2]


@pytest.mark.parametrize(('signum', 'error'), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_before_the_first_iteration_there_is_nothing_to_save(toy_config, monkeypatch, signum, error):
    runner = Runner.from_cfg(toy_config())
    monkeypatch.setattr(runner, 'load_or_resume', lambda: signal.raise_signal(signum))
    with pytest.raises(error) as stop:
        runner.train()
    assert not isinstance(stop.value, Interrupted) and not list(Path(runner.work_dir).glob('*.pth'))
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)


WORKERS = {
    'train_dataloader.num_workers': 2,
    'train_cfg.max_epochs': 4,
    'train_cfg.val_interval': 4,
    'default_hooks.checkpoint.interval': 6,
    'custom_hooks.1.pause': 0.05,
}


@pytest.fixture
def start(toy, monkeypatch):
    """Starts Python with these words, in a process group of its own; its output ends with the last of the group."""
    monkeypatch.setenv('PYTHONPATH', str(Path(toy.__file__).parent), prepend=os.pathsep)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')

    def run(words: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture
def training(start, toy_config, tmp_path) -> subprocess.Popen:
    """tools/train.py with two workers, a few iterations after its start."""
    toy_config()
    command = ['tools/train.py', str(tmp_path / 'toy.py'), '--work-dir', str(tmp_path / 'tool')]
    command += ['--progress', 'lines', '--cfg-options', *(f'{key}={value}' for key, value in WORKERS.items())]
    process = start(command)
    losses = tmp_path / 'tool/losses.txt'
    while not (losses.is_file() and losses.read_text().count('\n') >= 4):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group(training, start, toy_config, train, read_losses, tmp_path, signum):
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the tool and the workers of its data loader.

    The command `timeout` signals first the tool, then the group, which the tool is in.
    """
    os.kill(training.pid, signum)
    os.killpg(training.pid, signum)
    said, _ = training.communicate(timeout=60)
    assert training.returncode == 128 + signum, said
    assert 'Traceback' not in said and 'Terminated' not in said
    done = len(read_losses(tmp_path / 'tool'))
    whole = train(toy_config('whole', **WORKERS))
    assert done < len(whole)

    process = start(shlex.split(re.search(r'To go on:\n  python (.*)', said)[1]))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f'Going on from {tmp_path}/tool/interrupted.pth' in said and f'iteration {done}.' in said
    assert read_losses(tmp_path / 'tool') == whole


@pytest.mark.slow
def test_workers_leave_when_training_dies(training):
    """PyTorch looks for its parent every five seconds."""
    training.kill()
    training.communicate(timeout=30)
    assert training.returncode == -signal.SIGKILL


def test_a_worker_heeds_its_parent_alone():
    worker = get_context('fork').Process(target=time.sleep, args=(60,), daemon=True)
    with InterruptHook().listening():
        worker.start()
        subprocess.run(['kill', str(worker.pid)], check=True)
        worker.join(0.5)
        assert worker.is_alive()
        worker.terminate()
        worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.slow
def test_processes_of_a_distributed_run_stop_together_and_continue(launch, toy_config, tmp_path):
    """One of them gets the signal, in the middle of an accumulation that the checkpoint could not hold."""
    toy_config()

    def train(work_dir: str, signalled_rank: int, *checkpoint: str) -> list[int]:
        return launch('distributed_toy.py', tmp_path / 'toy.py', tmp_path / work_dir, signalled_rank, *checkpoint)

    def losses(work_dir: str) -> list[str]:
        return [(tmp_path / work_dir / f'losses{rank}.txt').read_text() for rank in '01']

    assert train('whole', -1) == [0, 0]
    assert losses('whole')[0] != losses('whole')[1]
    assert train('stopped', 1) == [130, 130]
    assert [text.count('\n') for text in losses('stopped')] == [6, 6]
    assert train('stopped', -1, str(tmp_path / 'stopped/interrupted.pth')) == [0, 0]
    assert losses('stopped') == losses('whole')
