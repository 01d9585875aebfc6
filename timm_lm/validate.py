"""Counting the errors of a network on a split of any data set that timm reads."""
import sys
from typing import Any, Dict, List

import torch
from timm.data import create_transform
from tqdm import tqdm

from .allocator import keep_freed_memory
from .compiler import check_compiler
from .data import TooLarge, check_class_names, check_labels, load_images, open_images
from .loader import BatchLoader, MemoryLoader, WorkerLoader
from .model_config import TimmModel, image_config, label_names
from .names import load_model
from .precision import no_bfloat16
from .training import evaluate

_CPU = torch.device('cpu')


def validate(
        name: str,
        split: str,
        device: torch.device = _CPU,
        batch_size: int = evaluate.COUNT_BATCH_SIZE,
        workers: int = 4,
        amp: bool = False,
        channels_last: bool = False,
        torchcompile: bool = False,
        program: str = 'timm-lm',
        **source: Any,
) -> Dict[str, float]:
    """Count the errors of a network.

    Args:
        name: A model name with or without tag, a weights folder, or ``hf-hub:OWNER/NAME``.
        split: The split to count on.
        device: Where the network runs.
        batch_size: Images per batch.
        workers: Processes that read images if these do not fit in memory.
        amp: Autocast to bfloat16 if the device has instructions for it; otherwise float32, without TF32 on a GPU.
        channels_last: Use this memory layout.
        torchcompile: Compile the network.
        program: Name that begins each note on data and precision; they go to standard error before the count.
        **source: Where the split is, as in ``load_images``.

    Returns:
        What ``evaluate`` returns (``top1`` and ``top5`` in %, ``loss``, ``errors``, ``images``,
        ``images_per_second``).

    Raises:
        UserError: If the network or the split cannot be loaded, or they do not fit together.
    """
    if torchcompile:
        check_compiler('inductor', None, device.type == 'cpu')
        torch.compiler.reset()  # it compiles only a few networks of a class, and runs others eagerly
    model = load_model(name)
    loader = _create_loader(model, split, source, workers, batch_size=batch_size, device=device,
                            channels_last=channels_last)
    remarks = [loader.data.remark, check_class_names(loader.data.class_names, label_names(model), of=name)]
    check_labels(loader.data, model.num_classes)
    if amp and no_bfloat16(device.type):
        amp = False
        remarks.append(f'{no_bfloat16(device.type)}; validating in float32, as without --amp.')
    for remark in filter(None, remarks):
        print(f'{program}: note: {remark}', file=sys.stderr)
    model = model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    network = torch.compile(model, dynamic=False) if torchcompile else model
    if device.type == 'cpu':
        keep_freed_memory()

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            return network(images)

    # GPUs would round float32 to TF32; elsewhere the flags are not even read, as newer PyTorch may refuse that
    rounding: List[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul] if device.type == 'cuda' else []
    allowed = [backend.allow_tf32 for backend in rounding]
    try:
        for backend in rounding:
            backend.allow_tf32 = amp and backend.allow_tf32
        return evaluate.evaluate(forward, tqdm(loader, unit='batch', leave=False, disable=None))
    finally:
        for backend, was_allowed in zip(rounding, allowed):
            backend.allow_tf32 = was_allowed


def _create_loader(model: TimmModel, split: str, source: Dict[str, Any], workers: int, **common: Any) -> BatchLoader:
    """Batches of a split in memory, or from worker processes if it does not fit."""
    config = image_config(model)
    common.update(mean=config['mean'], std=config['std'])
    size = {name: config[name] for name in ('input_size', 'crop_pct', 'crop_mode', 'interpolation')}
    try:
        return MemoryLoader(load_images(split, progress=True, device=common['device'], **size, **source), **common)
    except TooLarge:
        data = open_images(split, channels=config['input_size'][0], **source)
        transform: Any = create_transform(use_prefetcher=True, **size)
        return WorkerLoader(data, transform=transform, workers=workers, **common)
