"""A training from options to a run folder: data, network, optimizer, loop, weights.

The loop is an ordinary one on Accelerate, which owns device, precision and processes.
"""
import argparse
import importlib
import json
import math
import os
import shlex
import shutil
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin, set_seed
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import dispatch_clip_grad
from torch import nn
from tqdm import tqdm

import timm_lm
from timm_lm.data import ImageSet, MemoryLoader, load_images
from timm_lm.errors import UserError
from timm_lm.hub import (
    TimmModel,
    atomic_folder,
    check_name,
    describe,
    load_folder,
    load_model,
    render_card,
    save_folder,
)

from .evaluate import evaluate
from .report import RunLog

DATASET_NAMES = {'uoft-cs/cifar10': 'CIFAR-10', 'uoft-cs/cifar100': 'CIFAR-100'}


def train(args: argparse.Namespace, command: str = '') -> Path:
    """Train by options.

    Args:
        args: Options of ``parse_options``.
        command: The command line, for the card.

    Returns:
        The run folder. It holds ``args.yaml``, ``summary.csv``, ``metrics.jsonl``, ``curves.png``, ``k.png`` and the
        weights folder ``weights/``.

    Raises:
        UserError: If options and data do not fit together, or the loss is no longer finite.
    """
    start = time.perf_counter()
    for module in args.device_modules or ():
        importlib.import_module(module)

    # Device, precision and processes
    accelerator = _create_accelerator(args)
    set_seed(args.seed)

    # Data
    model = _create_model(args)
    data_config = _resolve_data_config(args, model)
    show = accelerator.is_main_process
    with accelerator.local_main_process_first():
        train_set = _load_split(args, args.train_split, data_config, show)
        eval_set = _load_split(args, args.val_split, data_config, show) if args.val_split else None
    for data in (train_set, eval_set):
        _check_labels(data, model.num_classes)
    train_loader = _create_loader(args, train_set, data_config, accelerator, is_training=True)
    eval_loader = _create_loader(args, eval_set, data_config, accelerator) if eval_set else None

    # Network, optimizer, schedule
    describe(model, tag=args.tag or None, class_names=train_set.class_names, **data_config)
    model.to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    _set_learning_rate(args, accelerator.num_processes)
    optimizer = create_optimizer(args, model)
    updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    network, prepared_optimizer = accelerator.prepare(model, optimizer)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)

    # Run folder
    folder = _run_folder(args, model)
    log = RunLog(folder)
    if accelerator.is_main_process:
        _create_run_folder(folder, args)
        _announce(accelerator, args, model, train_set, eval_set, folder)

    # Epochs
    evaluation: Optional[Dict[str, float]] = None
    for epoch in range(num_epochs):
        train_loader.set_epoch(epoch)
        metrics = _train_epoch(
            args, accelerator, network, criterion, prepared_optimizer, scheduler, train_loader, epoch, num_epochs)
        lr = optimizer.param_groups[0]['lr']
        last = epoch + 1 == num_epochs
        evaluation = None
        if eval_loader is not None and (last or (epoch + 1) % args.val_interval == 0):
            network.eval()
            evaluation = evaluate(network, eval_loader, reduce=_reducer(accelerator))
        if scheduler is not None:
            scheduler.step(epoch + 1, evaluation['top1'] if evaluation else None)
        if accelerator.is_main_process:
            k = {name: value.tolist() for name, value in model.k_values().items()} if hasattr(model, 'k_values') else {}
            log.append(epoch, metrics, evaluation, lr, k)
            _print_epoch(epoch, num_epochs, metrics, evaluation, lr)

    # Weights and pictures
    if accelerator.is_main_process:
        log.plot()
        _save_weights(args, model, folder, eval_loader, evaluation, num_epochs, time.perf_counter() - start, command)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _create_accelerator(args: argparse.Namespace) -> Accelerator:
    plugin = None
    if args.torchcompile:
        on_cpu = args.device == 'cpu' or not torch.cuda.is_available()
        if on_cpu and args.torchcompile == 'inductor':
            _check_compiler()
        plugin = TorchDynamoPlugin(backend=args.torchcompile, mode=args.torchcompile_mode or 'default', dynamic=False)
    AcceleratorState._reset_state()  # of an earlier training in this process, maybe in another precision
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else 'no'
    return Accelerator(mixed_precision=precision, cpu=args.device == 'cpu', dynamo_plugin=plugin)


def _check_compiler() -> None:
    """torch.compile writes C++ for the CPU."""
    if not any(shutil.which(name) for name in (os.environ.get('CXX', 'g++'), 'g++', 'clang++', 'cl')):
        raise UserError('--torchcompile needs a C++ compiler on the CPU and there is none; install g++, or run eagerly '
                        'with --no-torchcompile.')


def _create_model(args: argparse.Namespace) -> TimmModel:
    in_chans = args.in_chans
    if in_chans is None and args.input_size is not None:
        in_chans = args.input_size[0]
    kwargs = dict(
        num_classes=args.num_classes,
        in_chans=in_chans,
        drop_rate=args.drop or None,
        drop_path_rate=args.drop_path,
        global_pool=args.gp,
    )
    kwargs = {name: value for name, value in kwargs.items() if value is not None} | args.model_kwargs
    try:
        model = load_model(args.model, pretrained=True, **kwargs) if args.pretrained else _create(args.model, kwargs)
        if args.initial_checkpoint:
            load_checkpoint(model, args.initial_checkpoint)
    except (TypeError, ValueError) as e:
        raise UserError(f'{args.model} can not be made with these options ({e}).') from e
    except (OSError, RuntimeError, SafetensorError) as e:
        if isinstance(e, UserError):
            raise
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise UserError(f'--initial-checkpoint {args.initial_checkpoint} could not be loaded ({reason}).') from e
    return model


def _create(name: str, kwargs: Dict[str, Any]) -> TimmModel:
    check_name(name)
    return timm.create_model(name, **kwargs)


def _resolve_data_config(args: argparse.Namespace, model: TimmModel) -> Dict[str, Any]:
    try:
        config = resolve_data_config(dict(vars(args), in_chans=model.in_chans), model=model)
    except AssertionError as e:
        raise UserError(f'--mean and --std need one value, or one for each of the {model.in_chans} channels.') from e
    config.pop('crop_mode', None)
    if config['input_size'][0] != model.in_chans:
        config['input_size'] = (model.in_chans, *config['input_size'][1:])
    if any(len(config[key]) != model.in_chans for key in ('mean', 'std')):
        raise UserError(f'The mean and standard deviation of {args.model} are for {len(config["mean"])} channels, the '
                        f'images have {model.in_chans}; give --mean and --std.')
    return config


def _load_split(args: argparse.Namespace, split: str, data_config: Dict[str, Any], show: bool) -> ImageSet:
    return load_images(
        split,
        data_dir=args.data_dir,
        dataset=args.dataset,
        input_size=data_config['input_size'],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
        input_key=args.input_key,
        target_key=args.target_key,
        class_map=args.class_map,
        download=args.dataset_download,
        progress=show,
    )


def _check_labels(data: Optional[ImageSet], num_classes: int) -> None:
    if data is None:
        return
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(f'The data has labels from {low} to {high}, the model has {num_classes} classes; set '
                        f'--num-classes {high + 1}.')


def _create_loader(args: argparse.Namespace, data: ImageSet, data_config: Dict[str, Any], accelerator: Accelerator,
                   is_training: bool = False) -> MemoryLoader:
    device = accelerator.device
    batch_size = args.batch_size if is_training else args.validation_batch_size or args.batch_size
    return MemoryLoader(
        ImageSet(data.images.to(device), data.labels.to(device), data.class_names),
        batch_size,
        data_config['mean'],
        data_config['std'],
        is_training=is_training,
        padding=args.pad_crop,
        hflip=args.hflip,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        channels_last=args.channels_last,
    )


def _set_learning_rate(args: argparse.Namespace, num_processes: int) -> None:
    """timm's rule: without --lr, the base rate scaled by the size of an update, by its root for adaptive optimizers."""
    if args.lr is not None:
        return
    ratio = args.batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    args.lr = args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


def create_optimizer(args: argparse.Namespace, model: TimmModel) -> torch.optim.Optimizer:
    """The optimizer of timm's factory. Weight decay spares ``model.no_weight_decay()`` whatever else it is put on.

    With ``filter_bias_and_bn: false`` older versions of timm decay that too, so the groups are made here.
    """
    kwargs = optimizer_kwargs(cfg=args) | args.opt_kwargs
    if not kwargs.get('filter_bias_and_bn', True) and args.layer_decay is None:
        exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()

        def groups(model: TimmModel) -> List[Dict[str, Any]]:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            spared = [p for name, p in trained if name in exempt]
            decayed = dict(params=[p for name, p in trained if name not in exempt], weight_decay=args.weight_decay)
            return [decayed, dict(params=spared, weight_decay=0.)] if spared else [decayed]

        kwargs['param_group_fn'] = groups
    return create_optimizer_v2(model, **kwargs)


def _run_folder(args: argparse.Namespace, model: TimmModel) -> Path:
    size = model.pretrained_cfg['input_size'][-1]
    name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}-{size}'
    return Path(args.output or 'output/train') / name


def _create_run_folder(folder: Path, args: argparse.Namespace) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f'The run folder {folder} holds another run; give another --experiment, or remove it.')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args), sort_keys=True))


def _announce(accelerator: Accelerator, args: argparse.Namespace, model: TimmModel, train_set: ImageSet,
              eval_set: Optional[ImageSet], folder: Path) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    print(f'{args.model}: {parameters:,} parameters, {model.num_classes} classes, images '
          f"{'x'.join(map(str, model.pretrained_cfg['input_size']))}")
    print(f"{len(train_set):,} images to train on, {len(eval_set) if eval_set else 0:,} to validate on; "
          f'{accelerator.num_processes} process(es) on {accelerator.device}, precision {accelerator.mixed_precision}, '
          f"{'compiled by ' + args.torchcompile if args.torchcompile else 'eager'}; run folder {folder}", flush=True)


def _reducer(accelerator: Accelerator) -> Any:
    return (lambda totals: accelerator.reduce(totals, 'sum')) if accelerator.num_processes > 1 else None


def _train_epoch(args: argparse.Namespace, accelerator: Accelerator, network: nn.Module, criterion: nn.Module,
                 optimizer: Any, scheduler: Any, loader: MemoryLoader, epoch: int,
                 num_epochs: int) -> Dict[str, float]:
    """One pass over the data. Loss and errors gather on the device and are read at the log interval."""
    network.train()
    steps = len(loader)
    accumulate = args.grad_accum_steps
    updates_per_epoch = -(-steps // accumulate)
    totals = torch.zeros(2, device=accelerator.device, dtype=torch.float64)  # summed loss, correct images
    start = time.perf_counter()
    bar = tqdm(total=steps, desc=f'epoch {epoch + 1}/{num_epochs}', unit='batch', leave=False,
               disable=None if accelerator.is_main_process else True)
    for step, (images, labels) in enumerate(loader):
        is_update = (step + 1) % accumulate == 0 or step + 1 == steps
        # the last update of an epoch may be of fewer batches
        share = min(accumulate, steps - step // accumulate * accumulate)
        with nullcontext() if is_update else accelerator.no_sync(network):
            logits = network(images)
            loss = criterion(logits.float(), labels)
            accelerator.backward(loss / share)
        if is_update:
            if args.clip_grad is not None:
                accelerator.unscale_gradients()
                dispatch_clip_grad(network.parameters(), value=args.clip_grad, mode=args.clip_mode)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step_update(epoch * updates_per_epoch + step // accumulate + 1)
        totals += torch.stack([loss.detach().double(), (logits.detach().argmax(1) == labels).sum().double()])
        if (step + 1) % args.log_interval == 0 or step + 1 == steps:
            done = (step + 1) * args.batch_size
            mean_loss, top1 = totals[0].item() / (step + 1), 100 * totals[1].item() / done
            if not math.isfinite(mean_loss):
                raise UserError(f'The loss is not finite in epoch {epoch + 1}, by batch {step + 1} (learning rate '
                                f"{optimizer.param_groups[0]['lr']:g}); use a smaller rate.")
            rate = done * accelerator.num_processes / (time.perf_counter() - start)
            bar.set_postfix_str(f'loss {mean_loss:.3f}, error {100 - top1:.2f} %, {rate:.0f} images/s')
        bar.update()
    bar.close()
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals, 'mean')
    images_done = steps * args.batch_size
    seconds = time.perf_counter() - start
    return dict(
        loss=totals[0].item() / steps,
        top1=100 * totals[1].item() / images_done,
        images_per_second=images_done * accelerator.num_processes / seconds,
    )


def _print_epoch(epoch: int, num_epochs: int, train: Dict[str, float], evaluation: Optional[Dict[str, float]],
                 lr: float) -> None:
    test = ''
    if evaluation:
        test = f" | test loss {evaluation['loss']:.4f} error {100 - evaluation['top1']:6.2f} %"
    tqdm.write(f"epoch {epoch + 1:3d}/{num_epochs} | lr {lr:.2e} | train loss {train['loss']:.4f} "
               f"error {100 - train['top1']:6.2f} %{test} | {train['images_per_second']:.0f} images/s")


def _save_weights(args: argparse.Namespace, model: TimmModel, folder: Path, eval_loader: Optional[MemoryLoader],
                  seen: Optional[Dict[str, float]], epochs: int, seconds: float, command: str) -> None:
    """Write the weights folder, then count the errors of what was written: in float32, eager, on the CPU."""
    architecture = args.model.partition('.')[0]
    if ':' in args.model:  # hf-hub:, local-dir:
        architecture = model.pretrained_cfg['architecture']
    name = f'{architecture}.{args.tag}' if args.tag else architecture
    model_args = dict(args.model_kwargs)
    if args.gp:
        model_args['global_pool'] = args.gp

    dataset = args.dataset.removeprefix('hfds/') if args.dataset.startswith('hfds/') else args.dataset

    def card(result: Optional[Dict[str, float]]) -> str:
        return render_card(
            name,
            dataset=dataset,
            dataset_name=DATASET_NAMES.get(dataset, dataset or Path(args.data_dir or 'images').name),
            error=100 - result['top1'] if result else None,
            error_count=int(result['errors']) if result else None,
            num_images=int(result['images']) if result else None,
            seen_error=100 - seen['top1'] if seen else None,
            parameters=sum(p.numel() for p in model.parameters()),
            input_size=model.pretrained_cfg['input_size'],
            k=_k_summary(model),
            command=command,
            epochs=epochs,
            seed=args.seed,
            minutes=round(seconds / 60, 1),
            hardware=_hardware(),
            versions=f'timm-lm {timm_lm.__version__}, timm {timm.__version__}, torch {torch.__version__}',
        )

    weights = save_folder(model, folder / 'weights', card(None), model_args)
    if eval_loader is None:
        return
    loader = MemoryLoader(
        ImageSet(eval_loader.data.images.cpu(), eval_loader.data.labels.cpu()), eval_loader.batch_size,
        eval_loader.mean, eval_loader.std)
    result = evaluate(load_folder(weights), loader)
    with atomic_folder(weights) as temporary:
        shutil.copytree(weights, temporary, dirs_exist_ok=True)
        (temporary / 'README.md').write_text(card(result), encoding='utf-8')
    (folder / 'result.json').write_text(json.dumps(dict(result, seen_in_training=seen), indent=2) + '\n')
    tqdm.write(f"{weights}: error {100 - result['top1']:.2f} % ({result['errors']} of {result['images']} images, "
               'float32, eager, on the CPU)')


def _k_summary(model: TimmModel) -> str:
    if not hasattr(model, 'k_values'):
        return ''
    values = [v for k in model.k_values().values() for v in k.tolist()]
    return f'{min(values):.3f} to {max(values):.3f}' if values else ''


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        name = 'CPU'
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def command_line(argv: List[str]) -> str:
    """The command as a user would type it again: with DIR for the data's folder, without the run's folder."""
    shown: List[str] = []
    words = iter(argv)
    for word in words:
        option, _, value = word.partition('=')
        if option in ('--data-dir', '--output', '--experiment'):
            if not value:
                next(words, None)
            shown += [option, 'DIR'] if option == '--data-dir' else []
        else:
            shown.append(word)
    return 'timm-lm ' + shlex.join(shown)
