"""How far a run is and how long it will still take: a live bar on a terminal, plain lines elsewhere."""

import io
import logging
import sys
import time
from collections import deque
from contextlib import ExitStack, redirect_stdout
from datetime import timedelta

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from mmvig.engine.report import main_metrics
from mmvig.registry import HOOKS

__all__ = ['Display', 'ProgressHook']


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows iteration, epoch, loss, learning rate, speed, GPU memory and the time left, in training, validation, test.

    The time left in training is that of the whole run, the validations to come included. Until one was timed, it is
    taken to cost a third of training on as many images: the forward pass of a forward and a backward one.

    Args:
        style: 'bar', 'lines', or 'auto': a bar if the standard output is a terminal, else lines.
        interval: seconds between two lines, or between two updates of the bar; by default 5 and 0.2.
    """

    priority = 'LOWEST'

    def __init__(self, style: str = 'auto', interval: float | None = None) -> None:
        if style not in ('auto', 'bar', 'lines'):
            raise ValueError(f"ProgressHook: style must be 'auto', 'bar' or 'lines', got {style!r}")
        self._display = Display(style, interval)
        self._train_pace, self._evaluation_pace = Pace(), Pace()
        self._validation_seconds = None
        self._in_training = False

    # Training

    def before_train(self, runner) -> None:
        self._in_training = True
        self._display.open(runner.logger)

    def before_train_epoch(self, runner) -> None:
        self._train_pace.start()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._train_pace.tick()
        done, total = runner.iter + 1, runner.max_iters
        if not self._display.is_due(always=done == total):
            return
        loss = runner.message_hub.log_scalars.get('train/loss')
        rates = runner.optim_wrapper.get_lr()
        rate = rates.get('base_lr') or next(iter(rates.values()))
        self._display.show(
            'train',
            done,
            total,
            '' if _by_iteration(runner) else f'epoch {runner.epoch + 1}/{runner.max_epochs}',
            self._train_pace.left(self._training_left(runner, done)),
            '' if loss is None else f'loss {loss.mean(20):.4g}',
            f'lr {rate[0]:.2e}',
            self._train_pace.text(),
            _memory(),
        )

    def _training_left(self, runner, done: int) -> float:
        """Seconds of the iterations and validations after iteration number `done`."""
        seconds = (runner.max_iters - done) * self._train_pace.seconds
        if runner.val_loop is not None:
            seconds += _validations_left(runner) * self._seconds_of_a_validation(runner)
        return seconds

    def _seconds_of_a_validation(self, runner) -> float:
        if self._validation_seconds is not None:
            return self._validation_seconds
        images = len(runner.val_dataloader.dataset) / _images_a_batch(runner.train_dataloader)
        return images * self._train_pace.seconds / 3

    # Validation and test

    def before_val(self, runner) -> None:
        self._began = time.monotonic()
        self._display.open(runner.logger)
        self._evaluation_pace.start()

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        later = self._training_left(runner, runner.iter) if self._in_training else 0.0
        self._show_evaluation('val', batch_idx + 1, len(runner.val_dataloader), later)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self._display.finish('val')
        self._validation_seconds = time.monotonic() - self._began
        self._train_pace.start()
        when = ''
        if self._in_training:
            when = f'iter {runner.iter}' if _by_iteration(runner) else f'epoch {runner.epoch}'
        numbers = [f'{name} {value:.4g}' for name, value in main_metrics(metrics or {}).items()]
        self._display.note('val', when, *numbers)

    def before_test(self, runner) -> None:
        self._display.open(runner.logger)
        self._evaluation_pace.start()

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._show_evaluation('test', batch_idx + 1, len(runner.test_dataloader), 0.0)

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        self._display.finish('test')

    def _show_evaluation(self, task: str, done: int, total: int, later: float) -> None:
        self._evaluation_pace.tick()
        if not self._display.is_due(always=done == total):
            return
        left = self._evaluation_pace.left((total - done) * self._evaluation_pace.seconds + later)
        doing = 'computing the metrics' if done == total else self._evaluation_pace.text()
        self._display.show(task, done, total, left, doing, _memory())
        if done == total:
            self._display.mute()

    def close_display(self, runner) -> None:
        """Ends the display, however the run ended; `mmvig.engine.Runner` calls this."""
        self._in_training = False
        self._display.close()


def _by_iteration(runner) -> bool:
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def _validations_left(runner) -> int:
    """Validations after the iteration in work; a `val_interval` that changes later is taken to stay."""
    loop = runner.train_loop
    now, end = (runner.iter, runner.max_iters) if _by_iteration(runner) else (runner.epoch, runner.max_epochs)
    first = max(now + 1, loop.val_begin)
    if first > end:
        return 0
    return end // loop.val_interval - (first - 1) // loop.val_interval + (end % loop.val_interval != 0)


def _images_a_batch(dataloader) -> float:
    return max(len(dataloader.dataset), 1) / max(len(dataloader), 1)


def _memory() -> str:
    return f'{torch.cuda.max_memory_allocated() / 2**30:.1f} GB' if torch.cuda.is_available() else ''


class Pace:
    """The mean time of the latest 50 iterations; the very first one, which warms up, counts until there are others."""

    def __init__(self) -> None:
        self._durations = deque(maxlen=50)
        self._ticks = 0

    def start(self) -> None:
        self._last = time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        if self._ticks == 1:
            self._durations.clear()
        self._durations.append(now - self._last)
        self._last = now
        self._ticks += 1

    @property
    def seconds(self) -> float:
        return sum(self._durations) / max(len(self._durations), 1)

    def left(self, seconds: float) -> str:
        return f'left {timedelta(seconds=round(seconds))}' if self._ticks > 2 else ''

    def text(self) -> str:
        return f'{self.seconds:.2f} s/iter' if self.seconds >= 0.1 else f'{1 / max(self.seconds, 1e-6):.1f} iter/s'


class Display:
    """Writes to the standard output of the main process: tasks of a rich bar, or lines."""

    def __init__(self, style: str = 'auto', interval: float | None = None) -> None:
        self._console = Console(file=sys.stdout, highlight=False, quiet=not is_main_process())
        self._is_bar = style == 'bar' or (style == 'auto' and self._console.is_terminal)
        self._interval = interval if interval is not None else 0.2 if self._is_bar else 5.0
        self._next = 0.0
        self._open = ExitStack()
        self._muted = ExitStack()
        self._progress = None
        self._tasks = {}
        self._pace = Pace()

    def open(self, logger: logging.Logger | None = None) -> None:
        """What `logger` says on the console goes above the bar, and what is printed while muted goes to it."""
        if self._progress is None:
            self._logger = logger or logging.getLogger(__name__)
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn('{task.description:5}'),
                BarColumn(bar_width=12),
                TextColumn('{task.fields[text]}', table_column=Column(no_wrap=True, overflow='ellipsis')),
                console=self._console,
                disable=not self._is_bar,
                transient=True,
            )
            self._open.enter_context(self._progress)
            self._pace.start()
            for handler in self._logger.handlers:  # through the standard output that rich has put in place
                if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                    self._open.callback(handler.setStream, handler.stream)
                    handler.setStream(sys.stdout)

    def is_due(self, always: bool) -> bool:
        now = time.monotonic()
        if always or now >= self._next:
            self._next = now + self._interval
            return True
        return False

    def show(self, task: str, done: int, total: int, *parts: str) -> None:
        text = '  '.join(filter(None, [f'iter {done}/{total}', *parts]))
        if not self._is_bar:
            self._print(f'{task:5}  {text}')
            return
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, text='')
        self._progress.update(self._tasks[task], completed=done, total=total, text=escape(text))

    def tick(self, task: str, done: int, total: int) -> None:
        """`show` for work without more to say: its pace and the time left."""
        self._pace.tick()
        if self.is_due(always=done == total):
            self.show(task, done, total, self._pace.left((total - done) * self._pace.seconds), self._pace.text())

    def note(self, *parts: str) -> None:
        """A line that stays."""
        self._print('  '.join(filter(None, parts)))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def mute(self) -> None:
        """What is printed from here to `finish`, by pycocotools for one, goes to the log file."""
        printed = self._muted.enter_context(redirect_stdout(io.StringIO()))
        self._muted.callback(lambda: self._logger.info(printed.getvalue()))

    def finish(self, task: str) -> None:
        self._muted.close()
        if task in self._tasks:
            self._progress.remove_task(self._tasks.pop(task))

    def close(self) -> None:
        self._muted.close()
        self._open.close()
        self._progress = None
        self._tasks.clear()
