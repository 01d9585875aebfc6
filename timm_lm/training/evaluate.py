"""Evaluation of a network on a split."""
import time
from typing import Callable, Dict, Iterable, List, Tuple

import torch
import torch.nn.functional as F

from timm_lm.loader import IGNORE_LABEL

COUNT_BATCH_SIZE = 50  # for counts in float32 on the CPU: fast, and small next to the memory of training


@torch.no_grad()
def evaluate(
        model: Callable[[torch.Tensor], torch.Tensor],
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        gather: Callable[[List[List[float]]], List[List[float]]] = lambda own: own,
) -> Dict[str, float]:
    """Count the errors of a network.

    Args:
        model: Network in evaluation mode, images (N, C, H, W) to logits (N, classes).
        batches: Images and labels of the split, at least one batch; rows with label ``IGNORE_LABEL`` do not count.
        gather: Joins the lists of all processes, if there are several.

    Returns:
        ``top1`` and ``top5`` accuracy in %, mean ``loss``, number of ``errors`` and ``images``, ``images_per_second``.
    """
    start = time.perf_counter()
    results = []  # of each batch, on the device: images, correct at 1, correct at 5, summed loss
    for images, labels in batches:
        logits = model(images).float()
        top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        results.append(torch.stack([
            (labels != IGNORE_LABEL).sum().float(),
            top[:, 0].sum().float(),
            top.sum().float(),
            F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction='sum'),
        ]))
    count = top1 = top5 = loss = 0.
    for batch in gather(torch.stack(results).tolist()):  # in float64, which not every device has
        count, top1, top5, loss = (total + value for total, value in zip((count, top1, top5, loss), batch))
    return dict(
        top1=100 * top1 / count,
        top5=100 * top5 / count,
        loss=loss / count,
        errors=int(count - top1),
        images=int(count),
        images_per_second=count / (time.perf_counter() - start),
    )
