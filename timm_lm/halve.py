"""``make halve NAMES=... DATA=...``: save shipped weights in half precision, to make room for others."""
import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

from .card import CARD_NAME
from .errors import UserError
from .hub import TimmModel, load_folder, verify_folder
from .results import Row, add_rows, read_rows, with_result
from .ship import count_half, put_each, put_weights, save_half
from .training.options import parse_options
from .training.result import run_card


def halve(name: str, weights: Path, results: Path, data: Path) -> Row:
    """Save shipped weights again, in half precision, and record the errors that are counted on what was saved.

    Args:
        name: Of the weights folder.
        weights: Holds the weights folders and ``SHA256SUMS``.
        results: Folder of the record of runs. The card is made anew from the row of its run.
        data: Holds the data sets, each in a folder of its name in the record.

    Returns:
        The row.

    Raises:
        UserError: If there are no such weights, they are in half precision already, or the record does not tell all
            that their card does; then nothing is written.
    """
    folder = weights / name
    if not (folder / 'config.json').is_file():
        raise UserError(f'There are no weights {name} in {weights}.')
    verify_folder(folder)
    model = load_folder(folder)
    row, told, args, saved_in = _of_record(folder, model, results)
    if saved_in != 'float32':
        raise UserError(f'The weights {name} are in half precision already.')
    with tempfile.TemporaryDirectory(prefix='timm-lm-halve-') as temporary:
        half = Path(temporary) / name
        save_half(folder, half)
        row = with_result(row, count_half(half, told, args, str(data / row['dataset'])))
        put_weights(half, weights)
    add_rows([row], results)
    return row


def _of_record(folder: Path, model: TimmModel, results: Path) -> Tuple[Row, Dict[str, Any], Dict[str, Any], str]:
    """The run that the card tells of: its row, what ``result.json`` told of it, its options, and the precision."""
    card = (folder / CARD_NAME).read_text(encoding='utf-8')
    needed = 'errors', 'images', 'seen_top1_err', 'epochs', 'seed', 'minutes'
    rows = [row for path in sorted(results.glob('*.csv')) for row in read_rows(path)
            if row.get('model') == folder.name and all(row.get(name) for name in needed)]
    for row in rows:
        told = dict(
            {name: row[name] for name in ('model', 'command', 'hardware', 'versions')},
            parameters=sum(p.numel() for p in model.parameters()),
            input_size=model.pretrained_cfg['input_size'],
            folder=row['dataset'],
            epochs=int(row['epochs']),
            seed=int(row['seed']),
            minutes=float(row['minutes']),
            top1=float(row['top1']),
            errors=int(row['errors']),
            images=int(row['images']),
            seen_in_training=dict(top1=100 - float(row['seen_top1_err'])),
        )
        try:
            args = vars(parse_options(shlex.split(row['command'].removeprefix('timm-lm train'))))
        except UserError:  # of an option that there was then
            continue
        args |= dict(amp=row['precision'] != 'float32', amp_dtype=row['precision'])  # not all devices have bfloat16
        for saved_in in ('float32', 'float16'):
            if run_card(told, args, model, saved_in) == card:
                return row, told, args, saved_in
    raise UserError(f'No run in {results} tells all that the card of {folder.name} does, so that it can not be made '
                    'anew; restore the record or the card, or ship the run itself.')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Halve weights, and renew the pages that tell of them.

    Returns:
        0, or 2 after an error, with one line.
    """
    parser = argparse.ArgumentParser(prog='halve', description='Save shipped weights in half precision.')
    parser.add_argument('names', nargs='+', metavar='NAME', help='weights folder, such as lm_resnet32.best_c10')
    parser.add_argument('--data', type=Path, required=True, metavar='DIR', help='holds cifar10 and cifar100')
    parser.add_argument('--project', type=Path, default=Path(), metavar='DIR', help='a checkout (default: this folder)')
    args = parser.parse_args(argv)
    return put_each('halve', args.project, args.names, lambda name, weights, results: halve(
        name, weights, results, args.data))


if __name__ == '__main__':
    sys.exit(main())
