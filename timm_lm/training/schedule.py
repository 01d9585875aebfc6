"""The schedule of the learning rate: one of timm's, and its state."""
import argparse
import warnings
from typing import Any, Dict, Optional, Tuple

import torch
from timm import scheduler as timm_scheduler
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_lm.errors import UserError, one_line

_PLATEAU: Any = getattr(timm_scheduler, 'PlateauLRScheduler', ())  # newer timm plans to remove it


def create_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer,
                    updates_per_epoch: int) -> Tuple[Any, int]:
    """The schedule that the options name, as timm makes it.

    Args:
        args: Options.
        optimizer: The one whose rates it sets.
        updates_per_epoch: Updates per epoch, for schedules that step on updates.

    Returns:
        The schedule, None for ``--sched none``, and its number of epochs.

    Raises:
        UserError: If timm has no such schedule, or it cannot be made with these options.
    """
    try:
        with warnings.catch_warnings():  # of a plateau's state, which our checkpoints hold
            warnings.filterwarnings('ignore', 'PlateauLRScheduler is deprecated', FutureWarning)
            scheduler, epochs = create_scheduler_v2(
                optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
        if args.sched != 'none' and scheduler is None:  # in older timm
            raise ValueError(f"Unknown scheduler '{args.sched}'")
    except (AssertionError, TypeError, ValueError) as e:
        raise UserError(f'The schedule {args.sched} cannot be made with these options ({one_line(e)}); '
                        'use cosine, multistep, step, poly, tanh, plateau or none, or in newer timm constant, '
                        'rsqrt or wsd.') from e
    return scheduler, epochs


def schedule_state(scheduler: Any) -> Optional[Dict[str, Any]]:
    """State of a schedule for JSON; that of timm's plateau is incomplete, so the inner one is used."""
    if scheduler is None:
        return None
    if isinstance(scheduler, _PLATEAU):
        return dict(plateau=scheduler.lr_scheduler.state_dict(), restore_lr=scheduler.restore_lr)
    state: Dict[str, Any] = scheduler.state_dict()
    return state


def load_schedule(scheduler: Any, state: Dict[str, Any]) -> None:
    """Restore a state of ``schedule_state``."""
    if isinstance(scheduler, _PLATEAU):
        scheduler.lr_scheduler.load_state_dict(state['plateau'])
        scheduler.restore_lr = state['restore_lr']
    else:
        scheduler.load_state_dict(state)
