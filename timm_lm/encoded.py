"""A split as it is stored: images that are opened one by one, from Parquet or from a data set of timm's factory."""
import copy
import io
import json
import os
from pathlib import Path
from pickle import PickleError
from tarfile import TarError
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from timm.data import ImageDataset, create_dataset, get_img_extensions
from timm.utils import natural_key
from torch.utils.data import Dataset, IterableDataset

from .errors import UserError, one_line
from .models._labels import CIFAR100
from .splits import SPLIT_NAMES, TRAIN_OR_TEST, check_split_folder, split_of_part, unnamed_images, unread_images

# What opening and decoding an image that is none, or is damaged, may raise.
UNREADABLE_IMAGE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, TarError, TypeError,
    ValueError)
_TIFF_BITS = 258  # the tag of TIFF that tells the bits of each value
_TORCH_FOLDERS = ('torch/folder', 'torch/image_folder')


def image_mode(channels: int) -> str:
    """Pillow's mode of images of so many channels.

    Raises:
        UserError: If they are neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise UserError(f'Images are decoded to 1 or 3 channels, not {channels}; change in_chans or input_size.')
    return 'RGB' if channels == 3 else 'L'


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """An image in Pillow's mode 'RGB' or 'L'.

    Values of 16 bits are scaled to 8, as are the 12 bits of some TIFF; Pillow itself cuts them off at 255. Negative
    values are black.
    """
    bits = image.tag_v2.get(_TIFF_BITS) if isinstance(image, TiffImageFile) else None
    # 'I' are PNG in older Pillow, PGM, and TIFF of signed values
    if image.mode.startswith('I;16') or image.mode == 'I' and (image.format in ('PNG', 'PPM') or bits == (16,)):
        shift = 4 if bits == (12,) else 7 if bits == (16,) and image.mode in ('I', 'I;16S') else 8
        values = np.asarray(image).astype(np.int32).clip(0) >> shift
        image = Image.fromarray(values.clip(max=255).astype(np.uint8))
    return image.convert(mode)


class EncodedImages(Dataset):
    """A split as it is stored, decoded image by image.

    Attributes:
        labels: Class numbers, int64, shape (N,).
        class_names: Names in the order of the labels, if the data set tells them.
        transform: What each image goes through, None for the image itself.
        remark: What a person should know of how it was read.
        files: Paths of the images, if each lies in a file of its own.
    """

    def __init__(
            self,
            read: Callable[[int], Image.Image],
            labels: torch.Tensor,
            class_names: Optional[Tuple[str, ...]],
            mode: str,
            place: Callable[[int], str],
            remark: str = '',
            files: Sequence[str] = (),
    ):
        """
        Args:
            read: Index to image.
            labels: Class numbers, shape (N,).
            class_names: Their names.
            mode: Pillow's mode that images are converted to.
            place: Index to the words that name an image in errors.
            remark: What a person should know of how it was read.
            files: Paths of the images, if each lies in a file of its own.
        """
        self.read = read
        self.labels = labels
        self.class_names = class_names
        self.mode = mode
        self.place = place
        self.remark = remark
        self.files = files
        self.transform: Optional[Callable[[Image.Image], Any]] = None
        self.first = 0

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> 'EncodedImages':
        """The images from one index to another, without the latter."""
        part = copy.copy(self)
        part.labels, part.first = self.labels[start:stop], self.first + start
        return part

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        """Image (what ``transform`` makes of it) and class number.

        Raises:
            UserError: If the image is not readable, or the transform does not take it.
        """
        row = self.first + index
        try:
            image = convert_image(self.read(row), self.mode)
        except UNREADABLE_IMAGE as e:
            raise UserError(f'{self.place(row)} is not a readable image ({e}); repair or remove it.') from e
        try:
            return self.transform(image) if self.transform else image, int(self.labels[index])
        except (RuntimeError, ValueError) as e:  # such as a blur that is wider than the image
            raise UserError(f'{self.place(row)} can not be transformed by these options ({one_line(e)}).') from e


# Parquet


# uoft-cs/cifar100 on the Hub calls its crabs so, and all else as torchvision and the authors' own files do.
_MISSPELT_CIFAR100 = tuple('cra' if name == 'crab' else name for name in CIFAR100)


def stored_class_names(schema: Any, target_key: str) -> Optional[Tuple[str, ...]]:
    """Names of the labels, which the Hub's files carry in the schema's metadata."""
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
    """The columns of images and of class numbers, guessed where they are not named.

    Raises:
        UserError: If there are none, or several.
    """
    return (_find_column(schema, input_key, 'input', ('image', 'img'), path),
            _find_column(schema, target_key, 'target', ('label', 'labels', 'fine_label'), path))


def open_parquet(paths: List[Path], mode: str, input_key: Optional[str], target_key: Optional[str]) -> EncodedImages:
    """The images of some Parquet files, held encoded.

    Raises:
        UserError: If one is no Parquet, lacks a column, or has labels that are no numbers, or all of them are empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, columns, labels, class_names = [], [], [], None
    for path in paths:
        try:
            schema = pq.read_schema(path)
            image_column, label_column = find_columns(schema, input_key, target_key, path)
            table = pq.read_table(path, columns=[image_column, label_column])
        except (pa.ArrowException, OSError) as e:
            raise UserError(f'{path} is not a readable Parquet file ({one_line(e)}); copy it again.') from e
        class_names = class_names or stored_class_names(schema, label_column)
        names.append(image_column)
        columns.append(table.column(image_column))
        column = table.column(label_column)
        if not pa.types.is_integer(column.type) or column.null_count:
            raise UserError(f"The column '{label_column}' of {path} is not one of class numbers; name another with "
                            '--target-key.')
        labels.append(column.to_numpy())
    images = _ParquetImages(paths, names, columns)
    if not images.starts[-1]:
        raise UserError(f'{paths[0].parent} has no rows in the split; give a folder that has.')
    return EncodedImages(
        images.read, torch.from_numpy(np.concatenate(labels).astype(np.int64)), class_names, mode, images.place)


class _ParquetImages:
    """The images of some Parquet files, counted through.

    Worker processes that do not begin as a copy of this one are sent no images; they read the files themselves.
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

    def read(self, index: int) -> Image.Image:
        if self.columns is None:
            import pyarrow.parquet as pq
            self.columns = [
                pq.read_table(path, columns=[name]).column(name) for path, name in zip(self.paths, self.names)]
        file, row = self._locate(index)
        cell = self.columns[file][row].as_py()
        return Image.open(io.BytesIO((cell.get('bytes') if isinstance(cell, dict) else cell) or b''))

    def place(self, index: int) -> str:
        file, row = self._locate(index)
        return f'Row {row} of {self.paths[file]}'


# Data sets of timm's factory


def is_torch_folder(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    """Whether the options name a folder of images by one of timm's names for such."""
    return dataset.lower() in _TORCH_FOLDERS and data_dir is not None and Path(data_dir).is_dir()


def open_dataset(split: str, data_dir: Any, dataset: str, mode: str, class_map: str, download: bool,
                 input_key: Optional[str], target_key: Optional[str]) -> EncodedImages:
    """A data set of timm's factory that can be read by index.

    Raises:
        UserError: If timm can not open it, it can be read from end to end only, or an option does not go with it.
    """
    root = None if data_dir is None else str(data_dir)
    is_folder = not dataset and data_dir is not None and Path(data_dir).is_dir()  # of images, as it has no Parquet
    if split_of_part(split) != split and not dataset.startswith('hfds/'):  # the test split to timm's torch/
        raise UserError(f"'{split}' is a part of a split, which only Parquet has; name a whole one.")
    if is_folder or is_torch_folder(data_dir, dataset):
        check_split_folder(str(data_dir), split)
    if dataset.lower() in TRAIN_OR_TEST and split not in sum(SPLIT_NAMES, ()):
        raise UserError(f"{dataset} has no split '{split}'; there are train and test.")
    if dataset.startswith('torch/') and class_map:
        raise UserError(f'timm takes no --class-map for {dataset}; leave it out.')
    keys = {name: key for name, key in dict(input_key=input_key, target_key=target_key).items() if key}
    remarks = []
    if not dataset.startswith('hfds/'):
        # names of columns, which a recipe may give; for a folder of images timm takes endings instead
        columns = [name for name, key in keys.items() if not (is_folder and name == 'input_key' and '.' in key)]
        told = ' and '.join(f"--{name.replace('_', '-')} {keys.pop(name)}" for name in columns)
        if told:
            remarks.append(f'{told} say nothing of {dataset or root}, which has no columns.')
    try:
        images = _create_dataset(dataset, root, split, class_map, download, keys)
        if isinstance(images, IterableDataset):
            raise TypeError('it can be read from end to end only; give Parquet, a folder of images, or one of torch/ '
                            'or hfds/')
        len(images)
    except (AssertionError, EOFError, ImportError, KeyError, NotImplementedError, OSError, PickleError, RuntimeError,
            TarError, TypeError, ValueError) as e:
        reason = one_line(e, 1000).replace('download=True', '--dataset-download')
        raise UserError(
            f"timm could not open the split '{split}' of the data set '{dataset or root}' ({reason}).") from e
    reader = getattr(images, 'reader', images)
    numbers = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}  # of a tar file
    if is_folder:
        root = getattr(getattr(images, 'reader', None), 'root', '')
        endings = keys.get('input_key')
        read = set(endings.lower().split(';')) if endings else get_img_extensions(as_set=True)
        odd = sorted(name for name in numbers if not name or name.startswith('.'))
        if odd and not class_map:
            where = f'in {odd[-1]}' if odd[-1] else 'beside its folders of classes'
            raise UserError(f'{root} has images {where}, which would be a class; move them away.')
        remarks += [unread_images(root, read), unnamed_images(root, read, numbers) if class_map else '']
    labels = _dataset_labels(images)
    if not class_map and not dataset.startswith(('hfds/', 'torch/')):
        numbers, labels = _in_one_order(numbers, labels)
    source = _TimmImages(images)
    samples = getattr(source.source, 'samples', None) if is_folder else None
    return EncodedImages(
        source.read, labels, _names_in_order(numbers), mode, source.place,
        ' '.join(filter(None, remarks)), [os.path.abspath(path) for path, _ in samples or ()])


def _create_dataset(dataset: str, root: Optional[str], split: str, class_map: str, download: bool,
                    keys: Dict[str, str]) -> Any:
    if dataset.startswith('hfds/'):  # as create_dataset of older timm (1.0.26) has all of the name in lower case
        from timm.data.readers.reader_hfds import ReaderHfds
        name = dataset.removeprefix('hfds/')
        return ImageDataset(root, reader=ReaderHfds(name, root=root, split=split, class_map=class_map, **keys))  # type: ignore[arg-type]
    return create_dataset(
        dataset, root=root, split=split, class_map=class_map, download=download, **keys)  # type: ignore[arg-type]


def _in_one_order(numbers: Mapping[Any, int], labels: torch.Tensor) -> Tuple[Mapping[Any, int], torch.Tensor]:
    """Classes numbered by their names where timm numbers some at random, as it does those that differ in case alone."""
    names = sorted(numbers, key=lambda name: (natural_key(name), name))
    if [numbers[name] for name in names] == list(range(len(names))):
        return numbers, labels
    places = torch.empty(len(names), dtype=torch.long)
    for place, name in enumerate(names):
        places[numbers[name]] = place
    return {name: place for place, name in enumerate(names)}, places[labels]


def _names_in_order(numbers: Mapping[Any, int]) -> Optional[Tuple[str, ...]]:
    """The names of classes in the order of their numbers, of each the first one; None if some have no name."""
    names: Dict[int, str] = {}
    for name, number in numbers.items():
        if str(name):  # none is the end of a class map
            names.setdefault(number, str(name))
    if not names or set(names) != set(range(len(names))):
        return None
    return tuple(names[number] for number in range(len(names)))


class _TimmImages:
    """The images of a data set of timm's factory; timm's own getter replaces one that is broken by the next."""

    def __init__(self, images: Any):
        self.images = images
        self.source = getattr(images, 'reader', images)

    def read(self, index: int) -> Image.Image:
        image, _ = self.source[index]
        return image if isinstance(image, Image.Image) else Image.open(image)

    def place(self, index: int) -> str:
        try:
            name = self.images.filename(index, absolute=True)
        except (AttributeError, KeyError, NotImplementedError, TypeError):
            name = None
        return f'Image {index} of the data' + (f' ({name})' if name else '')


def _dataset_labels(images: Any) -> torch.Tensor:
    """Class numbers without decoding images, where the data set has them apart."""
    reader = getattr(images, 'reader', images)
    targets = getattr(reader, 'targets', None)
    if targets is not None and len(targets) == len(images):
        numbers = torch.as_tensor(targets).long()
        return numbers[:, 0] if numbers.ndim == 2 else numbers  # the class goes before what else is known
    samples = getattr(reader, 'samples', None)
    if samples is not None and len(samples) == len(images):
        return torch.tensor([int(label) for _, label in samples])
    table: Any = getattr(reader, 'dataset', None)  # of the package datasets
    if hasattr(table, 'column_names'):
        return torch.as_tensor(table[reader.label_key]).long()
    return torch.tensor([int(label) for _, label in images])
