"""One picture of rows of `mmvig.apis.benchmark`: what a model costs, and what it sees, at growing resolution."""

import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from mmvig.apis.benchmark import Row, best_rows

__all__ = ['draw', 'read_accuracies', 'series']

PANELS = (('gflops', 'GFLOPs'), ('peak_mb', 'extra peak memory, MB'), ('p50', 'ms'))


def read_accuracies(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads a CSV file with the columns model, size (pixels of a side) and accuracy: (size, accuracy) by model.

    Raises:
        ValueError: other columns.
    """
    with path.open(newline='') as stream:
        reader = csv.DictReader(stream)
        if not {'model', 'size', 'accuracy'} <= set(reader.fieldnames or ()):
            raise ValueError(f'{path} must have the columns model, size and accuracy, it has {reader.fieldnames}')
        points = defaultdict(list)
        for row in reader:
            points[row['model']].append((int(row['size']), float(row['accuracy'])))
    return {model: sorted(values) for model, values in points.items()}


def series(rows: list[Row]) -> tuple[tuple, dict[str, list[Row]]]:
    """The batch, mode and precision that was measured at the most resolutions (the first of several), and its rows.

    These are, by model, each model's fastest launch at every resolution, the smallest first.
    """
    groups = defaultdict(list)
    for row in best_rows(rows):
        groups[row.batch, row.mode, row.precision].append(row)
    key = max(groups, key=lambda key: len({(row.height, row.width) for row in groups[key]}))
    models = defaultdict(list)
    for row in sorted(groups[key], key=lambda row: row.height * row.width):
        models[row.model].append(row)
    return key, dict(models)


def draw(rows: list[Row], path: Path, accuracies: dict[str, list[tuple[int, float]]] | None, environment: str) -> None:
    """Draws FLOPs, memory, time and, where given, accuracy against resolution; a cross marks the end of the memory."""
    (batch, mode, precision), models = series(rows)
    others = [name for name in accuracies or {} if name not in models]
    colours = {name: f'C{i}' for i, name in enumerate([*models, *others])}
    figure = Figure(figsize=(4.2 * (len(PANELS) + bool(accuracies)), 4), layout='constrained')
    axes = figure.subplots(1, len(PANELS) + bool(accuracies), squeeze=False)[0]
    for axis, (column, label) in zip(axes, PANELS):
        for model, measured in models.items():
            points = [(_side(row), getattr(row, column)) for row in measured if row.p50 and getattr(row, column)]
            axis.plot(*zip(*points), 'o-', color=colours[model], label=model, markersize=4) if points else None
            if points and (full := [row for row in measured if row.status == 'out of memory']):
                axis.annotate(
                    'out of memory',
                    (_side(full[0]), points[-1][1]),
                    color=colours[model],
                    fontsize=7,
                    ha='center',
                    va='bottom',
                )
                axis.plot(_side(full[0]), points[-1][1], 'x', color=colours[model])
        _scale(axis, label, log=True)
    if accuracies:
        for model, points in accuracies.items():
            axes[-1].plot(*zip(*points), 'o-', color=colours[model], label=model, markersize=4)
        _scale(axes[-1], 'accuracy on digit scenes', log=False)
        if others:
            axes[-1].legend(fontsize=8)
    axes[0].legend(fontsize=8)
    figure.suptitle(f'{mode}, batch {batch}, {precision}; each model as its fastest launch. {environment}', fontsize=9)
    figure.savefig(path, dpi=150)


def _side(row: Row) -> float:
    return (row.height * row.width) ** 0.5


def _scale(axis, label: str, log: bool) -> None:
    axis.set_xscale('log', base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f'{value:.0f}')
    axis.set_yscale('log' if log else 'linear')
    axis.set_xlabel('side of the image, pixels')
    axis.set_title(label, fontsize=10)
    axis.grid(alpha=0.3)
