"""Parquet in the Hub's layout: the files of a split, parts of it, and the images that they hold."""
import io
import json
import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image

from .encoded import EncodedImages
from .errors import UserError, one_line, some
from .files import files_below
from .models._labels import CIFAR100

# train-00000-of-00005, also with the digest that older uploads have, or train
_SHARD = re.compile(r'(?P<split>.+?)(?:-(?P<index>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]{16})?)?$')
_NUMBERED = re.compile(r'\d{4,5}$')  # train/0000, as on the Hub's branch of converted data sets
# train[:90%], train[45000:]: a part of a split, as the package datasets names it
_PART = re.compile(r'(?P<split>[^\[\]]+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]$')
# uoft-cs/cifar100 on the Hub misspells crab; its other names are those of torchvision and of the authors' files.
_MISSPELT_CIFAR100 = tuple('cra' if name == 'crab' else name for name in CIFAR100)


# Files


def _parquet_splits(folder: Path) -> Dict[Tuple[str, str], List[Tuple[Path, int, int]]]:
    return _splits_by_name(folder, [path for path in files_below(folder) if path.suffix == '.parquet'])


def _splits_by_name(folder: Path, paths: Sequence[Path]) -> Dict[Tuple[str, str], List[Tuple[Path, int, int]]]:
    """(subfolder, split) -> (file, shard index, shard count), from file names in the Hub's layout."""
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
                        'as train-00000-of-00001.parquet, or one with a folder of images per class.')
    splits = _parquet_splits(folder)
    if not splits:
        raise UserError(f'The data folder {folder} has no Parquet files; give a folder in the Hub\'s layout, with '
                        'files such as train-00000-of-00001.parquet, or add --dataset= for a folder of images with a '
                        'recipe that names a data set.')
    found = [where for where, name in splits if name == split]
    if not found:
        names = ', '.join(sorted({name for _, name in splits}))
        raise UserError(f"The data folder {folder} has no split '{split}' (it has: {names}); name one of these with "
                        '--val-split (in training also --train-split), or add the files.')
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
    """The split that ``train[:90%]`` is a part of; other names unchanged."""
    match = _PART.match(split)
    return match['split'] if match else split


def rows_of_part(split: str, count: int) -> Tuple[int, int]:
    """First row and end (exclusive) of what a name such as ``train[:90%]`` selects; all rows by default.

    Args:
        split: The name, in the syntax of the package datasets.
        count: Rows of the whole split.

    Raises:
        UserError: If there are no such rows, or one bound is a percentage and the other a number.
    """
    match = _PART.match(split)
    if match is None:
        return 0, count
    bounds = [text for text in (match['start'], match['stop']) if text not in (None, '0')]
    if len({text.endswith('%') for text in bounds}) > 1:  # the package datasets takes both as percentages then
        raise UserError(f"The part '{split}' has one bound in % and one in images; give both in the same unit.")

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
    """Download the Parquet files of a data set repo's split to the Hub's cache, and return their folder."""
    from huggingface_hub import snapshot_download

    from .hub_client import set_up_client
    set_up_client()
    try:
        patterns = [f'*{split}*.parquet', f'*{split}/*.parquet']
        folder = Path(snapshot_download(repo_id, repo_type='dataset', allow_patterns=patterns))
        if any(name == split for _, name in _parquet_splits(folder)):
            return folder
        names = _splits_of_repo(repo_id)
    except Exception as e:
        reason = one_line(e)
        raise UserError(f'The data set {repo_id} could not be downloaded from the Hub ({reason}); give a folder of its '
                        'Parquet files with --data-dir.') from e
    if not names:
        raise UserError(f'The data set {repo_id} of the Hub has no Parquet files; give a folder of such files, or one '
                        'of images, with --data-dir.')
    raise UserError(f"The data set {repo_id} of the Hub has no split '{split}' (it has: {some(names)}); name one of "
                    'these with --val-split (in training also --train-split).')


def _splits_of_repo(repo_id: str) -> List[str]:
    from huggingface_hub import HfApi
    paths = [Path(name) for name in HfApi().list_repo_files(repo_id, repo_type='dataset') if name.endswith('.parquet')]
    return sorted({name for _, name in _splits_by_name(Path(), paths)})


# Images


def stored_class_names(schema: Any, target_key: str) -> Optional[Tuple[str, ...]]:
    """Names of the labels, which the Hub's files have in the metadata of the schema."""
    try:
        info = json.loads((schema.metadata or {})[b'huggingface'])
        names = tuple(info['info']['features'][target_key]['names'])
    except (KeyError, TypeError, ValueError):
        return None
    return CIFAR100 if names == _MISSPELT_CIFAR100 else names


def _find_column(schema: Any, key: Optional[str], wanted: str, guesses: Sequence[str], path: Path) -> str:
    names = schema.names
    candidates = [key] if key else [name for name in guesses if name in names]
    if len(candidates) != 1 or candidates[0] not in names:
        option = f'--{wanted}-key'
        raise UserError(f"{path} has no {wanted} column '{key or ' or '.join(guesses)}' (its columns: "
                        f"{', '.join(names)}); name one with {option}.")
    return candidates[0]


def find_columns(schema: Any, input_key: Optional[str], target_key: Optional[str], path: Path) -> Tuple[str, str]:
    """The columns of images and of class numbers, guessed if they are not named.

    Raises:
        UserError: If there are none, or several, or that of class numbers holds something else.
    """
    import pyarrow as pa
    images = _find_column(schema, input_key, 'input', ('image', 'img'), path)
    labels = _find_column(schema, target_key, 'target', ('label', 'labels', 'fine_label'), path)
    kind = schema.field(labels).type
    if not pa.types.is_integer(kind):
        raise UserError(f"The column '{labels}' of {path} holds {kind}, not class numbers; number the classes, such as "
                        f"with class_encode_column('{labels}') of the package datasets, or name another column with "
                        '--target-key.')
    return images, labels


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Names the Parquet file that cannot be read."""
    import pyarrow as pa
    try:
        yield
    except (pa.ArrowException, OSError) as e:
        raise UserError(f'{path} is not a readable Parquet file ({one_line(e)}); copy it again.') from e


def read_schema(path: Path) -> Any:
    """The schema of a Parquet file.

    Raises:
        UserError: If it is not Parquet.
    """
    import pyarrow.parquet as pq
    with _readable(path):
        return pq.read_schema(path)


def open_parquet(paths: List[Path], mode: str, input_key: Optional[str], target_key: Optional[str]) -> EncodedImages:
    """The images of some Parquet files, held encoded.

    Raises:
        UserError: If one is not Parquet, lacks a column, or has labels that are not integers or paths instead of
            images, or all of them are empty.
    """
    import pyarrow.parquet as pq
    names, columns, class_names = [], [], None
    labels: List[np.ndarray] = []
    for path in paths:
        with _readable(path):
            schema = pq.read_schema(path)
            image_column, label_column = find_columns(schema, input_key, target_key, path)
            table = _read_columns(path, [image_column, label_column])
        class_names = class_names or stored_class_names(schema, label_column)
        names.append(image_column)
        columns.append(table.column(image_column))
        column = table.column(label_column)
        if column.null_count:
            raise UserError(f"The column '{label_column}' of {path} has no class number in {column.null_count} rows; "
                            'remove these, or name another column with --target-key.')
        labels += map(np.from_dlpack, column.chunks)  # to_numpy would import pandas
    images = _ParquetImages(paths, names, columns)
    if not images.starts[-1]:
        raise UserError(f'{paths[0].parent} has no rows in the split; give a folder that has some.')
    if images.holds_paths():
        raise UserError(f"The column '{names[0]}' of {paths[0]} holds paths of images, not the images; give the folder "
                        "of the images itself, or embed them: images.with_format('arrow').map(datasets.table."
                        'embed_table_storage, batched=True).to_parquet(...).')
    return EncodedImages(
        images.read, torch.from_numpy(np.concatenate(labels).astype(np.int64)), class_names, mode, images.place)


def _read_columns(path: Path, columns: List[str]) -> Any:
    """Columns of a file as a table, like ``pq.read_table``, which imports pandas."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with pq.ParquetFile(path) as file:
        # one by one: all at once, a struct of more than 2 GiB is not readable
        groups = [file.read_row_group(i, columns=columns) for i in range(file.num_row_groups)]
        return pa.concat_tables(groups or [file.read(columns=columns)])


class _ParquetImages:
    """The images of some Parquet files, numbered across the files.

    Worker processes that are not forked from this one are sent no images; they read the files themselves.
    """

    def __init__(self, paths: List[Path], names: List[str], columns: List[Any]):
        self.paths = paths
        self.names = names  # of the columns
        self.columns: Optional[List[Any]] = columns
        self.starts = np.cumsum([0, *map(len, columns)])

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, 'columns': None}

    def _locate(self, index: int) -> Tuple[int, int]:
        file = int(np.searchsorted(self.starts, index, side='right')) - 1
        return file, index - int(self.starts[file])

    def _cell(self, index: int) -> Any:
        """What is stored of an image: its bytes, or its path, or a struct with one or both."""
        if self.columns is None:
            self.columns = [_read_columns(path, [name]).column(name) for path, name in zip(self.paths, self.names)]
        file, row = self._locate(index)
        return self.columns[file][row].as_py()

    def holds_paths(self) -> bool:
        """Whether the first row has the path of its image only, as the package datasets writes those of files."""
        cell = self._cell(0)
        return isinstance(cell, str) or isinstance(cell, dict) and cell.get('bytes') is None and bool(cell.get('path'))

    def read(self, index: int) -> Image.Image:
        cell = self._cell(index)
        return Image.open(io.BytesIO((cell.get('bytes') if isinstance(cell, dict) else cell) or b''))

    def place(self, index: int) -> str:
        file, row = self._locate(index)
        return f'Row {row} of {self.paths[file]}'


def count_rows(paths: List[Path]) -> int:
    """Number of rows in some Parquet files, 0 if one is not Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        return sum(pq.read_metadata(path).num_rows for path in paths)
    except (pa.ArrowException, OSError):
        return 0  # the file is named when it is read


def release_arrow_memory() -> None:
    """Release the memory of the encoded images, which pyarrow would otherwise keep for later."""
    import pyarrow as pa
    pa.default_memory_pool().release_unused()
