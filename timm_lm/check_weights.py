"""``make check-weights DATA=...``: count the errors of all shipped weights again, on real data."""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from .errors import UserError
from .hub import recorded_error, verify_folder
from .models._weights import weights_dir

# Id of a data set on the Hub, as cards name it, to its folder.
FOLDERS = {'uoft-cs/cifar10': 'cifar10', 'uoft-cs/cifar100': 'cifar100'}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Verify and count each shipped folder.

    Returns:
        0 if every count is the recorded one to within two images, 1 if not, 2 if data is missing.
    """
    parser = argparse.ArgumentParser(prog='check-weights', description='Count the errors of all shipped weights.')
    parser.add_argument('data', type=Path, metavar='DIR', help='holds the folders cifar10 and cifar100')
    args = parser.parse_args(argv)
    wrong = 0
    try:
        for folder in sorted(path for path in weights_dir().iterdir() if (path / 'config.json').is_file()):
            wrong += not _check(folder, args.data)
    except UserError as e:
        print(f'check-weights: error: {e}', file=sys.stderr)
        return 2
    return 1 if wrong else 0


def _check(folder: Path, data: Path) -> bool:
    from huggingface_hub import ModelCard
    from timm.data import resolve_data_config

    from .data import load_images
    from .hub import load_folder
    from .loader import MemoryLoader
    from .training.evaluate import evaluate
    from .training.options import COUNT_BATCH_SIZE

    verify_folder(folder)
    recorded = recorded_error(folder)
    results = ModelCard.load(folder / 'README.md').data.eval_results or []
    if recorded is None or not results:
        raise UserError(f'The card of {folder} records no error; train it again, or take the folder away.')
    dataset = results[0].dataset_type
    if dataset not in FOLDERS:
        raise UserError(f'The card of {folder} names the data set {dataset}, known are: {", ".join(FOLDERS)}.')
    model = load_folder(folder)
    config = resolve_data_config({}, model=model)
    images = load_images(results[0].dataset_split or 'test', data / FOLDERS[dataset], input_size=config['input_size'],
                         crop_pct=config['crop_pct'], interpolation=config['interpolation'])
    loader = MemoryLoader(images, COUNT_BATCH_SIZE, config['mean'], config['std'])
    errors = evaluate(model, loader)['errors']
    expected = round(recorded * len(images) / 100)
    print(f'{folder.name}: {errors} errors of {len(images)} images, recorded {expected}')
    return abs(errors - expected) <= 2


if __name__ == '__main__':
    sys.exit(main())
