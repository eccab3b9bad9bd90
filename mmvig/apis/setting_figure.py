"""One picture of rows of `mmvig.apis.benchmark` in a few settings: speed and memory beside the baseline's."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from mmvig.apis.benchmark import Row, best_rows

__all__ = ['draw_settings']

PANELS = (  # what a bar shows, and what stands above it
    ('speed', 'speed, the fastest baseline = 1', 'p50', '{:.3g}'),
    ('memory', 'memory, its = 1', 'peak_mb', '{:.0f}'),
)


def draw_settings(rows: list[Row], path: Path, environment: str) -> None:
    """Draws a group of bars a setting, each model by its fastest launch; above a bar are its milliseconds or MB."""
    rows = [row for row in best_rows(rows) if row.p50]
    settings = list(dict.fromkeys(row.setting for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    width = 0.8 / max(1, len(models))
    figure = Figure(figsize=(1.5 + 1.7 * len(settings), 6), layout='constrained')
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for axis, (column, label, number, form) in zip(axes, PANELS):
        for i, model in enumerate(models):
            bars = [row for row in rows if row.model == model and getattr(row, column)]
            places = [settings.index(row.setting) + (i - (len(models) - 1) / 2) * width for row in bars]
            drawn = axis.bar(places, [getattr(row, column) for row in bars], width, color=f'C{i}', label=model)
            axis.bar_label(drawn, [form.format(getattr(row, number)) for row in bars], fontsize=7)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_ylabel(label, fontsize=9)
        axis.set_yscale('log' if column == 'speed' else 'linear')
        axis.yaxis.set_major_formatter('{x:g}')
        if column == 'speed':
            axis.yaxis.set_minor_formatter(LogFormatter())  # 1.4, where the default has 1.4 x 10^0
        axis.grid(axis='y', alpha=0.3)
        axis.set_axisbelow(True)
    axes[-1].set_xticks(range(len(settings)), [str(setting).replace(' ', '\n', 1) for setting in settings], fontsize=8)
    axes[0].legend(fontsize=8)
    figure.suptitle(f'Above the bars: ms, and MB at the peak. {environment}', fontsize=9)
    figure.savefig(path, dpi=150)
