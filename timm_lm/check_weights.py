"""``make check-weights DATA=...``: count the errors of all shipped weights again, on real data."""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from huggingface_hub import ModelCard

from .card import recorded_error
from .errors import UserError
from .models._weights import read_digests, weights_dir
from .validate import validate
from .weights_folder import CARD_NAME, verify_folder


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Verify each shipped folder and count its errors.

    Returns:
        0 if every count is within two images of the recorded one, 1 if not, 2 if data is missing.
    """
    parser = argparse.ArgumentParser(prog='check-weights', description='Count the errors of all shipped weights.')
    parser.add_argument('data', type=Path, metavar='DIR', help='folder that holds cifar10 and cifar100')
    args = parser.parse_args(argv)
    wrong = 0
    try:
        names = {path.partition('/')[0] for path in read_digests(weights_dir())}
        if not names:
            raise UserError(f'{weights_dir()} has no table of digests; restore it.')
        for name in sorted(names):
            wrong += not _check(weights_dir() / name, args.data)
    except UserError as e:
        print(f'check-weights: error: {e}', file=sys.stderr)
        return 2
    return 1 if wrong else 0


def _check(folder: Path, data: Path) -> bool:
    verify_folder(folder)
    recorded = recorded_error(folder)
    if recorded is None:
        raise UserError(f'The card of {folder} records no error; restore it, or train the network again.')
    results = ModelCard.load(folder / CARD_NAME).data.eval_results
    result = validate(
        str(folder), results[0].dataset_split or 'test', program='check-weights',
        data_dir=data / results[0].dataset_type.rpartition('/')[2])  # of its id on the Hub
    errors, count = int(result['errors']), int(result['images'])
    expected = round(recorded * count / 100)
    print(f'{folder.name}: {errors} errors of {count} images, recorded {expected}')
    return abs(errors - expected) <= 2


if __name__ == '__main__':
    sys.exit(main())
