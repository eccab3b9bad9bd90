"""The files of results that the benchmarks append to."""

import csv
import sys
from pathlib import Path


def append(rows: list[dict], path: Path) -> None:
    new = not path.exists()
    if not new and path.open().readline().strip() != ','.join(rows[0]):
        sys.exit(f'{path} has other columns than {",".join(rows[0])}: choose another file with --out')
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, rows[0], lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerows(rows)
