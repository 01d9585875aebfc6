"""Loss and correct images of an epoch, summed over its batches while the device computes."""
import math
from typing import List, Tuple

import torch
from accelerate.utils import gather_object


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
        self.batch_results = torch.zeros(batches, 2, device=device)
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

    def of_all_processes(self) -> List[float]:
        """Loss and correct images of all processes, as read."""
        return [sum(values) for values in zip(*gather_object([[self.loss, self.correct]]))]
