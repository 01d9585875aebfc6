"""The network of a training, with its initial weights."""
import argparse
import importlib
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint

from timm_lm.depth import grow
from timm_lm.errors import UserError, one_line
from timm_lm.model_config import TimmModel
from timm_lm.names import load_model, timm_source
from timm_lm.parser import option_name

# Options that are keywords of a network, by the keyword.
_OPTIONS = dict(num_classes='num_classes', in_chans='in_chans', drop_rate='drop', drop_path_rate='drop_path',
                drop_block_rate='drop_block', global_pool='gp')


def import_modules(args: argparse.Namespace) -> None:
    """Import the modules that the options name, as some register networks.

    Raises:
        UserError: If one does not exist or cannot be imported.
    """
    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError, TypeError, ValueError) as e:  # the last two for an impossible name
            raise UserError(f"--device-modules '{module}' cannot be imported ({one_line(e)}).") from e


def create_again(
        facts: Mapping[str, Any],
        weights: Optional[Mapping[str, torch.Tensor]] = None,
        **kwargs: Any,
) -> TimmModel:
    """The network of a run; its initial weights are not needed.

    Args:
        facts: What ``run_facts`` recorded of it.
        weights: Its state dict, None for new weights.
        **kwargs: Keywords in addition to the recorded ones.

    Raises:
        UserError: If it can no longer be made, or the weights are of another network.
    """
    sizes = {name: facts[name] for name in ('num_classes', 'in_chans') if facts[name] is not None}
    cfg = dict(facts['pretrained_cfg'])
    try:
        model: TimmModel = timm.create_model(cfg['architecture'], **kwargs | sizes | facts['model_args'])
        if weights is not None:
            model.load_state_dict(weights)
    except Exception as e:
        raise UserError(f"The network {cfg['architecture']} of the run cannot be recreated from its name and arguments "
                        f'({one_line(e, 300)}); check the versions of timm and timm-lm.') from e
    model.pretrained_cfg = cfg
    return model


def _model_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    """Keywords of the network that the options give, without those of ``--model-kwargs``."""
    for name in sorted(_OPTIONS.keys() & args.model_kwargs.keys()):
        raise UserError(f'--model-kwargs has {name}; use {option_name(_OPTIONS[name])} instead.')
    kwargs = {name: getattr(args, option) for name, option in _OPTIONS.items()}
    kwargs['drop_block_rate'] = args.drop_block or None
    if args.in_chans is None and args.input_size is not None:
        kwargs['in_chans'] = args.input_size[0]
    return {name: value for name, value in kwargs.items() if value is not None}


def _check_files(args: argparse.Namespace) -> None:
    """Raise a UserError if there is no file where the options name one of weights."""
    for name in ('pretrained_path', 'initial_checkpoint'):
        path = getattr(args, name)
        if path and not Path(path).is_file():
            what = 'is a folder; --model takes weights folders' if Path(path).is_dir() else 'does not exist'
            raise UserError(f'{option_name(name)} {path} {what}. Give a file of weights.')


def _load_initial(args: argparse.Namespace, model: TimmModel) -> None:
    try:
        load_checkpoint(model, args.initial_checkpoint, weights_only=True)
    except Exception as e:  # a damaged file has many
        raise UserError(
            f'--initial-checkpoint {args.initial_checkpoint} could not be loaded ({one_line(e)}).') from e


def _grow(args: argparse.Namespace, model: TimmModel) -> None:
    """Start a network from a shallower one, whose license stays."""
    try:
        shallow = load_model(args.grow_from)
        grow(shallow, model)
        model.pretrained_cfg['license'] = shallow.pretrained_cfg.get('license')
    except UserError as e:
        raise UserError(f'--grow-from {args.grow_from} cannot start {args.model}: {e}') from e


def create_model(args: argparse.Namespace, recorded: Optional[Mapping[str, Any]] = None) -> TimmModel:
    """The network, with its initial weights.

    Args:
        args: Options.
        recorded: What a resumed run recorded of its network, whose initial weights are then not loaded again.

    Raises:
        UserError: If there is no such network, it does not accept the options, or the weights cannot be loaded.
    """
    kwargs = _model_kwargs(args)
    if recorded:  # with its own --model-kwargs; others are reported when the options are compared
        return create_again(recorded, **kwargs)
    kwargs |= args.model_kwargs
    _check_files(args)
    if args.pretrained_path:
        overlay = dict(file=args.pretrained_path, num_classes=-1)  # -1: a new head
        kwargs.update(pretrained=True, pretrained_cfg_overlay=overlay)
    try:
        if args.pretrained and not args.pretrained_path:
            model = load_model(args.model, **kwargs)
        else:
            model = timm.create_model(timm_source(args.model), **kwargs)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f'{args.model} cannot be made with these options ({one_line(e, 300)}).') from e
    if args.initial_checkpoint:
        _load_initial(args, model)
    if args.grow_from:
        _grow(args, model)
    _init_head(args, model)
    return model


@torch.no_grad()
def _init_head(args: argparse.Namespace, model: TimmModel) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    head = model.get_classifier()
    if any(getattr(head, name, None) is None for name in ('weight', 'bias')):
        raise UserError(f'The head of {args.model} is not a layer with a weight and a bias; leave --head-init-scale '
                        'and --head-init-bias out.')
    if args.head_init_scale is not None:
        head.weight.mul_(args.head_init_scale)
        head.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        head.bias.fill_(args.head_init_bias)


def prepare_network(args: argparse.Namespace, model: TimmModel, accelerator: Accelerator) -> TimmModel:
    """The network in the memory layout that the options choose, with gradient checkpointing and shared batch statistics
    if they ask for them.

    Raises:
        UserError: If it has no gradient checkpointing, or statistics are to be shared on the CPU, where PyTorch cannot.
    """
    # FSDP shards only contiguous weights; the images still have the chosen layout
    channels_last = args.channels_last and accelerator.distributed_type != DistributedType.FSDP
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError) as e:
            raise UserError(f'{args.model} cannot recompute in its backward pass; leave --grad-checkpointing '
                            'out.') from e
    if args.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == 'cpu':
            raise UserError('--sync-bn needs GPUs; leave it out.')
        return convert_sync_batchnorm(model)
    return model
