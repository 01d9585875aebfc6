"""Updates of the residual state: forward Euler and the linear two-step rule.

Source: Lu, Zhong, Li, Dong, "Beyond Finite Layer Neural Networks: Bridging Deep Architectures and Numerical
Differential Equations", ICML 2018, https://arxiv.org/abs/1710.10121.
"""
from collections import OrderedDict
from typing import Any, Dict, Sequence, Tuple, Union, cast

import torch
from torch import nn

from timm_lm.eager import runs_eagerly

from .fused_two_step import can_fuse, fused_two_step

KInit = Union[float, Tuple[float, float]]


def two_step(
        f: torch.Tensor,
        x: torch.Tensor,
        x_prev: torch.Tensor,
        k: torch.Tensor,
) -> torch.Tensor:
    """One linear two-step update, ``x[n+1] = f + (1 - k) x[n] + k x[n-1]``.

    The two states are mixed with ``torch.lerp``, which reads each once, rounds once in low precision, and saves only
    the states for backward, which the network holds anyway. A compiler decomposes ``lerp`` and would save the
    difference of the states as well; for training under ``torch.compile`` the sum is therefore written so that ``dk``
    is computed from the states themselves and accumulated in the precision of ``k``. Without a compiler, large states
    on a GPU with one ``k`` per block are updated in one Triton kernel each way, which computes in float32 and rounds
    once (``fused_two_step``).
    When exported, compiled for inference or traced in float32, the update consists of sums and a product, as not all
    formats support ``lerp``.

    Args:
        f: The residual branch ``f(x[n])``, shape (N, C, H, W).
        x: The state ``x[n]`` (its projection where the shape changes), shape (N, C, H, W).
        x_prev: The history ``x[n-1]``, shape (N, C, H, W).
        k: The coefficient of the history, of a shape that broadcasts to the state: () or (C, 1, 1). It is cast to
            the dtype of the state (to float32 in the Triton kernels).

    Returns:
        The state ``x[n+1]``, shape (N, C, H, W).
    """
    x_prev = x_prev.to(x.dtype)
    eager = False
    if not torch.jit.is_scripting():
        eager = runs_eagerly(f, x, x_prev, k)
        if eager and can_fuse(f, x, x_prev, k):
            return fused_two_step(f, x, x_prev, k)
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            k = k.expand(x.shape[-3], 1, 1).expand(x.shape).to(x.dtype)  # dk per channel, as norms sum their gradients
            return f + (x + (k * x_prev - k * x))
        # a trace is compared with the eager result, which is rounded differently in low precision
        if torch.jit.is_tracing() and x.dtype == torch.float32 or torch.compiler.is_compiling():
            return f + (x + k.to(x.dtype) * (x_prev - x))
    mixed = torch.lerp(x, x_prev, k.to(x.dtype))
    return mixed.add_(f) if eager and f.dtype == mixed.dtype else f + mixed


class TwoStep(nn.Module):
    """The two-step update with its own ``k``, one scalar per block or one value per channel.

    ``k`` is stored with shape (1,) or (C,), never (): sharded training does not accept zero-dimensional parameters.
    """

    def __init__(
            self,
            channels: int,
            k_init: KInit = (-0.1, 0.),
            per_channel: bool = False,
            trainable: bool = True,
            device=None,
            dtype=None,
    ):
        """
        Args:
            channels: Channels C of the state.
            k_init: Range ``(low, high)`` of the uniform distribution that ``k`` is drawn from, or one fixed number.
            per_channel: One ``k`` per channel instead of one for the block.
            trainable: Learn ``k``. If False it is a buffer, under the same name in the state dict.

        Raises:
            ValueError: If ``k_init`` is neither a number nor an increasing pair of them.
        """
        super().__init__()
        try:
            is_range = isinstance(k_init, Sequence) and not isinstance(k_init, str)
            ends: Any = k_init if is_range else (k_init, k_init)
            low, high = map(float, ends)
        except (TypeError, ValueError):
            low, high = 1., 0.
        if not low <= high:
            raise ValueError(f'k_init must be a number or a range (low, high), got {k_init!r}.')
        self.k_init: KInit = (low, high) if is_range else low
        self.per_channel = per_channel
        k = torch.empty(channels if per_channel else 1, device=device, dtype=dtype)
        if trainable:
            self.k = nn.Parameter(k)
        else:
            self.register_buffer('k', k)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reinitialise ``k`` from ``k_init``."""
        if isinstance(self.k_init, tuple):
            self.k.uniform_(self.k_init[0], self.k_init[1])
        else:
            self.k.fill_(self.k_init)

    def forward(self, f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor) -> torch.Tensor:
        k = self.k.view(-1, 1, 1) if self.per_channel else self.k.view(())
        return two_step(f, x, x_prev, k)

    def extra_repr(self) -> str:
        shape = 'per channel' if self.per_channel else 'scalar'
        return f'{shape}, k_init={self.k_init}, trainable={isinstance(self.k, nn.Parameter)}'


class EulerStep(nn.Module):
    """The plain residual update, ``x[n+1] = x[n] + f(x[n])``: forward Euler, the two-step rule at ``k = 0``."""

    def forward(self, f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor) -> torch.Tensor:
        """Like ``TwoStep.forward``; the history is not read."""
        return f + x


def two_steps(network: nn.Module) -> Dict[str, TwoStep]:
    """The two-step updates of any network, also a scripted one, by name, in network order."""
    return {name: cast(TwoStep, module) for name, module in network.named_modules()
            if isinstance(module, TwoStep) or getattr(module, 'original_name', '') == TwoStep.__name__}


def k_values(network: nn.Module) -> Dict[str, torch.Tensor]:
    """The coefficient ``k`` of each two-step block of any network, by block name, in network order.

    Returns:
        Detached copies on the CPU, of shape (1,), or (C,) if per channel; empty for a plain network.
    """
    return OrderedDict(
        (name.removesuffix('.step'), step.k.detach().float().reshape(-1).cpu().clone())
        for name, step in two_steps(network).items())
