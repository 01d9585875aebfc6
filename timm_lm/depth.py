"""Depth refinement: start a deep network from the weights of a trained shallow one.

In both networks a stage solves the same differential equation, in smaller steps in the deep one. Each block of a stage
after the first is repeated, and the last convolution of its branch is divided by the number of repeats. The first
repeat takes over the history: the step before it is smaller by the number of repeats of the previous block, so its
``k`` is multiplied by that number. The other repeats start from ``k = 0``. If the branch were constant over the
repeats, together they would make the step of the original block, up to products of two ``k``. The ``k`` of a block that
projects the history (LM-ResNeXt) is kept. A plain network has ``k = 0``.

Source: Chang, Meng, Haber, Tung, Begert, "Multi-level Residual Networks from Dynamical Systems View", ICLR 2018,
https://arxiv.org/abs/1710.10348. There, each block is doubled, several times during one training, in plain networks
whose step size is an explicit factor; the treatment of ``k`` is ours.
"""
from typing import Any, Dict, List, Tuple, cast

import torch

from .errors import UserError
from .layers import TwoStep
from .models import LMResNet

# The keys of a network's config that describe its input images.
_IMAGES = ('input_size', 'test_input_size', 'pool_size', 'mean', 'std', 'crop_pct', 'test_crop_pct', 'crop_mode',
           'interpolation')


def repeated_blocks(shallow: int, deep: int) -> List[int]:
    """For each block of a deep stage, the block of the shallow stage that it repeats.

    The first block changes the shape, so it is not repeated.

    Args:
        shallow: Blocks of the shallow stage.
        deep: Blocks of the deep stage.

    Raises:
        UserError: If the deep stage has fewer blocks, or more where there is none to repeat.
    """
    if deep < shallow or deep > shallow == 1:
        raise UserError(f'{shallow} blocks of a stage cannot become {deep}; grow a network with at least 2, and no '
                        'more than the deep one has.')
    return [0] + [1 + i * (shallow - 1) // (deep - 1) for i in range(deep - 1)]


@torch.no_grad()
def grow(shallow: LMResNet, deep: LMResNet) -> LMResNet:
    """Initialise a deep network with the weights of a shallow one of the same kind and width.

    The deep network is a starting point for training, not a copy: until it is trained its error is higher, the more so
    the more often blocks are repeated. A head with another number of classes keeps its own weights. A plain network
    becomes a two-step one with ``k = 0``, which at the same depth computes the same. The deep network's
    ``pretrained_cfg`` takes over the image settings of the shallow one and, if the head fits, the class names.

    Args:
        shallow: A trained network.
        deep: The network to initialise, two-step if the shallow one is. It is changed in place.

    Returns:
        The deep network.

    Raises:
        UserError: If one of them is not a network of this package, a stage of the deep one has fewer blocks or repeats
            one of a single block, their tensors differ in more than depth (as where one was optimized for inference),
            or the deep one's weights are computed from others, as by weight norm or pruning. Activations are not
            compared.

    Source: Chang et al., ICLR 2018, https://arxiv.org/abs/1710.10348; the treatment of ``k`` is ours.
    """
    for model in (shallow, deep):
        if not isinstance(model, LMResNet):
            raise UserError(f'A {type(model).__name__} cannot be grown; use networks of timm-lm.')
    if any('weight' not in block.last_conv()._parameters for _, new in _pairs(shallow, deep) for block in new.blocks):
        raise UserError('A network whose weights are computed from others, as by weight norm or pruning, cannot be '
                        'grown to; grow to it before that.')
    sources = [repeated_blocks(len(old.blocks), len(new.blocks)) for old, new in _pairs(shallow, deep)]
    wanted = deep.state_dict()
    state = {name: tensor for name, tensor in shallow.state_dict().items() if not name.startswith('stages.')}
    if shallow.num_classes != deep.num_classes:
        state = {name: tensor for name, tensor in state.items() if not name.startswith('head.')}
        state.update((name, tensor) for name, tensor in wanted.items() if name.startswith('head.'))
    for stage, ((old, _), repeated) in enumerate(zip(_pairs(shallow, deep), sources)):
        for i, source in enumerate(repeated):
            for name, tensor in old.blocks[source].state_dict().items():
                state[f'stages.{stage}.blocks.{i}.{name}'] = tensor
    old_k, new_k = ({name for name in tensors if name.endswith('.step.k')} for tensors in (state, wanted))
    if not old_k:
        state.update((name, torch.zeros_like(wanted[name])) for name in new_k)
    elif not new_k:
        raise UserError('A two-step network cannot start a plain one; grow a plain network, or start a two-step '
                        'one.')
    shapes, wanted_shapes = ({name: tensor.shape for name, tensor in d.items()} for d in (state, wanted))
    differing = sorted(name for name in {*state, *wanted} if shapes.get(name) != wanted_shapes.get(name))
    if differing:
        raise UserError(f'The networks differ in more than depth: in {differing[0]} and {len(differing) - 1} others; '
                        'grow networks of the same kind and width, before they are optimized for inference.')
    deep.load_state_dict(state)
    _copy_config(shallow, deep)
    _divide_steps(deep, sources)
    return deep


def _divide_steps(deep: LMResNet, sources: List[List[int]]) -> None:
    """Make the steps of repeated blocks smaller, so that together they go as far as the block that they repeat.

    Args:
        deep: A network with the weights of the repeated blocks.
        sources: For each stage, the block of the shallow stage that each block repeats.
    """
    repeats_before = 1  # of the previous block, also across stages: k weighs the step that it made
    for stage, repeated in zip(deep.stages, sources):
        for i, (block, source) in enumerate(zip(cast(Any, stage).blocks, repeated)):
            repeats = repeated.count(source)
            block.last_conv().weight.div_(repeats)
            if isinstance(block.step, TwoStep) and block.history is None:
                is_first = repeated.index(source) == i
                block.step.k.mul_(repeats_before if is_first else 0)
            repeats_before = repeats


def _copy_config(shallow: LMResNet, deep: LMResNet) -> None:
    # networks that timm did not make have none
    old, new = (cast(Dict[str, Any], getattr(model, 'pretrained_cfg', {})) for model in (shallow, deep))
    for name in _IMAGES + (('label_names',) if shallow.num_classes == deep.num_classes else ()):
        if old.get(name) is not None:
            new[name] = old[name]
        elif old and name.startswith('test_'):
            new.pop(name, None)


def _pairs(shallow: LMResNet, deep: LMResNet) -> List[Tuple[Any, Any]]:
    return list(zip(shallow.stages, deep.stages))
