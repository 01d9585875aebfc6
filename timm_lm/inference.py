"""Networks optimized for inference: norms folded into convolutions, every ``k`` a constant."""
import copy
import math
from typing import Any, Tuple, TypeGuard, TypeVar

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_lm.models.lm_resnet import ResidualBlock
from timm_lm.packed_conv import PackedConv2d

Network = TypeVar('Network', bound=nn.Module)

# Convolutions with at least this many weights are packed: reordering fewer takes less time than checking whether the
# copy is still valid. The CIFAR networks with basic blocks have none.
PACKED_WEIGHTS = 2 ** 16
# In evaluation mode each is a constant affine map followed by an activation.
_BATCH_NORMS = (BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct)
LARGEST_SHIFT = 32  # of a norm before a convolution, in units of its weight and bias; larger ones would round


class ChannelClamp(nn.Module):
    """Clamps each channel of (N, C, H, W) to bounds of its own."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: torch.Tensor, high: torch.Tensor):
        """
        Args:
            low: Lower bounds, shape (C,).
            high: Upper bounds, shape (C,).
        """
        super().__init__()
        self.register_buffer('low', low.view(-1, 1, 1))
        self.register_buffer('high', high.view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, self.low.to(x.dtype), self.high.to(x.dtype))


@torch.no_grad()
def optimize(model: Network) -> Network:
    """A copy of a network that computes the same with less work, for inference only.

    - A batch norm that follows a plain convolution within a residual branch is folded into that convolution; its
      activation stays. The first norm of a bottleneck block becomes a clamp and is folded into the 1x1 convolution
      after it (in float32 and float64, with ReLU, unless the shortcut needs its output too). The others stay.
    - Each ``k`` becomes a buffer; gradient checkpointing is turned off.
    - Convolutions are in the channels_last layout, which their CPU and GPU kernels prefer. On the CPU in float32, those
      with many weights keep a second copy of them, in the order in which the kernel reads them (``PackedConv2d``).

    The copy is in evaluation mode and has no trainable parameters. It can be compiled, exported and scripted as the
    network could. To load other weights, load them into the network and optimize it again: its state dict only loads
    into a copy that was folded alike. For lower precision, convert the network first. Networks that wrap one of ours
    (timm's ``features_only``, except with ``feature_cls='fx'``, or a segmentation network) work too; their other parts
    stay as they are, and so do convolutions with hooks, such as pruned ones. Hooks of other modules keep working.

    Args:
        model: A network with floating-point weights and residual blocks of this package. It is not changed.

    Returns:
        The copy. In float32 its outputs match the network's to 1e-5 of the largest (on a GPU, if TF32 is off).

    Raises:
        ValueError: If the network has none of this package's residual blocks.

    Example:
        >>> model = timm_lm.optimize(timm.create_model('lm_resnet20', pretrained=True))
    """
    # tensors that hooks compute from parameters (pruning, weight norm) cannot be copied with their autograd history
    made = {id(value): value.detach().clone() for module in model.modules() for value in vars(module).values()
            if isinstance(value, torch.Tensor) and not value.is_leaf}
    model = copy.deepcopy(model, made).eval().requires_grad_(False)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no residual blocks of timm-lm; pass one of its networks, before '
                         'tracing it.')
    can_pack = PackedConv2d.is_possible()
    for block in blocks:
        for i in (1, 2):  # convolutions of the branch that a norm may follow
            if hasattr(block, f'norm{i + 1}'):
                _fold(block, f'conv{i}', f'norm{i + 1}')
        _fold_first(block)
        k = block.step._parameters.pop('k', None)
        if k is not None:  # one that hooks compute from other tensors, as in pruning, stays as it is
            block.step.register_buffer('k', k.detach())
        if can_pack:
            _pack(block)
    for module in model.modules():
        if hasattr(module, 'grad_checkpointing'):
            setattr(module, 'grad_checkpointing', False)  # noqa: B010
    return model.to(memory_format=torch.channels_last)


def _is_plain(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution has its own weights, not computed from others as by weight norm or pruning."""
    return type(conv) is nn.Conv2d and 'weight' in conv._parameters and not _has_hooks(conv)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _fold(block: ResidualBlock, conv_name: str, norm_name: str) -> None:
    """Fold a batch norm into the convolution before it.

    Other norms depend on their input and stay.
    """
    conv, norm = getattr(block, conv_name), getattr(block, norm_name)
    if not _is_plain(conv) or not isinstance(norm, _BATCH_NORMS) or _has_hooks(norm) or norm.running_mean is None:
        return
    dtype = conv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    own_conv, own_norm = copy.deepcopy(conv), copy.deepcopy(norm)  # as blocks may share them
    fused = fuse_conv_bn_eval(own_conv.to(wide), own_norm.to(wide))  # type: ignore[arg-type]
    setattr(block, conv_name, fused.to(dtype))
    setattr(block, norm_name, norm.act.to(dtype))


def _fold_first(block: ResidualBlock) -> None:
    """Fold the first norm of a branch, up to a clamp, into the 1x1 convolution after it.

    For a channel with scale s and shift b, relu(s x + b) is s clamp(x, min=-b/s) + b if s > 0, and
    s clamp(x, max=-b/s) + b if s < 0. A convolution without padding can compute all of this but the clamp.
    """
    conv, norm = getattr(block, 'conv1'), getattr(block, 'norm1')  # noqa: B009
    if block.downsample is not None and not block.shortcut_norm:  # it needs the output of the norm too
        return
    if not _is_plain(conv) or conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups > 1:
        return
    if not isinstance(norm, _BATCH_NORMS) or norm.running_mean is None or type(norm.act) is not nn.ReLU:
        return
    if any(map(_has_hooks, norm.modules())) or type(norm.drop) is not nn.Identity:
        return
    dtype = conv.weight.dtype
    scale, shift, unit = _scale_and_shift(norm)
    if dtype not in (torch.float32, torch.float64) or shift.abs().max() > LARGEST_SHIFT * unit:
        return
    bound = -shift / scale
    is_constant = (scale.abs() < 1e-20) | ~bound.to(dtype).isfinite()
    is_constant |= (shift < 0) & (bound.abs() > torch.finfo(torch.float16).max)  # off; the copy may become float16
    low = bound.where(scale > 0, -math.inf).where(~is_constant, 0)
    high = bound.where(scale < 0, math.inf).where(~is_constant, 0)
    scale, shift = scale.where(~is_constant, 0), shift.where(~is_constant, shift.relu())
    folded = copy.deepcopy(conv).cpu().double()
    own_bias = 0 if folded.bias is None else folded.bias
    folded.bias = nn.Parameter(own_bias + folded.weight.flatten(1) @ shift, requires_grad=False)
    folded.weight.mul_(scale.view(1, -1, 1, 1))
    like = conv.weight
    block.conv1, block.norm1 = folded.to(like), ChannelClamp(low, high).to(like)


def _scale_and_shift(norm: Any) -> Tuple[torch.Tensor, torch.Tensor, float]:
    """Scale and shift by which a batch norm maps each channel, and the usual size of its outputs.

    They are float64 on the CPU, as not all devices have it.
    """
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.cpu().double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.cpu().double()
    scale = weight / (variance + norm.eps).sqrt()
    return scale, bias - mean * scale, (weight.abs() + bias.abs()).max().item()


def _pack(block: ResidualBlock) -> None:
    """Replace plain convolutions with many weights by packed ones."""
    for parent in list(block.modules()):
        for name, conv in list(parent.named_children()):
            if not _is_plain(conv) or conv.weight.numel() < PACKED_WEIGHTS:
                continue
            if conv.padding_mode == 'zeros' and not isinstance(conv.padding, str):
                setattr(parent, name, PackedConv2d.from_conv(conv))
