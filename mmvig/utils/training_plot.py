"""The curves of one or more training runs, from the numbers that MMEngine writes beside its log."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmvig.engine.report import main_metrics

__all__ = ['History', 'draw_comparison', 'draw_history', 'read_history']

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#8C6BB1', '#666666')  # Okabe and Ito's
AT_MOST = len(COLOURS)
NO_METRICS = ('data_time', 'epoch', 'iter', 'memory', 'step', 'time')


@dataclass
class History:
    """What a run logged, its resumed parts included: one dict a logged moment, with 'iter' and the numbers by name."""

    train: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The mean of an iteration's time over what was logged of training; NaN if no time was."""
        times = [row['time'] for row in self.train if 'time' in row]
        return float(np.mean(times)) if times else float('nan')


def read_history(work_dir: str | os.PathLike) -> History:
    """Reads every `<time>/vis_data/scalars.json` under `work_dir`, in order of time.

    A resumed run replaces what was logged, by the run before it, of the iterations that both went through. A line that
    a killed run left unfinished is passed over.

    Raises:
        FileNotFoundError: nothing was logged there.
    """
    history = History()
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        rows = [row for row in map(_row, path.read_text().splitlines()) if row is not None]
        first = next((row['iter'] for row in rows if 'iter' in row), None)
        if first is not None and history.train:
            history.train = [row for row in history.train if row['iter'] < first]
            history.validation = [row for row in history.validation if row['iter'] < first]
            history.resumed_at.append(history.train[-1]['iter'] if history.train else 0)
        for row in rows:
            if 'iter' in row:
                history.train.append(row)
            else:  # of a validation MMEngine logs the epoch or the iteration, and not which of them
                now = history.train[-1]['iter'] if history.train else 0
                if not history.validation or history.validation[-1]['iter'] != now:
                    history.validation.append({})
                history.validation[-1] |= {**row, 'iter': now}  # a test after it leaves what only it measured
    if not history.train:
        raise FileNotFoundError(
            f'work_dir: {work_dir} holds no */vis_data/scalars.json with a training run; tools/train.py writes one '
            'within the first iterations (default_hooks.logger.interval).'
        )
    return history


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def draw_history(history: History, title: str) -> Figure:
    """Loss and its terms, the metrics of the validations if there were any, and the learning rate, over iterations."""
    metrics = _metric_names(history.validation)
    heights = [3, 3, 1.3] if metrics else [3, 1.3]
    figure = Figure(figsize=(9, 1.4 + sum(heights)), dpi=120, layout='constrained')
    figure.suptitle(title, fontsize=13, fontweight='bold')
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)

    names = _names(history.train)
    losses = [name for name in names if 'loss' in name and name != 'loss'][:AT_MOST]
    _curves(axes[0], history.train, ['loss'] if 'loss' in names else [], color='black', linewidth=2, zorder=3)
    _curves(axes[0], history.train, losses, linewidth=1.1)
    values = np.array([row[name] for row in history.train for name in ['loss', *losses] if row.get(name, 0) > 0])
    if len(values) and values.max() > 30 * np.median(values):
        axes[0].set_yscale('log')
    else:
        axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel('training loss')

    if metrics:
        _curves(axes[1], history.validation, metrics, marker='o', linewidth=1.6)
        axes[1].set_ylabel('validation' if len(metrics) > 1 else metrics[0])
        if all(row.get(name, 0) >= 0 for row in history.validation for name in metrics):
            axes[1].set_ylim(bottom=0)
    rate = 'base_lr' if 'base_lr' in names else 'lr'
    _curves(axes[-1], history.train, [rate] if rate in names else [], color=COLOURS[0], linewidth=1.6)
    axes[-1].set_ylabel('learning rate')
    axes[-1].ticklabel_format(axis='y', style='sci', scilimits=(-2, 2))
    _iterations(axes[-1])

    for axis in axes:
        _clean(axis)
        for place in history.resumed_at:
            axis.axvline(place, color='#999999', linewidth=1, linestyle=':')
        if len(axis.lines) > 1 + len(history.resumed_at):
            axis.legend(frameon=False, fontsize=9, loc='upper left', bbox_to_anchor=(1, 1))
    for place in history.resumed_at:
        axes[0].annotate('resumed', (place, 1), xycoords=('data', 'axes fraction'), fontsize=8, color='#777777')
    return figure


def draw_comparison(histories: dict[str, History], keys: list[str] | None = None) -> Figure:
    """One panel a quantity, beside one another, and in each a curve a run, over iterations.

    Args:
        histories: by the name that the legend gives a run.
        keys: quantities of training or validation by the name under which they are logged, such as 'loss', 'lr' or
            'coco/bbox_mAP'; by default the loss and the validations' metrics, up to `AT_MOST` in all.

    Raises:
        ValueError: a key that no run logged.
    """
    logged = {name: _quantities(history) for name, history in histories.items()}
    known = list(dict.fromkeys(key for quantities in logged.values() for key in quantities))
    if unknown := [key for key in keys or () if key not in known]:
        raise ValueError(f'keys: no run logged {", ".join(unknown)}; there is {", ".join(known)}.')
    metrics = _metric_names([row for history in histories.values() for row in history.validation])
    keys = keys or [key for key in ('loss', *metrics) if key in known][:AT_MOST]
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(4.6 * columns, 0.5 + 3.4 * rows), dpi=120, layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, key in zip(axes, keys):
        for i, (name, quantities) in enumerate(logged.items()):
            if key in quantities:
                linestyle = ('-', '--', ':')[i // AT_MOST % 3]
                _curves(axis, quantities[key], [key], color=COLOURS[i % AT_MOST], linestyle=linestyle, linewidth=1.6)
                axis.lines[-1].set_label(name)
        axis.set_title(key, fontsize=11)
        _iterations(axis)
        _clean(axis)
    for axis in axes[len(keys) :]:
        axis.remove()
    lines = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    figure.legend(lines.values(), lines.keys(), loc='outside lower center', ncols=columns, frameon=False)
    return figure


def _quantities(history: History) -> dict[str, list[dict]]:
    """The rows that hold a number, by its name; training's where both training and validation log it."""
    return {name: rows for rows in (history.validation, history.train) for name in _names(rows)}


def _iterations(axis) -> None:
    axis.set_xlabel('iteration')
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(left=0)


def _clean(axis) -> None:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(axis='y', color='#dddddd', linewidth=0.8)
    axis.set_axisbelow(True)


def _curves(axis, rows: list[dict], names: list[str], color: str | None = None, **style) -> None:
    for name, colour in zip(names, COLOURS):
        points = [(row['iter'], row[name]) for row in rows if name in row]
        marker = style.get('marker', 'o' if len(points) < 10 else None)  # or a single point would not be seen
        axis.plot(*zip(*points), label=name, color=color or colour, **{**style, 'marker': marker, 'markersize': 4})


def _names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float))))


def _metric_names(rows: list[dict]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in main_metrics(row))
    return [name for name in names if name not in NO_METRICS][:AT_MOST]
