"""The moving average of the weights."""
from typing import Any

import torch
from timm.utils import ModelEmaV3


class AveragedWeights(ModelEmaV3):
    """timm's average of a network whose tensors stay in place: both state dicts are built once.

    Building them at each update, as timm does, takes longer than the update of a small network.
    """

    _averaged: Any = None  # tensors of the average, and of the network
    _counts: Any = ()  # integer tensors of both, such as batch counts

    def apply_update_(self, model: torch.nn.Module, decay: float) -> None:
        if self._averaged is None:
            pairs = list(zip(self.module.state_dict().values(), model.state_dict().values()))
            self._averaged, self._counts = (
                tuple(zip(*(pair for pair in pairs if pair[0].is_floating_point() == kind))) for kind in (True, False))
        own, theirs = self._averaged
        torch._foreach_lerp_(own, theirs, weight=1. - decay)
        if self._counts:
            torch._foreach_copy_(*self._counts)
