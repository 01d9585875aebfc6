"""Networks optimized for inference: norms folded into convolutions, every ``k`` a constant."""
import copy
from typing import TypeGuard, TypeVar

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


@torch.no_grad()
def optimize(model: Network) -> Network:
    """A copy of a network that computes the same with less work, for inference only.

    - A batch norm that follows a plain convolution within a residual branch is folded into that convolution; its
      activation stays. The norms of the state stay too: they follow a sum that is used elsewhere as well.
    - Each ``k`` becomes a buffer; gradient checkpointing is turned off.
    - Convolutions are in the channels_last layout, which their CPU and GPU kernels prefer. On the CPU in float32, those
      with many weights keep a second copy of them, in the order in which the kernel reads them (``PackedConv2d``).

    The copy is in evaluation mode and has no trainable parameters. It can be compiled, exported and scripted as the
    network could; its state dict loads into another optimized copy, not into the network. Networks that wrap one of
    ours (timm's ``features_only``, except with ``feature_cls='fx'``, or a segmentation network) work too; their other
    parts stay as they are, and so do convolutions with hooks, such as pruned ones. Hooks of other modules keep working.

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
        block.is_optimized = True
        for i in (1, 2):  # convolutions of the branch that a norm may follow
            if hasattr(block, f'norm{i + 1}'):
                _fold(block, f'conv{i}', f'norm{i + 1}')
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


def _pack(block: ResidualBlock) -> None:
    """Replace plain convolutions with many weights by packed ones."""
    for parent in list(block.modules()):
        for name, conv in list(parent.named_children()):
            if not _is_plain(conv) or conv.weight.numel() < PACKED_WEIGHTS:
                continue
            if conv.padding_mode == 'zeros' and not isinstance(conv.padding, str):
                setattr(parent, name, PackedConv2d.from_conv(conv))
