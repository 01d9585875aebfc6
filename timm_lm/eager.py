"""Whether operations run one by one on plain tensors, so that our own kernels can replace some of them."""
import torch
from torch import nn


def runs_eagerly(*tensors: torch.Tensor) -> bool:
    """Whether a call with these tensors is seen by no compiler, tracer, transform, dispatch mode or tensor subclass.

    Also False if PyTorch no longer has the private names that show this.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return (
            all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
            and torch.autograd.forward_ad._current_level < 0
            and not torch._C._are_functorch_transforms_active()
            and not any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)  # batched gradients
            and not torch._C._len_torch_dispatch_stack())
    except AttributeError:
        return False
