"""The form of a network for inference: norms folded into convolutions, every ``k`` a constant."""
import copy
from typing import TypeGuard, TypeVar

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_lm.models.lm_resnet import ResidualBlock
from timm_lm.packed_conv import PackedConv2d

Network = TypeVar('Network', bound=nn.Module)

# Weights of a convolution from which on they are packed: fewer are reordered in less time than it takes to look
# whether they still fit. The CIFAR networks with basic blocks have none.
PACKED_WEIGHTS = 2 ** 16
# In evaluation mode all of them are an affine map with constants, and an activation.
_BATCH_NORMS = (BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct)


@torch.no_grad()
def optimize(model: Network) -> Network:
    """A copy of a network that computes the same with less work, for inference only.

    - A batch norm that follows a plain convolution within a residual branch is folded into that convolution; its
      activation stays. The norms of the state stay too: they follow a sum, which others read as well.
    - Each ``k`` becomes a buffer; gradient checkpointing is switched off.
    - Convolutions are in the channels_last layout, which the CPU's and the GPU's kernels for them prefer. On the CPU
      in float32 those of many weights keep a second copy of them, ordered as the kernel reads them (``PackedConv2d``).

    The copy is in evaluation mode without parameters to train. It can be compiled, exported and scripted as the network
    could; its state dict is its own: it loads into another optimized copy, not into the network. Networks around one of
    ours (timm's ``features_only``, but for its ``feature_cls='fx'``, or a segmentation network) are taken too; their
    other parts stay as they are, and so do convolutions with hooks, such as pruned ones. Other modules' hooks go on.

    Args:
        model: A network with floating-point weights, whose residual blocks are this package's. It is not changed.

    Returns:
        The copy. In float32 its outputs are the network's to 1e-5 of the largest, on a GPU if TF32 is off.

    Raises:
        ValueError: If the network has none of this package's residual blocks.

    Example:
        >>> model = timm_lm.optimize(timm.create_model('lm_resnet20', pretrained=True))
    """
    # tensors that hooks made of parameters (pruning, weight norm) cannot be copied while they have a history
    made = {id(value): value.detach().clone() for module in model.modules() for value in vars(module).values()
            if isinstance(value, torch.Tensor) and not value.is_leaf}
    model = copy.deepcopy(model, made).eval().requires_grad_(False)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no residual blocks of timm-lm; give one of its networks, before '
                         'it is traced.')
    can_pack = PackedConv2d.is_possible()
    for block in blocks:
        block.is_optimized = True
        for i in (1, 2):  # convolutions of the branch that a norm may follow
            if hasattr(block, f'norm{i + 1}'):
                _fold(block, f'conv{i}', f'norm{i + 1}')
        k = block.step._parameters.pop('k', None)
        if k is not None:  # one that hooks make of other tensors, as pruning does, stays as it is
            block.step.register_buffer('k', k.detach())
        if can_pack:
            _pack(block)
    for module in model.modules():
        if hasattr(module, 'grad_checkpointing'):
            setattr(module, 'grad_checkpointing', False)  # noqa: B010
    return model.to(memory_format=torch.channels_last)


def _is_plain(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution is one with weights of its own: not made of others, as by weight norm or pruning."""
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
    """Put packed convolutions in the place of plain ones of many weights."""
    for parent in list(block.modules()):
        for name, conv in list(parent.named_children()):
            if not _is_plain(conv) or conv.weight.numel() < PACKED_WEIGHTS:
                continue
            if conv.padding_mode == 'zeros' and not isinstance(conv.padding, str):
                setattr(parent, name, PackedConv2d.from_conv(conv))
