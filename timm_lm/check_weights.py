"""``make check-weights DATA=...``: count the errors of all shipped weights again, on real data."""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from huggingface_hub import ModelCard

from .card import recorded_error
from .errors import UserError
from .files import whole_entries
from .models._weights import read_digests, weights_dir
from .validate import validate
from .weights_folder import CARD_NAME, CONFIG_NAME, verify_folder

# Id of a data set on the Hub, as in cards -> its folder.
FOLDERS = {'uoft-cs/cifar10': 'cifar10', 'uoft-cs/cifar100': 'cifar100'}


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
        found = {path.name for path in whole_entries(weights_dir()) if (path / CONFIG_NAME).is_file()}
        for name in sorted(names | found):
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
    dataset = results[0].dataset_type
    if dataset not in FOLDERS:
        raise UserError(f'The card of {folder} names the data set {dataset}; known ones are: {", ".join(FOLDERS)}.')
    result = validate(
        str(folder), results[0].dataset_split or 'test', program='check-weights', data_dir=data / FOLDERS[dataset])
    errors, count = int(result['errors']), int(result['images'])
    expected = round(recorded * count / 100)
    print(f'{folder.name}: {errors} errors of {count} images, recorded {expected}')
    return abs(errors - expected) <= 2


if __name__ == '__main__':
    sys.exit(main())
