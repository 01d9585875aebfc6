"""LM-ResNet and LM-ResNeXt: pre-activation residual networks that step like a linear two-step method.

A residual network is forward Euler for ``u' = f(u)``. These networks take the linear two-step rule instead,
``x[n+1] = (1 - k[n]) x[n] + k[n] x[n-1] + f(x[n])``, with one trainable ``k`` per block. The plain pre-activation
networks (``preact_*``) are the forward Euler case of the same code.

Source: Lu, Zhong, Li, Dong, "Beyond Finite Layer Neural Networks: Bridging Deep Architectures and Numerical
Differential Equations", ICML 2018, https://arxiv.org/abs/1710.10121.
"""
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.layers import (
    BatchNormAct2d,
    ClassifierHead,
    DropPath,
    calculate_drop_path_rates,
    create_conv2d,
    get_act_layer,
    get_norm_act_layer,
)
from timm.models import (
    FeatureDictNet,
    FeatureListNet,
    PretrainedCfg,
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    named_apply,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import nn

from timm_lm.layers import EulerStep, StateNoise, TwoStep
from timm_lm.layers.steps import KInit, k_values, two_steps

from . import _labels
from ._weights import check_shipped, is_shipped, sources_of_tags

__all__ = ['LMResNet']

LayerType = Union[str, Callable[..., nn.Module], Type[nn.Module]]


class Projection(nn.Module):
    """Strided 1x1 convolution to the shape of the next state, optionally after its own norm and activation."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            norm_layer: Optional[Callable[..., nn.Module]] = None,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            stride: Stride of the convolution.
            norm_layer: Norm-activation layer before the convolution, none if None.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = norm_layer(in_chs, **dd) if norm_layer is not None else nn.Identity()
        self.conv = create_conv2d(in_chs, out_chs, 1, stride=stride, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))


class ResidualBlock(nn.Module):
    """What basic and bottleneck blocks share: the shortcut, the history and the update around the branch ``f``.

    A block maps (state, history) to (next state, next history). The next history is the shortcut: the state itself, or
    its projection where the shape changes.
    """

    last_conv_name = 'conv2'

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int,
            norm_layer: Callable[..., nn.Module],
            has_history: bool,
            two_step: bool,
            shortcut_norm: bool,
            history_proj: bool,
            step_kwargs: Dict[str, Any],
            drop_path_rate: float,
            noise_level: float,
            noise_type: str,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            stride: Stride of the block.
            norm_layer: Norm-activation layer.
            has_history: Whether a history comes in; False for the first block of a network.
            two_step: Whether the network takes two-step updates; False for a plain network.
            shortcut_norm: Give a projected shortcut its own norm, instead of the first norm of the branch.
            history_proj: Project the history where the shape changes, so that the rule holds there too.
            step_kwargs: Arguments of ``TwoStep``.
            drop_path_rate: Probability of dropping the branch.
            noise_level: Level of the noise added to the state, none if 0.
            noise_type: See ``StateNoise``.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        changes_shape = stride != 1 or in_chs != out_chs
        self.two_step = two_step
        self.shortcut_norm = shortcut_norm
        self.downsample: Optional[Projection] = None
        self.history: Optional[Projection] = None
        if changes_shape:
            proj_norm = norm_layer if shortcut_norm else None
            self.downsample = Projection(in_chs, out_chs, stride, norm_layer=proj_norm, **dd)
        if two_step and has_history and (history_proj or not changes_shape):
            if changes_shape:
                self.history = Projection(in_chs, out_chs, stride, norm_layer=norm_layer, **dd)
            self.step: nn.Module = TwoStep(out_chs, **step_kwargs, **dd)
        else:
            self.step = EulerStep()
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        noise = StateNoise(noise_level, noise_type)  # checks its settings even if the level is 0
        self.noise = noise if noise_level > 0 else nn.Identity()

    def last_conv(self) -> nn.Conv2d:
        """The last convolution of the branch, whose output is ``f``."""
        return getattr(self, self.last_conv_name)

    def zero_init_last(self) -> None:
        """Start the branch from ``f = 0``."""
        nn.init.zeros_(self.last_conv().weight)

    def update(
            self,
            f: torch.Tensor,
            x: torch.Tensor,
            x_preact: torch.Tensor,
            x_prev: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Step from the state with the branch ``f``.

        Args:
            f: Output of the branch, shape (N, C_out, H_out, W_out).
            x: State, shape (N, C_in, H, W).
            x_preact: State after the first norm and activation of the branch, same shape.
            x_prev: History, same shape.

        Returns:
            Next state and next history, each of shape (N, C_out, H_out, W_out).
        """
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x if self.shortcut_norm else x_preact)
        if self.history is not None:
            x_prev = self.history(x_prev)
        x = self.noise(self.step(self.drop_path(f), shortcut, x_prev))
        # a plain network has no use for a history, so none is kept alive
        return x, shortcut if self.two_step else x


class BasicBlock(ResidualBlock):
    """Pre-activation basic block: two 3x3 convolutions, the first one strided."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            dilation: int = 1,
            first_dilation: Optional[int] = None,
            cardinality: int = 1,
            base_width: int = 64,
            norm_layer: Callable[..., nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
            **block_kwargs: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_chs, out_chs, stride, norm_layer, **block_kwargs, **dd)
        if cardinality != 1 or base_width != 64:
            raise ValueError('Basic blocks take no cardinality and no base width; use bottleneck blocks.')
        self.norm1 = norm_layer(in_chs, **dd)
        self.conv1 = create_conv2d(in_chs, out_chs, 3, stride=stride, dilation=first_dilation or dilation, **dd)
        self.norm2 = norm_layer(out_chs, **dd)
        self.conv2 = create_conv2d(out_chs, out_chs, 3, dilation=dilation, **dd)

    def forward(self, x: torch.Tensor, x_prev: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        x_preact = self.norm1(x)
        f = self.conv2(self.norm2(self.conv1(x_preact)))
        return self.update(f, x, x_preact, x_prev)


class BottleneckBlock(ResidualBlock):
    """Pre-activation bottleneck block: 1x1, grouped and strided 3x3, and 1x1 convolution; expansion 4."""

    expansion = 4
    last_conv_name = 'conv3'

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            dilation: int = 1,
            first_dilation: Optional[int] = None,
            cardinality: int = 1,
            base_width: int = 64,
            norm_layer: Callable[..., nn.Module] = BatchNormAct2d,
            device=None,
            dtype=None,
            **block_kwargs: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_chs, out_chs, stride, norm_layer, **block_kwargs, **dd)
        mid_chs = out_chs // self.expansion * base_width // 64 * cardinality
        if mid_chs == 0:
            raise ValueError(f'{out_chs} channels are too few for {cardinality} groups of a base width of '
                             f'{base_width}.')
        self.norm1 = norm_layer(in_chs, **dd)
        self.conv1 = create_conv2d(in_chs, mid_chs, 1, **dd)
        self.norm2 = norm_layer(mid_chs, **dd)
        self.conv2 = create_conv2d(
            mid_chs, mid_chs, 3, stride=stride, dilation=first_dilation or dilation, groups=cardinality, **dd)
        self.norm3 = norm_layer(mid_chs, **dd)
        self.conv3 = create_conv2d(mid_chs, out_chs, 1, **dd)

    def forward(self, x: torch.Tensor, x_prev: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        x_preact = self.norm1(x)
        f = self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(x_preact)))))
        return self.update(f, x, x_preact, x_prev)


class Stage(nn.Module):
    """Blocks of one output shape; only the first one may change the shape."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int,
            dilation: int,
            drop_path_rates: Sequence[float],
            block_fn: Callable[..., ResidualBlock],
            has_history: bool,
            **block_kwargs: Any,
    ):
        super().__init__()
        self.grad_checkpointing = False
        first_dilation = 1 if dilation in (1, 2) else 2
        self.blocks = nn.ModuleList()
        for i, drop_path_rate in enumerate(drop_path_rates):
            first = i == 0
            self.blocks.append(block_fn(
                in_chs if first else out_chs,
                out_chs,
                stride=stride if first else 1,
                dilation=dilation,
                first_dilation=first_dilation if first else dilation,
                has_history=has_history or not first,
                drop_path_rate=drop_path_rate,
                **block_kwargs,
            ))

    def forward(self, x: torch.Tensor, x_prev: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (state, history) through the blocks, recomputing each in backward if gradient checkpointing is on."""
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, x_prev = checkpoint(block, x, x_prev)
            else:
                x, x_prev = block(x, x_prev)
        return x, x_prev


def _create_stem(in_chans: int, out_chs: int, stem_type: str, **dd: Any) -> nn.Sequential:
    if stem_type == 'cifar':
        conv = create_conv2d(in_chans, out_chs, 3, **dd)
        pool: nn.Module = nn.Identity()
    elif stem_type == '':
        conv = create_conv2d(in_chans, out_chs, 7, stride=2, **dd)
        pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    else:
        raise ValueError(f"Unknown stem_type '{stem_type}', use '' (7x7 and pool) or 'cifar' (3x3).")
    return nn.Sequential(OrderedDict(conv=conv, pool=pool))


class LMResNet(nn.Module):
    """LM-ResNet, LM-ResNeXt and the plain pre-activation networks, for small images and for ImageNet.

    Parameter names follow timm's ResNetV2, at its widths, but a stage that keeps the shape has no projection. Blocks
    pass on a pair (state, history), of which a plain network ignores the second. Hooks on a block or a stage therefore
    get such a pair; for the state alone, hook the ``step`` of a block.
    """

    def __init__(
            self,
            layers: Sequence[int],
            channels: Sequence[int] = (256, 512, 1024, 2048),
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            output_stride: int = 32,
            stem_chs: int = 64,
            stem_type: str = '',
            basic: bool = False,
            cardinality: int = 1,
            base_width: int = 64,
            shortcut_norm: bool = False,
            two_step: bool = True,
            history_proj: bool = False,
            k_init: KInit = (-0.1, 0.),
            k_per_channel: bool = False,
            k_trainable: bool = True,
            state_noise: float = 0.,
            state_noise_type: str = 'gaussian',
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = BatchNormAct2d,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            zero_init_last: bool = False,
            device=None,
            dtype=None,
    ):
        """
        Args:
            layers: Blocks of each stage.
            channels: Output channels of each stage.
            num_classes: Classes of the head, none if 0.
            in_chans: Channels of the image.
            global_pool: Pooling of the head, one of timm's ('avg', 'max', 'avgmax', 'catavgmax', '').
            output_stride: Largest ratio of image size to feature size; later strides become dilations.
            stem_chs: Output channels of the stem.
            stem_type: '' (7x7 convolution of stride 2, max pool) or 'cifar' (3x3 convolution).
            basic: Basic blocks instead of bottleneck blocks.
            cardinality: Groups of the 3x3 convolutions of bottleneck blocks.
            base_width: Width of a group where a ResNet has 64 (ResNeXt's notation: cardinality x base_width d).
            shortcut_norm: Give a projected shortcut its own norm and activation (as in the authors' CIFAR networks);
                otherwise it shares the first norm of its block (as in timm's ResNetV2).
            two_step: Two-step updates; False makes the plain network (forward Euler).
            history_proj: Project the history where the shape changes, so that the two-step rule holds there too
                (LM-ResNeXt); otherwise those blocks take Euler steps (LM-ResNet).
            k_init: Range of the uniform distribution that each ``k`` is drawn from, or one fixed number.
            k_per_channel: One ``k`` per channel instead of one per block.
            k_trainable: Learn ``k``; if False it keeps its initial value.
            state_noise: Level of the noise added to the state after each block in training, none if 0.
            state_noise_type: 'gaussian' (standard deviation = level) or 'uniform' (one-sided, U(0, level)).
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0 at the first. It drops the
                branch ``f`` per sample; state and history are kept.
            zero_init_last: Start the last convolution of each branch from zero.

        Raises:
            ValueError: If the settings do not fit together, or the stem type, the noise type or the range of ``k`` is
                invalid. Layer and pooling names that timm does not know raise timm's errors.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if len(layers) != len(channels):
            raise ValueError(f'layers and channels must name the same stages, got {layers} and {channels}.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.zero_init_last = zero_init_last
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer=get_act_layer(act_layer))

        self.stem = _create_stem(in_chans, stem_chs, stem_type, **dd)
        is_small = stem_type == 'cifar'
        self.feature_info: List[Dict[str, Any]] = [
            dict(num_chs=stem_chs, reduction=1 if is_small else 2, module='stem.conv')]

        self.stages = nn.ModuleList()
        rates_by_stage: Any = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        reduction, dilation = 1 if is_small else 4, 1  # of the state, and of the convolutions
        for in_chs, out_chs, drop_path_rates in zip([stem_chs, *channels], channels, rates_by_stage):
            stride, step = 1, 1 if not self.stages else 2  # later stages halve the state
            if reduction < output_stride:
                stride = step
            else:  # or keep its size, and reach as far by dilation
                dilation *= step
            reduction *= stride
            name = f'stages.{len(self.stages)}'
            self.feature_info.append(dict(num_chs=out_chs, reduction=reduction, module=name))
            self.stages.append(Stage(
                in_chs,
                out_chs,
                stride=stride,
                dilation=dilation,
                drop_path_rates=drop_path_rates,
                block_fn=BasicBlock if basic else BottleneckBlock,
                has_history=len(self.stages) > 0,
                cardinality=cardinality,
                base_width=base_width,
                norm_layer=norm_act_layer,
                two_step=two_step,
                shortcut_norm=shortcut_norm,
                history_proj=history_proj,
                step_kwargs=dict(k_init=k_init, per_channel=k_per_channel, trainable=k_trainable),
                noise_level=state_noise,
                noise_type=state_noise_type,
                **dd,
            ))

        self.num_features = self.feature_info[-1]['num_chs']
        self.norm = norm_act_layer(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, use_conv=True, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

        self.init_weights()

    @torch.jit.ignore
    def init_weights(self, zero_init_last: Optional[bool] = None) -> None:
        """Reinitialise all weights, and reset the statistics of the norms.

        Args:
            zero_init_last: Start the last convolution of each branch from zero; as set in the constructor if None.
        """
        if zero_init_last is None:
            zero_init_last = self.zero_init_last
        named_apply(partial(_init_weights, zero_init_last=zero_init_last), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that get no weight decay: each ``k``."""
        return {f'{name}.k' for name, step in two_steps(self).items() if isinstance(step.k, nn.Parameter)}

    @torch.jit.ignore
    def k_values(self) -> Dict[str, torch.Tensor]:
        """The coefficient ``k`` of each two-step block, by block name, in network order.

        Returns:
            Detached copies on the CPU, of shape (1,), or (C,) if per channel; empty for a plain network.
        """
        return k_values(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters by layer, for layer-wise learning rates."""
        stage = r'^stages\.(\d+)'
        last = (r'^norm', (99999,))  # a group of its own, after the blocks
        return {'stem': '^stem', 'blocks': stage if coarse else [(stage + r'\.blocks\.(\d+)', None), last]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward, from the state and the history that enter it."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes of the new classifier, none if 0.
            global_pool: Pooling of the head, unchanged if None.
        """
        self.num_classes = num_classes
        pool_type = self.head.global_pool.pool_type if global_pool is None else global_pool
        like = next(self.parameters())
        head = ClassifierHead(
            self.num_features, num_classes, pool_type=pool_type, use_conv=True, device=like.device, dtype=like.dtype)
        head.train(self.training)
        if isinstance(self.head, ClassifierHead):  # keep its hooks and dropout
            names = ['in_features', 'num_features', 'fc']
            if pool_type != getattr(self.head.global_pool, 'pool_type', None):  # it may be the user's own
                names += ['global_pool', 'flatten']
            for name in names:
                setattr(self.head, name, getattr(head, name, None))
        else:
            self.head = head
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates: the stem's output (0) and the state after each stage (1, ...).

        Args:
            x: Images, shape (N, C, H, W).
            indices: Take the last n if int, all if None, the given ones if a sequence.
            norm: Apply the final norm to the last stage's state.
            stop_early: Stop after the last wanted intermediate.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return only the intermediates.

        Returns:
            The intermediates, or (final features, intermediates); with ``stop_early`` the former are the last state
            that was computed, without the final norm if that is not of the last stage.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        wanted, last_wanted = feature_take_indices(len(self.stages) + 1, indices)
        last = last_wanted if stop_early else len(self.stages)

        x = self.stem.conv(x)
        found = [x] if 0 in wanted else []
        x = self.stem.pool(x)
        x_prev = x
        for number, stage in enumerate(self.stages, start=1):
            if number <= last:  # a ModuleList cannot be sliced in TorchScript
                x, x_prev = stage(x, x_prev)
                if number in wanted:
                    found.append(x)

        is_whole, norm_found = last == len(self.stages), norm and len(self.stages) in wanted
        if is_whole and (norm_found or not intermediates_only):
            x = self.norm(x)
        if norm_found:
            found[-1] = x
        if intermediates_only:
            return found
        return x, found

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the layers that the given intermediates do not need.

        Args:
            indices: As for ``forward_intermediates``.
            prune_norm: Remove the final norm.
            prune_head: Remove the head.

        Returns:
            The indices, as non-negative numbers.
        """
        kept, last = feature_take_indices(len(self.stages) + 1, indices)
        if last < len(self.stages):
            self.num_features = self.feature_info[last]['num_chs']
            prune_norm = prune_head = True  # they are sized for the last stage
        self.stages = self.stages[:last]
        if not self.stages:
            self.stem.pool = nn.Identity()  # the stem's intermediate is taken before it
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return kept

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features before pooling: images (N, C, H, W) to (N, num_features, H / stride, W / stride)."""
        x = self.stem(x)
        x_prev = x
        for stage in self.stages:
            x, x_prev = stage(x, x_prev)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (N, num_classes) of features (N, num_features, H, W), or the pooled features if ``pre_logits``.

        With ``global_pool=''`` both keep the shape of the features, (..., H, W).
        """
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W); as ``forward_head``."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module, name: str = '', zero_init_last: bool = False) -> None:
    if isinstance(module, nn.Conv2d):
        if name.startswith('head.'):
            nn.init.normal_(module.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, 'reset_parameters'):  # norms with their statistics, and the two-step coefficients
        module.reset_parameters()
        for statistic, value in (('running_mean', 0.), ('running_var', 1.)):  # some norms do not reset them
            if isinstance(getattr(module, statistic, None), torch.Tensor):
                getattr(module, statistic).fill_(value)
    elif zero_init_last and isinstance(module, (BasicBlock, BottleneckBlock)):
        module.zero_init_last()


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: LMResNet, strict: bool = True) -> Dict[str, Any]:
    """Prepare pretrained weights for the network.

    The tags ``resnetv2_*`` hold weights of timm's plain ResNetV2, a starting point for fine-tuning. For these tags
    only, missing coefficients are filled with ``k = 0``, so that the network computes what timm's does. With
    ``k_per_channel``, each channel starts from the block's single ``k``, which computes the same too.

    Args:
        state_dict: The weights, by name.
        model: The network.
        strict: The ``pretrained_strict`` given to ``timm.create_model``.

    Raises:
        RuntimeError: If ``strict`` and the weights have a ``k`` for other steps than the network, even where timm
            accepts missing and unexpected weights, as it does for another number of classes.
    """
    state_dict = dict(state_dict)
    wanted = {f'{name}.k': step.k.shape for name, step in two_steps(model).items()}
    if str(model.pretrained_cfg.get('tag', '')).startswith('resnetv2_'):
        for key, shape in wanted.items():
            state_dict.setdefault(key, torch.zeros(shape))
    found = {key for key in state_dict if key.endswith('.step.k')}
    missing, unexpected = sorted(wanted.keys() - found), sorted(found - wanted.keys())
    if strict and (missing or unexpected):
        reason = (
            'the networks differ in depth, or in history_proj' if found and wanted else
            'those with k belong to a two-step network, those without to a plain one (two_step=False)')
        raise RuntimeError(
            f'The weights do not fit the steps (missing keys: {missing}, unexpected keys: {unexpected}); {reason}.')
    for key in wanted.keys() & found:
        if state_dict[key].shape == (1,):
            state_dict[key] = state_dict[key].expand(wanted[key])
    return state_dict


class _FeatureGetter(FeatureGetterNet):
    """timm's feature getter, with the checkpointing switch of timm's other wrappers."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def _is_registered(variant: str, given: Any) -> bool:
    """Whether a config is that of one of the network's tags, and not a user's own."""
    is_name = not isinstance(given, (dict, PretrainedCfg))
    return is_name or resolve_pretrained_cfg(variant, given) in get_arch_pretrained_cfgs(variant).values()


def _create_lm_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> LMResNet:
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    given = kwargs.get('pretrained_cfg')
    cfg = resolve_pretrained_cfg(variant, given, dict(overlay))
    if 'file' not in overlay and not cfg.source and is_shipped(cfg.file) and (
            cfg.hf_hub_id or cfg.url or cfg.state_dict):
        overlay['file'] = None  # a source was asked for, and timm would prefer the shipped file
    if not pretrained and _is_registered(variant, given):
        # new weights have no class names: a network trained on other classes would be saved with these names
        overlay = dict(label_names=None, description=None) | overlay
    kwargs['pretrained_cfg_overlay'] = overlay
    if pretrained:
        check_shipped(overlay.get('file', cfg.file))
    feature_cls = kwargs.get('feature_cls')
    if isinstance(feature_cls, str):
        feature_cls = feature_cls.lower()
    is_chain = feature_cls in ('list', 'dict') or (
        isinstance(feature_cls, type) and issubclass(feature_cls, (FeatureListNet, FeatureDictNet)))
    if kwargs.get('features_only') and is_chain:
        raise ValueError(
            f"feature_cls={kwargs['feature_cls']!r} rebuilds a network as a chain of modules, but {variant} carries a "
            "pair (state, history) from block to block; use feature_cls 'getter', 'hook' or 'fx'.")
    if feature_cls == 'getter':
        kwargs['feature_cls'] = _FeatureGetter
    num_features = len(kwargs['layers']) + 1
    return build_model_with_cfg(
        LMResNet,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, strict=kwargs.get('pretrained_strict', True)),
        feature_cfg=dict(out_indices=tuple(range(num_features)), feature_cls=_FeatureGetter),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7),
        crop_pct=0.875, interpolation='bicubic',
        mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD,
        first_conv='stem.conv', classifier='head.fc', license='apache-2.0',
    ) | kwargs


_PAPER = dict(
    paper_name='Beyond Finite Layer Neural Networks: Bridging Deep Architectures and Numerical Differential Equations',
    paper_ids='arXiv:1710.10121',
)


def _cifar_cfg(labels: Tuple[str, ...], **kwargs: Any) -> Dict[str, Any]:
    return _cfg(
        num_classes=len(labels), label_names=labels, input_size=(3, 32, 32), pool_size=(8, 8),
        crop_pct=1.0, interpolation='bilinear', **_PAPER,
    ) | kwargs


# True mean and standard deviation of the pixels of the train splits.
_C10 = _cifar_cfg(_labels.CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_C100 = _cifar_cfg(_labels.CIFAR100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))


def _cifar_tags(*further: str) -> Dict[str, Dict[str, Any]]:
    """Tags of a network for small images, named after its recipes, in timm's order.

    The first one sets the number of classes; the first one with weights for that number of classes is the default.
    """
    best = [tag for tag in ('distill_c10', 'grow_c10') if tag in further]  # better than best_c10, the best first
    tags = dict.fromkeys((*best, 'best_c10', *further, 'best_c100', 'paper_c100'))  # each once
    return {tag: cfg for data, cfg in (('_c10', _C10), ('_c100', _C100)) for tag in tags if tag.endswith(data)}


_C100_TAGS = dict(best_c100=_C100, paper_c100=_C100)
_RESNEXT_TAGS = dict(resnext_c100=_C100)
_UNTRAINED_TAGS = dict(untrained=_cfg())
_IN1K_TAGS = dict(paper_in1k=_cfg(
    interpolation='bilinear', mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, **_PAPER))


def _resnetv2_tag(tag: str, hf_hub_id: str, **kwargs: Any) -> Dict[str, Dict[str, Any]]:
    """Weights of timm's plain ResNetV2, loaded with ``k = 0``."""
    return {tag: _cfg(
        hf_hub_id=hf_hub_id, test_input_size=(3, 288, 288), test_crop_pct=1.0,
        description='Weights of the plain ResNetV2 of timm with k = 0, a start for fine-tuning.', **kwargs)}


_TAGS: Mapping[str, Dict[str, Dict[str, Any]]] = {
    'lm_resnet20': _cifar_tags('distill_c10', 'distill_c100', 'grow_c100', 'paper_c10', 'demo_c10', 'plain_first_c10'),
    'lm_resnet32': _cifar_tags('distill_c10', 'grow_c10', 'grow_c100', 'paper_c10', 'plain_first_c10'),
    'lm_resnet44': _cifar_tags('distill_c10', 'grow_c10', 'grow_c100', 'regrow_c100', 'paper_c10', 'plain_first_c10'),
    'lm_resnet56': _cifar_tags(
        'distill_c10', 'grow_c10', 'grow_c100', 'regrow_c100', 'paper_c10', 'plain_first_c10', 'sd_c10', 'noise_c10'),
    'lm_resnet110': _cifar_tags(
        'grow_c10', 'grow_c100', 'regrow_c100', 'paper_c10', 'plain_first_c10', 'sd_c10', 'noise_c10'),
    'lm_resnet164': _C100_TAGS,
    'lm_resnext29_8x64d': _RESNEXT_TAGS,
    'lm_resnext29_16x64d': _RESNEXT_TAGS,
    'preact_resnet20': _cifar_tags('distill_c10', 'distill_c100', 'grow_c100', 'paper_c10', 'demo_c10'),
    'preact_resnet32': _cifar_tags('distill_c10', 'grow_c10', 'grow_c100', 'paper_c10'),
    'preact_resnet44': _cifar_tags('distill_c10', 'grow_c10', 'grow_c100', 'regrow_c100', 'paper_c10'),
    'preact_resnet56': _cifar_tags(
        'distill_c10', 'grow_c10', 'grow_c100', 'regrow_c100', 'paper_c10', 'sd_c10', 'noise_c10'),
    'preact_resnet110': _cifar_tags('grow_c10', 'grow_c100', 'regrow_c100', 'paper_c10', 'sd_c10', 'noise_c10'),
    'preact_resnet164': _C100_TAGS,
    'preact_resnext29_8x64d': _RESNEXT_TAGS,
    'preact_resnext29_16x64d': _RESNEXT_TAGS,
    'lm_resnet18': _resnetv2_tag('resnetv2_ra4_e3600_r224_in1k', 'timm/resnetv2_18.ra4_e3600_r224_in1k', crop_pct=0.9),
    'lm_resnet34': _resnetv2_tag('resnetv2_ra4_e3600_r224_in1k', 'timm/resnetv2_34.ra4_e3600_r224_in1k', crop_pct=0.9),
    'lm_resnet50': _resnetv2_tag('resnetv2_a1h_in1k', 'timm/resnetv2_50.a1h_in1k', crop_pct=0.95) | _IN1K_TAGS,
    'lm_resnet101': _resnetv2_tag('resnetv2_a1h_in1k', 'timm/resnetv2_101.a1h_in1k', crop_pct=0.95) | _IN1K_TAGS,
    'lm_resnet152': _UNTRAINED_TAGS,
    'lm_resnext50_32x4d': _UNTRAINED_TAGS,
    'lm_resnext101_32x8d': _UNTRAINED_TAGS,
    'preact_resnext50_32x4d': _UNTRAINED_TAGS,
    'preact_resnext101_32x8d': _UNTRAINED_TAGS,
}

default_cfgs = generate_default_cfgs({
    full_name: cfg for name, tags in _TAGS.items() for full_name, cfg in sources_of_tags(name, tags).items()
})

_CIFAR_BASIC = dict(channels=(16, 32, 64), stem_chs=16, stem_type='cifar', basic=True, shortcut_norm=True)
_CIFAR_BOTTLENECK = dict(channels=(64, 128, 256), stem_chs=16, stem_type='cifar', shortcut_norm=True)
_CIFAR_RESNEXT = dict(layers=(3, 3, 3), channels=(256, 512, 1024), stem_type='cifar', shortcut_norm=True, base_width=64)


@register_model
def lm_resnet20(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-20 for 32x32 images."""
    model_args = dict(layers=(3, 3, 3), **_CIFAR_BASIC)
    return _create_lm_resnet('lm_resnet20', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet32(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-32 for 32x32 images."""
    model_args = dict(layers=(5, 5, 5), **_CIFAR_BASIC)
    return _create_lm_resnet('lm_resnet32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet44(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-44 for 32x32 images."""
    model_args = dict(layers=(7, 7, 7), **_CIFAR_BASIC)
    return _create_lm_resnet('lm_resnet44', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet56(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-56 for 32x32 images."""
    model_args = dict(layers=(9, 9, 9), **_CIFAR_BASIC)
    return _create_lm_resnet('lm_resnet56', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet110(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-110 for 32x32 images."""
    model_args = dict(layers=(18, 18, 18), **_CIFAR_BASIC)
    return _create_lm_resnet('lm_resnet110', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet164(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-164 for 32x32 images, with bottleneck blocks."""
    model_args = dict(layers=(18, 18, 18), **_CIFAR_BOTTLENECK)
    return _create_lm_resnet('lm_resnet164', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnext29_8x64d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNeXt-29 8x64d for 32x32 images, with the history projected where the shape changes."""
    model_args = dict(cardinality=8, history_proj=True, **_CIFAR_RESNEXT)
    return _create_lm_resnet('lm_resnext29_8x64d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnext29_16x64d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNeXt-29 16x64d for 32x32 images, with the history projected where the shape changes."""
    model_args = dict(cardinality=16, history_proj=True, **_CIFAR_RESNEXT)
    return _create_lm_resnet('lm_resnext29_16x64d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnet20(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNet-20 for 32x32 images, the plain twin of LM-ResNet-20."""
    model_args = dict(layers=(3, 3, 3), two_step=False, **_CIFAR_BASIC)
    return _create_lm_resnet('preact_resnet20', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnet32(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNet-32 for 32x32 images, the plain twin of LM-ResNet-32."""
    model_args = dict(layers=(5, 5, 5), two_step=False, **_CIFAR_BASIC)
    return _create_lm_resnet('preact_resnet32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnet44(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNet-44 for 32x32 images, the plain twin of LM-ResNet-44."""
    model_args = dict(layers=(7, 7, 7), two_step=False, **_CIFAR_BASIC)
    return _create_lm_resnet('preact_resnet44', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnet56(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNet-56 for 32x32 images, the plain twin of LM-ResNet-56."""
    model_args = dict(layers=(9, 9, 9), two_step=False, **_CIFAR_BASIC)
    return _create_lm_resnet('preact_resnet56', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnet110(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNet-110 for 32x32 images, the plain twin of LM-ResNet-110."""
    model_args = dict(layers=(18, 18, 18), two_step=False, **_CIFAR_BASIC)
    return _create_lm_resnet('preact_resnet110', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnet164(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNet-164 for 32x32 images, the plain twin of LM-ResNet-164."""
    model_args = dict(layers=(18, 18, 18), two_step=False, **_CIFAR_BOTTLENECK)
    return _create_lm_resnet('preact_resnet164', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnext29_8x64d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNeXt-29 8x64d for 32x32 images, the plain twin of LM-ResNeXt-29 8x64d."""
    model_args = dict(cardinality=8, two_step=False, **_CIFAR_RESNEXT)
    return _create_lm_resnet('preact_resnext29_8x64d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnext29_16x64d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNeXt-29 16x64d for 32x32 images, the plain twin of LM-ResNeXt-29 16x64d."""
    model_args = dict(cardinality=16, two_step=False, **_CIFAR_RESNEXT)
    return _create_lm_resnet('preact_resnext29_16x64d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet18(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-18, timm's resnetv2_18 with two-step updates."""
    model_args = dict(layers=(2, 2, 2, 2), channels=(64, 128, 256, 512), basic=True)
    return _create_lm_resnet('lm_resnet18', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet34(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-34, timm's resnetv2_34 with two-step updates."""
    model_args = dict(layers=(3, 4, 6, 3), channels=(64, 128, 256, 512), basic=True)
    return _create_lm_resnet('lm_resnet34', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet50(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-50, timm's resnetv2_50 with two-step updates."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_lm_resnet('lm_resnet50', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet101(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-101, timm's resnetv2_101 with two-step updates."""
    model_args = dict(layers=(3, 4, 23, 3))
    return _create_lm_resnet('lm_resnet101', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnet152(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNet-152, timm's resnetv2_152 with two-step updates."""
    model_args = dict(layers=(3, 8, 36, 3))
    return _create_lm_resnet('lm_resnet152', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNeXt-50 32x4d, with the history projected where the shape changes."""
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4, history_proj=True)
    return _create_lm_resnet('lm_resnext50_32x4d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lm_resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """LM-ResNeXt-101 32x8d, with the history projected where the shape changes."""
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=8, history_proj=True)
    return _create_lm_resnet('lm_resnext101_32x8d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNeXt-50 32x4d, the plain twin of LM-ResNeXt-50 32x4d."""
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4, two_step=False)
    return _create_lm_resnet('preact_resnext50_32x4d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def preact_resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> LMResNet:
    """Pre-activation ResNeXt-101 32x8d, the plain twin of LM-ResNeXt-101 32x8d."""
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=8, two_step=False)
    return _create_lm_resnet('preact_resnext101_32x8d', pretrained=pretrained, **dict(model_args, **kwargs))
