"""The size of networks: parameters and multiply-accumulate operations."""
import copy
from functools import cache
from typing import Sequence, Tuple

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .model_config import TimmModel


@cache
def network_size(architecture: str, num_classes: int, input_size: Tuple[int, int, int]) -> Tuple[int, float]:
    """Parameters and MACs, counted without allocating memory for either."""
    model = timm.create_model(architecture, num_classes=num_classes, device='meta')
    return count_parameters(model), count_macs(model, input_size)


def count_parameters(model: TimmModel) -> int:
    """Parameters of a network, trained or not."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: TimmModel, input_size: Sequence[int]) -> float:
    """Multiply-accumulate operations of one image (C, H, W)."""
    model = copy.deepcopy(model).to('meta').eval()
    for module in list(model.modules()):  # PyTorch's counter would decompose norms, and find no products
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device='meta'))
    return counter.get_total_flops() / 2  # it counts two per MAC
