"""The moving average of the weights."""
import argparse
from typing import List, Optional, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.utils import ModelEmaV3

from timm_lm.errors import UserError
from timm_lm.model_config import TimmModel


class AveragedWeights(ModelEmaV3):
    """timm's average of a network whose tensors stay where they are: both state dicts are made once.

    Made at each update, as timm does, they take longer than the update of a small network.
    """

    _pairs: Optional[Tuple[List[torch.Tensor], List[torch.Tensor]]] = None  # of the average, and of the network
    _is_float32 = True
    _counts: Optional[Tuple[List[torch.Tensor], List[torch.Tensor]]] = None  # whole numbers of both, such as of batches

    def apply_update_(self, model: torch.nn.Module, decay: float) -> None:
        if self._pairs is None:
            pairs = list(zip(self.module.state_dict().values(), model.state_dict().values()))
            averaged = [pair for pair in pairs if pair[0].is_floating_point()]
            self._pairs = [own for own, _ in averaged], [theirs for _, theirs in averaged]
            counts = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._counts = ([own for own, _ in counts], [theirs for _, theirs in counts]) if counts else None
            self._is_float32 = all(tensor.dtype == torch.float32 for tensor in self._pairs[0])
        if not self._is_float32:
            super().apply_update_(model, decay)  # which rounds low precision in its own way
            return
        torch._foreach_lerp_(*self._pairs, weight=1. - decay)
        if self._counts:
            torch._foreach_copy_(*self._counts)


def create_average(args: argparse.Namespace, model: TimmModel, accelerator: Accelerator) -> Optional[ModelEmaV3]:
    """The moving average of the weights on their device, if the options ask for one.

    Raises:
        UserError: With sharded weights.
    """
    if not args.model_ema:
        return None
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError('--model-ema can not average sharded weights; leave it out, or train without FSDP.')
    return AveragedWeights(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
