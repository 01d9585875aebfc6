"""Evaluation of a network on a split."""
import time
from typing import Callable, Dict, Iterable, Optional, Tuple

import torch
import torch.nn.functional as F

from timm_lm.loader import IGNORE_LABEL

COUNT_BATCH_SIZE = 50  # for counts in float32 on the CPU: fast, and small next to the memory of training


def sum_dtype(device: torch.device) -> torch.dtype:
    """Precision of sums over a split: float64 where the device has it."""
    if device.type == 'xpu' and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float32 if device.type == 'mps' else torch.float64


@torch.no_grad()
def evaluate(
        model: Callable[[torch.Tensor], torch.Tensor],
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        reduce: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> Dict[str, float]:
    """Count the errors of a network.

    Args:
        model: Network in evaluation mode, images (N, C, H, W) to logits (N, classes).
        batches: Images and labels of the split, at least one batch; rows with label ``IGNORE_LABEL`` do not count.
        reduce: Sums a tensor over processes, if there are several.

    Returns:
        ``top1`` and ``top5`` accuracy in %, mean ``loss``, number of ``errors`` and ``images``, ``images_per_second``.
    """
    start = time.perf_counter()
    totals = None  # images, correct at 1, correct at 5, summed loss
    for images, labels in batches:
        dtype = sum_dtype(labels.device)
        logits = model(images).float()
        top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        batch = torch.stack([
            (labels != IGNORE_LABEL).sum().to(dtype),
            top[:, 0].sum().to(dtype),
            top.sum().to(dtype),
            F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction='sum').to(dtype),
        ])
        totals = batch if totals is None else totals + batch
    assert totals is not None
    if reduce is not None:
        totals = reduce(totals)
    count, top1, top5, loss = totals.tolist()
    return dict(
        top1=100 * top1 / count,
        top5=100 * top5 / count,
        loss=loss / count,
        errors=int(count - top1),
        images=int(count),
        images_per_second=count / (time.perf_counter() - start),
    )
