"""The two-step update as one Triton kernel forward and one backward, for large states on a GPU.

PyTorch's own operations read or write a state 6 times forward and 11 times backward, where 4 and 5 are needed. Compiled
networks do without these kernels, as a compiler can make the update a part of its neighbours.
"""
import functools
from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl

from timm_lm.eager import runs_eagerly

BLOCK = 2048  # elements of a program at a time
WARPS = 8
PROGRAMS = 8  # of the backward kernel, on each multiprocessor; each gives a part of dk


@triton.jit
def _forward_kernel(f, x, x_prev, k, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    state = tl.load(x + i, inside, 0.).to(tl.float32)
    history = tl.load(x_prev + i, inside, 0.).to(tl.float32)
    branch = tl.load(f + i, inside, 0.).to(tl.float32)
    tl.store(out + i, branch + state + tl.load(k).to(tl.float32) * (history - state), inside)


@triton.jit
def _backward_kernel(g, x, x_prev, k, dx, dx_prev, dk, size, programs, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    share = tl.load(k).to(tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, size, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        gradient = tl.load(g + i, inside, 0.).to(tl.float32)
        state = tl.load(x + i, inside, 0.).to(tl.float32)
        history = tl.load(x_prev + i, inside, 0.).to(tl.float32)
        tl.store(dx + i, gradient - share * gradient, inside)
        tl.store(dx_prev + i, share * gradient, inside)
        products += gradient * (history - state)
    tl.store(dk + program, tl.sum(products, 0))


def update(f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``fused_two_step`` without gradients."""
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            f, x, x_prev, k, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


def gradients(g: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor,
              k: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those of state, history and ``k``, from that of the next state, ``g``, which is the one of the branch as well."""
    g, x_prev = (  # hooks on what autograd saves may lay the history out in another way
        tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor) for tensor in (g, x_prev))
    dx, dx_prev = torch.empty_like(x), torch.empty_like(x)
    programs = PROGRAMS * _multiprocessors(x.device)
    dk = torch.empty(programs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            g, x, x_prev, k, dx, dx_prev, dk, x.numel(), programs, BLOCK=BLOCK, num_warps=WARPS)
    return dx, dx_prev, dk.sum().to(k.dtype).view(k.shape)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


class _FusedTwoStep(torch.autograd.Function):
    """Keeps the states alone for backward, which the network holds anyway."""

    @staticmethod
    def forward(ctx: Any, f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x_prev, k)
        return update(f, x, x_prev, k)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, x_prev, k = ctx.saved_tensors
        if torch.is_grad_enabled() or not runs_eagerly(g):  # they are to be differentiated again, or g is a batch
            share = k.to(g.dtype)
            dk = (g * (x_prev - x)).sum(dtype=torch.float32).to(k.dtype).view(k.shape)
            found = g, g - share * g, share * g, dk
        else:
            found = g, *gradients(g, x, x_prev, k)
        return tuple(gradient if needed else None for gradient, needed in zip(found, ctx.needs_input_grad))


def fused_two_step(f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``f + (1 - k) x + k x_prev``, computed in float32 and rounded once.

    Args:
        f: The residual branch, shape (N, C, H, W).
        x: The state; it and the history have the shape, the strides and the dtype of ``f``, without gaps.
        x_prev: The history.
        k: One number, of any shape and floating dtype.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (f, x, x_prev, k)):
        return _FusedTwoStep.apply(f, x, x_prev, k)
    return update(f, x, x_prev, k)
