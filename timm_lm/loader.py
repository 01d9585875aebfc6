"""Batches of a split: from memory, or decoded by worker processes; augmented and normalised on the device."""
import copy
import multiprocessing
import os
import random
import signal
import threading
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader, Dataset

from .augment import BatchMixup, Values, normalize, pad_crop, random_erase, random_flip, to_device
from .decoded import DecodedImages
from .encoded import EncodedImages
from .errors import UserError

IGNORE_LABEL = -100  # of the rows that pad the last batch of an evaluation; cross entropy ignores it

Batch = Tuple[torch.Tensor, torch.Tensor]
Planned = Tuple[int, Tuple[int, ...]]  # index of an image, and the numbers that its seed is made from


def _seed(*parts: int) -> int:
    """One seed from several numbers, with a random stream of its own; trailing zeros change nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of whole batches of training images on their device.

    Attributes:
        padding: Padding of the random crop in pixels, no crop if 0.
        hflip: Probability of mirroring an image left to right.
        vflip: Probability of mirroring an image top to bottom.
        erase: Probability of random erasing.
        erase_mode: What boxes are filled with, as in ``random_erase``.
        erase_count: Maximum number of boxes per image.
        mixup: Mixes images and labels; the batches then have soft targets (N, classes).
        mixup_off_epoch: No mixing from this epoch on; 0 mixes always.
    """

    padding: int = 0
    hflip: float = 0.
    vflip: float = 0.
    erase: float = 0.
    erase_mode: str = 'pixel'
    erase_count: int = 1
    mixup: Optional[BatchMixup] = None
    mixup_off_epoch: int = 0

    def augment_pixels(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment uint8 images."""
        if self.padding:
            images = pad_crop(images, self.padding, generator)
        if self.hflip:
            images = random_flip(images, -1, self.hflip, generator)
        if self.vflip:
            images = random_flip(images, -2, self.vflip, generator)
        return images

    def augment_normalized(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, seed: int,
                           epoch: int) -> Batch:
        """Augment normalised images and their targets."""
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.mixup_off_epoch or epoch < self.mixup_off_epoch
            images, labels = self.mixup(images, labels, seed)
        if self.erase:
            images = random_erase(
                images, self.erase, self.erase_mode, self.erase_count, np.random.default_rng(seed), generator)
        return images, labels


class BatchLoader(ABC):
    """Batches of a split for one process; their content depends only on (seed, epoch, batch, process).

    Subclasses read the images of batches, as uint8.

    Attributes:
        kind: How they are read, as in ``--loader``.
    """

    kind = ''

    def __init__(
            self,
            data: Any,
            batch_size: int,
            mean: Values,
            std: Values,
            device: torch.device,
            is_training: bool = False,
            augmentation: Augmentation = Augmentation(),
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            channels_last: bool = False,
            repeats: float = 0,
    ):
        """
        Args:
            data: The split.
            batch_size: Images per batch and process.
            mean: Mean of each channel, for pixels in [0, 1].
            std: Standard deviation of each channel, for pixels in [0, 1].
            device: Where the batches are made.
            is_training: Shuffle, augment and drop the last incomplete batch. Otherwise the last batch is padded
                with rows of label ``IGNORE_LABEL``, so that every batch has the same shape.
            augmentation: Augmentation of training batches.
            seed: Seed for order and augmentation.
            rank: Rank of this process.
            world_size: Processes that share the data.
            channels_last: Memory layout of the batches.
            repeats: How often an image occurs in the batches of all processes (repeated augmentation), 0 for once.

        Raises:
            UserError: If the training data is smaller than one batch.
        """
        self.data = data
        # no larger than its share of the data: padding is computed for nothing
        self.batch_size = batch_size if is_training else min(batch_size, -(-len(data) // world_size))
        self.device = device
        # moved to the device once, not with each batch
        self.mean, self.std = (  # of pixels in [0, 255]
            255 * torch.as_tensor(value, dtype=torch.float32, device=device) for value in (mean, std))
        self.is_training = is_training
        self.augmentation = augmentation
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.sampler = None
        if is_training and repeats and world_size > 1:
            rounding = 256 if len(data) >= 256 else 0  # older timm rounds fewer down to none
            self.sampler = RepeatAugSampler(data, world_size, rank, num_repeats=repeats, selected_round=rounding)
        self.epoch = 0
        if is_training and len(self) == 0:
            raise UserError(f'The training split has {len(data)} images, less than one batch of '
                            f'{batch_size * world_size}; use a smaller --batch-size.')

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.sampler is not None:
            return len(self.sampler) // self.batch_size
        per_step = self.batch_size * self.world_size
        return len(self.data) // per_step if self.is_training else -(-len(self.data) // per_step)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def order(self) -> torch.Tensor:
        """Indices of the images of this process in this epoch, in order."""
        if self.sampler is not None:
            self.sampler.set_epoch(_seed(self.seed, self.epoch))
            return torch.tensor(list(self.sampler))
        if not self.is_training:
            return torch.arange(len(self.data))[self.rank::self.world_size]
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
        return torch.randperm(len(self.data), generator=generator)[self.rank::self.world_size]

    @abstractmethod
    def read(self, order: torch.Tensor, start: int) -> Iterator[Batch]:
        """Batches in this order from number ``start`` on: uint8 images on the device and labels."""

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches of this epoch from number ``start`` on: float32 images (N, C, H, W), and labels (N,) or targets."""
        generator = torch.Generator(self.device)
        for step, (images, labels) in enumerate(self.read(self.order(), start), start):
            if self.is_training:
                seed = _seed(self.seed, self.epoch, step, self.rank)
                images = self.augmentation.augment_pixels(images, generator.manual_seed(seed))
            elif len(labels) < self.batch_size:
                images, labels = self._fill(images, labels)
            images = normalize(images, self.mean, self.std, self.memory_format)
            if self.is_training:
                images, labels = self.augmentation.augment_normalized(
                    images, labels, generator, seed, self.epoch)
            yield images, labels

    def on_cpu(self, batch_size: int) -> 'BatchLoader':
        """The same split on the CPU, all of it for one process, in batches of another size and contiguous memory."""
        other = copy.copy(self)
        other.batch_size = min(batch_size, len(self.data))
        other.device = torch.device('cpu')
        other.mean, other.std = self.mean.cpu(), self.std.cpu()
        other.memory_format = torch.contiguous_format
        other.rank, other.world_size = 0, 1
        return other

    def _slices(self, order: torch.Tensor, start: int) -> Iterator[Tuple[int, torch.Tensor]]:
        """(position of the first image, indices) of each batch."""
        for step in range(start, len(self)):
            first = step * self.batch_size
            yield first, order[first:first + self.batch_size]

    def _fill(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        missing = self.batch_size - len(labels)
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return images, torch.cat([labels, labels.new_full((missing,), IGNORE_LABEL)])


class MemoryLoader(BatchLoader):
    """Batches of a decoded split that is kept on the device."""

    kind = 'memory'

    def __init__(self, data: DecodedImages, batch_size: int, mean: Values, std: Values,
                 device: Optional[torch.device] = None, **kwargs: Any):
        """
        Args:
            data: The decoded split.
            batch_size: As in ``BatchLoader``, like all other arguments.
            device: Where the split is kept and the batches are made, None for where it is now.
        """
        device = device or data.images.device
        super().__init__(data.to(device), batch_size, mean, std, device, **kwargs)

    def read(self, order: torch.Tensor, start: int) -> Iterator[Batch]:
        order = order.to(self.device)
        labels = self.data.labels[order]
        for first, index in self._slices(order, start):
            yield self.data.images[index], labels[first:first + len(index)]

    def on_cpu(self, batch_size: int) -> 'BatchLoader':
        other = super().on_cpu(batch_size)
        other.data = self.data.to(torch.device('cpu'))
        return other


class WorkerLoader(BatchLoader):
    """Batches of a split that worker processes decode and augment image by image, with a seed for each image."""

    kind = 'timm'

    def __init__(self, data: EncodedImages, batch_size: int, mean: Values, std: Values, device: torch.device,
                 transform: Callable[[Any], Any], workers: int = 4, pin_memory: bool = False, **kwargs: Any):
        """
        Args:
            data: The split as it is stored.
            batch_size: As in ``BatchLoader``, like all other arguments.
            transform: Image to uint8 array or tensor (C, H, W), like timm's with ``use_prefetcher``.
            workers: Processes that read images, 0 for this one.
            pin_memory: Put batches in pinned memory, which is always done for CUDA.
        """
        super().__init__(data, batch_size, mean, std, device, **kwargs)
        self.plan: List[List[Planned]] = []  # the images of each batch of a pass
        self.loader = DataLoader(
            _Seeded(data, transform), batch_sampler=self.plan, collate_fn=fast_collate, num_workers=workers,
            pin_memory=pin_memory or device.type == 'cuda',  # otherwise a copy waits for the device
            persistent_workers=workers > 0, generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent)

    def read(self, order: torch.Tensor, start: int) -> Iterator[Batch]:
        slices = list(self._slices(order, start))
        batches: List[List[Planned]] = [
            [(index, (self.seed, self.epoch, self.rank, first + i)) for i, index in enumerate(indices.tolist())]
            or [(0, (0,))]  # no image is left for this process; the first one stands in, without a label
            for first, indices in slices
        ]
        self.plan[:] = batches  # in place: a loader with persistent workers keeps the sampler that it was made with
        if self.loader.num_workers:
            _start_fork_server()
        try:
            for (_, indices), (images, labels) in zip(slices, self.loader):
                if not len(indices):
                    labels = torch.full_like(labels, IGNORE_LABEL)
                yield to_device(images, self.device), to_device(labels, self.device)
        except UserError as e:  # of a worker process, which puts its traceback before the message
            message = str(e).strip().splitlines()[-1].partition('UserError: ')[2] or str(e)
            raise UserError(message) from e.with_traceback(None)  # its frames would keep workers alive


def _start_fork_server() -> None:
    """Start the process that forks workers, as from Python 3.14 on, so that it outlives a signal to its whole group.

    Otherwise the workers would end with it.
    """
    if multiprocessing.get_start_method() != 'forkserver' or not hasattr(signal, 'sigwaitinfo'):
        return
    from multiprocessing import forkserver, resource_tracker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            # new processes inherit it; again, as older Python unblocks SIGTERM in the first
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP])
            start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Keep a worker process alive when its whole group is sent a signal, as by `timeout`, Slurm or a launcher.

    The training process finishes the step and saves, for which it may need more batches. SIGTERM is obeyed if it comes
    from that process. A worker also ends with it; PyTorch watches only the process that forked the worker. On macOS and
    Windows the sender is unknown, and a worker ends at once.
    """
    for name in ('SIGINT', 'SIGHUP'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, 'sigwaitinfo'):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def obey_the_parent() -> None:
        told = None
        while parent.is_alive() and (told is None or told.si_pid != parent.pid):
            told = signal.sigtimedwait([signal.SIGTERM], 1)
        os._exit(0)

    threading.Thread(target=obey_the_parent, daemon=True).start()


class _Seeded(Dataset):
    """Images with a seed for each, so that augmentation does not depend on which process reads which image."""

    def __init__(self, data: EncodedImages, transform: Callable[[Any], Any]):
        self.data = replace(data, transform=transform)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: Planned) -> Tuple[Any, int]:
        index, numbers = item
        with _global_streams(_seed(*numbers)):
            return self.data[index]


@contextmanager
def _global_streams(seed: int) -> Iterator[None]:
    """Seed the global random streams, which timm's transforms draw from, and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # of the CPU only
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
