"""Data sets of timm's factory, read by index, and folders of images in timm's layout."""
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, get_img_extensions
from timm.utils import natural_key

from .encoded import EncodedImages
from .errors import UserError, one_line, some
from .files import files_below
from .parquet import split_of_part
from .parser import option_name

# Names of a split that timm treats as the same in a folder of images.
SPLIT_NAMES = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'), ('test',))
# Data sets of torchvision whose test split timm reads for every split name but those of training.
TRAIN_OR_TEST = {f'torch/{name}' for name in ('cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist', 'qmnist')}
TORCH_FOLDERS = ('torch/folder', 'torch/image_folder')
_OWN_LOADER = ('torch/imagenet', 'torch/places365')  # more that torchvision reads from files with a loader
# Of images that timm leaves out by default; Pillow reads all but those of phones.
_IMAGE_ENDINGS = {'.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpe', '.pbm', '.pgm', '.pnm', '.ppm',
                  '.tga', '.tif', '.tiff', '.webp'}


# Folders of images


def check_split_folder(folder: Union[str, Path], split: str, required: bool = False) -> None:
    """Check that a folder of images has a subfolder for a split; without one, timm reads all images.

    Args:
        folder: The folder.
        split: Name of the split.
        required: Refuse a folder of classes without folders of splits, too.

    Raises:
        UserError: If the folder has only other splits, or none although one is required.
    """
    names = next((names for names in SPLIT_NAMES if split in names), ())
    if any((Path(folder) / name).is_dir() for name in (split, *names) if name):
        return
    folders = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    others = [name for name in folders if name.lower() in sum(SPLIT_NAMES, ())]
    if others:
        raise UserError(f"The data folder {folder} has no split '{split}' (it has: {', '.join(others)}); add the "
                        'images, name one of these (--val-split; in training also --train-split), or train without '
                        'validation (--val-split=).')
    if required:
        raise UserError(f"The data folder {folder} has no folder '{split}' (it has: {some(folders)}), so training "
                        'and validation images would be the same; make train/ and validation/, name others with '
                        '--train-split and --val-split, or give --val-split= to skip validation.')


def unread_images(root: str, read: Set[str]) -> str:
    """A remark on the images of a folder that timm reads only if their extensions are named, '' if there are none."""
    kinds = _IMAGE_ENDINGS - get_img_extensions(as_set=True) - read
    left_out = [path for path in files_below(root) if path.suffix.lower() in kinds]
    endings = {path.suffix.lower() for path in left_out}
    return _left_out(left_out, root, f"timm does not read {', '.join(sorted(endings))} by default; convert them, or "
                                    f'name all extensions: --input-key "{";".join(sorted(read | endings))}"')


def unnamed_images(root: str, read: Set[str], numbers: Mapping[str, int]) -> str:
    """A remark on the images of folders that a class map does not name, '' if there are none."""
    left_out = [path for path in files_below(root) if path.suffix.lower() in read and path.parent.name not in numbers]
    names = some(sorted({path.parent.name for path in left_out}))
    return _left_out(left_out, root, f'--class-map does not name {names}')


def _left_out(images: Sequence[Path], root: str, reason: str) -> str:
    count = '1 image' if len(images) == 1 else f'{len(images)} images'
    return f'{count} in {root} left out, as {reason}.' if images else ''


# Data sets


def is_torch_folder(data_dir: Optional[Union[str, Path]], dataset: str) -> bool:
    """Whether the options name a folder of images as timm's ``torch/folder`` or ``torch/image_folder``."""
    return dataset.lower() in TORCH_FOLDERS and data_dir is not None and Path(data_dir).is_dir()


def open_dataset(split: str, data_dir: Any, dataset: str, mode: str, class_map: str, download: bool,
                 input_key: Optional[str], target_key: Optional[str]) -> EncodedImages:
    """Open a data set of timm's factory that can be read by index.

    Raises:
        UserError: If timm cannot open it, or an option does not apply to it.
    """
    root = None if data_dir is None else str(data_dir)
    is_folder = not dataset and data_dir is not None and Path(data_dir).is_dir()  # of images, as it has no Parquet
    is_torch = is_torch_folder(data_dir, dataset)
    if split_of_part(split) != split and not dataset.startswith('hfds/'):  # timm's torch/ would read the test split
        raise UserError(f"'{split}' is a part of a split, which only Parquet has; name a whole split.")
    if is_folder or is_torch:
        check_split_folder(str(data_dir), split)
    if dataset.lower() in TRAIN_OR_TEST and split not in sum(SPLIT_NAMES, ()):
        raise UserError(f"{dataset} has no split '{split}'; there are train and test.")
    if dataset.startswith('torch/') and class_map:
        raise UserError(f'timm takes no --class-map for {dataset}; leave it out.')
    keys: Dict[str, Any] = {name: key for name, key in dict(input_key=input_key, target_key=target_key).items() if key}
    remarks = []
    if not dataset.startswith('hfds/'):
        # names of columns, which a recipe may give; for a folder of images timm takes extensions instead
        columns = [name for name, key in keys.items() if not (is_folder and name == 'input_key' and '.' in key)]
        told = ' and '.join(f'{option_name(name)} {keys.pop(name)}' for name in columns)
        if told:
            remarks.append(f'{told} ignored, as {dataset or root} has no columns.')
    if is_folder and 'input_key' in keys:  # timm compares lower-case extensions
        keys['input_key'] = keys['input_key'].lower()
    if is_torch or dataset.lower() in _OWN_LOADER:  # torchvision's loader converts to RGB, which clips 16 bits
        keys['loader'] = Image.open
    read = set(keys['input_key'].split(';')) if 'input_key' in keys else get_img_extensions(as_set=True)
    try:
        images = _create_dataset(dataset, root, split, class_map, download, keys)
        labels = _dataset_labels(images)
    except Exception as e:
        reason = one_line(e, 1000).replace('download=True', '--dataset-download')
        hint = unread_images(str(root), read) if is_folder else ''
        raise UserError(f"timm could not open the split '{split}' of the data set '{dataset or root}' ({reason}). "
                        f'{hint}'.rstrip()) from e
    reader = getattr(images, 'reader', images)
    numbers = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}  # of a tar file
    if is_folder or is_torch:
        root = str(reader.root)
        odd = sorted(name for name in numbers if not name or name.startswith('.'))
        if odd and not class_map:
            where = f'in {odd[-1]}' if odd[-1] else 'beside its folders of classes'
            raise UserError(f'{root} has images {where}, which would be a class; move them away.')
    if is_folder:
        remarks += [unread_images(str(root), read), unnamed_images(str(root), read, numbers) if class_map else '']
    if not class_map and not dataset.startswith(('hfds/', 'torch/')):
        numbers, labels = _in_one_order(numbers, labels)
    source = _TimmImages(images)
    samples = getattr(source.source, 'samples', None) if is_folder else None
    return EncodedImages(
        source.read, labels, _names_in_order(numbers), mode, source.place,
        ' '.join(filter(None, remarks)), [os.path.abspath(path) for path, _ in samples or ()])


def _create_dataset(dataset: str, root: Optional[str], split: str, class_map: str, download: bool,
                    keys: Dict[str, Any]) -> Any:
    if dataset.startswith('hfds/'):  # older timm's (1.0.26) create_dataset lowercases the whole name
        from timm.data.readers.reader_hfds import ReaderHfds  # isort: skip  # says how to install datasets
        from datasets.exceptions import DatasetGenerationError
        name = dataset.removeprefix('hfds/')
        try:
            return ImageDataset(root, reader=ReaderHfds(name, root=root, split=split, class_map=class_map, **keys))  # type: ignore[arg-type]
        except DatasetGenerationError as e:  # of a damaged file, or a full disk
            raise OSError(str(e.__cause__ or e)) from e
    return create_dataset(
        dataset, root=root, split=split, class_map=class_map, download=download, **keys)  # type: ignore[arg-type]


def _in_one_order(numbers: Mapping[Any, int], labels: torch.Tensor) -> Tuple[Mapping[Any, int], torch.Tensor]:
    """Number classes by name where timm numbers some at random, as it does those that differ only in case."""
    names = sorted(numbers, key=lambda name: (natural_key(name), name))
    if [numbers[name] for name in names] == list(range(len(names))):
        return numbers, labels
    places = torch.empty(len(names), dtype=torch.long)
    for place, name in enumerate(names):
        places[numbers[name]] = place
    return {name: place for place, name in enumerate(names)}, places[labels]


def _names_in_order(numbers: Mapping[Any, int]) -> Optional[Tuple[str, ...]]:
    """The first name of each class in the order of their numbers; None if some have no name."""
    names: Dict[int, str] = {}
    for name, number in numbers.items():
        if str(name):  # an empty one is the end of a class map
            names.setdefault(number, str(name))
    if not names or set(names) != set(range(len(names))):
        return None
    return tuple(names[number] for number in range(len(names)))


class _TimmImages:
    """The images of a data set of timm's factory; timm's own getter replaces a broken one with the next."""

    def __init__(self, images: Any):
        self.images = images
        self.source = getattr(images, 'reader', images)

    def read(self, index: int) -> Image.Image:
        image, _ = self.source[index]
        return image if isinstance(image, Image.Image) else Image.open(image)

    def place(self, index: int) -> str:
        try:
            name = self.images.filename(index, absolute=True)
        except (AttributeError, KeyError, TypeError):
            name = None
        return f'Image {index} of the data' + (f' ({name})' if name else '')


def _dataset_labels(images: Any) -> torch.Tensor:
    """Class numbers, without decoding images if the data set stores them separately."""
    reader = getattr(images, 'reader', images)
    targets = getattr(reader, 'targets', None)
    if targets is not None and len(targets) == len(images):
        numbers = torch.as_tensor(targets).long()
        return numbers[:, 0] if numbers.ndim == 2 else numbers  # the class is the first of the targets
    samples = getattr(reader, 'samples', None)
    if samples is not None and len(samples) == len(images):
        return torch.tensor([int(label) for _, label in samples])
    table: Any = getattr(reader, 'dataset', None)  # of the package datasets
    if hasattr(table, 'column_names'):
        return torch.as_tensor(table[reader.label_key][:]).long()  # at once: newer ones give them one by one
    return torch.tensor([int(label) for _, label in images])
