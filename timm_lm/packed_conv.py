"""A convolution for inference that keeps its weights in the layout that the CPU kernel reads."""
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from timm_lm.eager import runs_eagerly


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps a copy of its weights, reordered for the size of its last input.

    oneDNN's kernels read weights in blocks. PyTorch reorders the weights at each call, which takes a quarter of the
    time of a ResNet-50 on one image. The copy is made at the first call, and again when the input size or the weights
    change, in place or by assigning another tensor (but not through ``.data``, which autograd does not see either);
    outputs are those of ``nn.Conv2d``. Where the copy cannot be used (other devices and dtypes, autocast, gradients,
    ``torch.func``, compilers, tracing and export) this is a plain ``nn.Conv2d``; its parameters and state dict always
    are those of one.
    """

    __jit_ignored_attributes__ = ['_packed']  # TorchScript could not save it
    # what the copy was made from, the copy, and the weights, kept alive so that no others take their address
    _packed: Optional[Tuple[Any, torch.Tensor, torch.Tensor]] = None

    @classmethod
    def is_possible(cls) -> bool:
        """Whether this PyTorch has the private functions that this needs; a small convolution is tried."""
        like: Any = dict(device='cpu', dtype=torch.float32)
        plain = torch.autocast('cpu', enabled=False)
        with torch.inference_mode(False), torch.no_grad(), plain, torch.random.fork_rng(devices=[]):
            conv, x = cls(1, 1, 1, **like), torch.ones(1, 1, 1, 1, **like)
            try:
                return conv._can_pack(x) and conv._forward_packed(x).shape == x.shape
            except (AttributeError, RuntimeError, TypeError):
                return False

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> 'PackedConv2d':
        """The same convolution, with the same parameters.

        Args:
            conv: A convolution that pads with zeros, by numbers (not 'same' or 'valid').
        """
        packed = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,  # type: ignore[arg-type]
            conv.padding, conv.dilation, conv.groups, conv.bias is not None, device='meta')  # type: ignore[arg-type]
        packed.weight, packed.bias = conv.weight, conv.bias
        return packed.train(conv.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self._can_pack(input):
            return self._forward_packed(input)
        return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    @torch.jit.unused
    def _can_pack(self, x: torch.Tensor) -> bool:
        if type(x) is not torch.Tensor or x.device.type != 'cpu':  # first, as GPUs wait for the host
            return False
        weight = self.weight
        tensors = [tensor for tensor in (x, weight, self.bias) if tensor is not None]
        return (
            runs_eagerly(*tensors)
            and x.dim() == 4 and x.numel() > 0
            and all(tensor.device.type == 'cpu' and tensor.dtype == torch.float32 for tensor in tensors)
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            and not weight.is_inference()  # these do not track changes
            and not torch.is_autocast_enabled('cpu')
            and torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled())

    @torch.jit.unused
    def _forward_packed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self.weight.detach()
        state = (x.shape, weight.data_ptr(), weight._version)
        packed = self._packed
        if packed is None or packed[0] != state:
            reordered = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
                weight.to_mkldnn(), list(self.padding), list(self.stride), list(self.dilation), self.groups,
                list(x.shape))
            self._packed = packed = (state, reordered, weight)
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed[1], self.bias, self.padding, self.stride, self.dilation, self.groups, 'none', [], '')

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> 'PackedConv2d':
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> Dict[str, Any]:
        """Leaves out the copy, which can be neither copied nor saved."""
        return {**super().__getstate__(), '_packed': None}  # type: ignore[dict-item]
