"""``make ship RUNS=...``: put weights of finished runs among those that ship, with digests and rows of results."""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Union

import torch
import yaml
from safetensors import SafetensorError

from .card import CARD_NAME
from .errors import UserError
from .files import atomic_folder, whole_entries, write_text
from .hub import load_folder, save_folder, verify_folder, write_digests
from .models._weights import weights_dir
from .names import check_name, our_models, saved_model_args
from .networks import write_table
from .results import Row, add_rows, check_rows, read_run, with_result
from .results_page import write_report
from .training.result import count_errors, mean_k, run_card

HALF_FROM = 600_000  # parameters; from lm_resnet44 (0.66 million) on weights ship in half precision
TRACKED_LIMIT = 20 << 20  # bytes of all weights folders together


def ship(run: Union[str, Path], weights: Path, results: Path, data_dir: Optional[str] = None,
         half: bool = False) -> Row:
    """Put the weights of a finished run among those that ship.

    Large networks are saved in half precision. Their errors are then counted again on what was saved, and it is this
    figure that the card and the row of results record.

    Args:
        run: Folder of the run.
        weights: Holds the weights folders and ``SHA256SUMS``; a folder of the same name is replaced.
        results: Folder of the record of runs.
        data_dir: Where the data is now, None for where it was.
        half: Save in half precision whatever the size, as where there is no room otherwise.

    Returns:
        The row.

    Raises:
        UserError: If the run did not end, has no error counted, is of another network or of a tag that its network does
            not have, if the record has another run of its name, or if the weights would be larger than 20 MiB together;
            then nothing is written.
    """
    run = Path(run)
    row = read_run(run)
    if row['status'] != 'done':
        raise UserError(f"The run {run} has no count of errors to ship ({row['status']}); go on with it by --resume "
                        'auto.')
    if not row['errors']:
        raise UserError(f'The run {run} has no count of errors to ship, as it was trained without a --val-split; train '
                        'another with one.')
    check_name(row['model'])
    if row['model'].partition('.')[0] not in our_models() or '.' not in row['model']:
        raise UserError(f"The run {run} is of {row['model']}; what ships is a network of this package with a tag, that "
                        'of the run.')
    told = json.loads((run / 'result.json').read_text(encoding='utf-8'))
    args = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    source = run / 'weights'
    verify_folder(source)
    with tempfile.TemporaryDirectory(prefix='timm-lm-ship-') as temporary:
        folder = Path(temporary) / row['model']
        half = half or told['parameters'] >= HALF_FROM
        if half:
            save_half(source, folder)
        else:
            shutil.copytree(source, folder)
        _check_size(folder, weights, half)
        if half:
            told |= count_half(folder, told, args, data_dir)
        else:
            write_text(folder / CARD_NAME, run_card(told, args, load_folder(folder)))  # by the template of today
        row = with_result(row, told)
        check_rows([row], results)
        put_weights(folder, weights)
    add_rows([row], results)
    return row


def put_weights(folder: Path, weights: Path) -> None:
    """Put a copy of a weights folder among those that ship, in the place of one of its name, with its digest."""
    try:
        with atomic_folder(weights / folder.name) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
    finally:  # weights without their digest would be refused
        write_digests(weights)


def save_half(source: Path, folder: Path) -> None:
    """Save a weights folder in half precision, without a card."""
    save_folder(load_folder(source), folder, '', saved_model_args(str(source)), dtype=torch.float16)


def count_half(folder: Path, told: Dict[str, Any], args: Dict[str, Any], data_dir: Optional[str]) -> Dict[str, Any]:
    """Count the errors of a folder in half precision, and write a card of them; returns the count and ``k``."""
    model = load_folder(folder)
    counts: Dict[str, Any] = count_errors(
        folder, args['val_split'], data_dir=data_dir or args['data_dir'], dataset=args['dataset'],
        input_key=args['input_key'], target_key=args['target_key'], class_map=args['class_map'])
    write_text(folder / CARD_NAME, run_card(told | counts, args, model, 'float16'))
    return counts | dict(k=mean_k(model))


def _check_size(folder: Path, weights: Path, half: bool) -> None:
    """Before errors are counted, which takes its time; the card is yet to come, and is small."""
    others = [path for path in whole_entries(weights) if path.name != folder.name]
    size = _size(folder) + sum(map(_size, others))
    if size > TRACKED_LIMIT:
        cure = '' if half else 'ship it in half precision, or '
        raise UserError(f'With {folder.name} the weights would take {size / 2**20:.1f} MiB, more than '
                        f'{TRACKED_LIMIT / 2**20:.0f}; {cure}take another folder out of {weights} first.')


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob('*') if path.is_dir() else [path]) if file.is_file())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Ship runs, and renew the pages that tell of them.

    Returns:
        0, or 2 after an error, with one line.
    """
    parser = argparse.ArgumentParser(prog='ship', description='Put weights of runs among those that ship.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a finished run')
    parser.add_argument('--data-dir', metavar='DIR', help='where the data is now (default: where it was)')
    parser.add_argument('--half', action='store_true', help='save in half precision, whatever the size')
    parser.add_argument('--project', type=Path, default=Path(), metavar='DIR', help='a checkout (default: this folder)')
    args = parser.parse_args(argv)
    return put_each('ship', args.project, args.runs, lambda run, weights, results: ship(
        run, weights, results, args.data_dir, args.half))


def put_each(prog: str, project: Path, sources: Sequence[str], put: Callable[[str, Path, Path], Row]) -> int:
    """Put weights of each source among those that ship, tell their errors, and renew the pages that tell of them.

    Args:
        prog: Name of the command, for its line of an error.
        project: The checkout.
        sources: What ``put`` is called with, one by one, beside the folders of weights and results; it returns a row.
        put: Raises ``UserError`` if it can not; those before stay.

    Returns:
        0, or 2 after an error, with one line.
    """
    results = project / 'results'
    try:
        if weights_dir().resolve() != (project / 'weights').resolve():
            raise UserError(f'{project.resolve()} is not the checkout that this package runs from; change to it.')
        rows = []
        try:
            for source in sources:
                rows.append(row := put(source, weights_dir(), results))
                print(f"{row['model']}: {row['errors']} errors of {row['images']} images ({row['top1_err']} %)")
        finally:
            if rows:  # if need be only those before one that could not be put there
                write_report(results, project / 'docs' / 'results.md')
                write_table(results, project / 'README.md')
    except (OSError, SafetensorError, UserError) as e:
        print(f'{prog}: error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
