"""Trains many configs, side by side where there are several GPUs, and sets what came out against each other."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from mmengine.config import Config

from mmvig.apis.measure import build
from mmvig.utils.home import home
from mmvig.utils.training_plot import COLOURS, History, read_history

__all__ = ['METRICS', 'Result', 'Training', 'draw', 'results', 'train_all']

BACKBONE = re.compile(
    r'vigh?-gla-(nano|tiny|small|base)(-adapter)?|r50|resnet50|swin-t(iny)?(-p(atch)?\d+-w(indow)?\d+)?'
)
METRICS = {  # by name: as a library logs it, and what it logs of a perfect model
    'box AP': ('coco/bbox_mAP', 1),
    'mask AP': ('coco/segm_mAP', 1),
    'top-1': ('accuracy/top1', 100),
    'mIoU': ('mIoU', 100),
}
GRACE = 120  # seconds in which a training that was told to stop has to save


class Training(NamedTuple):
    """A config file and where its training lives: a folder by its name in that of the study."""

    config: Path
    study: Path

    @property
    def name(self) -> str:
        return self.config.stem

    @property
    def work_dir(self) -> Path:
        return self.study / self.name

    @property
    def backbone(self) -> str:
        """As the file's name has it; the whole name, if it is none that is known here."""
        match = BACKBONE.search(self.name)
        return match[0] if match else self.name

    @property
    def task(self) -> str:
        """The file's name without the backbone: the trainings of a task are to be compared."""
        return re.sub('[_-]{2,}', '_', BACKBONE.sub('', self.name, count=1)).strip('_-')

    @property
    def about(self) -> Path:
        """A file that is there when the training is complete; it says on what it ran."""
        return self.work_dir / 'complete.json'


class Result(NamedTuple):
    """A row of the table. `metrics` are the last validation's; times and memory are medians over training."""

    task: str
    backbone: str
    parameters: float  # millions
    metrics: dict[str, float]  # by the names in METRICS, from 0 to 1
    seconds: float  # an iteration
    waiting: float  # of these, for data
    memory: float | None  # GiB at most; None without a GPU
    device: str
    torch: str
    commit: str

    def row(self) -> dict[str, str | int]:
        """As text for a table; a metric of another task is ''."""
        return {
            'task': self.task,
            'backbone': self.backbone,
            'parameters, M': f'{self.parameters:.1f}',
            **{name: f'{self.metrics[name]:.3f}' if name in self.metrics else '' for name in METRICS},
            'ms an iteration': f'{1000 * self.seconds:.0f}',
            'ms waiting for data': f'{1000 * self.waiting:.0f}',
            'memory, GiB': '' if self.memory is None else f'{self.memory:.1f}',
            'device': self.device,
            'torch': self.torch,
            'commit': self.commit,
        }


def train_all(
    trainings: Iterable[Training],
    *,
    seconds: float,
    options: Sequence[str] = (),
    say: Callable[[str], None] = print,
    interval: float = 20.0,
    stop: Callable[[], object] = lambda: False,
) -> list[Training]:
    """Runs tools/train.py on each that is not complete, in their order, one a visible GPU, or one alone without GPUs.

    A training that was stopped goes on from its last checkpoint. What it prints is in `console.txt` of its folder.

    Args:
        seconds: then trainings are told to save and stop, and no other begins.
        options: `--cfg-options` for all of them.
        say: is told what begins and ends and, every `interval` seconds, how far the running ones are.
        stop: is asked, several times a second, whether the time is over already.

    Returns:
        Those that failed; a training that was stopped has not.
    """
    free = _devices()
    waiting = [training for training in trainings if not training.about.exists()]
    running: dict[str, tuple[Training, subprocess.Popen]] = {}
    failed, stopping = [], False
    start = heard = time.monotonic()
    try:
        while running or (waiting and not stopping):
            now = time.monotonic() - start
            if not stopping and (now >= seconds or stop()):
                stopping = True
                why = f'{seconds:.0f} s are over' if now >= seconds else f'Told to stop after {now:.0f} s'
                say(f'{why}: {len(running)} running and {len(waiting)} waiting trainings stop.')
                _stop(running.values())
            while free and waiting and not stopping:
                device = free.pop(0)
                running[device] = waiting[0], _begin(waiting[0], device, options)
                say(f'{now:4.0f} s  {waiting.pop(0).name} begins on device {device}')
            for device, (training, process) in list(running.items()):
                if process.poll() is not None:
                    del running[device]
                    free.append(device)
                    if process.returncode == 0:
                        training.about.write_text(json.dumps(_about(device)))
                    elif not stopping:
                        failed.append(training)
                    say(f'{now:4.0f} s  {training.name} {_last_words(training, process.returncode, stopping)}')
            if time.monotonic() - heard >= interval:
                heard = time.monotonic()
                for training, _ in running.values():
                    say(f'{now:4.0f} s  {training.name}: {_last_line(training)}')
            time.sleep(0.2)
    finally:
        _stop(running.values())
    return failed


def _devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each visible GPU, or 'cpu'."""
    if not torch.cuda.is_available():
        return ['cpu']
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    return visible.split(',') if visible else [str(i) for i in range(torch.cuda.device_count())]


def _begin(training: Training, device: str, options: Sequence[str]) -> subprocess.Popen:
    training.work_dir.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(home() / 'tools/train.py'),
        str(training.config),
        '--work-dir',
        str(training.work_dir),
        '--resume',
    ]
    command += ['--progress', 'lines', *(['--cfg-options', *options] if options else [])]
    environment = os.environ if device == 'cpu' else {**os.environ, 'CUDA_VISIBLE_DEVICES': device}
    with (training.work_dir / 'console.txt').open('a') as console:
        return subprocess.Popen(
            command, stdout=console, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _stop(running: Iterable[tuple[Training, subprocess.Popen]]) -> None:
    """Lets trainings finish their iteration and save."""
    processes = [process for _, process in running if process.poll() is None]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(training: Training) -> str:
    lines = (training.work_dir / 'console.txt').read_text().split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), '')


def _last_words(training: Training, status: int, stopped: bool) -> str:
    if status == 0:
        metrics = _metrics(read_history(training.work_dir))
        return f'is complete: {", ".join(f"{name} {value:.3f}" for name, value in metrics.items())}'
    if stopped:
        return 'has stopped, and goes on with the next call'
    return f'failed with status {status}: {_last_line(training)} (all of it: {training.work_dir / "console.txt"})'


def _about(device: str) -> dict[str, str]:
    return dict(
        device='CPU' if device == 'cpu' else torch.cuda.get_device_name(),
        torch=torch.__version__,
        commit=os.environ.get('COMMIT') or _commit(),
    )


def _commit() -> str:
    """Of the sources, with a plus if they have changed since; '' without git."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        return git('rev-parse', '--short', 'HEAD') + '+' * bool(git('status', '--porcelain', '-uno'))
    except FileNotFoundError:
        return ''


def results(trainings: Iterable[Training]) -> list[Result]:
    """Of the complete ones, in their order."""
    return [read_result(training) for training in trainings if training.about.exists()]


def read_result(training: Training) -> Result:
    history = read_history(training.work_dir)
    timed = history.train[1:] or history.train  # the first span has what happens once
    memory = [row['memory'] for row in history.train if 'memory' in row]
    about = json.loads(training.about.read_text())
    return Result(
        task=training.task,
        backbone=training.backbone,
        parameters=sum(p.numel() for p in build(Config.fromfile(training.config)).parameters()) / 1e6,
        metrics=_metrics(history),
        seconds=median(row['time'] for row in timed),
        waiting=median(row['data_time'] for row in timed),
        memory=max(memory) / 1024 if memory else None,
        **about,
    )


def _metrics(history: History) -> dict[str, float]:
    last = history.validation[-1] if history.validation else {}
    return {name: last[key] / perfect for name, (key, perfect) in METRICS.items() if key in last}


def draw(trainings: Iterable[Training]) -> Figure:
    """A row a task: the loss over iterations, and bars for the metrics, the time of an iteration and the memory.

    Raises:
        ValueError: no training is complete.
    """
    done = [training for training in trainings if training.about.exists()]
    if not done:
        raise ValueError('trainings: none of them is complete')
    tasks = list(dict.fromkeys(training.task for training in done))
    figure = Figure(figsize=(13, 3.1 * len(tasks)), dpi=110, layout='constrained')
    axes = figure.subplots(len(tasks), 4, squeeze=False, width_ratios=(2, 1.4, 1, 1))
    for row, task in zip(axes, tasks):
        mine = [training for training in done if training.task == task]
        found = [read_result(training) for training in mine]
        _draw_losses(row[0], {training.backbone: read_history(training.work_dir) for training in mine})
        row[0].set_title(task, fontsize=10, loc='left', fontweight='bold')
        metrics = list(dict.fromkeys(name for result in found for name in result.metrics))
        _bars(row[1], found, metrics, lambda result, name: result.metrics.get(name, 0.0), '.3f')
        row[1].set_ylim(0, 1)
        _bars(row[2], found, ['ms an iteration'], lambda result, _: 1000 * result.seconds, '.0f')
        if any(result.memory is not None for result in found):
            _bars(row[3], found, ['memory, GiB'], lambda result, _: result.memory or 0.0, '.1f')
        else:
            row[3].remove()
    return figure


def _draw_losses(axis, histories: dict[str, History]) -> None:
    for colour, (backbone, history) in zip(COLOURS, histories.items()):
        points = [(row['iter'], row['loss']) for row in history.train if 'loss' in row]
        axis.plot(*zip(*points), color=colour, label=backbone, linewidth=1.5)
    axis.set_ylim(bottom=0)
    axis.set_xlabel('iteration')
    axis.set_ylabel('training loss')
    axis.legend(frameon=False, fontsize=8)
    axis.spines[['top', 'right']].set_visible(False)


def _bars(axis, found: list[Result], names: list[str], value: Callable[[Result, str], float], form: str) -> None:
    width = 0.8 / len(found)
    for i, (colour, result) in enumerate(zip(COLOURS, found)):
        places = [place + (i - (len(found) - 1) / 2) * width for place in range(len(names))]
        bars = axis.bar(places, [value(result, name) for name in names], 0.92 * width, color=colour)
        axis.bar_label(bars, fmt=f'{{:{form}}}', fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.spines[['top', 'right']].set_visible(False)
