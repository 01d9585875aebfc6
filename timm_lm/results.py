"""The record of runs: one row per run in ``<dataset>.csv``, in a folder of results."""
import csv
import io
from pathlib import Path
from typing import Dict, List, Sequence

from .errors import UserError
from .files import locked, write_text

# timm's result columns, then ours; errors and parameters are in timm's units (%, millions).
COLUMNS = (
    'model', 'img_size', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'crop_pct', 'interpolation',
    'dataset', 'recipe', 'seed', 'epochs', 'errors', 'images', 'seen_top1_err', 'k_min', 'k_max', 'k', 'minutes',
    'hardware', 'precision', 'versions', 'command', 'run', 'status',
)
PUBLISHED_NAME = 'published.csv'  # in the same folder, not a record of runs
Row = Dict[str, str]


def read_rows(path: Path) -> List[Row]:
    """The rows of a file, none if there is no such file.

    Raises:
        UserError: If a row has more or fewer values than the file has columns.
    """
    if not path.is_file():
        return []
    with open(path, newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f'Row {number} of {path} does not have a value for each column; fix it.')
    return rows


def check_rows(rows: Sequence[Row], results: Path) -> None:
    """Check that rows replace only earlier ones of the same run.

    Raises:
        UserError: If two networks or seeds have the same run name, in the record or among the rows, or if a file has
            columns of its own.
    """
    for dataset in {row['dataset'] for row in rows}:
        known: Dict[str, Row] = {}
        path = results / f'{dataset}.csv'
        for row in (*read_rows(path), *(row for row in rows if row['dataset'] == dataset)):
            unknown = sorted(row.keys() - set(COLUMNS))
            if unknown:  # which would be lost
                raise UserError(f"{path} has columns that the record does not have ({', '.join(unknown)}); remove "
                                'them.')
            other = known.setdefault(row['run'], row)
            if any(other[name] != row[name] for name in ('model', 'seed')):
                raise UserError(f"There would be two runs {row['run']} of {dataset} ({other['model']} of seed "
                                f"{other['seed']} and {row['model']} of seed {row['seed']}); rename the run folder.")


def add_rows(rows: Sequence[Row], results: Path) -> List[Path]:
    """Add rows to the files of their data sets; one of the same run is replaced.

    Returns:
        The files that were written.

    Raises:
        UserError: As ``check_rows``; then nothing is written.
    """
    if not rows:
        return []
    results.mkdir(parents=True, exist_ok=True)
    with locked(results):  # so that concurrent additions are not lost
        check_rows(rows, results)
        written = []
        for dataset in sorted({row['dataset'] for row in rows}):
            path = results / f'{dataset}.csv'
            merged = {row['run']: row for row in read_rows(path)}
            merged.update((row['run'], row) for row in rows if row['dataset'] == dataset)
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(sorted(merged.values(), key=lambda row: (row['recipe'], row['model'], row['run'])))
            write_text(path, text.getvalue())
            written.append(path)
        return written
