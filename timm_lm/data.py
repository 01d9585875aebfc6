"""The splits of a data set: opened image by image, or decoded once into uint8 tensors."""
import copy
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from pickle import PickleError
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset, create_transform, get_img_extensions
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from .errors import UserError, one_line, some
from .files import sha256
from .image_set import ImageSet, cache_path, read_cache, stamp, write_cache
from .splits import (
    SPLIT_NAMES,
    check_split_folder,
    download_parquet,
    files_below,
    find_parquet,
    rows_of_part,
    split_of_part,
    unnamed_images,
    unread_images,
)

LONG_TO_READ = 1 << 30  # bytes of files; whether a split fits is found before they are read
MEMORY_LIMIT = 4 << 30  # bytes of a decoded split, less where memory is small
# What opening and decoding an image that is none, or is damaged, may raise.
UNREADABLE_IMAGE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, TypeError, ValueError)
# What names of timm's data sets begin with.
_KINDS = ('hfds', 'hfids', 'tfds', 'torch', 'wds')
_TORCH_FOLDERS = ('torch/folder', 'torch/image_folder')
# Data sets of torchvision for which timm takes every name of a split but those of training for the test split.
_TRAIN_OR_TEST = {f'torch/{name}' for name in ('cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist', 'qmnist')}


class TooLarge(UserError):
    """A split does not fit in memory."""


# Decoding


def image_mode(channels: int) -> str:
    """Pillow's mode of images of so many channels.

    Raises:
        UserError: If they are neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise UserError(f'Images are decoded to 1 or 3 channels, not {channels}; change in_chans or input_size.')
    return 'RGB' if channels == 3 else 'L'


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """An image in Pillow's mode 'RGB' or 'L'. Values of 16 bits are scaled to 8; Pillow itself cuts them off at 255."""
    # 'I' are PNG in older Pillow, and PGM
    if image.mode.startswith('I;16') or image.mode == 'I' and image.format in ('PNG', 'PPM'):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert(mode)


class _Decoder:
    """Encoded image -> uint8 array (C, H, W) of the wanted size, by timm's evaluation transform where sizes differ."""

    def __init__(self, input_size: Sequence[int], crop_pct: float, interpolation: str, crop_mode: str):
        channels, height, width = input_size
        self.size = (width, height)
        self.as_it_is = crop_pct == 1.0
        try:
            self.transform = create_transform(
                (channels, height, width), is_training=False, use_prefetcher=True, crop_pct=crop_pct,
                crop_mode=crop_mode, interpolation=interpolation)
        except KeyError as e:
            raise UserError(f"There is no interpolation '{interpolation}'; use bilinear or bicubic.") from e

    def __call__(self, image: Image.Image) -> np.ndarray:
        if not (self.as_it_is and image.size == self.size):
            return np.asarray(self.transform(image))
        array = np.array(image)  # a copy: PyTorch warns of Pillow's read-only memory
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _class_names(schema: Any, target_key: str) -> Optional[Tuple[str, ...]]:
    """Names of the labels, which the Hub's files carry in the schema's metadata."""
    try:
        info = json.loads((schema.metadata or {})[b'huggingface'])
        return tuple(info['info']['features'][target_key]['names'])
    except (KeyError, TypeError, ValueError):
        return None


def _find_column(schema: Any, key: Optional[str], wanted: str, guesses: Sequence[str], path: Path) -> str:
    names = schema.names
    candidates = [key] if key else [name for name in guesses if name in names]
    if len(candidates) != 1 or candidates[0] not in names:
        option = f'--{wanted}-key'
        raise UserError(f"{path} has no {wanted} column '{key or ' or '.join(guesses)}' (its columns: "
                        f"{', '.join(names)}); name one with {option}.")
    return candidates[0]


def _find_columns(schema: Any, input_key: Optional[str], target_key: Optional[str], path: Path) -> Tuple[str, str]:
    return (_find_column(schema, input_key, 'input', ('image', 'img'), path),
            _find_column(schema, target_key, 'target', ('label', 'labels', 'fine_label'), path))


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
            UserError: If the image is not readable.
        """
        row = self.first + index
        try:
            image = convert_image(self.read(row), self.mode)
        except UNREADABLE_IMAGE as e:
            raise UserError(f'{self.place(row)} is not a readable image ({e}); repair or remove it.') from e
        return self.transform(image) if self.transform else image, int(self.labels[index])


def _open_parquet(paths: List[Path], mode: str, input_key: Optional[str], target_key: Optional[str]) -> EncodedImages:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, columns, labels, class_names = [], [], [], None
    for path in paths:
        try:
            schema = pq.read_schema(path)
            image_column, label_column = _find_columns(schema, input_key, target_key, path)
            table = pq.read_table(path, columns=[image_column, label_column])
        except (pa.ArrowException, OSError) as e:
            raise UserError(f'{path} is not a readable Parquet file ({one_line(e)}); copy it again.') from e
        class_names = class_names or _class_names(schema, label_column)
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


def _open_dataset(split: str, data_dir: Any, dataset: str, mode: str, class_map: str, download: bool,
                  input_key: Optional[str], target_key: Optional[str]) -> EncodedImages:
    """A data set of timm's factory that can be read by index."""
    root = None if data_dir is None else str(data_dir)
    is_folder = not dataset and data_dir is not None and Path(data_dir).is_dir()  # of images, as it has no Parquet
    if split_of_part(split) != split and not dataset.startswith('hfds/'):  # the test split to timm's torch/
        raise UserError(f"'{split}' is a part of a split, which only Parquet has; name a whole one.")
    if is_folder or _is_torch_folder(data_dir, dataset):
        check_split_folder(str(data_dir), split)
    if dataset.lower() in _TRAIN_OR_TEST and split not in sum(SPLIT_NAMES, ()):
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
        images: Any = create_dataset(
            dataset, root=root, split=split, class_map=class_map, download=download, **keys)  # type: ignore[arg-type]
        if isinstance(images, IterableDataset):
            raise TypeError('it can be read from end to end only; give Parquet, a folder of images, or one of torch/ '
                            'or hfds/')
        len(images)
    except (AssertionError, EOFError, ImportError, KeyError, NotImplementedError, OSError, PickleError, RuntimeError,
            TypeError, ValueError) as e:
        reason = one_line(e, 1000).replace('download=True', '--dataset-download')
        raise UserError(
            f"timm could not open the split '{split}' of the data set '{dataset or root}' ({reason}).") from e
    numbers = getattr(getattr(images, 'reader', images), 'class_to_idx', None) or {}
    if is_folder:
        root = getattr(getattr(images, 'reader', None), 'root', '')
        endings = keys.get('input_key')
        read = set(endings.lower().split(';')) if endings else get_img_extensions(as_set=True)
        odd = sorted(name for name in numbers if not name or name.startswith('.'))
        if odd and not class_map:
            where = f'in {odd[-1]}' if odd[-1] else 'beside its folders of classes'
            raise UserError(f'{root} has images {where}, which would be a class; move them away.')
        remarks += [unread_images(root, read), unnamed_images(root, read, numbers) if class_map else '']
    source = _TimmImages(images)
    samples = getattr(source.source, 'samples', None) if is_folder else None
    return EncodedImages(
        source.read, _dataset_labels(images), _names_in_order(numbers), mode, source.place,
        ' '.join(filter(None, remarks)), [os.path.abspath(path) for path, _ in samples or ()])


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


def _decode_all(images: EncodedImages, decode: _Decoder, progress: bool) -> ImageSet:
    images.transform = decode
    bar = tqdm(range(len(images)), desc='decoding', unit='image', disable=None if progress else True, leave=False)
    decoded = torch.empty(0, dtype=torch.uint8)
    for i in bar:
        image, _ = images[i]
        if i == 0:
            decoded = torch.empty(len(images), *image.shape, dtype=torch.uint8)
        decoded[i] = torch.as_tensor(image)
    return ImageSet(decoded, images.labels, images.class_names, images.remark)


def _decode_files(images: EncodedImages, decode: _Decoder, settings: Dict[str, Any], progress: bool) -> ImageSet:
    """Decode images in files of their own, or take them from the cache if the files are as they were then."""
    if len(images.files) != len(images):  # such as those of a tar file
        return _decode_all(images, decode, progress)
    try:
        content = stamp(images.files, images.labels)
    except OSError:  # one is gone, or a link that leads nowhere; decoding names it
        return _decode_all(images, decode, progress)
    # one place for a folder, however often its images change
    cache = cache_path([os.path.commonpath(images.files)], settings)
    found = read_cache(cache, content)
    if found is not None:
        return replace(found, class_names=images.class_names, remark=images.remark)
    data = _decode_all(images, decode, progress)
    write_cache(cache, data, content)
    return data


def load_images(
        split: str,
        data_dir: Optional[Union[str, Path]] = None,
        dataset: str = '',
        input_size: Sequence[int] = (3, 32, 32),
        crop_pct: float = 1.0,
        interpolation: str = 'bilinear',
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        class_map: str = '',
        download: bool = False,
        progress: bool = False,
        crop_mode: str = 'center',
        device: Optional[torch.device] = None,
) -> ImageSet:
    """Decode a split into memory.

    Args:
        split: Name of the split; of Parquet also a part of it, such as ``train[:90%]`` or ``train[45000:]``.
        data_dir: Folder of the data. With Parquet files in the Hub's layout it is read directly.
        dataset: timm's name of the data set. ``hfds/<folder>`` and ``hfds/<owner>/<name>`` name a Parquet folder and a
            repo of the Hub; anything else is opened by ``timm.data.create_dataset``.
        input_size: Size (C, H, W) that images get, by timm's evaluation transform where theirs is another.
        crop_pct: Share of the resized image that the centre crop keeps.
        interpolation: Of the resizing, in timm's names.
        input_key: Column of the images, guessed if empty; for a folder of images the endings that are read, as
            ``.png;.jpg``.
        target_key: Column of the class numbers; guessed if empty.
        class_map: As in ``timm.data.create_dataset``.
        download: As in ``timm.data.create_dataset``.
        progress: Show a progress bar while decoding.
        crop_mode: How images that are not square become so, in timm's names.
        device: Where the split is to be kept and must fit too; it is decoded into the memory of the host.

    Returns:
        The decoded split; Parquet and folders of images come from a cache on disk when they were decoded before.

    Raises:
        UserError: If the data is missing, has no such split, or can not be read.
        TooLarge: If the split takes more than 4 GiB decoded, or than a quarter of the memory of host or device.
    """
    decode = _Decoder(input_size, crop_pct, interpolation, crop_mode)
    mode = image_mode(input_size[0])
    whole = split_of_part(split)
    settings = dict(input_size=list(input_size), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation,
                    input_key=input_key or None, target_key=target_key or None)
    folder = _parquet_folder(data_dir, dataset, whole)
    if folder is None:
        images = _open_dataset(split, data_dir, dataset, mode, class_map, download, input_key, target_key)
        _check_memory(split, len(images), input_size, device)
        return _decode_files(images, decode, settings, progress)
    paths = find_parquet(folder, whole)
    _check_no_class_map(folder, class_map)
    if sum(path.stat().st_size for path in paths) > LONG_TO_READ:
        _check_memory(split, _count_rows(paths), input_size, device)
    cache = cache_path([sha256(path) for path in paths], settings)
    data = read_cache(cache)
    if data is None:
        _check_memory(split, _count_rows(paths), input_size, device)
        data = _decode_all(_open_parquet(paths, mode, input_key, target_key), decode, progress)
        _release_arrow_memory()
        write_cache(cache, data)
    else:
        _check_memory(split, len(data), input_size, device)
    return data.part(*rows_of_part(split, len(data)))


def open_images(
        split: str,
        data_dir: Optional[Union[str, Path]] = None,
        dataset: str = '',
        channels: int = 3,
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        class_map: str = '',
        download: bool = False,
) -> EncodedImages:
    """Open a split to be decoded image by image; arguments as in ``load_images``.

    Parquet up to 4 GiB is held encoded; more goes through timm's ``hfds/``, which needs the package datasets.

    Args:
        channels: 3 for RGB images, 1 for grey ones.

    Raises:
        UserError: If the data is missing, has no such split, or can not be read.
    """
    mode = image_mode(channels)
    whole = split_of_part(split)
    folder = _parquet_folder(data_dir, dataset, whole)
    if folder is None:
        return _open_dataset(split, data_dir, dataset, mode, class_map, download, input_key, target_key)
    paths = find_parquet(folder, whole)
    _check_no_class_map(folder, class_map)
    if sum(path.stat().st_size for path in paths) <= MEMORY_LIMIT:
        data = _open_parquet(paths, mode, input_key, target_key)
        return data.part(*rows_of_part(split, len(data)))
    import pyarrow.parquet as pq
    columns = _find_columns(pq.read_schema(paths[0]), input_key, target_key, paths[0])
    return _open_dataset(split, None, f'hfds/{folder}', mode, class_map, download, *columns)


def _check_no_class_map(folder: Path, class_map: str) -> None:
    if class_map:
        raise UserError(f'--class-map numbers the classes of folders of images; the Parquet files in {folder} have '
                        'class numbers of their own. Leave it out.')


def _release_arrow_memory() -> None:
    """Give back what the encoded images took; pyarrow keeps it for later otherwise."""
    import pyarrow as pa
    pa.default_memory_pool().release_unused()


def _count_rows(paths: List[Path]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        return sum(pq.read_metadata(path).num_rows for path in paths)
    except (pa.ArrowException, OSError):
        return 0  # named when it is read


def _check_memory(split: str, count: int, input_size: Sequence[int], device: Optional[torch.device]) -> None:
    size = count * int(np.prod(input_size))
    limit = min([MEMORY_LIMIT, *(memory // 4 for memory in _memory_sizes(device))])
    if size > limit:
        raise TooLarge(f"The split '{split}' takes {size / 2**30:.1f} GiB decoded, more than the "
                       f'{limit / 2**30:.1f} GiB held in memory; use --loader timm or a smaller --input-size.')


def _memory_sizes(device: Optional[torch.device]) -> List[int]:
    """Bytes of memory of the host and the device, as far as they are told."""
    sizes = []
    if 'SC_PHYS_PAGES' in getattr(os, 'sysconf_names', {}):  # not on Windows
        sizes.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
    if device is not None and device.type == 'cuda':
        sizes.append(torch.cuda.get_device_properties(device).total_memory)
    return sizes


def _parquet_folder(data_dir: Optional[Union[str, Path]], dataset: str, split: str) -> Optional[Path]:
    """The folder of Parquet files that the options name, or None if the data is of another kind."""
    is_hub_name = dataset.startswith('hfds/')
    kind = dataset.partition('/')[0]
    is_bare = '/' not in dataset
    is_archive = is_bare and data_dir is not None and Path(data_dir).is_file()
    if dataset and (is_bare or kind not in _KINDS) and not is_archive:  # timm would read the folder, whatever it is
        raise UserError(f"There is no kind '{kind}' of data sets; --dataset begins with {'/, '.join(_KINDS)}/. Leave "
                        'it out for a folder of images.')
    if data_dir is None:
        if is_hub_name:
            name = dataset.removeprefix('hfds/')
            return Path(name) if Path(name).is_dir() else download_parquet(name, split)
        if not dataset:
            raise UserError('No data was named; give a folder with --data-dir or a data set with --dataset.')
        return None
    folder = Path(data_dir)
    if is_hub_name:
        return folder
    return None if dataset or is_image_folder(folder, dataset) else folder


def is_image_folder(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    """Whether the options name a folder of images in folders by class; all of it is searched for Parquet."""
    if data_dir is None or dataset or not Path(data_dir).is_dir():
        return False
    return any(Path(data_dir).iterdir()) and not any(path.suffix == '.parquet' for path in files_below(data_dir))


def is_class_folder(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    """Whether timm looks for a folder of the split in the data folder, and takes all of it where there is none."""
    return _is_torch_folder(data_dir, dataset) or is_image_folder(data_dir, dataset)


def _is_torch_folder(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    return dataset.lower() in _TORCH_FOLDERS and data_dir is not None and Path(data_dir).is_dir()


def check_labels(data: Union[ImageSet, EncodedImages], num_classes: int) -> None:
    """Compare the labels of a split with the classes of a network.

    Raises:
        UserError: If there are others.
    """
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0:
        raise UserError(f'The data has labels from {low} on, as a split without known labels has; choose another split '
                        'or another --target-key.')
    if high >= num_classes:
        raise UserError(f'The data has labels up to {high}, the network has {num_classes} classes; train one of '
                        f'--num-classes {high + 1}, or choose another label column with --target-key.')


def check_class_names(data: Union[ImageSet, EncodedImages], names: Optional[Sequence[str]], of: str,
                      may_differ: bool = True) -> str:
    """Compare the class names of a split with known ones, as a folder of images that lacks a class numbers others.

    Names that have nothing in common may be two ways to name the same classes.

    Args:
        data: The split.
        names: Names in the order of the class numbers, unknown if None.
        of: What these are the classes of, for the message.
        may_differ: Names that have nothing in common pass.

    Returns:
        A remark if names passed that have nothing in common, else ''.

    Raises:
        UserError: If names are shared, but not all of them in the same order, or none are and they may not differ.
    """
    found, known = data.class_names or (), tuple(names or ())
    if not found or not known or found == known:
        return ''
    if may_differ and not {*found} & {*known}:
        return (f'No class of the data ({some(found)}) has a name of {of} ({some(known)}); classes are told by their '
                'numbers alone.')
    shown = some(sorted({*found} ^ {*known}))
    raise UserError(f'The {len(found)} classes of the data are not the {len(known)} of {of}, or in another order, '
                    f'so that class numbers do not agree (in one of them only: {shown or "none"}); bring the '
                    'folders into line, or number the classes with --class-map.')
