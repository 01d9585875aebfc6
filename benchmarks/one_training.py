"""One training in this process, to be measured: with our engine, or with a bare loop of the same steps.

Its peak memory is reported. The bare loop prints images/s, one line per epoch; our engine writes them to its folder.

    python one_training.py REPORT engine COMMAND...   what `timm-lm COMMAND...` does
    python one_training.py REPORT bare OPTIONS        a loop with the options in a JSON file
    python one_training.py REPORT keeping OPTIONS     the same loop, keeping freed memory as our engine does

Further arguments are ignored. REPORT receives one JSON object: ``bytes``, and ``kind``, what they measure.
`train_throughput.py` starts all of them.
"""
import json
import re
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict

import timm
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs

from timm_lm import cli
from timm_lm.allocator import keep_freed_memory


def peak_memory() -> Dict[str, Any]:
    """Peak memory of this process: of tensors on the GPU if it used one, otherwise resident."""
    if torch.cuda.is_initialized():
        return dict(bytes=torch.cuda.max_memory_allocated(), kind='torch.cuda.max_memory_allocated')
    try:
        status = Path('/proc/self/status').read_text()
        return dict(bytes=int(re.findall(r'VmHWM:\s+(\d+) kB', status)[0]) * 1024, kind='peak resident set')
    except (OSError, IndexError):  # not Linux
        unit = 1 if sys.platform == 'darwin' else 1024
        return dict(bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, kind='peak resident set')


def bare_loop(options: Namespace) -> None:
    """Train on random pixels: what a network costs without an engine.

    It holds nothing but the data set as one uint8 tensor (N, C, H, W) with its labels, the network, the optimizer and
    the compiled step.

    Args:
        options: Options of a training, with ``images`` (the number N), ``input_size`` (C, H, W) and ``steps`` (batches
            per epoch).
    """
    def clock() -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return time.perf_counter()

    torch.backends.cudnn.benchmark = True  # as in both engines
    device = torch.device(options.device)
    pixels = torch.randint(256, (options.images, *options.input_size), dtype=torch.uint8, device=device)
    labels = torch.randint(options.num_classes, (options.images,), device=device)
    model = timm.create_model(
        options.model, num_classes=options.num_classes, in_chans=options.input_size[0],
        drop_path_rate=options.drop_path, **options.model_kwargs).to(device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=options), **options.opt_kwargs)
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=options.smoothing)
    network = model
    if options.torchcompile:
        network = torch.compile(
            model, backend=options.torchcompile, mode=options.torchcompile_mode, dynamic=False)  # type: ignore
    dtype = torch.bfloat16 if options.amp_dtype == 'bfloat16' else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and dtype == torch.float16)
    start = clock()
    for step in range(options.epochs * options.steps):
        index = torch.randint(options.images, (options.batch_size,), device=device)
        images = pixels[index].float().sub_(128).div_(64).contiguous(memory_format=layout)
        with torch.autocast(device.type, dtype=dtype, enabled=options.amp):
            loss = loss_fn(network(images), labels[index])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if (step + 1) % options.steps == 0:
            end = clock()
            print(f'{options.steps * options.batch_size / (end - start):.1f} images/s', flush=True)
            start = end


def main() -> None:
    report, kind, *rest = sys.argv[1:]
    try:
        if kind in ('bare', 'keeping'):
            if kind == 'keeping':
                keep_freed_memory()
            bare_loop(Namespace(**json.loads(Path(rest[0]).read_text())))
        else:
            sys.exit(cli.main(rest))
    finally:
        Path(report).write_text(json.dumps(peak_memory()))


if __name__ == '__main__':
    main()
