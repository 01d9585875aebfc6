"""The Triton kernels of the two-step update, for the next state and the gradients; importing them needs Triton."""
import functools
from typing import Tuple

import torch
import triton
import triton.language as tl

BLOCK = 2048  # elements per program at a time
WARPS = 8
PROGRAMS = 8  # of the backward kernel, per multiprocessor; each computes a part of dk


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
    """Gradients of state, history and ``k`` from ``g``, that of the next state, which is also that of the branch."""
    g, x_prev = (  # saved-tensor hooks may change the layout of the history
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
