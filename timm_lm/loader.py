"""Batches of images in memory: augmentation of whole batches on their device, and the loader that applies it.

The functions on batches take and return uint8 or float tensors of shape (N, C, H, W).
"""
from typing import Iterator, Sequence, Tuple, Union

import numpy as np
import torch

from .data import ImageSet
from .errors import UserError

Values = Union[Sequence[float], torch.Tensor]  # one for each channel

IGNORE_LABEL = -100  # of the rows that fill up the last batch of an evaluation; cross entropy leaves it out


def pad_crop(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Pad by zeros and crop each image at a random place to its old size.

    Args:
        images: Shape (N, C, H, W).
        padding: Pixels on each side.
        generator: Source of the places, on the device of the images.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, (N, C, places, places, H, W)
    dy, dx = torch.randint(2 * padding + 1, (2, n), generator=generator, device=images.device)
    return windows[torch.arange(n, device=images.device), :, dy, dx]


def random_hflip(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image (N, C, H, W) left to right with the given probability."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < probability
    return torch.where(flip, images.flip(-1), images)


def normalize(images: torch.Tensor, mean: Values, std: Values) -> torch.Tensor:
    """uint8 images (N, C, H, W) to float32, less the mean and over the deviation, both for pixels in [0, 1]."""
    mean, std = (torch.as_tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))
    return (images.float() - mean * 255) / (std * 255)


def _seed(*parts: int) -> int:
    """One seed of several numbers, so that each epoch and each batch has its own stream."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class MemoryLoader:
    """Batches of a decoded split, on its device; what they hold depends on (seed, epoch, batch) alone."""

    def __init__(
            self,
            data: ImageSet,
            batch_size: int,
            mean: Values,
            std: Values,
            is_training: bool = False,
            padding: int = 0,
            hflip: float = 0.,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            channels_last: bool = False,
    ):
        """
        Args:
            data: The split, on the device of the training.
            batch_size: Images of one batch of one process.
            mean: Mean of each channel, for pixels in [0, 1].
            std: Standard deviation of each channel, for pixels in [0, 1].
            is_training: Shuffle, augment and drop the last incomplete batch. Otherwise the last batch is filled up
                with rows of label ``IGNORE_LABEL``, so that every batch has the same shape.
            padding: Pixels of padding of the random crop, no crop if 0.
            hflip: Probability of mirroring an image.
            seed: Seed of order and augmentation.
            rank: Which process this is.
            world_size: Processes that share the data.
            channels_last: Memory layout of the batches.

        Raises:
            UserError: If the training data is smaller than one batch.
        """
        self.data = data
        self.batch_size = batch_size
        # on the device once, not with each batch
        self.mean, self.std = (torch.as_tensor(value, device=data.images.device) for value in (mean, std))
        self.is_training = is_training
        self.padding = padding
        self.hflip = hflip
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.epoch = 0
        if is_training and len(self) == 0:
            raise UserError(f'The training split has {len(data)} images, less than one batch of '
                            f'{batch_size * world_size}; use a smaller --batch-size.')

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        per_step = self.batch_size * self.world_size
        return len(self.data) // per_step if self.is_training else -(-len(self.data) // per_step)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """The batches of this epoch from the given one on: images (N, C, H, W) float32 and labels (N,)."""
        device = self.data.images.device
        if self.is_training:
            generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
            order = torch.randperm(len(self.data), generator=generator)[self.rank::self.world_size]
        else:
            order = torch.arange(len(self.data))[self.rank::self.world_size]
        order = order.to(device)
        generator = torch.Generator(device)
        for step in range(start, len(self)):
            index = order[step * self.batch_size:(step + 1) * self.batch_size]
            images, labels = self.data.images[index], self.data.labels[index]
            if self.is_training:
                generator.manual_seed(_seed(self.seed, self.epoch, step, self.rank))
                images = self._augment(images, generator)
            elif len(index) < self.batch_size:
                images, labels = self._fill(images, labels)
            yield normalize(images, self.mean, self.std).contiguous(memory_format=self.memory_format), labels

    def _augment(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.padding:
            images = pad_crop(images, self.padding, generator)
        if self.hflip:
            images = random_hflip(images, self.hflip, generator)
        return images

    def _fill(self, images: torch.Tensor, labels: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        missing = self.batch_size - len(labels)
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return images, torch.cat([labels, labels.new_full((missing,), IGNORE_LABEL)])
