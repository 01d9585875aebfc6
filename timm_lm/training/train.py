"""A training from options to a run folder: data, network, optimizer, loop, checkpoints, weights.

The loop is an ordinary one on Accelerate, which owns device, precision and processes.
"""
import argparse
import importlib
import signal
import threading
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import yaml
from accelerate.utils import gather_object, set_seed
from timm.models import model_parameters, safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import dispatch_clip_grad
from torch import nn
from tqdm import tqdm

from timm_lm.data import ImageSet, check_labels
from timm_lm.errors import UserError
from timm_lm.files import write_text
from timm_lm.hub import TimmModel, describe

from .checkpoint import Checkpoint, CheckpointStore, Progress, random_states, restore
from .evaluate import evaluate, sum_dtype
from .factory import (
    create_accelerator,
    create_loader,
    create_model,
    create_optimizer,
    load_split,
    resolve_input_config,
    set_learning_rate,
)
from .report import RunLog
from .result import command_line, save_weights

__all__ = ['Interrupted', 'command_line', 'train']

# Options that may differ between a run and its resumption.
FREE_OPTIONS = (
    'config', 'resume', 'output', 'experiment', 'data_dir', 'log_interval', 'recovery_interval', 'checkpoint_hist')


class Interrupted(Exception):
    """A signal stopped the training; its state was saved.

    Attributes:
        exit_code: 128 + number of the signal: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int, folder: Path):
        super().__init__(f'Stopped by {signal.Signals(number).name}; the state is in {folder}, go on with '
                         '--resume auto.')
        self.exit_code = 128 + number


class StopSignals:
    """Notes SIGTERM and SIGINT, so that the running step can end; the second one acts as ever."""

    def __init__(self) -> None:
        self.number = 0
        self.before: Dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        self._give_back()

    def _note(self, number: int, _frame: Any) -> None:
        self.number = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class Training:
    """The parts of a training that move, and the steps that move them."""

    def __init__(self, args: argparse.Namespace, accelerator: Any, model: TimmModel, loader: Any,
                 store: CheckpointStore, signals: StopSignals):
        self.args = args
        self.accelerator = accelerator
        self.model = model
        self.loader = loader
        self.store = store
        self.signals = signals
        self.criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
        self.updates_per_epoch = -(-len(loader) // args.grad_accum_steps)
        try:
            self.plain_optimizer = create_optimizer(args, model)
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.plain_optimizer, **scheduler_kwargs(args), updates_per_epoch=self.updates_per_epoch)
        except (AssertionError, ImportError, KeyError, TypeError, ValueError) as e:
            raise UserError(f'The optimizer {args.opt} or the schedule {args.sched} can not be made with these options '
                            f'({e or type(e).__name__}).') from e
        if args.sched != 'none' and self.scheduler is None:
            raise UserError(f"There is no schedule '{args.sched}'; use cosine, multistep, step, poly, tanh or none.")
        self.network, self.optimizer = accelerator.prepare(model, self.plain_optimizer)
        # of the running epoch, on the device: summed loss, correct images, 1 + first batch of a loss that is not finite
        self.sum_dtype = sum_dtype(accelerator.device)
        self.sums = torch.zeros(3, dtype=self.sum_dtype, device=accelerator.device)

    @property
    def learning_rate(self) -> float:
        return self.plain_optimizer.param_groups[0]['lr']

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint from the main process; the others give their random states."""
        self.check_finite(progress.epoch if progress.batch else progress.epoch - 1)
        states = gather_object([random_states()]) if self.accelerator.num_processes > 1 else [random_states()]
        updates = progress.epoch * self.updates_per_epoch + progress.batch // self.args.grad_accum_steps
        if not self.accelerator.is_main_process:
            return self.store.folder
        return self.store.save(
            updates, progress, self.model, self.plain_optimizer, self.sums, states,
            scheduler=self.scheduler.state_dict() if self.scheduler else None,
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else None)

    def resume(self, checkpoint: Checkpoint) -> Progress:
        """Go back to a checkpoint."""
        sums = restore(checkpoint, self.model, self.plain_optimizer, self.scheduler, self.accelerator.scaler,
                       self.accelerator.process_index)
        self.sums.copy_(sums if self.accelerator.is_main_process else torch.zeros_like(sums))
        return checkpoint.progress

    def check_finite(self, epoch: int) -> None:
        """Read from the device whether every loss of the epoch was finite.

        Raises:
            UserError: If one was not; it names the first such batch, the rate and the last good checkpoint.
        """
        first_bad = int(self.sums[2].item())
        if first_bad:
            good = next(iter(self.store.newest_first()), None)
            rest = f'the last good checkpoint is {good}' if good else 'there is no checkpoint yet'
            raise UserError(f'The loss is not finite from batch {first_bad} of epoch {epoch + 1} on (learning rate '
                            f'{self.learning_rate:g}); {rest}. Use a smaller rate.')

    def train_epoch(self, epoch: int, first_batch: int = 0) -> Dict[str, float]:
        """One pass over the data, or the rest of one. Sums are read from the device at the log interval only.

        Returns:
            Mean ``loss``, accuracy ``top1`` in %, and ``images_per_second`` of the pass.

        Raises:
            Interrupted: After a signal, with the state saved.
            UserError: If the loss is not finite.
        """
        args, accelerator = self.args, self.accelerator
        self.loader.set_epoch(epoch)
        self.network.train()
        if first_batch == 0:
            self.sums.zero_()
        steps = len(self.loader)
        start = time.perf_counter()
        bar = tqdm(total=steps, initial=first_batch, desc=f'epoch {epoch + 1}/{self.num_epochs}', unit='batch',
                   leave=False, disable=None if accelerator.is_main_process else True)
        for step, (images, labels) in enumerate(self.loader.batches(first_batch), start=first_batch):
            is_update = (step + 1) % args.grad_accum_steps == 0 or step + 1 == steps
            self.step(images, labels, epoch, step, is_update)
            bar.update()
            if (step + 1) % args.log_interval == 0:
                self.check_finite(epoch)
                bar.set_postfix_str(self._live_line(step + 1, (step + 1 - first_batch) / (time.perf_counter() - start)))
            if is_update and step + 1 < steps:
                self._save_or_stop(Progress(epoch, step + 1))
        bar.close()
        self.check_finite(epoch)
        seconds = time.perf_counter() - start
        images_per_step = args.batch_size * accelerator.num_processes
        sums = accelerator.reduce(self.sums, 'sum') if accelerator.num_processes > 1 else self.sums
        return dict(
            loss=sums[0].item() / steps / accelerator.num_processes,
            top1=100 * sums[1].item() / (steps * images_per_step),
            images_per_second=(steps - first_batch) * images_per_step / seconds,
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int, is_update: bool) -> None:
        """Forward and backward of one batch, and the update when its batches are complete."""
        args = self.args
        steps, accumulate = len(self.loader), args.grad_accum_steps
        share = min(accumulate, steps - step // accumulate * accumulate)  # the last update may be of fewer batches
        with nullcontext() if is_update else self.accelerator.no_sync(self.network):
            logits = self.network(images).float()
            loss = self.criterion(logits, labels)
            self.accelerator.backward(loss / share)
        if is_update:
            if args.clip_grad is not None:
                self.accelerator.unscale_gradients()
                dispatch_clip_grad(
                    model_parameters(self.model, exclude_head='agc' in args.clip_mode), value=args.clip_grad,
                    mode=args.clip_mode)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step_update(epoch * self.updates_per_epoch + step // accumulate + 1)
        loss = loss.detach().to(self.sum_dtype)
        bad = ~loss.isfinite() & (self.sums[2] == 0)
        self.sums += torch.stack(
            [loss, (logits.detach().argmax(1) == labels).sum().to(self.sum_dtype), bad.to(self.sum_dtype) * (step + 1)])

    def _live_line(self, steps: int, rate: float) -> str:
        loss, correct, _ = self.sums.tolist()
        images = self.args.batch_size * self.accelerator.num_processes
        return (f'loss {loss / steps:.3f}, error {100 - 100 * correct / (steps * self.args.batch_size):.2f} %, '
                f'lr {self.learning_rate:.2e}, {rate * images:.0f} images/s')

    def _save_or_stop(self, progress: Progress) -> None:
        """In the middle of an epoch, after an update: save at the interval, save and stop after a signal."""
        interval = self.args.recovery_interval
        signal_number = self._agreed_signal(progress.batch)
        if signal_number or interval and progress.batch % interval == 0:
            folder = self.save(progress)
            if signal_number:
                raise Interrupted(signal_number, folder)

    def _agreed_signal(self, batch: int) -> int:
        """Number of a signal, 0 if none. Several processes ask each other at the log interval, and stop at once."""
        if self.accelerator.num_processes == 1:
            return self.signals.number
        if batch % self.args.log_interval:
            return 0
        numbers = self.accelerator.gather(torch.tensor([self.signals.number], device=self.accelerator.device))
        return int(numbers.max().item())

    def stop_after_epoch(self, progress: Progress, folder: Path) -> None:
        """Stop between two epochs after a signal; the checkpoint of the epoch is written by then."""
        number = self._agreed_signal(0)
        if number and progress.epoch < self.num_epochs:
            raise Interrupted(number, folder)


def train(args: argparse.Namespace, command: str = '') -> Path:
    """Train by options.

    Args:
        args: Options of ``parse_options``.
        command: The command line, for the card.

    Returns:
        The run folder. It holds ``args.yaml``, ``summary.csv``, ``metrics.jsonl``, ``curves.png``, ``k.png``,
        ``checkpoints/`` and the weights folder ``weights/``.

    Raises:
        UserError: If options and data do not fit together, or the loss is no longer finite.
        Interrupted: After SIGTERM or SIGINT, with the state saved.
    """
    start = time.perf_counter()
    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise UserError(f'--device-modules {module} can not be imported ({e}).') from e

    # Device, precision and processes
    accelerator = create_accelerator(args)
    is_main = accelerator.is_main_process
    set_seed(args.seed)

    # Run folder to be, and the checkpoint to go on from
    model = create_model(args)
    folder = _run_folder(args, model)
    store = CheckpointStore(folder / 'checkpoints', keep=args.checkpoint_hist)
    checkpoint = _find_checkpoint(args, folder, store, is_main)

    # Data
    data_config = resolve_input_config(args, model)
    with accelerator.local_main_process_first():
        train_set = load_split(args, args.train_split, data_config, is_main)
        eval_set = load_split(args, args.val_split, data_config, is_main) if args.val_split else None
    for data in (train_set, eval_set):
        if data is not None:
            check_labels(data, model.num_classes)
    train_loader = create_loader(args, train_set, data_config, accelerator, is_training=True)
    eval_loader = create_loader(args, eval_set, data_config, accelerator) if eval_set else None

    # Network, optimizer, schedule
    describe(model, tag=args.tag or None, class_names=train_set.class_names, **data_config)
    model.to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    set_learning_rate(args, accelerator.num_processes)
    set_seed(args.seed, device_specific=True)  # each process drops other paths
    signals = StopSignals()
    training = Training(args, accelerator, model, train_loader, store, signals)

    # Run folder
    accelerator.wait_for_everyone()
    log = RunLog(folder)
    if is_main:
        _create_run_folder(folder, args, resumed=checkpoint is not None)
        log.truncate(checkpoint.progress.epoch if checkpoint else 0)
    progress = training.resume(checkpoint) if checkpoint else Progress()
    if is_main:
        _announce(training, train_set, eval_set, folder, checkpoint)

    # Epochs
    evaluation: Optional[Dict[str, float]] = None
    with signals:
        for epoch in range(progress.epoch, training.num_epochs):
            metrics = training.train_epoch(epoch, progress.batch if epoch == progress.epoch else 0)
            lr = training.learning_rate
            last = epoch + 1 == training.num_epochs
            evaluation = None
            if eval_loader is not None and (last or (epoch + 1) % args.val_interval == 0):
                training.network.eval()
                evaluation = evaluate(training.network, eval_loader, reduce=_reducer(accelerator))
            if training.scheduler is not None:
                training.scheduler.step(epoch + 1, evaluation['top1'] if evaluation else None)
            if is_main:
                log.append(epoch, metrics, evaluation, lr, _k_values(model))
                _print_epoch(epoch, training.num_epochs, metrics, evaluation, lr)
            saved = training.save(Progress(epoch + 1))
            training.stop_after_epoch(Progress(epoch + 1), saved)

    # Weights and pictures
    if is_main:
        log.plot()
        seen = evaluation or (log.rows()[-1]['eval'] if log.rows() else None)
        save_weights(args, model, folder, eval_loader, seen, training.num_epochs, time.perf_counter() - start, command,
                     accelerator.device, accelerator.num_processes)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _run_folder(args: argparse.Namespace, model: TimmModel) -> Path:
    if args.resume not in ('', 'auto'):
        return Path(args.resume).parent.parent
    if args.resume == 'auto' and not args.experiment:
        raise UserError('--resume auto looks in the folder of a run; name it with --experiment.')
    size = model.pretrained_cfg['input_size'][-1]
    name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}-{size}'
    return Path(args.output or 'output/train') / name


def _find_checkpoint(args: argparse.Namespace, folder: Path, store: CheckpointStore,
                     is_main: bool) -> Optional[Checkpoint]:
    """The checkpoint to go on from, None to start anew."""
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise UserError(f'The run folder {folder} can not be made, a file is in its way; choose another --output.')
    if not args.resume:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f'The run folder {folder} holds another run; give another --experiment, go on with '
                            '--resume auto, or remove it.')
        return None
    if (folder / 'args.yaml').is_file():
        _compare_options(args, folder)
    if args.resume != 'auto':
        return store.read(Path(args.resume))
    return store.newest(tell=tqdm.write if is_main else lambda line: None)


def _compare_options(args: argparse.Namespace, folder: Path) -> None:
    before = yaml.safe_load((folder / 'args.yaml').read_text())
    now = yaml.safe_load(yaml.safe_dump(vars(args)))
    differing = [name for name in now if name not in FREE_OPTIONS and now[name] != before.get(name, now[name])]
    if differing:
        shown = ', '.join(f'{name} (was {before[name]}, is {now[name]})' for name in differing)
        raise UserError(f'The run in {folder} was started with other options: {shown}; give the same, or start another '
                        'run with another --experiment.')


def _create_run_folder(folder: Path, args: argparse.Namespace, resumed: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            options = {name: value for name, value in vars(args).items() if name not in ('config', 'resume')}
            write_text(folder / 'args.yaml', yaml.safe_dump(options, sort_keys=True))
    except OSError as e:
        raise UserError(f'The run folder {folder} can not be written ({e}); choose another place with --output.') from e


def _announce(training: Training, train_set: ImageSet, eval_set: Optional[ImageSet], folder: Path,
              checkpoint: Optional[Checkpoint]) -> None:
    args, model, accelerator = training.args, training.model, training.accelerator
    parameters = sum(p.numel() for p in model.parameters())
    print(f'{args.model}: {parameters:,} parameters, {model.num_classes} classes, images '
          f"{'x'.join(map(str, model.pretrained_cfg['input_size']))}")
    print(f"{len(train_set):,} images to train on, {len(eval_set) if eval_set else 0:,} to validate on; "
          f'{accelerator.num_processes} process(es) on {accelerator.device}, precision {accelerator.mixed_precision}, '
          f"{'compiled by ' + args.torchcompile if args.torchcompile else 'eager'}; run folder {folder}", flush=True)
    if checkpoint is not None:
        print(f'Going on from {checkpoint.folder}: epoch {checkpoint.progress.epoch + 1}, batch '
              f'{checkpoint.progress.batch + 1}', flush=True)


def _reducer(accelerator: Any) -> Any:
    return (lambda totals: accelerator.reduce(totals, 'sum')) if accelerator.num_processes > 1 else None


def _k_values(model: TimmModel) -> Dict[str, List[float]]:
    return {name: k.tolist() for name, k in model.k_values().items()} if hasattr(model, 'k_values') else {}


def _print_epoch(epoch: int, num_epochs: int, train: Dict[str, float], evaluation: Optional[Dict[str, float]],
                 lr: float) -> None:
    test = ''
    if evaluation:
        test = f" | test loss {evaluation['loss']:.4f} error {100 - evaluation['top1']:6.2f} %"
    tqdm.write(f"epoch {epoch + 1:3d}/{num_epochs} | lr {lr:.2e} | train loss {train['loss']:.4f} "
               f"error {100 - train['top1']:6.2f} %{test} | {train['images_per_second']:.0f} images/s")
