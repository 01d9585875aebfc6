"""The splits of a data set by name: opened image by image, or decoded once into uint8 tensors."""
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from tqdm import tqdm

from .decoded import DecodedImages, cache_path, read_cache, stamp, write_cache
from .encoded import EncodedImages, image_mode
from .errors import UserError, one_line, some
from .files import files_below, sha256
from .parquet import (
    count_rows,
    download_parquet,
    find_columns,
    find_parquet,
    open_parquet,
    read_schema,
    release_arrow_memory,
    rows_of_part,
    split_of_part,
    stored_class_names,
)
from .timm_data import is_torch_folder, open_dataset

MEMORY_LIMIT = 4 << 30  # bytes of a decoded split, less where memory is small
# The memory limit of a container on Linux, in cgroup v2 and v1.
_CONTAINER_LIMITS = (Path('/sys/fs/cgroup/memory.max'), Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'))
# Images in memory, or to be decoded one by one.
Split = Union[DecodedImages, EncodedImages]


class TooLarge(UserError):
    """A split does not fit in memory."""


# Decoding


class _Decoder:
    """Encoded image -> uint8 array (C, H, W) of the wanted size, with timm's evaluation transform if sizes differ."""

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
        array = np.array(image)  # a copy: PyTorch warns about Pillow's read-only memory
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode_all(images: EncodedImages, decode: _Decoder, progress: bool) -> DecodedImages:
    images.transform = decode
    bar = tqdm(range(len(images)), desc='decoding', unit='image', disable=None if progress else True, leave=False)
    decoded = torch.empty(0, dtype=torch.uint8)
    failed: List[int] = []
    error: Optional[UserError] = None
    for i in bar:
        try:
            image, _ = images[i]
        except UserError as e:
            error = error or e
            failed.append(i)
            continue
        if not len(decoded):
            decoded = torch.empty(len(images), *image.shape, dtype=torch.uint8)
        decoded[i] = torch.as_tensor(image)
    if error and len(failed) > 1:  # reported together, as the next attempt decodes all again
        names = some([images.place(i) for i in failed[1:]])
        raise UserError(f'{error} The same applies to {len(failed) - 1} more: {names}.') from error
    if error:
        raise error
    return DecodedImages(decoded, images.labels, images.class_names, images.remark)


def _decode_files(images: EncodedImages, decode: _Decoder, settings: Dict[str, Any], progress: bool) -> DecodedImages:
    """Decode images that are separate files, or read them from the cache if the files have not changed."""
    if len(images.files) != len(images):  # such as those of a tar file
        return _decode_all(images, decode, progress)
    try:
        content = stamp(images.files, images.labels)
    except OSError:  # one is gone, or a broken link; decoding names it
        return _decode_all(images, decode, progress)
    # one cache file for a folder, however often its images change
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
) -> DecodedImages:
    """Decode a split into memory.

    Args:
        split: Name of the split; for Parquet also a part of it, such as ``train[:90%]`` or ``train[45000:]``.
        data_dir: Folder of the data; Parquet files in the Hub's layout are read directly.
        dataset: timm's name of the data set. ``hfds/<folder>`` and ``hfds/<owner>/<name>`` name a Parquet folder and a
            repo on the Hub; anything else is opened by ``timm.data.create_dataset``.
        input_size: Size (C, H, W) of the decoded images, by timm's evaluation transform if theirs differs.
        crop_pct: Share of the resized image that the centre crop keeps.
        interpolation: Interpolation of the resizing, as timm names it.
        input_key: Column of the images, guessed if empty; for a folder of images the extensions that are read, as
            ``.png;.jpg``.
        target_key: Column of the class numbers; guessed if empty.
        class_map: As in ``timm.data.create_dataset``.
        download: As in ``timm.data.create_dataset``.
        progress: Show a progress bar while decoding.
        crop_mode: How images that are not square are made square, as timm names it.
        device: Where the split will be kept, and must fit too; it is decoded into host memory.

    Returns:
        The decoded split; Parquet and folders of images are read from a cache on disk if they were decoded before.

    Raises:
        UserError: If the data is missing, has no such split, or cannot be read.
        TooLarge: If the decoded split takes more than 4 GiB, or more than a quarter of the memory of the device
            or, per process, of the host.
    """
    decode = _Decoder(input_size, crop_pct, interpolation, crop_mode)
    mode = image_mode(input_size[0])
    whole = split_of_part(split)
    settings = dict(input_size=list(input_size), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation,
                    input_key=input_key or None, target_key=target_key or None)
    folder = _parquet_folder(data_dir, dataset, whole)
    if folder is None:
        images = open_dataset(split, data_dir, dataset, mode, class_map, download, input_key, target_key)
        _check_memory(split, len(images), input_size, device)
        return _decode_files(images, decode, settings, progress)
    paths = find_parquet(folder, whole)
    _check_no_class_map(folder, class_map)
    _check_memory(split, count_rows(paths), input_size, device)
    cache = cache_path([sha256(path) for path in paths], settings)
    data = read_cache(cache)
    if data is None:
        data = _decode_all(open_parquet(paths, mode, input_key, target_key), decode, progress)
        release_arrow_memory()
        write_cache(cache, data)
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

    Parquet up to 4 GiB is held encoded; more is read through timm's ``hfds/``, which needs the package datasets.

    Args:
        channels: 3 for RGB images, 1 for grey ones.

    Raises:
        UserError: If the data is missing, has no such split, or cannot be read.
    """
    mode = image_mode(channels)
    whole = split_of_part(split)
    folder = _parquet_folder(data_dir, dataset, whole)
    if folder is None:
        return open_dataset(split, data_dir, dataset, mode, class_map, download, input_key, target_key)
    paths = find_parquet(folder, whole)
    _check_no_class_map(folder, class_map)
    if sum(path.stat().st_size for path in paths) <= MEMORY_LIMIT:
        data = open_parquet(paths, mode, input_key, target_key)
        return data.part(*rows_of_part(split, len(data)))
    schema = read_schema(paths[0])
    columns = find_columns(schema, input_key, target_key, paths[0])
    data = open_dataset(whole, None, f'hfds/{folder}', mode, class_map, download, *columns)
    data.class_names = stored_class_names(schema, columns[1])  # older timm has only those of a column named label
    return data.part(*rows_of_part(split, len(data)))


def _check_no_class_map(folder: Path, class_map: str) -> None:
    if class_map:
        raise UserError(f'--class-map numbers the classes of folders of images; the Parquet files in {folder} already '
                        'have class numbers. Leave it out.')


def _check_memory(split: str, count: int, input_size: Sequence[int], device: Optional[torch.device]) -> None:
    size = count * int(np.prod(input_size))
    limit = min([MEMORY_LIMIT, *(memory // 4 for memory in _memory_sizes(device))])
    if size > limit:
        raise TooLarge(f"The split '{split}' takes {size / 2**30:.1f} GiB decoded, more than the "
                       f'{limit / 2**30:.1f} GiB held in memory; use --loader timm or a smaller --input-size.')


def _memory_sizes(device: Optional[torch.device]) -> List[int]:
    """Bytes of memory of the host, per process, and of the device, as far as they are known."""
    sizes = []
    if 'SC_PHYS_PAGES' in getattr(os, 'sysconf_names', {}):  # not on Windows
        sizes.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
    for limit in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # 'max' means no limit
            sizes.append(int(limit.read_text()))
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # of a launcher, each with its own copy
    sizes = [size // processes for size in sizes]
    if device is not None and device.type in ('cuda', 'xpu'):
        sizes.append(getattr(torch, device.type).get_device_properties(device).total_memory)
    return sizes


def _parquet_folder(data_dir: Optional[Union[str, Path]], dataset: str, split: str) -> Optional[Path]:
    """The folder of Parquet files that the options name, or None if the data is of another kind."""
    is_hub_name = dataset.startswith('hfds/')
    is_read = not dataset or dataset.startswith(('hfds/', 'torch/')) or is_archive(data_dir, dataset)
    if not is_read:  # timm would take an unknown one for a folder of images
        raise UserError(f"The data set '{dataset}' is not read; --dataset begins with hfds/ or torch/ (timm's wds/, "
                        'tfds/ and hfids/ can be read from end to end only). Leave it out for a folder of images.')
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


def is_archive(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    """Whether the options name a tar file of images, which has no splits."""
    return bool(dataset) and '/' not in dataset and data_dir is not None and Path(data_dir).is_file()


def is_image_folder(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    """Whether the options name a folder with images in a folder per class; all of it is searched for Parquet."""
    if data_dir is None or dataset or not Path(data_dir).is_dir():
        return False
    return any(Path(data_dir).iterdir()) and not any(path.suffix == '.parquet' for path in files_below(data_dir))


def looks_for_split_folder(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    """Whether timm looks for a folder of the split in the data folder, and reads all of it if there is none."""
    return is_torch_folder(data_dir, dataset) or is_image_folder(data_dir, dataset)


def check_labels(data: Split, num_classes: int) -> None:
    """Compare the labels of a split with the classes of a network.

    Raises:
        UserError: If a label is not a class of the network.
    """
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0:
        raise UserError(f'The data has labels from {low} on, like a split whose labels are unknown; choose another '
                        'split or another --target-key.')
    if high >= num_classes:
        names = f" (its classes: {one_line(', '.join(data.class_names), 500)})" if data.class_names else ''
        raise UserError(f'The data has labels up to {high}, but the network has {num_classes} classes; train one '
                        f'with --num-classes {high + 1}, or take out what is no class, or (Parquet) choose another '
                        f'label column with --target-key{names}.')


def check_class_names(found: Optional[Sequence[str]], names: Optional[Sequence[str]], of: str,
                      may_be_disjoint: bool = True) -> str:
    """Compare the class names of data with known ones, as a folder of images that lacks a class renumbers others.

    Two sets of names that have nothing in common may be different names for the same classes.

    Args:
        found: Names of the classes of the data in the order of their numbers, unknown if None.
        names: Names in the order of the class numbers, unknown if None.
        of: What the known classes belong to, for the message.
        may_be_disjoint: Accept names that have nothing in common.

    Returns:
        A remark if names that have nothing in common were accepted, otherwise ''.

    Raises:
        UserError: If some names are shared but not all in the same order, or none are and they may not differ.
    """
    found, known = tuple(found or ()), tuple(names or ())
    if not found or not known or found == known:
        return ''
    if may_be_disjoint and not {*found} & {*known}:
        return (f'No class of the data ({some(found)}) is among those of {of} ({some(known)}); classes are compared '
                'by number only.')
    shown = some(sorted({*found} ^ {*known}))
    raise UserError(f'The {len(found)} classes of the data are not the {len(known)} of {of}, or in another order, '
                    f'so class numbers do not agree (only in one of them: {shown or "none"}); make them '
                    'match (folders of images also with --class-map).')
