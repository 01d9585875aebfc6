"""What a training is made of, built from its options: accelerator, network, data, loaders, optimizer."""
import argparse
import math
import os
import shutil
from typing import Any, Dict, List

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs

from timm_lm.data import ImageSet, load_images
from timm_lm.errors import UserError
from timm_lm.hub import TimmModel, check_name, load_model
from timm_lm.loader import MemoryLoader


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Device, precision, processes and compilation.

    Raises:
        UserError: If compilation is asked for and there is no compiler.
    """
    on_cpu = args.device == 'cpu' or not _has_accelerator()
    plugin = None
    if args.torchcompile:
        _check_backend(args.torchcompile, on_cpu)
        plugin = TorchDynamoPlugin(backend=args.torchcompile, mode=args.torchcompile_mode or 'default', dynamic=False)
    AcceleratorState._reset_state()  # of an earlier training in this process, maybe in another precision
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else 'no'
    # Accelerate joins processes on the CPU only if told that it is the CPU
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, dynamo_plugin=plugin)
    if args.device not in (None, 'cpu', accelerator.device.type):
        raise UserError(f'--device {args.device} is not what Accelerate chose ({accelerator.device}); leave it out, or '
                        'choose devices by `accelerate launch`.')
    return accelerator


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or (
        hasattr(torch, 'accelerator') and torch.accelerator.is_available())


def _check_backend(backend: str, on_cpu: bool) -> None:
    """The backend of torch.compile, and the compiler that its code for the CPU is in need of."""
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(f"There is no backend '{backend}' of torch.compile; there are: {', '.join(backends)}.")
    if not on_cpu or backend != 'inductor':
        return
    if not any(shutil.which(name) for name in (os.environ.get('CXX', 'g++'), 'g++', 'clang++', 'cl')):
        raise UserError('--torchcompile needs a C++ compiler on the CPU and there is none; install g++, or run eagerly '
                        'with --no-torchcompile.')


def create_model(args: argparse.Namespace) -> TimmModel:
    """The network, with its first weights.

    Raises:
        UserError: If there is no such network, it does not take the options, or the weights can not be loaded.
    """
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
        model = load_model(args.model, **kwargs) if args.pretrained else _create(args.model, kwargs)
    except UserError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{args.model} can not be made with these options ({e}).') from e
    if args.initial_checkpoint:
        try:
            load_checkpoint(model, args.initial_checkpoint, weights_only=True)
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as e:
            reason = ' '.join(str(e).split())[:200] or type(e).__name__
            raise UserError(f'--initial-checkpoint {args.initial_checkpoint} could not be loaded ({reason}).') from e
    return model


def _create(name: str, kwargs: Dict[str, Any]) -> TimmModel:
    check_name(name)
    return timm.create_model(name, **kwargs)


def resolve_input_config(args: argparse.Namespace, model: TimmModel) -> Dict[str, Any]:
    """Size, mean, standard deviation and resizing of the images: the options, then the network's own.

    Raises:
        UserError: If they do not fit the channels of the network.
    """
    in_chans = getattr(model, 'in_chans', 3)
    try:
        config = resolve_data_config(dict(vars(args), in_chans=in_chans), model=model)
    except AssertionError as e:
        raise UserError(f'--mean and --std need one value, or one for each of the {in_chans} channels.') from e
    config.pop('crop_mode', None)
    if config['input_size'][0] != in_chans:
        config['input_size'] = (in_chans, *config['input_size'][1:])
    if any(len(config[key]) != in_chans for key in ('mean', 'std')):
        raise UserError(f'The mean and standard deviation of {args.model} are for {len(config["mean"])} channels, the '
                        f'images have {in_chans}; give --mean and --std.')
    return config


def load_split(args: argparse.Namespace, split: str, data_config: Dict[str, Any], show: bool) -> ImageSet:
    """A decoded split of the data that the options name."""
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


def create_loader(args: argparse.Namespace, data: ImageSet, data_config: Dict[str, Any], accelerator: Accelerator,
                   is_training: bool = False) -> MemoryLoader:
    """Batches of a split for this process, the split on its device."""
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


def set_learning_rate(args: argparse.Namespace, num_processes: int) -> None:
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
