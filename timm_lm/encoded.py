"""A split as it is stored: images that are opened and converted one by one."""
from dataclasses import dataclass, replace
from tarfile import TarError
from typing import Any, Callable, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch.utils.data import Dataset

from .errors import UserError, one_line

# What opening and decoding a damaged image, or another kind of file, may raise.
UNREADABLE_IMAGE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, TarError, TypeError,
    ValueError)
NOT_READ = ('EPS', 'IPTC')  # Pillow starts Ghostscript for the first, which the second may hold
_TIFF_BITS = 258  # the TIFF tag BitsPerSample


def image_mode(channels: int) -> str:
    """Pillow's mode for images with this many channels.

    Raises:
        UserError: If they are neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise UserError(f'Images are decoded to 1 or 3 channels, not {channels}; change in_chans or input_size.')
    return 'RGB' if channels == 3 else 'L'


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to Pillow's mode 'RGB' or 'L'.

    16-bit values are scaled to 8 bits, as are the 12-bit values of some TIFF files; Pillow itself clips them at 255.
    Negative values become black.

    Raises:
        UnidentifiedImageError: If another program would have to read it.
    """
    if image.format in NOT_READ:
        raise UnidentifiedImageError(f'{image.format} is not read')
    bits = image.tag_v2.get(_TIFF_BITS) if isinstance(image, TiffImageFile) else None
    # 'I' is the mode of PNG in older Pillow, of PGM, and of TIFF with signed values
    if image.mode.startswith('I;16') or image.mode == 'I' and (image.format in ('PNG', 'PPM') or bits == (16,)):
        shift = 4 if bits == (12,) else 7 if bits == (16,) and image.mode in ('I', 'I;16S') else 8
        values = np.asarray(image).astype(np.int32).clip(0) >> shift
        image = Image.fromarray(values.clip(max=255).astype(np.uint8))
    return image.convert(mode)


@dataclass(eq=False, repr=False)
class EncodedImages(Dataset):
    """A split as it is stored, decoded image by image.

    Attributes:
        read: Index to image.
        labels: Class numbers, int64, shape (N,).
        class_names: Names in the order of the labels, if the data set has them.
        mode: Pillow's mode that images are converted to.
        place: Index to the words that identify an image in errors.
        remark: What the user should know about how it was read.
        files: Paths of the images, if each is a separate file.
        transform: Applied to each image; None returns the image itself.
        first: Index of the first image in ``read`` and ``place``.
    """

    read: Callable[[int], Image.Image]
    labels: torch.Tensor
    class_names: Optional[Tuple[str, ...]]
    mode: str
    place: Callable[[int], str]
    remark: str = ''
    files: Sequence[str] = ()
    transform: Optional[Callable[[Image.Image], Any]] = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> 'EncodedImages':
        """The images from ``start`` up to ``stop``, exclusive."""
        return replace(self, labels=self.labels[start:stop], first=self.first + start)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        """Image (after ``transform``) and class number.

        Raises:
            UserError: If the image is not readable, or the transform fails on it.
        """
        row = self.first + index
        try:
            image = convert_image(self.read(row), self.mode)
        except UNREADABLE_IMAGE as e:
            raise UserError(f'{self.place(row)} is not a readable image ({e}); repair or remove it.') from e
        try:
            return self.transform(image) if self.transform else image, int(self.labels[index])
        except (RuntimeError, ValueError) as e:  # such as a blur that is wider than the image
            raise UserError(f'{self.place(row)} cannot be transformed by these options ({one_line(e)}).') from e
