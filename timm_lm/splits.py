"""Which files a split of a data set is made of, by the layouts that the Hub and timm have, and which are left out."""
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

from PIL import Image
from timm.data import get_img_extensions

from .errors import UserError, one_line, some

# train-00000-of-00005, also with the digest that older uploads have, or train
_SHARD = re.compile(r'(?P<split>.+?)(?:-(?P<index>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]{16})?)?$')
_NUMBERED = re.compile(r'\d{4,5}$')  # train/0000, as on the Hub's branch of converted data sets
# train[:90%], train[45000:]: a part of a split, as the package datasets names it
_PART = re.compile(r'(?P<split>[^\[\]]+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]$')
# Names of a split that timm takes for one another in a folder of images.
SPLIT_NAMES = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'), ('test',))
# Data sets of torchvision for which timm takes every name of a split but those of training for the test split.
TRAIN_OR_TEST = {f'torch/{name}' for name in ('cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist', 'qmnist')}


def files_below(folder: Union[str, Path]) -> Iterator[Path]:
    """All files below a folder, behind links too, as timm reads a folder of images."""
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names)


# Parquet


def _parquet_splits(folder: Path) -> Dict[Tuple[str, str], List[Tuple[Path, int, int]]]:
    return _splits_by_name(folder, [path for path in files_below(folder) if path.suffix == '.parquet'])


def _splits_by_name(folder: Path, paths: Sequence[Path]) -> Dict[Tuple[str, str], List[Tuple[Path, int, int]]]:
    """(subfolder, split) -> (file, shard index, shard count), from the names that the Hub's layout gives files."""
    splits = defaultdict(list)
    numbered = Counter(path.parent for path in paths if _NUMBERED.match(path.stem))
    for path in sorted(paths):
        parent = path.parent.relative_to(folder)
        if _NUMBERED.match(path.stem) and parent.name:
            splits[parent.parent.as_posix(), parent.name].append((path, int(path.stem), numbered[path.parent]))
            continue
        match = _SHARD.match(path.stem)
        assert match is not None
        splits[parent.as_posix(), match['split']].append((path, int(match['index'] or 0), int(match['count'] or 1)))
    return splits


def find_parquet(folder: Union[str, Path], split: str) -> List[Path]:
    """The Parquet files of a split in a folder of the Hub's layout (``[sub/]train-00000-of-00005.parquet``).

    Raises:
        UserError: If the folder is missing, has no Parquet files, no such split, several of them in subfolders, or not
            all shards of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = 'is a file' if folder.exists() else 'does not exist'
        raise UserError(f'The data folder {folder} {what}; give a folder with Parquet files in the Hub\'s layout, such '
                        'as train-00000-of-00001.parquet, or one of images in folders by class.')
    splits = _parquet_splits(folder)
    if not splits:
        raise UserError(f'The data folder {folder} has no Parquet files; give a folder in the Hub\'s layout, with '
                        'files such as train-00000-of-00001.parquet. For a folder of images, where a recipe names a '
                        "data set, add --dataset ''.")
    found = [where for where, name in splits if name == split]
    if not found:
        names = ', '.join(sorted({name for _, name in splits}))
        raise UserError(f"The data folder {folder} has no split '{split}' (it has: {names}); name one of these with "
                        '--train-split or --val-split, or add the files.')
    if len(found) > 1:
        raise UserError(f"The data folder {folder} has the split '{split}' in several subfolders ({', '.join(found)}); "
                        'give one of them as the data folder.')
    shards = splits[found[0], split]
    missing = set(range(shards[0][2])) - {index for _, index, _ in shards}
    if missing or len(shards) != shards[0][2]:
        raise UserError(f"The split '{split}' in {folder} should have {shards[0][2]} shards but has {len(shards)}; "
                        'copy the folder again.')
    return [path for path, _, _ in sorted(shards, key=lambda shard: shard[1])]


def split_of_part(split: str) -> str:
    """The split that ``train[:90%]`` is a part of; other names as they are."""
    match = _PART.match(split)
    return match['split'] if match else split


def rows_of_part(split: str, count: int) -> Tuple[int, int]:
    """From which row to which, without the latter, a name such as ``train[:90%]`` asks for, all rows by default.

    Args:
        split: The name, in the manner of the package datasets.
        count: Rows of the whole split.

    Raises:
        UserError: If there are no such rows, or one bound is a share and the other a number.
    """
    match = _PART.match(split)
    if match is None:
        return 0, count
    bounds = [text for text in (match['start'], match['stop']) if text not in (None, '0')]
    if len({text.endswith('%') for text in bounds}) > 1:  # the package datasets takes both for shares then
        raise UserError(f"The part '{split}' has one bound in % and one in images; give both in the same.")

    def bound(text: Optional[str], default: int) -> int:
        if text is None:
            return default
        value = round(count * int(text[:-1]) / 100) if text.endswith('%') else int(text)
        return value + count if value < 0 else value

    start, stop = bound(match['start'], 0), bound(match['stop'], count)
    if not 0 <= start < stop <= count:
        raise UserError(f"The split '{match['split']}' has {count:,} images and no part '{split}'; give another one.")
    return start, stop


def download_parquet(repo_id: str, split: str) -> Path:
    """The folder of a data set repo of the Hub, its Parquet files downloaded into the Hub's cache."""
    from huggingface_hub import snapshot_download

    from .hub_client import HUB_ERRORS, set_up_client
    set_up_client()
    try:
        patterns = [f'*{split}*.parquet', f'*{split}/*.parquet']
        folder = Path(snapshot_download(repo_id, repo_type='dataset', allow_patterns=patterns))
        if any(name == split for _, name in _parquet_splits(folder)):
            return folder
        names = _splits_of_repo(repo_id)
    except HUB_ERRORS as e:
        reason = one_line(e)
        raise UserError(f'The data set {repo_id} could not be downloaded from the Hub ({reason}); give a folder of its '
                        'Parquet files with --data-dir.') from e
    if not names:
        raise UserError(f'The data set {repo_id} of the Hub has no Parquet files; give a folder of such files, or one '
                        'of images, with --data-dir.')
    raise UserError(f"The data set {repo_id} of the Hub has no split '{split}' (it has: {some(names)}); name one of "
                    'these with --train-split or --val-split.')


def _splits_of_repo(repo_id: str) -> List[str]:
    from huggingface_hub import HfApi
    paths = [Path(name) for name in HfApi().list_repo_files(repo_id, repo_type='dataset') if name.endswith('.parquet')]
    return sorted({name for _, name in _splits_by_name(Path(), paths)})


# Folders of images


def check_split_folder(folder: Union[str, Path], split: str, required: bool = False, is_training: bool = False) -> None:
    """Check that a folder of images has a subfolder for a split; where it has none, timm takes all images.

    Args:
        folder: The folder.
        split: Name of the split.
        required: A folder of classes, without folders of splits, does not do.
        is_training: The split is the one to train on.

    Raises:
        UserError: If the folder has other splits, or none and one is required.
    """
    names = next((names for names in SPLIT_NAMES if split in names), ())
    if any((Path(folder) / name).is_dir() for name in (split, *names)):
        return
    folders = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    others = [name for name in folders if name.lower() in sum(SPLIT_NAMES, ())]
    if others:
        advice = 'name one of these (--val-split, in training --train-split too), or add the images'
        if required and not is_training and [name.lower() in SPLIT_NAMES[0] for name in others] == [True]:
            advice = "add the images, or train without validation by --val-split ''"
        raise UserError(f"The data folder {folder} has no split '{split}' (it has: {', '.join(others)}); {advice}.")
    if required:
        raise UserError(f"The data folder {folder} has no folder '{split}' (it has: {some(folders)}), so that the "
                        'images to train on would be those to validate on; make train/ and validation/, name others by '
                        "--train-split and --val-split, or train without validation by --val-split ''.")


def unread_images(root: str, read: Set[str]) -> str:
    """A remark on the images of a folder that timm reads only if their endings are named, '' if there are none."""
    kinds = {*Image.registered_extensions(), '.heic', '.heif'} - get_img_extensions(as_set=True) - read  # of phones
    left_out = [path for path in files_below(root) if path.suffix.lower() in kinds]
    endings = ', '.join(sorted({path.suffix.lower() for path in left_out}))
    return _left_out(left_out, root, f'timm does not read {endings} by itself; convert them, or name all endings, as '
                                    "by --input-key '.png;.webp'")


def unnamed_images(root: str, read: Set[str], numbers: Mapping[str, int]) -> str:
    """A remark on the images of folders that a class map does not name, '' if there are none."""
    left_out = [path for path in files_below(root) if path.suffix.lower() in read and path.parent.name not in numbers]
    names = some(sorted({path.parent.name for path in left_out}))
    return _left_out(left_out, root, f'--class-map does not name {names}')


def _left_out(images: Sequence[Path], root: str, reason: str) -> str:
    count = '1 image' if len(images) == 1 else f'{len(images)} images'
    return f'{count} in {root} left out, as {reason}.' if images else ''
