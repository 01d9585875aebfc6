"""The optimizer of a training and its learning rate."""
import argparse
import inspect
import math
from typing import Any, Dict, List

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs, param_groups_weight_decay

from timm_lm.errors import UserError
from timm_lm.model_config import TimmModel

# Whether timm exempts what a network names from weight decay even with filter_bias_and_bn=False.
_TIMM_SPARES = 'weight_decay_exclude_1d' in inspect.signature(param_groups_weight_decay).parameters


def set_learning_rate(args: argparse.Namespace, num_processes: int) -> None:
    """timm's rule: without --lr, scale the base rate by the images of an update, or their root if adaptive."""
    if args.lr is not None:
        return
    ratio = args.batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    args.lr = args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


def has_fused_kernel(name: str, device_type: str = 'cpu') -> bool:
    """Whether an optimizer of timm's factory is one of PyTorch's that updates all weights of a device in one kernel."""
    if device_type == 'mps':
        return False
    if name == 'adagrad' and device_type != 'cpu':  # older PyTorch has its kernel only for the CPU
        return False
    return 'fused' in inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters


def _check_optimizer(name: str) -> None:
    if name.startswith('kron') or name == 'adahessian':
        why = 'its state cannot be saved exactly' if name.startswith('kron') else 'it needs second derivatives'
        raise UserError(f'--opt {name} is refused: {why}; choose another of timm.optim.list_optimizers().')


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialise the momentum of fused SGD to zero before the first step.

    If float16 overflows in that step, as it often does, the fused kernel leaves the momentum uninitialised. From zero
    the first step is the same.
    """
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)  # within timm's Lookahead
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        if group['momentum'] and group['fused']:  # others skip the step
            for p in group['params']:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def create_optimizer(args: argparse.Namespace, model: TimmModel, sharded: bool = False) -> torch.optim.Optimizer:
    """The optimizer of timm's factory, fused where PyTorch supports it (not with ``sharded`` weights).

    Weight decay always exempts ``model.no_weight_decay()``. With ``filter_bias_and_bn: false`` older versions of timm
    decay that too, so the groups are made here for them.

    Raises:
        UserError: If this engine cannot train with it or resume it, or ``opt_kwargs`` sets what has its own option.
    """
    name = args.opt.lower().removeprefix('lookahead_')
    _check_optimizer(name)
    kwargs = optimizer_kwargs(cfg=args)
    twice = sorted(kwargs.keys() & args.opt_kwargs.keys())
    if twice:
        raise UserError(f"--opt-kwargs cannot set {', '.join(twice)}; use the options for them.")
    kwargs |= args.opt_kwargs
    device = next(model.parameters()).device
    in_float16 = args.amp and args.amp_dtype == 'float16'  # where fused SGD starts from zero, see begin_momentum
    can_begin = not (in_float16 and kwargs.get('dampening'))
    if not kwargs.keys() & {'fused', 'foreach'} and not sharded and can_begin and has_fused_kernel(name, device.type):
        kwargs['fused'] = True
    if not kwargs.get('filter_bias_and_bn', True) and args.layer_decay is None and not _TIMM_SPARES:
        exempt: Any = getattr(model, 'no_weight_decay', set)()

        def groups(model: TimmModel) -> List[Dict[str, Any]]:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            spared = [p for name, p in trained if name in exempt]
            decayed = dict(params=[p for name, p in trained if name not in exempt], weight_decay=args.weight_decay)
            return [decayed, dict(params=spared, weight_decay=0.)] if spared else [decayed]

        kwargs['param_group_fn'] = groups
    return create_optimizer_v2(model, **kwargs)
