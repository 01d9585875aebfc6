"""Augmentation of whole batches of images on their device.

All functions take images of shape (N, C, H, W) and return new ones of that shape. They draw from the generators or the
seed that they are given; the global random streams have no influence and are left unchanged.
"""
import math
from typing import Sequence, Tuple, Union

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam

from .errors import UserError

Values = Union[Sequence[float], torch.Tensor]  # one for each channel

ERASE_AREA = (0.02, 1 / 3)  # of a box, as a share of the image
ERASE_ASPECT = 0.3  # height over width of a box is between this and its inverse
ERASE_ATTEMPTS = 10  # to draw a box that is smaller than the image


def pad_crop(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Pad with zeros and crop each image at a random position to its original size.

    Args:
        images: Shape (N, C, H, W).
        padding: Pixels on each side.
        generator: Source of the positions, on the device of the images.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, (N, C, places, places, H, W)
    dy, dx = torch.randint(2 * padding + 1, (2, n), generator=generator, device=images.device)
    return windows[torch.arange(n, device=images.device), :, dy, dx]


def random_flip(images: torch.Tensor, dim: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image (N, C, H, W) along a dimension with the given probability."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < probability
    return torch.where(flip, images.flip(dim), images)


def normalize(images: torch.Tensor, mean: Values, std: Values,
              memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    """Convert uint8 images (N, C, H, W) to float32 and normalise by ``mean`` and ``std`` of pixels in [0, 255]."""
    mean, std = (
        torch.as_tensor(value, dtype=torch.float32, device=images.device).view(-1, 1, 1) for value in (mean, std))
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device, memory_format=memory_format)
    return torch.sub(images, mean, out=out).div_(std)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to a device, asynchronously only for CUDA: others may read memory that is freed by then."""
    return tensor.to(device, non_blocking=device.type == 'cuda')


def _on_device_of(array: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    return to_device(torch.from_numpy(array), images.device)


def _inside(boxes: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Which pixels (N, 1, H, W) lie in the boxes (N, 4) of (top, bottom, left, right), bottom and right excluded."""
    height, width = images.shape[-2:]
    y, x = torch.arange(height, device=images.device).view(-1, 1), torch.arange(width, device=images.device)
    top, bottom, left, right = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def _draw_erase_boxes(n: int, height: int, width: int, probability: float, count: int,
                      rng: np.random.Generator) -> np.ndarray:
    """Boxes (N, count, 4) of top, bottom, left and right; those that erase nothing are empty."""
    boxes_of_image = rng.integers(1, count, (n, 1), endpoint=True)
    wanted = (rng.random((n, 1)) < probability) & (np.arange(count) < boxes_of_image)
    attempts = (ERASE_ATTEMPTS, n, count)
    area = rng.uniform(*ERASE_AREA, attempts) * height * width / boxes_of_image
    aspect = np.exp(rng.uniform(math.log(ERASE_ASPECT), -math.log(ERASE_ASPECT), attempts))
    h, w = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    fits = (h < height) & (w < width)
    first = fits.argmax(0)[None]  # of the attempts; any where none fits, as the box is emptied then
    h, w = (np.take_along_axis(size, first, 0)[0] * (wanted & fits.any(0)) for size in (h, w))
    top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
    return np.stack((top, top + h, left, left + w), -1)


def random_erase(images: torch.Tensor, probability: float, mode: str, count: int, rng: np.random.Generator,
                 generator: torch.Generator) -> torch.Tensor:
    """Overwrite boxes at random places of normalised images, with the distributions of timm's ``RandomErasing``.

    A box covers between 0.02 and 1/3 of the image, divided by its number of boxes, at an aspect ratio (height to width)
    between 0.3 and 1 / 0.3. Boxes may overlap; a box larger than the image in all of ten attempts is skipped.
    Source: Zhong et al. 2017, Random Erasing Data Augmentation, algorithm 1.

    Args:
        images: Normalised, shape (N, C, H, W); their memory format is kept.
        probability: Probability of erasing in an image.
        mode: What a box is filled with: ``pixel`` for normal noise, ``rand`` for one normal value per channel,
            ``const`` for zeros, the mean.
        count: Maximum number of boxes per image.
        rng: Source of the boxes.
        generator: Source of the noise, on the device of the images.

    Raises:
        UserError: If the mode does not exist.
    """
    n, channels, height, width = images.shape
    shapes = dict(pixel=(n, channels, height, width), rand=(n, channels, 1, 1), const=(1, 1, 1, 1))
    if mode not in shapes:
        raise UserError(f"There is no erasing mode '{mode}'; use --remode pixel, rand or const.")
    boxes = _on_device_of(_draw_erase_boxes(n, height, width, probability, count, rng), images)
    for box in boxes.unbind(1):
        fill = torch.zeros(shapes[mode], dtype=images.dtype, device=images.device)
        if mode != 'const':
            fill.normal_(generator=generator)
        images = torch.where(_inside(box, images), fill, images, out=torch.empty_like(images))
    return images


class BatchMixup(Mixup):
    """timm's ``Mixup`` with the same arguments and draws, but a seed for each batch, which is mixed as a whole.

    Image i is mixed with image N - 1 - i. Sources: Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, and
    Yun et al. 2019, CutMix.
    """

    def __call__(  # type: ignore[override]
            self,
            images: torch.Tensor,
            labels: torch.Tensor,
            seed: int,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Mix images and labels as timm would after ``numpy.random.seed(seed)``.

        Args:
            images: Float, shape (N, C, H, W); they are not modified.
            labels: Class numbers, shape (N,).
            seed: Seed of all draws, below 2**32.

        Returns:
            The mixed images and the smoothed float32 targets (N, classes); while ``mixup_enabled`` is false, nothing is
            mixed.

        Raises:
            UserError: If N is odd.
        """
        if len(images) % 2:
            raise UserError(f'Mixup and cutmix need an even --batch-size, not {len(images)}.')
        state = np.random.get_state()  # timm draws from the global stream
        np.random.seed(seed)
        try:
            return super().__call__(images.clone(), labels)
        finally:
            np.random.set_state(state)

    def _mix_elem(self, x: torch.Tensor) -> torch.Tensor:
        return self._mix(x, self._draw(len(x), x))

    def _mix_pair(self, x: torch.Tensor) -> torch.Tensor:
        half = self._draw(len(x) // 2, x)
        return self._mix(x, np.concatenate((half, half[::-1])))

    def _draw(self, count: int, x: torch.Tensor) -> np.ndarray:
        """Shape (count, 6): share of the image in its target, its weight outside the box, and the box."""
        lam, use_cutmix = self._params_per_elem(count)
        drawn = np.zeros((count, 6), np.float32)
        drawn[:, 0], drawn[:, 1] = lam, np.where(use_cutmix, 1, lam)
        for i in np.flatnonzero(use_cutmix & (lam != 1)):  # numbers on the host; one by one, in timm's order
            drawn[i, 2:], drawn[i, 0] = cutmix_bbox_and_lam(
                x.shape, lam[i], ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam)
        return drawn

    def _mix(self, x: torch.Tensor, drawn: np.ndarray) -> torch.Tensor:
        """Mix in place, as timm's methods do, and return the shares (N, 1) for the targets."""
        params = _on_device_of(drawn, x)
        weight = params[:, 1].view(-1, 1, 1, 1) * ~_inside(params[:, 2:], x)
        x.copy_(x.flip(0).float().lerp(x.float(), weight))
        return params[:, :1]
