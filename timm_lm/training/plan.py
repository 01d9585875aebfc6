"""What a training is going to do, in words and a picture, before it starts."""
import argparse
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch
from accelerate import Accelerator

from timm_lm.data import Split
from timm_lm.loader import BatchLoader, MemoryLoader
from timm_lm.model_config import TimmModel
from timm_lm.network_size import count_parameters
from timm_lm.precision import asked_precision

from .option_rules import not_in_memory
from .schedule import create_schedule

WIDTH, HEIGHT = 72, 8  # characters of the picture
_BARS = ' ▁▂▃▄▅▆▇█'


def rates(args: argparse.Namespace, updates_per_epoch: int) -> List[float]:
    """The learning rate at the start of each epoch, or with ``sched_on_updates`` at up to 1,000 points in time."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, epochs = create_schedule(args, optimizer, updates_per_epoch)
    if scheduler is None:
        return [args.lr] * epochs
    found = []
    stride = max(1, updates_per_epoch * epochs // 1000)
    for epoch in range(epochs):
        found.append(optimizer.param_groups[0]['lr'])
        for update in range(1, updates_per_epoch if args.sched_on_updates else 0):
            if update % stride == 0:
                scheduler.step_update(epoch * updates_per_epoch + update)
                found.append(optimizer.param_groups[0]['lr'])
        scheduler.step_update((epoch + 1) * updates_per_epoch)
        is_validated = (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs
        scheduler.step(epoch + 1, 0. if is_validated else None)
    return found


def draw(values: List[float], epochs: int) -> str:
    """A plot of values over the epochs of a run, in lines of text."""
    columns = [values[i * len(values) // WIDTH] for i in range(WIDTH)]
    top = max(columns) or 1.
    heights = [round(value / top * HEIGHT * 8) for value in columns]
    lines = []
    for row in reversed(range(HEIGHT)):
        bars = ''.join(_BARS[min(8, max(0, height - 8 * row))] for height in heights)
        label = f'{top:.3g}' if row == HEIGHT - 1 else '0' if row == 0 else ''
        lines.append(f'{label:>8} |{bars}'.rstrip())
    lines.append(' ' * 9 + '+' + '-' * WIDTH)
    lines.append(' ' * 10 + '1' + f'epoch {epochs}'.rjust(WIDTH - 1))
    return '\n'.join(lines)


def describe_data(model: TimmModel, splits: Sequence[Split]) -> List[str]:
    """What the user should know about the data before training."""
    remarks = [data.remark for data in splits if data.remark]
    count = len(splits[0].class_names or ())
    if 0 < count < model.num_classes:
        remarks.append(f'The data has {count} classes, the network {model.num_classes}, so their names are not '
                       f'recorded; --num-classes {count} makes a head for them.')
    return remarks


def describe_run(
        args: argparse.Namespace,
        model: TimmModel,
        start: str,
        train_loader: BatchLoader,
        eval_loader: Optional[BatchLoader],
        accelerator: Accelerator,
        folder: Path,
) -> str:
    """Network, data, batches, device and folder of a run, a line each; ``start`` is that of ``run_facts``."""
    size = 'x'.join(map(str, model.pretrained_cfg['input_size']))
    lines: Dict[str, str] = {
        'network': f'{args.model}: {count_parameters(model):,} parameters, {model.num_classes} classes, images {size}, '
                   + (start or 'new weights'),
        'data': f'{len(train_loader.data):,} images to train on ({_place(args, train_loader)})'
                + (f', {len(eval_loader.data):,} to validate on' if eval_loader else ', none to validate on'),
        'batches': f'{args.batch_size} images'
                   + (f' x {accelerator.num_processes} processes' if accelerator.num_processes > 1 else '')
                   + (f' x {args.grad_accum_steps} accumulated' if args.grad_accum_steps > 1 else '')
                   + f', {-(-len(train_loader) // args.grad_accum_steps):,} updates an epoch',
        'device': f'{accelerator.device}, {asked_precision(vars(args))}, '
                  + (f'compiled by {args.torchcompile} in the first steps' if args.torchcompile else 'eager'),
        'run folder': str(folder),
    }
    return '\n'.join(f'{name:<11}{text}' for name, text in lines.items())


def _place(args: argparse.Namespace, loader: BatchLoader) -> str:
    if isinstance(loader, MemoryLoader):
        return 'in memory'
    asked = not_in_memory(args)
    why = f" for {', '.join(asked)}" if asked and args.loader == 'auto' else ''
    return f"timm's transforms in {args.workers} worker processes{why}"


def describe_schedule(args: argparse.Namespace, updates_per_epoch: int, epochs: int) -> str:
    """Optimizer and schedule in a line, and a picture of the rate."""
    warmup = f', {args.warmup_epochs} epochs of warm-up' if args.warmup_epochs and args.sched != 'none' else ''
    head = (f'{args.opt}, weight decay {args.weight_decay:g}; {args.sched}, rate {args.lr:g}{warmup}; {epochs} epochs, '
            f'{epochs * updates_per_epoch:,} updates')
    if args.sched == 'plateau':
        head += '; drawn as if nothing improved after the first epoch'
    return f"{'schedule':<11}{head}\n{draw(rates(args, updates_per_epoch), epochs)}"
