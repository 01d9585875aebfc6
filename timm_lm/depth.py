"""Depth refinement: start a deep network from the weights of a trained shallow one.

To both a stage is the same differential equation, which the deep network solves in smaller steps. Each block after the
first one of a stage is repeated, and the last convolution of its branch is divided by the number of repeats. The first
of the repeats takes over the history: the step behind it has become smaller by the repeats of the block before, so its
``k`` is multiplied by them. The others start from ``k = 0``. Were the branch constant over the repeats, they would
together make the step of the block they come from, but for products of two ``k``. The ``k`` of a block that projects
the history (LM-ResNeXt) stays. A plain network has ``k = 0``.

Source: Chang, Meng, Haber, Tung, Begert, "Multi-level Residual Networks from Dynamical Systems View", ICLR 2018,
https://arxiv.org/abs/1710.10348. There each block is doubled, several times during one training, in plain networks
whose step size is an explicit factor; what becomes of ``k`` is ours.
"""
from typing import Any, Dict, List, Tuple, cast

import torch

from .errors import UserError
from .layers import TwoStep
from .models import LMResNet

# What of a network's config tells how it sees images.
_IMAGES = ('input_size', 'pool_size', 'mean', 'std', 'crop_pct', 'interpolation')


def repeated_blocks(shallow: int, deep: int) -> List[int]:
    """For each block of a deep stage the block of the shallow stage that it repeats.

    The first block changes the shape, so it is not repeated.

    Args:
        shallow: Blocks of the shallow stage.
        deep: Blocks of the deep stage.

    Raises:
        UserError: If the deep stage has fewer blocks, or more where there is none to repeat.
    """
    if deep < shallow or deep > shallow == 1:
        raise UserError(f'{shallow} blocks of a stage cannot become {deep}; give a network with at least 2, and not '
                        'more than the deep one has.')
    return [0] + [1 + i * (shallow - 1) // (deep - 1) for i in range(deep - 1)]


@torch.no_grad()
def grow(shallow: LMResNet, deep: LMResNet) -> LMResNet:
    """Give a deep network the weights of a shallow one of the same kind and width.

    The deep network is a start for training and not a copy: until it is trained its error is higher, the more so the
    more often blocks are repeated. A head of another number of classes is left as it was made. A plain network becomes
    a two-step one with ``k = 0``, which at the same depth computes the same. Its ``pretrained_cfg`` tells how it is to
    see images, which is how the shallow one saw them, and, if it has its head, the names of the classes.

    Args:
        shallow: A trained network.
        deep: The network to start, two-step if the shallow one is. It is changed in place.

    Returns:
        The deep network.

    Raises:
        UserError: If one of them is no network of this package, their tensors differ in more than depth, or the deep
            one's convolutions are made of others, as by weight norm or pruning. Activations are not compared.

    Source: Chang et al., ICLR 2018, https://arxiv.org/abs/1710.10348; what becomes of ``k`` is ours.
    """
    for model in (shallow, deep):
        if not isinstance(model, LMResNet):
            raise UserError(f'A {type(model).__name__} cannot be grown; give networks of timm-lm.')
        if any(block.is_optimized for stage in model.stages for block in cast(Any, stage).blocks):
            raise UserError('A network that was optimized for inference cannot be grown; give the one it was made of.')
    if any('weight' not in block.last_conv()._parameters for _, new in _pairs(shallow, deep) for block in new.blocks):
        raise UserError('A network whose convolutions are made of others, as by weight norm or pruning, cannot be '
                        'grown to; grow it before that.')
    if len(shallow.stages) != len(deep.stages):
        raise UserError(f'{len(shallow.stages)} stages cannot be grown to {len(deep.stages)}.')
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
        raise UserError('A two-step network cannot start a plain one; give a plain network to grow, or a two-step one '
                        'to start.')
    shapes, wanted_shapes = ({name: tensor.shape for name, tensor in d.items()} for d in (state, wanted))
    differing = sorted(name for name in {*state, *wanted} if shapes.get(name) != wanted_shapes.get(name))
    if differing:
        raise UserError(f'The networks differ in more than depth: in {differing[0]} and {len(differing) - 1} others.')
    deep.load_state_dict(state)
    _copy_config(shallow, deep)
    repeats_before = 1
    for (_, new), repeated in zip(_pairs(shallow, deep), sources):
        for i, (block, source) in enumerate(zip(new.blocks, repeated)):
            repeats = repeated.count(source)
            block.last_conv().weight.div_(repeats)
            if isinstance(block.step, TwoStep) and block.history is None:
                is_first = repeated.index(source) == i
                block.step.k.mul_(repeats_before if is_first else 0)
            repeats_before = repeats
    return deep


def _copy_config(shallow: LMResNet, deep: LMResNet) -> None:
    # networks that timm did not make have none
    old, new = (cast(Dict[str, Any], getattr(model, 'pretrained_cfg', {})) for model in (shallow, deep))
    names = _IMAGES + (('label_names',) if shallow.num_classes == deep.num_classes else ())
    new.update((name, old[name]) for name in names if old.get(name) is not None)


def _pairs(shallow: LMResNet, deep: LMResNet) -> List[Tuple[Any, Any]]:
    return list(zip(shallow.stages, deep.stages))
