"""Ctrl-C and SIGTERM: finish the iteration, write a checkpoint, stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.dist import all_reduce, barrier
from mmengine.hooks import EMAHook, Hook

from mmvig.engine.resume import in_accumulation

__all__ = ['InterruptHook', 'Interrupted']

# Seconds. The command `timeout` sends its signal twice, to the process and to the group that the process is in.
SAME_SIGNAL = 0.2


class Interrupted(KeyboardInterrupt):
    """Training stopped on a signal; all of it is in `checkpoint`. `status` is the exit status, 128 + the signal."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f'stopped by {signal.Signals(signum).name}; the run is saved in {checkpoint}')
        self.status = 128 + signum
        self.checkpoint = checkpoint


class InterruptHook(Hook):
    """Writes `interrupted.pth` at the end of the iteration in which the first signal came, and raises Interrupted.

    The second signal has its usual effect, at once. Processes of a distributed run stop at the same iteration.
    """

    priority = 'LOWEST'
    _listening = False  # in this process: one trains at a time

    def __init__(self) -> None:
        self._signum = 0
        self._training = False
        self._trained = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the two signals, in the main thread; workers of the DataLoader, its forks, leave them to it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        main, usual, received = os.getpid(), {}, False

        def receive(signum: int, frame) -> None:
            nonlocal received
            if os.getpid() != main or received:
                return
            received = True
            time.sleep(SAME_SIGNAL)
            for number, handler in usual.items():
                signal.signal(number, signal.SIG_DFL if handler is signal.default_int_handler else handler)
            if not self._training:  # nothing to lose yet
                raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
            self._signum = signum
            os.write(2, b'\nFinishing this iteration and saving; once more to stop at once.\n')

        for number in (signal.SIGINT, signal.SIGTERM):
            usual[number] = signal.signal(number, receive)
        InterruptHook._listening = True
        try:
            yield
        finally:
            InterruptHook._listening = False
            for number, handler in usual.items():
                signal.signal(number, handler)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self._training = True

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if runner.world_size > 1 and in_accumulation(runner.optim_wrapper):
            return  # a distributed run's checkpoint would lose the gradients
        if self._signalled(runner):
            self._stop(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))

    def before_val(self, runner) -> None:
        self._trained = _weight_sums(runner)

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self._training and self._signalled(runner):
            for hook in runner.hooks:  # validation may run on averaged weights, in exchange for the trained ones
                if isinstance(hook, EMAHook) and not torch.equal(_weight_sums(runner), self._trained):
                    hook._swap_ema_parameters()
            self._stop(runner, dict(epoch=runner.epoch, iter=runner.iter, in_validation=True))

    def _signalled(self, runner) -> bool:
        if runner.world_size > 1:
            signum = torch.tensor(self._signum)
            all_reduce(signum, op='max')
            self._signum = int(signum)
        return self._signum != 0

    def _stop(self, runner, meta: dict) -> None:
        name = 'interrupted.pth'
        runner.save_checkpoint(runner.work_dir, name, meta=meta)
        checkpoint = Path(runner.work_dir, name)
        if runner.rank == 0:
            Path(runner.work_dir, 'last_checkpoint').write_text(str(checkpoint))
        barrier()  # a launcher ends the others, the writing one included, when the first has ended
        raise Interrupted(self._signum, checkpoint)


def _heed_the_parent_alone() -> None:
    """In a fork of a process that listens: only the parent's SIGTERM ends it, which a scheduler sends to them all.

    A handler would not do: it does not learn the sender, and PyTorch sets its own in a worker.
    """
    if InterruptHook._listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_the_parent, daemon=True).start()


def _await_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # as PyTorch's worker does: any other status is reported as a failure


os.register_at_fork(after_in_child=_heed_the_parent_alone)


def _weight_sums(runner) -> torch.Tensor:
    """One number for each parameter, by which trained and averaged weights can be told apart."""
    return torch.stack([p.detach().float().sum() for p in runner.model.parameters()])
