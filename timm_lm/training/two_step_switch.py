"""A training that begins with residual blocks and switches their two-step on later."""
import argparse
from typing import Any, Dict

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from timm_lm.errors import UserError
from timm_lm.layers import TwoStep
from timm_lm.layers.steps import two_steps
from timm_lm.model_config import TimmModel

_SOME = StateDictOptions(full_state_dict=True, strict=False)


class TwoStepSwitch:
    """Holds every ``k`` of a network at 0 until the epoch of ``--two-step-epoch``."""

    def __init__(self, args: argparse.Namespace, model: TimmModel, sharded: bool):
        """
        Args:
            args: Options.
            model: The network, before its weights are sharded.
            sharded: Whether they will be.

        Raises:
            UserError: If the options name an epoch and the network has no two-step blocks.
        """
        self.epoch = args.two_step_epoch
        self.seed = args.seed
        self.model = model
        self.sharded = sharded
        self.two_steps = two_steps(model)
        if self.epoch and not self.two_steps:
            raise UserError(f'--two-step-epoch switches two-step blocks on and {args.model} has none; leave it out.')
        self.k_sizes = {name: step.k.numel() for name, step in self.two_steps.items()}  # a shard has fewer

    def start_epoch(self, epoch: int, network: nn.Module) -> None:
        """Set every ``k`` to 0 before the two-step is switched on; at that epoch, start them as in a new network.

        Args:
            epoch: The epoch that begins.
            network: The network as it is trained, sharded or not.
        """
        if not self.epoch or epoch > self.epoch:
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            fresh: Dict[str, Any] = {
                f'{name}.k': TwoStep(self.k_sizes[name], step.k_init, step.per_channel).k.detach()
                for name, step in self.two_steps.items()}
        if epoch < self.epoch:
            fresh = {name: torch.zeros_like(k) for name, k in fresh.items()}
        if self.sharded:
            set_model_state_dict(network, fresh, options=_SOME)
        else:
            self.model.load_state_dict(fresh, strict=False)

    def hold(self, epoch: int) -> None:
        """Zero the gradients of every ``k`` before an update of an epoch in which they are held at 0."""
        if epoch >= self.epoch:
            return
        for step in self.two_steps.values():
            if step.k.grad is not None:
                step.k.grad.zero_()
