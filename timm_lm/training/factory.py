"""What a training is made of, built from its options: accelerator, network, optimizer."""
import argparse
import importlib
import importlib.util
import inspect
import math
import os
from datetime import timedelta
from pathlib import Path
from pickle import PickleError
from typing import Any, Dict, List, Mapping, Optional

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    parse_flag_from_env,
)
from safetensors import SafetensorError
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs, param_groups_weight_decay

from timm_lm.compiler import check_compiler
from timm_lm.depth import grow
from timm_lm.errors import UserError, one_line
from timm_lm.model_config import TimmModel
from timm_lm.names import load_model, timm_source
from timm_lm.precision import no_bfloat16

from .option_rules import option_name
from .options import turn_off

# What loading a file of weights fails with.
_UNREADABLE = (AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError, PickleError,
               SafetensorError)
# Whether timm spares what a network names from weight decay with filter_bias_and_bn=False too.
_TIMM_SPARES = 'weight_decay_exclude_1d' in inspect.signature(param_groups_weight_decay).parameters
# Processes wait for the first one while it decodes the data and while it counts the errors of the final weights.
LONGEST_WAIT = timedelta(hours=4)


def import_modules(args: argparse.Namespace) -> None:
    """Import the modules that the options name, as some register networks.

    Raises:
        UserError: If there is none of this name, or it can not be imported.
    """
    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError, TypeError, ValueError) as e:  # the latter two of a name that none can have
            raise UserError(f"--device-modules '{module}' can not be imported ({one_line(e)}).") from e


def settle_precision(args: argparse.Namespace) -> str:
    """Turn ``--amp`` in bfloat16 off on a device that has no instructions for it, as every recipe asks for it.

    Returns:
        What the user should know of it, '' if nothing was changed.

    Raises:
        UserError: If the CPU is to train in float16.
    """
    if not args.amp:
        return ''
    on_cpu = _on_cpu(args)
    if args.amp_dtype == 'float16':
        if on_cpu:
            raise UserError('--amp in float16 is for GPUs; on the CPU give --amp-dtype bfloat16, or --no-amp.')
        return ''
    reason = no_bfloat16('cpu' if on_cpu else 'cuda' if torch.cuda.is_available() else 'another')
    if not reason:
        return ''
    turn_off(args, 'amp')
    return f'{reason}; trained in float32, as by --no-amp.'


def create_accelerator(args: argparse.Namespace, folder: Path) -> Accelerator:
    """Device, precision, processes, compilation and trackers.

    Args:
        args: Options.
        folder: The run folder, where trackers write.

    Raises:
        UserError: If compilation is asked for and there is no compiler, or a tracker is not installed.
    """
    on_cpu = _on_cpu(args)
    for name in ('deepspeed', 'megatron_lm', 'parallelism_config'):
        if os.environ.get(f'ACCELERATE_USE_{name.upper()}', 'false').lower() == 'true':
            raise UserError(f"Accelerate's settings ask for {name}, which this engine does not know; take DDP or FSDP.")
    plugin = TorchDynamoPlugin(backend='no')  # else one of Accelerate's own settings is taken
    if args.torchcompile:
        check_compiler(args.torchcompile, args.torchcompile_mode, on_cpu)
        plugin = TorchDynamoPlugin(backend=args.torchcompile, mode=args.torchcompile_mode or 'default', dynamic=False)
    # of an earlier training in this process, maybe in another precision or on another device
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else 'no'
    trackers = _trackers(args)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=on_cpu,  # else it does not join processes on the CPU
            dynamo_plugin=plugin,
            log_with=trackers or None,
            project_dir=folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb),
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )
    except ValueError as e:  # of a precision that the device does not have
        raise UserError(f'Accelerate can not be set up ({e}); give --no-amp, or change its settings.') from e
    if accelerator.device.type in ('cuda', 'xpu') and accelerator.device.index is not None:
        # Accelerate does not for that of ACCELERATE_TORCH_DEVICE; random states are those of the current one
        getattr(torch, accelerator.device.type).set_device(accelerator.device)
    if args.torchcompile and accelerator.num_processes > 1:
        # Small networks gain nothing from graphs that are cut where gradients are sent, and older PyTorch loses sight
        # of the weights in them: CUDA graphs are recorded anew at each step, and gradients may be wrong.
        torch._dynamo.config.optimize_ddp = False
    fsdp = getattr(accelerator.state, 'fsdp_plugin', None)
    if fsdp is not None:  # each process makes the whole network; Accelerate would fail to send running statistics
        fsdp.cpu_ram_efficient_loading = False
        fsdp.mixed_precision_policy = None  # lower precision is that of autocast, as without FSDP
        if getattr(fsdp, 'fsdp_version', 1) == 1 and not fsdp.use_orig_params:
            raise UserError('FSDP of version 1 hides the parameters from the optimizer; add '
                            '--fsdp_use_orig_params true, or in newer Accelerate --fsdp_version 2.')
        if getattr(fsdp.cpu_offload, 'offload_params', hasattr(fsdp.cpu_offload, 'pin_memory')):
            raise UserError('FSDP that keeps parameters on the CPU can not go on from a checkpoint, as running '
                            'statistics are on the device; leave --fsdp_offload_params out.')
    if args.device is not None and not _is_named(accelerator.device, args.device):
        raise UserError(f'--device {args.device} is not what Accelerate chose ({accelerator.device}); leave it out, or '
                        'choose devices by `accelerate launch`.')
    if accelerator.device.type == 'cuda':  # as timm's script
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _is_named(device: torch.device, name: str) -> bool:
    try:
        named = torch.device(name)
    except RuntimeError as e:
        raise UserError(f'--device {name} is no device of PyTorch ({one_line(e)}).') from e
    return named.type == device.type and named.index in (None, device.index or 0)


def _trackers(args: argparse.Namespace) -> List[str]:
    names = [name for name in ('tensorboard', 'wandb') if getattr(args, f'log_{name}')]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log-{name} needs the package {name}; install `pip install 'timm-lm[trackers]'`.")
    return names


def _on_cpu(args: argparse.Namespace) -> bool:
    return args.device == 'cpu' or parse_flag_from_env('ACCELERATE_USE_CPU') or not _has_accelerator()


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or (
        hasattr(torch, 'accelerator') and torch.accelerator.is_available())


# Keywords of a network that have an option of another name.
_OPTIONS = dict(drop_rate='drop', drop_path_rate='drop_path', drop_block_rate='drop_block', global_pool='gp')


def _by_options(reason: str) -> str:
    """Why a network can not be made, with the names of options in the place of its keywords'."""
    for name, option in _OPTIONS.items():
        reason = reason.replace(f"keyword argument '{name}'", f'option {option_name(option)}')
    return reason


def create_again(facts: Mapping[str, Any], **kwargs: Any) -> TimmModel:
    """The network of a run, with new weights, whatever became of those that it began with.

    Args:
        facts: What ``run_facts`` told of it.
        **kwargs: Keywords beside those that are told.
    """
    sizes = {name: facts[name] for name in ('num_classes', 'in_chans') if facts[name] is not None}
    cfg = dict(facts['pretrained_cfg'])
    model: TimmModel = timm.create_model(cfg['architecture'], **kwargs | sizes | facts['model_args'])
    model.pretrained_cfg = cfg
    return model


def create_model(args: argparse.Namespace, recorded: Optional[Mapping[str, Any]] = None) -> TimmModel:
    """The network, with its first weights.

    Args:
        args: Options.
        recorded: What the run told of its network, if it goes on: the first weights are not loaded again then.

    Raises:
        UserError: If there is no such network, it does not take the options, or the weights can not be loaded.
    """
    in_chans = args.in_chans
    if in_chans is None and args.input_size is not None:
        in_chans = args.input_size[0]
    kwargs = dict(
        num_classes=args.num_classes,
        in_chans=in_chans,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block or None,
        global_pool=args.gp,
    )
    for name in sorted(kwargs.keys() & args.model_kwargs.keys()):
        raise UserError(f'--model-kwargs has {name}; give it by {option_name(_OPTIONS.get(name, name))}.')
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if recorded:  # with its own --model-kwargs; others are told when the options are compared
        try:
            return create_again(recorded, **kwargs)
        except (*_UNREADABLE, AssertionError) as e:
            raise UserError(f'The network of the run can not be made again ({one_line(e, 300)}).') from e
    kwargs |= args.model_kwargs
    for name in ('pretrained_path', 'initial_checkpoint'):
        path = getattr(args, name)
        if path and not Path(path).is_file():
            what = 'is a folder; --model takes weights folders' if Path(path).is_dir() else 'does not exist'
            raise UserError(f"--{name.replace('_', '-')} {path} {what}. Give a file of weights.")
    if args.pretrained_path:
        overlay = dict(file=args.pretrained_path, num_classes=-1)  # -1: the head is made anew
        kwargs.update(pretrained=True, pretrained_cfg_overlay=overlay)
    try:
        if args.pretrained and not args.pretrained_path:
            model = load_model(args.model, **kwargs)
        else:
            model = timm.create_model(timm_source(args.model), **kwargs)
    except UserError as e:
        raise UserError(_by_options(str(e))) from e
    except (*_UNREADABLE, AssertionError) as e:
        raise UserError(f'{args.model} can not be made with these options ({_by_options(one_line(e, 300))}).') from e
    if args.initial_checkpoint:
        try:
            load_checkpoint(model, args.initial_checkpoint, weights_only=True)
        except _UNREADABLE as e:
            raise UserError(f'--initial-checkpoint {args.initial_checkpoint} could not be loaded ({one_line(e)}).'
                            ) from e
    if args.grow_from:
        try:
            shallow = load_model(args.grow_from)
            grow(shallow, model)
            model.pretrained_cfg['license'] = shallow.pretrained_cfg.get('license')
        except UserError as e:
            raise UserError(f'--grow-from {args.grow_from} can not start {args.model}: {e}') from e
    _init_head(args, model)
    return model


@torch.no_grad()
def _init_head(args: argparse.Namespace, model: TimmModel) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    head = model.get_classifier()
    if any(getattr(head, name, None) is None for name in ('weight', 'bias')):
        raise UserError(f'The head of {args.model} is no layer with a weight and a bias; leave --head-init-scale and '
                        '--head-init-bias out.')
    if args.head_init_scale is not None:
        head.weight.mul_(args.head_init_scale)
        head.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        head.bias.fill_(args.head_init_bias)


def share_batch_statistics(args: argparse.Namespace, model: TimmModel, accelerator: Accelerator) -> TimmModel:
    """Batch norms whose statistics are those of all processes, if the options ask for them.

    Raises:
        UserError: On the CPU, where PyTorch has none.
    """
    if not args.sync_bn or accelerator.num_processes == 1:
        return model
    if accelerator.device.type == 'cpu':
        raise UserError('--sync-bn needs GPUs; leave it out.')
    return convert_sync_batchnorm(model)


def set_learning_rate(args: argparse.Namespace, num_processes: int) -> None:
    """timm's rule: without --lr, the base rate scaled by the size of an update, by its root for adaptive optimizers."""
    if args.lr is not None:
        return
    ratio = args.batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    args.lr = args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


def can_fuse(name: str, device_type: str = 'cpu') -> bool:
    """Whether an optimizer of timm's factory is one of PyTorch's that updates all weights of a device by one kernel."""
    if device_type == 'mps':
        return False
    if name == 'adagrad' and device_type != 'cpu':  # older PyTorch has its kernel for the CPU alone
        return False
    return 'fused' in inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters


def _check_optimizer(name: str) -> None:
    if name.startswith('kron') or name == 'adahessian':
        why = 'its state can not be saved exactly' if name.startswith('kron') else 'it needs second derivatives'
        raise UserError(f'--opt {name} is refused: {why}; choose another of timm.optim.list_optimizers().')


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give fused SGD its momentum of zero before the first step.

    If float16 overflows in that step, as it often does, the fused kernel leaves the momentum that it was to begin as
    the memory was. From zero the first step is the same.
    """
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)  # within timm's Lookahead
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        if group['momentum'] and group['fused']:  # others leave the step out
            for p in group['params']:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def create_optimizer(args: argparse.Namespace, model: TimmModel, sharded: bool = False) -> torch.optim.Optimizer:
    """The optimizer of timm's factory, fused where PyTorch can (and ``sharded`` weights allow it).

    Weight decay spares ``model.no_weight_decay()`` whatever else it is put on. With ``filter_bias_and_bn: false`` older
    versions of timm decay that too, so the groups are made here for them.

    Raises:
        UserError: If it is one that this engine can not train with or not go on with, or ``opt_kwargs`` has what an
            option of its own is for.
    """
    name = args.opt.lower().removeprefix('lookahead_')
    _check_optimizer(name)
    kwargs = optimizer_kwargs(cfg=args)
    twice = sorted(kwargs.keys() & args.opt_kwargs.keys())
    if twice:
        raise UserError(f"--opt-kwargs can not give {', '.join(twice)}, for which there are options of their own.")
    kwargs |= args.opt_kwargs
    device = next(model.parameters()).device
    in_float16 = args.amp and args.amp_dtype == 'float16'  # where fused SGD begins by zero, see begin_momentum
    can_begin = not (in_float16 and kwargs.get('dampening'))
    if not kwargs.keys() & {'fused', 'foreach'} and not sharded and can_begin and can_fuse(name, device.type):
        kwargs['fused'] = True
    if not kwargs.get('filter_bias_and_bn', True) and args.layer_decay is None and not _TIMM_SPARES:
        exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()

        def groups(model: TimmModel) -> List[Dict[str, Any]]:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            spared = [p for name, p in trained if name in exempt]
            decayed = dict(params=[p for name, p in trained if name not in exempt], weight_decay=args.weight_decay)
            return [decayed, dict(params=spared, weight_decay=0.)] if spared else [decayed]

        kwargs['param_group_fn'] = groups
    return create_optimizer_v2(model, **kwargs)
