"""``make ship RUNS=...``: add weights of finished runs to the shipped ones, with digests and rows of results."""
import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import torch
from safetensors import SafetensorError

from .errors import UserError
from .files import atomic_folder, whole_entries, write_text
from .models._weights import weights_dir, write_digests
from .names import check_name, is_ours, saved_model_args
from .readme_table import write_table
from .results import Row, add_rows, check_rows
from .results_page import write_report
from .run_row import read_run, with_result
from .training.arguments import data_source
from .training.result import mean_k, run_card
from .training.run_folder import read_args, read_result
from .validate import validate
from .weights_folder import CARD_NAME, load_folder, save_folder, verify_folder

TRACKED_LIMIT = 20 << 20  # bytes of all weights folders together


def ship(run: Union[str, Path], weights: Path, results: Path, data_dir: Optional[str] = None) -> Row:
    """Add the weights of a finished run to the shipped ones.

    They are saved in half precision. Their errors are counted again with the saved weights, and this count is the one
    in the card and in the row of results.

    Args:
        run: Folder of the run.
        weights: Folder of the weights folders and ``SHA256SUMS``; a folder of the same name is replaced.
        results: Folder of the record of runs.
        data_dir: Where the data is now, None if it was not moved.

    Returns:
        The row.

    Raises:
        UserError: If the run did not finish, has no error count, is of another network or of a tag that its network
            does not have, if the record has another run of the same name, or if the weights would exceed 20 MiB in
            total; then nothing is written.
    """
    run = Path(run)
    row = read_run(run)
    if not row['errors']:
        raise UserError(f"The run {run} has no error count to ship ({row['status']}); train it to the end, with a "
                        '--val-split.')
    check_name(row['model'])
    if not is_ours(row['model']) or '.' not in row['model']:
        raise UserError(f"The run {run} is of {row['model']}; only networks of this package can ship, and "
                        'only with a tag; train it with a recipe or --tag.')
    told, args = read_result(run), read_args(run)
    source = run / 'weights'
    verify_folder(source)
    with tempfile.TemporaryDirectory(prefix='timm-lm-ship-') as temporary:
        folder = Path(temporary) / row['model']
        save_folder(load_folder(source), folder, '', saved_model_args(str(source)), dtype=torch.float16)
        _check_size(folder, weights)
        row = with_result(row, told | _count(folder, told, args, data_dir))
        check_rows([row], results)
        _put(folder, weights)
    add_rows([row], results)
    return row


def _put(folder: Path, weights: Path) -> None:
    """Copy a weights folder to the shipped ones, replacing one of the same name, with its digest."""
    try:
        with atomic_folder(weights / folder.name) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
    finally:  # weights without their digest would be refused
        write_digests(weights)


def _count(folder: Path, told: Dict[str, Any], args: Dict[str, Any], data_dir: Optional[str]) -> Dict[str, Any]:
    """Count the errors of a weights folder, and write its card; returns the count and ``k``."""
    model = load_folder(folder)
    counts: Dict[str, Any] = validate(
        str(folder), args['val_split'], program='ship',
        **data_source(args | dict(data_dir=data_dir or args['data_dir'], dataset_download=False)))
    write_text(folder / CARD_NAME, run_card(told | counts, args, model, 'float16'))
    return counts | dict(k=mean_k(model))


def _check_size(folder: Path, weights: Path) -> None:
    """Check the size before counting errors, which takes a while; the card is not written yet, but is small."""
    others = [path for path in whole_entries(weights) if path.name != folder.name]
    size = _size(folder) + sum(map(_size, others))
    if size > TRACKED_LIMIT:
        raise UserError(f'With {folder.name} the weights would take {size / 2**20:.1f} MiB, more than '
                        f'{TRACKED_LIMIT / 2**20:.0f}; remove another folder from {weights} first.')


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob('*') if path.is_dir() else [path]) if file.is_file())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Ship runs, and update the pages that report them.

    Returns:
        0, or 2 after an error, which is reported in one line.
    """
    parser = argparse.ArgumentParser(prog='ship', description='Add weights of runs to the shipped ones.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a finished run')
    parser.add_argument('--data-dir', metavar='DIR', help='where the data is now (default: where it was)')
    args = parser.parse_args(argv)
    project = weights_dir().parent
    results = project / 'results'
    try:
        rows = []
        try:
            for run in args.runs:
                rows.append(row := ship(run, weights_dir(), results, args.data_dir))
                print(f"{row['model']}: {row['errors']} errors of {row['images']} images ({row['top1_err']} %)")
        finally:
            if rows:  # also those before a run that failed
                write_report(results, project / 'docs' / 'results.md')
                write_table(results, project / 'README.md')
    except (OSError, SafetensorError, UserError) as e:
        print(f'ship: error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
