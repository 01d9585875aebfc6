"""Loss and correct images of an epoch, summed over its batches while the device computes."""
import math
from typing import List, Tuple

import torch
from accelerate import Accelerator

from .evaluate import sum_dtype


class EpochSums:
    """Summed loss and correct images of the batches of an epoch, in this process.

    The results of a batch stay on the device until they are read, as the host would wait for it at each batch.
    """

    def __init__(self, batches: int, device: torch.device):
        """
        Args:
            batches: Batches of an epoch.
            device: Where their results are.
        """
        self.batch_results = torch.zeros(batches, 2, dtype=sum_dtype(device), device=device)
        self.start()

    def start(self, done: int = 0, loss: float = 0., correct: float = 0.) -> None:
        """Begin an epoch, or go on with the sums of its first ``done`` batches."""
        self.loss, self.correct = loss, correct  # of the batches that were read
        self.rates: List[float] = [math.nan] * done  # of each batch; those of an earlier process are not asked for
        self.read_batches = done
        self.finite_batches = done  # those before the first loss that was not finite

    def add(self, lr: float, loss: torch.Tensor, correct: torch.Tensor) -> None:
        """Add a batch by its learning rate, and its loss and number of correct images on the device."""
        result = self.batch_results[len(self.rates)]
        result[0].copy_(loss)
        result[1].copy_(correct)
        self.rates.append(lr)

    def read(self) -> None:
        """Sum the results of the batches since the last reading, for which the host waits for the device."""
        done = len(self.rates)
        for loss, correct in self.batch_results[self.read_batches:done].tolist():
            self.loss += loss
            self.correct += correct
            self.finite_batches += math.isfinite(self.loss)
        self.read_batches = done

    def first_not_finite(self) -> Tuple[int, float]:
        """Number, from 1, of the first batch read whose loss was not finite, and its learning rate; (0, 0) if none."""
        finite = self.finite_batches
        return (finite + 1, self.rates[finite]) if finite < self.read_batches else (0, 0.)

    def reduced(self, accelerator: Accelerator) -> torch.Tensor:
        """Loss and correct images of all processes, as read."""
        sums = torch.tensor(
            [self.loss, self.correct], dtype=self.batch_results.dtype, device=self.batch_results.device)
        return accelerator.reduce(sums)
