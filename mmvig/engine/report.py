"""What people read: metrics as tables, and words said once however many processes a run has."""

import os
import re
from numbers import Real

from rich.table import Table

__all__ = ['is_first', 'main_metrics', 'metrics_table', 'say']

COCO = re.compile(r'(?P<dataset>.*/)?(?P<kind>bbox|segm|proposal)_mAP(_(?P<column>50|75|s|m|l))?')
COCO_KINDS = dict(bbox='box', segm='mask', proposal='proposal')
COCO_COLUMNS = {None: 'AP', '50': 'AP50', '75': 'AP75', 's': 'AP small', 'm': 'AP medium', 'l': 'AP large'}


def metrics_table(metrics: dict) -> Table:
    """One row for boxes and one for masks where the metrics are COCO's, otherwise one row a number."""
    found = {name: match for name in metrics if (match := COCO.fullmatch(name))}
    if found:
        cells = {(match['kind'], match['column']): metrics[name] for name, match in found.items()}
        table = Table('', *COCO_COLUMNS.values())
        for kind in dict.fromkeys(kind for kind, _ in cells):
            table.add_row(COCO_KINDS[kind], *(_number(cells.get((kind, column), -1)) for column in COCO_COLUMNS))
        return table
    table = Table('metric', 'value')
    for name, value in metrics.items():
        table.add_row(name, _number(value) if isinstance(value, Real) else str(value))
    return table


def main_metrics(metrics: dict) -> dict[str, Real]:
    """The numbers among the metrics, without COCO's for one size of objects each."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, Real) and not ((match := COCO.fullmatch(name)) and match['column'] in ('s', 'm', 'l'))
    }


def _number(value: float) -> str:
    """COCO writes -1 where nothing of that size is in the data."""
    return '-' if value == -1 else f'{value:.4g}'


def say(*lines: str) -> None:
    """Prints, in one process of a distributed run; which may not have begun, so that its launcher's word counts."""
    if is_first():
        print(*lines, sep='\n', flush=True)


def is_first() -> bool:
    """Whether this is the process of a distributed run that speaks."""
    return os.environ.get('RANK', '0') == '0'
