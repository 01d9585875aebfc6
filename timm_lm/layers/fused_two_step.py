"""Large two-step updates on a GPU without a compiler: when they apply, and the update in one Triton kernel each way.

PyTorch's own operations read or write a state 6 times forward and 11 times backward, where 4 and 5 are needed. Compiled
networks do not use these kernels, as a compiler can fuse the update with its neighbours.
"""
import functools
import warnings
from typing import Any, Optional, Tuple

import torch

from timm_lm.eager import runs_eagerly
from timm_lm.errors import one_line

FUSED_ON = 'cuda'  # tests set it to 'cpu', for Triton's interpreter, or to no device
FUSED_SIZE = 2 ** 22  # elements of a state; smaller updates take less time than their launch


def can_fuse(f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether an eager update is large enough for the Triton kernels, and supported by them."""
    return (
        x.device.type == FUSED_ON
        and x.numel() >= FUSED_SIZE
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and f.dtype == x.dtype == x_prev.dtype
        and f.shape == x.shape == x_prev.shape
        and f.stride() == x.stride() == x_prev.stride()
        and any(x.is_contiguous(memory_format=layout) for layout in (torch.contiguous_format, torch.channels_last))
        and k.numel() == 1 and f.device == x.device == x_prev.device == k.device
        and (x.dtype != torch.bfloat16 or _has_bfloat16(x.device))
        and _has_triton(x.device))


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    """Whether kernels can store bfloat16, which PyTorch's operations emulate on older NVIDIA GPUs.

    This is not tried out, as a compiler without an instruction for it may end the process.
    """
    return bool(device.type != 'cuda' or torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0))


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: they are tried, as they need a C compiler and a supported GPU.

    They are tried without autograd, which may be about to recompute a block.
    """
    try:
        from .two_step_kernels import gradients, update
        with torch.inference_mode(False), torch.no_grad():
            f, x, x_prev, k = (torch.ones(1, device=device) for _ in range(4))
            gradients(update(f, x, x_prev, k), x, x_prev, k)
        return True
    except Exception as e:  # from a compiler, a driver or Triton itself
        if 'out of memory' in str(e):  # temporary
            raise
        warnings.warn(f'Large two-step updates use PyTorch\'s own operations on {device}, as Triton\'s kernels do not '
                      f'run there ({one_line(e)}).', stacklevel=2)
        return False


class _FusedTwoStep(torch.autograd.Function):
    """Saves only the states for backward, which the network holds anyway."""

    @staticmethod
    def forward(ctx: Any, f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        from .two_step_kernels import update
        ctx.save_for_backward(x, x_prev, k)
        return update(f, x, x_prev, k)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, x_prev, k = ctx.saved_tensors
        if torch.is_grad_enabled() or not runs_eagerly(g):  # for second derivatives, or a batched g
            share = k.to(g.dtype)
            dk = (g * (x_prev - x)).sum(dtype=torch.float32).to(k.dtype).view(k.shape)
            found = g, g - share * g, share * g, dk
        else:
            from .two_step_kernels import gradients
            found = g, *gradients(g, x, x_prev, k)
        return tuple(gradient if needed else None for gradient, needed in zip(found, ctx.needs_input_grad))


def fused_two_step(f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``f + (1 - k) x + k x_prev``, computed in float32 and rounded once.

    Args:
        f: The residual branch, shape (N, C, H, W).
        x: The state, dense; it and the history have the shape, the strides and the dtype of ``f``.
        x_prev: The history.
        k: One number, of any shape and floating dtype.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (f, x, x_prev, k)):
        return _FusedTwoStep.apply(f, x, x_prev, k)
    from .two_step_kernels import update
    return update(f, x, x_prev, k)
