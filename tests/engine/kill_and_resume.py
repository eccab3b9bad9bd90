"""Kills a training run with SIGKILL at random moments and goes on from what is left, as tools/train.py --resume does.

    python tests/engine/kill_and_resume.py --kills 20

The losses of all lives of the run, and its last checkpoint, must be those of a run that nobody killed, bit for bit, and
every life must begin at the newest complete checkpoint. The run has dropout, drop path, batch norm, data augmented by
worker processes, momentum, a schedule, averaged weights, accumulated gradients, and keeps two checkpoints.
"""

import argparse
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import toy_training

import mmvig  # noqa: F401
from mmvig.compat.checkpoint_loading import load_checkpoint_file
from mmvig.engine.checkpoint import UNFINISHED
from mmvig.engine.resume import latest_checkpoint, load_for_resume

ROOT = Path(__file__).parents[2]
OPTIONS = [
    'model.width=768',  # a checkpoint takes some time to write
    'optim_wrapper.optimizer.lr=0.001',
    'train_dataloader.num_workers=1',
    '+train_dataloader.persistent_workers=True',
    'train_dataloader.dataset.size=38',
    'train_cfg.val_interval=5',
    'default_hooks.checkpoint.interval=3',
    '+default_hooks.checkpoint.max_keep_ckpts=2',
    'custom_hooks.1.pause=0.01',
]
BATCHES = 10  # an epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--epochs', type=int, default=16)
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: %(default)s)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        survive(Path(folder), args.kills, args.epochs, random.Random(args.seed))


def survive(folder: Path, kills: int, epochs: int, rng: random.Random) -> None:

    torch.set_num_threads(1)
    config = folder / 'toy.py'
    config.write_text(toy_training.CONFIG)
    iterations = epochs * BATCHES
    whole = folder / 'whole'
    assert wait(start(config, whole, epochs, folder / 'whole.log')) == 0, (folder / 'whole.log').read_text()[-3000:]
    want = dict(losses(whole))
    assert sorted(want) == list(range(iterations)) and len(set(want.values())) == iterations

    killed, struck, while_writing, done = folder / 'killed', 0, 0, 0
    for life in range(kills + 1):
        newest = latest_checkpoint(killed) if killed.exists() else None
        begins = 0 if newest is None else load_for_resume(newest)['meta']['iter']
        before = len(losses(killed))
        process = start(config, killed, epochs, folder / f'{life}.log')
        if life < kills:
            # Most kills come some iterations after the start, which leaves time for the rest; a few while it starts.
            target = before + rng.randint(0, 6 * iterations // (5 * kills + 5))
            while len(losses(killed)) < target and not gone(process):
                time.sleep(0.002)
            if life % 3 == 2:  # and some while a checkpoint is written
                while not (killed / UNFINISHED).exists() and not gone(process):
                    time.sleep(0.0005)
            else:
                time.sleep(rng.uniform(0, 0.05))
            os.kill(process, signal.SIGKILL)
            status = wait(process)
            ended = losses(killed)[-1:] == [(iterations - 1, want[iterations - 1])]
            assert status == -signal.SIGKILL or ended, (folder / f'{life}.log').read_text()[-3000:]
            struck += status == -signal.SIGKILL
            while_writing += (killed / UNFINISHED).exists()
        else:
            assert wait(process) == 0, (folder / f'{life}.log').read_text()[-3000:]
        lived = losses(killed)[before:]
        assert [i for i, _ in lived] == list(range(begins, begins + len(lived))), (begins, lived)
        assert all(want[i] == loss for i, loss in lived), f'life {life} left the course'
        done = max([done, *(i + 1 for i, _ in lived)])
        print(f'life {life:2}: from iteration {begins:3} of {iterations}, {len(lived):3} iterations', flush=True)
    assert done == iterations
    ends = [load_checkpoint_file(latest_checkpoint(path)) for path in (whole, killed)]
    for part in ('state_dict', 'ema_state_dict'):
        assert all(value.equal(ends[1][part][name]) for name, value in ends[0][part].items()), part
    assert len(list(killed.glob('iter_*.pth'))) <= 3  # the two that are kept, and one that a kill left behind
    print(f"{struck} kills, {while_writing} of them while a checkpoint was written: every loss is the unkilled run's")


def start(config: Path, work_dir: Path, epochs: int, log: Path) -> int:
    """Runs tools/train.py --resume in a fork, which has imported everything: its process id."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 1
    try:
        sys.argv = ['tools/train.py', str(config), '--work-dir', str(work_dir), '--progress', 'lines', '--resume']
        sys.argv += ['--cfg-options', *OPTIONS, f'train_cfg.max_epochs={epochs}']
        runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')
        status = 0
    except SystemExit as end:
        print(end)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def gone(pid: int) -> bool:
    """Whether the process has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def losses(work_dir: Path) -> list[tuple[int, str]]:
    """(iteration, loss with all its bits), in the order of their coming; a kill may have cut the last line."""
    file = work_dir / 'losses.txt'
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [(int(line.split()[0]), line.split()[2]) for line in lines if line.endswith('\n')]


if __name__ == '__main__':
    main()
