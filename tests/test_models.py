"""The networks: parameters, the recurrence, keywords, and timm's model interface."""
import copy
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, DropPath
from timm.models import FeatureDictNet, FeatureListNet, checkpoint, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from timm_lm.layers import EulerStep, StateNoise, TwoStep
from timm_lm.models import LMResNet, _weights
from timm_lm.training.recipes import RECIPES

# The smallest network of each kind, with the size of its images.
TINY = {
    'basic': ('lm_resnet20', dict(layers=(2, 2, 2)), 32),
    'plain': ('preact_resnet20', dict(layers=(2, 2, 2)), 32),
    'bottleneck': ('lm_resnet164', dict(layers=(2, 2, 2)), 32),
    'resnext': ('lm_resnext29_8x64d', dict(
        layers=(2, 2, 2), channels=(32, 64, 128), stem_chs=16, cardinality=2, num_classes=10), 32),
    'imagenet': ('lm_resnet18', dict(layers=(1, 2, 1, 2), channels=(16, 24, 32, 40), stem_chs=16), 64),
    'imagenet resnext': ('lm_resnext50_32x4d', dict(
        layers=(1, 2, 1, 2), channels=(32, 64, 128, 256), stem_chs=16, cardinality=4, base_width=16), 64),
}
TWO_STEP = [kind for kind in TINY if kind != 'plain']


def create(kind, **kwargs):
    """A tiny network in evaluation mode. Norms away from 1 and 0, so that one that is forgotten or doubled shows."""
    name, tiny, _ = TINY[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **(tiny | kwargs)).eval()
    randomize_norms(model)
    return model


@torch.no_grad()
def randomize_norms(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)


def images(kind, batch_size=2, dtype=torch.float32, in_chans=3):
    size = TINY[kind][2]
    return torch.randn(batch_size, in_chans, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def blocks(model):
    return [block for stage in model.stages for block in stage.blocks]


def count(name, **kwargs):
    model = timm.create_model(name, device='meta', **kwargs)
    return sum(p.numel() for p in model.parameters())


def count_k(name, **kwargs):
    return sum(k.numel() for k in ks(timm.create_model(name, device='meta', **kwargs)).values())


def ks(model):
    return {name: p for name, p in model.named_parameters() if name.rpartition('.')[2] == 'k'}


# ------------------------------------------------------------------------------------------------- parameters

# By counting in the paper's tables: plain parameters, LM parameters without the k's, number of k's.
CIFAR_COUNTS = [
    ('resnet20', 10, 272_378, 272_378, 6),
    ('resnet32', 10, 466_810, 466_810, 12),
    ('resnet44', 10, 661_242, 661_242, 18),
    ('resnet56', 10, 855_674, 855_674, 24),
    ('resnet110', 10, 1_730_618, 1_730_618, 51),
    ('resnet164', 10, 1_703_674, 1_703_674, 51),
    ('resnet164', 100, 1_726_804, 1_726_804, 51),
    ('resnext29_8x64d', 10, 34_424_778, 35_081_674, 8),
    ('resnext29_16x64d', 10, 68_153_290, 68_810_186, 8),
]


@pytest.mark.parametrize('name, num_classes, plain, lm, num_k', CIFAR_COUNTS)
def test_parameters_of_cifar_networks(name, num_classes, plain, lm, num_k):
    assert count(f'preact_{name}', num_classes=num_classes) == plain
    assert count(f'lm_{name}', num_classes=num_classes, two_step=False) == plain
    assert count(f'lm_{name}', num_classes=num_classes) == lm + num_k
    assert count_k(f'lm_{name}') == num_k
    assert count_k(f'preact_{name}') == 0


@pytest.mark.parametrize('depth, blocks_per_stage', [
    (18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)), (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))])
def test_parameters_of_imagenet_networks_are_timm_s_and_the_k_s(depth, blocks_per_stage):
    """Basic blocks of 64 channels do not change shape at the first stage, yet the first block has no history."""
    num_k = sum(blocks_per_stage) - 4
    assert count(f'lm_resnet{depth}') == count(f'resnetv2_{depth}') + num_k
    assert count_k(f'lm_resnet{depth}') == num_k
    assert count(f'lm_resnet{depth}', two_step=False) == count(f'resnetv2_{depth}')


@pytest.mark.parametrize('name, num_k', [
    ('resnext29_8x64d', 8), ('resnext29_16x64d', 8), ('resnext50_32x4d', 15), ('resnext101_32x8d', 32)])
def test_lm_resnext_adds_the_k_s_and_the_history_projections(name, num_k):
    lm = timm.create_model(f'lm_{name}', device='meta')
    plain = timm.create_model(f'preact_{name}', device='meta')
    lm, plain = dict(lm.named_parameters()), dict(plain.named_parameters())
    assert plain.keys() < lm.keys()
    assert all(lm[n].shape == plain[n].shape for n in plain)
    added = {n: p.numel() for n, p in lm.items() if n not in plain}
    assert sum(size for n, size in added.items() if n.endswith('.step.k')) == num_k
    # a projection: BN of the input, 1x1 convolution to twice the channels, at every stage but the first
    channels = (256, 512, 1024, 2048)[:4 if '32x' in name else 3]
    projections = sum(2 * c + 2 * c * c for c in channels[:-1])
    assert sum(size for n, size in added.items() if '.history.' in n) == projections
    assert sum(added.values()) == num_k + projections


@pytest.mark.parametrize('name', ['resnext50_32x4d', 'resnext101_32x8d'])
def test_imagenet_resnext_has_the_convolutions_of_timm_s(name):
    """Post-activation places its norms elsewhere, the weights of convolutions and classifier are the same."""
    def sizes(name):
        model = timm.create_model(name, device='meta')
        return sorted(p.numel() for p in model.parameters() if p.dim() > 1)

    assert sizes(f'preact_{name}') == sizes(name)


def test_two_step_blocks():
    """Not the first block, nor those that change shape, unless their history is projected."""
    def two_step_blocks(model):
        return [[isinstance(block.step, TwoStep) for block in stage.blocks] for stage in model.stages]

    assert two_step_blocks(create('basic', layers=(3, 2, 2))) == [[False, True, True], [False, True], [False, True]]
    assert two_step_blocks(create('bottleneck')) == [[False, True]] * 3
    assert two_step_blocks(create('imagenet')) == [[False], [False, True], [False], [False, True]]
    assert two_step_blocks(create('resnext')) == [[False, True], [True, True], [True, True]]
    assert two_step_blocks(create('plain')) == [[False, False]] * 3
    # same channels and stride 1 in the second stage: nothing changes shape, and its first block has a history
    same = create('imagenet', channels=(16, 16, 32, 40), output_stride=4)
    assert two_step_blocks(same) == [[False], [True, True], [False], [False, True]]
    history = create('resnext')
    assert [block.history is not None for block in blocks(history)] == [False, False, True, False, True, False]


# --------------------------------------------------------------------------------------------- the recurrence

def is_two_step(model, history_proj):
    """Which blocks take two-step updates, by the rule of the paper: not the first, nor those that change shape."""
    first, *others = blocks(model)
    return {first: False} | {block: history_proj or block.downsample is None for block in others}


def recurrence(model, x, history_proj, f):
    """State after each stage, from the projections, the k's and the branches ``f`` of the blocks that have one."""
    two_step = is_two_step(model, history_proj)
    states = []
    x = x_prev = model.stem(x)
    for stage in model.stages:
        for block in stage.blocks:
            shortcut, history = x, x_prev
            if block.downsample is not None:
                own_norm = isinstance(block.downsample.norm, BatchNormAct2d)
                x_preact = block.downsample.norm(x) if own_norm else block.norm1(x)
                shortcut = F.conv2d(x_preact, block.downsample.conv.weight, stride=block.downsample.conv.stride)
            if two_step[block]:
                if block.downsample is not None:
                    history = block.history(x_prev)
                k = block.step.k.detach().view(-1, 1, 1)
                x = (1 - k) * shortcut + k * history
            else:
                x = shortcut
            x = x + f.get(block, 0.)
            x_prev = shortcut
        states.append(x)
    return states


def zero_weights(block):
    nn.init.zeros_((block.conv3 if hasattr(block, 'conv3') else block.conv2).weight)


def drop_always(block):
    """Drop the branch of every sample, which only happens in training."""
    block.drop_path = DropPath(1.)
    block.train()


def flip_signs(model):
    with torch.no_grad():
        for step in model.modules():
            if isinstance(step, TwoStep):
                step.k.neg_()


@pytest.mark.parametrize('silence', [zero_weights, drop_always])
@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('kind', TWO_STEP)
def test_without_branches_every_stage_is_the_bare_recurrence(kind, per_channel, silence):
    """In three ways: all branches alive, those of two-step blocks silent, all silent.

    With all silent, an LM-ResNet stays where its projections put it: state and history are equal from the first block
    on, whatever k is. So the branches of its Euler blocks, which make the two differ, stay alive in the second way.
    """
    history_proj = 'resnext' in kind
    model = create(kind, k_per_channel=per_channel, k_init=(-0.9, 0.9), layers=(3,) * len(create(kind).stages)).double()
    f = {}
    for block, two_step in is_two_step(model, history_proj).items():
        assert isinstance(block.step, TwoStep if two_step else EulerStep)
    x = images(kind, dtype=torch.float64)

    def check(depends_on_k):
        f.clear()
        handles = [block.drop_path.register_forward_hook(lambda module, args, out, block=block: f.update({block: out}))
                   for block in blocks(model)]
        with torch.no_grad():
            states = model.forward_intermediates(x, intermediates_only=True)[1:]
            expected = recurrence(model, x, history_proj, f)
            for state, bare in zip(states, expected, strict=True):
                torch.testing.assert_close(state, bare, rtol=1e-11, atol=1e-11)
            flip_signs(model)
            flipped = model.forward_intermediates(x, intermediates_only=True)[-1]
            flip_signs(model)
        assert ((flipped - states[-1]).abs().max() > 1e-3) == depends_on_k
        for handle in handles:
            handle.remove()

    check(True)
    assert all((out != 0).any() for out in f.values())
    for block, two_step in is_two_step(model, history_proj).items():
        if two_step:
            silence(block)
    check(True)
    assert {block: bool((out == 0).all()) for block, out in f.items()} == is_two_step(model, history_proj)
    for block in blocks(model):
        silence(block)
    check(history_proj)
    assert all((out == 0).all() for out in f.values())


def test_drop_path_drops_the_branch_of_a_sample_and_nothing_else():
    model = create('basic', drop_path_rate=0.5, k_init=(-0.9, -0.5)).double().train()
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for block in blocks(model)]
    assert rates == pytest.approx([0., 0.1, 0.2, 0.3, 0.4, 0.5])  # linear, from 0 at the first block
    block = blocks(model)[-1]
    x, x_prev = torch.randn(2, 16, 64, 8, 8, dtype=torch.float64).unbind()
    branch = {}
    block.drop_path.register_forward_hook(lambda module, args, out: branch.update(f=args[0], dropped=out))
    out, history = block(x, x_prev)
    k = block.step.k.item()
    bare = (1 - k) * x + k * x_prev
    dropped = [torch.allclose(o, b, rtol=0, atol=1e-12) for o, b in zip(out, bare)]
    kept = [torch.allclose(o, b + f / 0.5, rtol=0, atol=1e-12) for o, b, f in zip(out, bare, branch['f'])]
    assert [d != k for d, k in zip(dropped, kept)] == [True] * 16
    assert any(dropped) and any(kept)
    assert torch.equal(history, x)


@pytest.mark.parametrize('kind', TWO_STEP)
def test_k_zero_is_the_plain_network(kind):
    """Projections of the history aside, an LM network with k = 0 computes what its plain setting does."""
    lm = create(kind, k_init=0.)
    plain = create(kind, two_step=False)
    plain.load_state_dict({n: t for n, t in lm.state_dict().items() if n in plain.state_dict()})
    x = images(kind)
    with torch.no_grad():
        torch.testing.assert_close(lm(x), plain(x))
        lm_away = create(kind, k_init=0.5)
        lm_away.load_state_dict({n: t for n, t in lm.state_dict().items() if not n.endswith('.k')}, strict=False)
        assert not torch.allclose(lm_away(x), plain(x), rtol=1e-2)


# ------------------------------------------------------------------------------------------- the coefficients

def test_k_starts_between_minus_a_tenth_and_zero():
    values = torch.cat(list(timm.create_model('lm_resnet110').k_values().values()))
    assert len(values) == 51
    assert values.min() >= -0.1 and values.max() <= 0
    assert values.unique().numel() > 40  # drawn for each block


def test_k_values_by_block_name():
    model = create('resnext')
    values = model.k_values()
    assert list(values) == [f'stages.{s}.blocks.{b}' for s, b in [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]]
    for name, k in values.items():
        own = model.get_submodule(name).step.k
        assert torch.equal(k, own)
        assert not k.requires_grad and k.data_ptr() != own.data_ptr()
    assert create('plain').k_values() == {}


def test_k_per_channel():
    model = create('basic', k_per_channel=True)
    assert [k.shape for k in model.k_values().values()] == [(16,), (32,), (64,)]


def test_k_per_channel_starts_from_the_one_k_of_pretrained_weights():
    model = timm.create_model('lm_resnet20', pretrained=True, k_per_channel=True).eval()
    reference = timm.create_model('lm_resnet20', pretrained=True).eval()
    for name, k in reference.k_values().items():
        assert torch.equal(model.k_values()[name], k.expand(model.get_submodule(name).step.k.shape))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


def test_fixed_k():
    model, trainable = create('basic', k_trainable=False, k_init=-0.2), create('basic')
    assert not ks(model)
    assert model.state_dict().keys() == trainable.state_dict().keys()
    assert model.no_weight_decay() == set()
    assert torch.cat(list(model.k_values().values())).tolist() == pytest.approx([-0.2] * 3)
    trainable.load_state_dict(model.state_dict())
    x = images('basic')
    with torch.no_grad():
        assert torch.equal(model(x), trainable(x))


@pytest.mark.parametrize('per_channel', [False, True])
def test_k_gets_no_weight_decay(per_channel):
    model = create('resnext', k_per_channel=per_channel)
    assert model.no_weight_decay() == set(ks(model))
    assert len(model.no_weight_decay()) == 5
    optimizer = create_optimizer_v2(model, opt='momentum', lr=0.1, weight_decay=0.3)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert {decay[id(k)] for k in ks(model).values()} == {0.}
    assert decay[id(model.stem.conv.weight)] == 0.3
    assert len(decay) == len(list(model.parameters()))

    before = {name: k.detach().clone() for name, k in ks(model).items()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(k, before[name]) for name, k in ks(model).items())


def test_k_gets_no_weight_decay_with_layer_decay():
    model = create('basic')
    groups = param_groups_layer_decay(
        model, weight_decay=0.3, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay(),
        weight_decay_exclude_1d=False)
    own = {id(k) for k in ks(model).values()}
    assert {g['weight_decay'] for g in groups if own & {id(p) for p in g['params']}} == {0.}
    assert {g['weight_decay'] for g in groups if not own & {id(p) for p in g['params']}} == {0.3}


# ---------------------------------------------------------------------------------------------------- keywords

def test_num_classes():
    for num_classes, shape in [(7, (2, 7)), (0, (2, 64))]:
        model = create('basic', num_classes=num_classes)
        assert model.num_classes == num_classes
        assert model(images('basic')).shape == shape


def test_in_chans():
    model = create('imagenet', in_chans=1)
    assert model.in_chans == 1
    assert model(images('imagenet', in_chans=1)).shape == (2, 1000)


@pytest.mark.parametrize('pool, width', [('avg', 64), ('max', 64), ('avgmax', 64), ('catavgmax', 128)])
def test_global_pool(pool, width):
    model = create('basic', global_pool=pool, num_classes=5)
    x = model.forward_features(images('basic'))
    avg, top = x.mean((2, 3)), x.amax((2, 3))
    pooled = {'avg': avg, 'max': top, 'avgmax': 0.5 * (avg + top), 'catavgmax': torch.cat([avg, top], 1)}[pool]
    assert model.head_hidden_size == width
    assert model.num_features == 64
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), pooled)
    assert model(images('basic')).shape == (2, 5)


def test_no_global_pool():
    model = create('basic', global_pool='', num_classes=0)
    assert model(images('basic')).shape == (2, 64, 8, 8)


def test_drop_rate_acts_before_the_classifier_in_training():
    model = create('basic', drop_rate=0.5)
    x = model.forward_features(images('basic'))
    assert torch.equal(model.forward_head(x), model.forward_head(x))
    model.train()
    dropped = model.forward_head(x, pre_logits=True)
    pooled = x.mean((2, 3))
    assert 0.2 < (dropped == 0).float().mean() < 0.8
    torch.testing.assert_close(dropped[dropped != 0], 2 * pooled[dropped != 0])
    model.reset_classifier(3)
    assert model.head.drop.p == 0.5


@pytest.mark.parametrize('name', ['resnetv2_18', 'resnetv2_50'])
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride_as_timm_s_network(name, output_stride):
    """With k = 0 and the same weights, dilations included, ours is timm's ResNetV2."""
    kwargs = dict(layers=(1, 1, 2, 2), channels=(32, 64, 96, 128), output_stride=output_stride, num_classes=9)
    torch.manual_seed(0)
    theirs = timm.create_model(name, zero_init_last=False, **kwargs).eval()
    randomize_norms(theirs)
    ours = timm.create_model(name.replace('resnetv2_', 'lm_resnet'), k_init=0., **kwargs).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert all(n.endswith('.step.k') for n in missing)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        assert ours.forward_features(x).shape[-2:] == (64 // output_stride, 96 // output_stride)
    info = timm.create_model(
        name.replace('resnetv2_', 'lm_resnet'), features_only=True, **kwargs).feature_info
    assert info.reduction() == [2, *(min(r, output_stride) for r in (4, 8, 16, 32))]


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride_with_a_projected_history(output_stride):
    model = create('imagenet resnext', output_stride=output_stride)
    taps = model.forward_intermediates(images('imagenet resnext'), intermediates_only=True)
    assert [tap.shape[-1] for tap in taps] == [32, *(64 // min(r, output_stride) for r in (4, 8, 16, 32))]
    assert [stage.blocks[0].history is not None for stage in model.stages] == [False, True, True, True]


@pytest.mark.parametrize('act_layer, act', [('silu', nn.SiLU), (nn.LeakyReLU, nn.LeakyReLU)])
def test_act_layer(act_layer, act):
    model = create('resnext', act_layer=act_layer)
    norms = [m for m in model.modules() if isinstance(m, BatchNormAct2d)]
    assert len(norms) == 6 * 3 + 3 + 2 + 1  # branches, projected shortcuts, projected histories, the last
    assert all(isinstance(norm.act, act) for norm in norms)
    assert torch.isfinite(model(images('resnext'))).all()


@pytest.mark.parametrize('kind, norm_layer, groups', [('basic', 'groupnorm1', 1), ('imagenet', 'groupnorm', 32)])
def test_norm_layer(kind, norm_layer, groups):
    kwargs = dict(channels=(32, 32, 64, 64), stem_chs=32) if kind == 'imagenet' else {}
    model = create(kind, norm_layer=norm_layer, **kwargs)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert isinstance(model.norm, nn.GroupNorm) and model.norm.num_groups == groups
    x = images(kind)
    model.train()
    with torch.no_grad():  # no statistics of the batch: a sample alone gives the same
        torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


def test_zero_init_last():
    model = timm.create_model('lm_resnet20', zero_init_last=True)
    assert all((block.conv2.weight == 0).all() for block in blocks(model))
    assert not any((block.conv2.weight == 0).all() for block in blocks(timm.create_model('lm_resnet20')))
    model.init_weights()
    assert all((block.conv2.weight == 0).all() for block in blocks(model))
    model.init_weights(zero_init_last=False)
    assert not any((block.conv2.weight == 0).all() for block in blocks(model))
    bottleneck = create('bottleneck', zero_init_last=True)
    assert all((block.conv3.weight == 0).all() for block in blocks(bottleneck))


def test_convolutions_start_with_the_authors_variance():
    """A normal distribution with variance 2 / (k * k * out_channels), for grouped convolutions too."""
    stages = timm.create_model('lm_resnext29_8x64d').stages
    for conv in (stages[0].blocks[0].conv1, stages[0].blocks[0].conv2, stages[1].blocks[0].history.conv):
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.bias is None
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize('kind', TINY)
@pytest.mark.parametrize('device, dtype', [
    ('meta', torch.float32), ('cpu', torch.float64), ('cpu', torch.bfloat16)])
def test_device_and_dtype(kind, device, dtype):
    name, kwargs, _ = TINY[kind]
    kwargs = dict(k_per_channel=True) | kwargs if kind != 'plain' else kwargs
    model = timm.create_model(name, device=device, dtype=dtype, state_noise=0.01, drop_path_rate=0.1, **kwargs)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {device}
    assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
    if device == 'cpu':
        out = model.train()(images(kind, dtype=dtype))
        assert out.dtype == dtype
        assert torch.isfinite(out).all()


@pytest.mark.parametrize('kind', ['basic', 'resnext'])
def test_autocast_keeps_bf16_states(kind):
    model = create(kind, k_per_channel=kind == 'basic').train()
    with torch.autocast('cpu', torch.bfloat16):
        states = model.forward_intermediates(images(kind), intermediates_only=True)
        loss = model(images(kind)).float().pow(2).mean()
    assert {state.dtype for state in states} == {torch.bfloat16}
    loss.backward()
    assert all(k.grad is not None and k.grad.dtype == torch.float32 for k in ks(model).values())


@pytest.mark.parametrize('noise_type', ['gaussian', 'uniform'])
def test_state_noise(noise_type):
    model = create('basic', layers=(1, 1, 1), state_noise=0.01, state_noise_type=noise_type, zero_init_last=True)
    assert [block.noise.level for block in blocks(model)] == [0.01] * 3
    x = images('basic')
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        stem, state = model.train().forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    noise = state - stem  # the first block changes no shape, and its branch is silent
    assert 0.002 < noise.std() < 0.011
    if noise_type == 'uniform':
        assert noise.min() > -1e-6 and noise.max() < 0.01 + 1e-6
        assert noise.mean().item() == pytest.approx(0.005, abs=2e-4)
    else:
        assert noise.mean().item() == pytest.approx(0, abs=2e-4)


def test_noise_is_added_after_the_update_and_kept_in_the_history():
    model = create(
        'basic', layers=(3, 1, 1), state_noise=0.1, state_noise_type='uniform', zero_init_last=True, k_init=0.5).train()
    seen = []
    for block in blocks(model)[:3]:
        block.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    with torch.no_grad():
        model(images('basic'))
    for (x, x_prev), (x_next, _) in seen:
        noise = x_next - (0.5 * x + 0.5 * x_prev)
        assert noise.mean().item() == pytest.approx(0.05, abs=2e-3)
        assert noise.min() > -1e-5 and noise.max() < 0.1 + 1e-5
    # the noisy state is the state: the next block but one sees the same tensor as its history
    assert seen[2][0][1] is seen[1][0][0]
    assert seen[1][0][0] is seen[0][1][0]


def test_no_noise_by_default():
    assert not any(isinstance(m, StateNoise) for m in create('basic').modules())


@pytest.mark.parametrize('kwargs, message', [
    (dict(state_noise=0.1, state_noise_type='laplace'), 'laplace'),
    (dict(state_noise_type='laplace'), 'laplace'),
    (dict(state_noise=-0.1), 'must not be negative'),
    (dict(stem_type='deep'), 'deep'),
    (dict(layers=(1, 1)), 'same stages'),
    (dict(cardinality=2), 'cardinality'),
    (dict(k_init=(0.1,)), 'a number or a range'),
    (dict(k_init=(0.1, 0.2, 0.3)), 'a number or a range'),
    (dict(k_init=(0., -0.1)), 'a number or a range'),
    (dict(k_init=(0., -0.1), device='meta'), 'a number or a range'),
    (dict(k_init='x'), 'a number or a range'),
    (dict(k_init=float('nan')), 'a number or a range'),
])
def test_bad_settings_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('lm_resnet20', **kwargs)


def test_too_few_channels_for_the_groups_raise():
    with pytest.raises(ValueError, match='32 channels are too few for 32 groups of a base width of 4'):
        timm.create_model('lm_resnext50_32x4d', channels=(32, 64, 128, 256))


@pytest.mark.parametrize('name', ['lm_resnet20', 'preact_resnet20', 'lm_resnext50_32x4d'])
def test_unknown_keyword_raises(name):
    with pytest.raises(TypeError, match='no_such_keyword'):
        timm.create_model(name, no_such_keyword=1)


# ------------------------------------------------------------------------------------ features and intermediates

@pytest.mark.parametrize('kind', TINY)
def test_features_only(kind):
    size = TINY[kind][2]
    model = create(kind)
    with torch.no_grad():
        taps = model.forward_intermediates(images(kind), intermediates_only=True)
    features = timm.create_model(TINY[kind][0], features_only=True, **TINY[kind][1]).eval()
    features.model.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n in features.model.state_dict()})
    with torch.no_grad():
        outputs = features(images(kind))
    assert len(outputs) == (5 if 'imagenet' in kind else 4)
    info = features.feature_info
    assert info.reduction() == ([2, 4, 8, 16, 32] if 'imagenet' in kind else [1, 1, 2, 4])
    assert info.channels() == [model.stem.conv.out_channels, *TINY[kind][1].get('channels', info.channels()[1:])]
    assert info.module_name() == ['stem.conv', *(f'stages.{i}' for i in range(len(outputs) - 1))]
    for out, tap, chs, reduction in zip(outputs, taps, info.channels(), info.reduction(), strict=True):
        assert out.shape == (2, chs, size // reduction, size // reduction)
        assert torch.equal(out, tap)


@pytest.mark.parametrize('feature_cls', ['hook', 'fx'])
@pytest.mark.parametrize('kind', ['basic', 'plain', 'resnext', 'imagenet'])
def test_feature_classes_agree(kind, feature_cls):
    outputs = []
    for cls in ('getter', feature_cls):
        torch.manual_seed(0)
        model = timm.create_model(TINY[kind][0], features_only=True, feature_cls=cls, **TINY[kind][1]).eval()
        with torch.no_grad():
            outputs.append(model(images(kind)))
    assert len(outputs[0]) == len(outputs[1])
    for a, b in zip(*outputs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('feature_cls', ['getter', 'hook', 'fx'])
@pytest.mark.parametrize('out_indices', [(1, 3), (0, 2), (2,)])
def test_out_indices(feature_cls, out_indices):
    model = timm.create_model(
        'lm_resnet20', layers=(1, 1, 1), features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    assert [out.shape[1] for out in model(images('basic'))] == [(16, 16, 32, 64)[i] for i in out_indices]


@pytest.mark.parametrize('feature_cls', [
    'list', 'dict', 'LIST', FeatureListNet, FeatureDictNet, type('Own', (FeatureListNet,), {})])
def test_feature_classes_that_rebuild_are_refused(feature_cls):
    with pytest.raises(ValueError, match="getter', 'hook' or 'fx'"):
        timm.create_model('lm_resnet20', features_only=True, feature_cls=feature_cls)


def test_features_with_checkpointing_have_the_same_gradients(monkeypatch):
    grads = []
    recompute = Mock(side_effect=checkpoint)
    monkeypatch.setattr('timm_lm.models.lm_resnet.checkpoint', recompute)
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model('lm_resnext29_8x64d', features_only=True, **TINY['resnext'][1]).double().train()
        model.set_grad_checkpointing(enable)
        sum(out.pow(2).mean() for out in model(images('resnext', dtype=torch.float64))).backward()
        assert recompute.called == enable
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('kind', TINY)
def test_forward_is_features_then_head(kind):
    model = create(kind)
    x = images(kind)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model(x), model.forward_head(features))
        torch.testing.assert_close(model(x), model.get_classifier()(pooled[:, :, None, None]).flatten(1))


@pytest.mark.parametrize('kind', TINY)
def test_forward_intermediates(kind):
    model = create(kind)
    x = images(kind)
    hooked = {}
    for name in (info['module'] for info in model.feature_info):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: hooked.update({name: out[0] if isinstance(out, tuple) else out}))
    last = len(model.feature_info) - 1
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        assert len(taps) == last + 1
        assert all(torch.equal(tap, hooked[info['module']]) for tap, info in zip(taps, model.feature_info))

        only = model.forward_intermediates(x, intermediates_only=True)
        assert all(map(torch.equal, only, taps))
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert all(map(torch.equal, normed[:-1], taps[:-1]))
        assert torch.equal(normed[-1], final)
        for indices, wanted in [(2, [last - 1, last]), ([-1, 0], [0, last]), ((1, 2), [1, 2])]:
            some = model.forward_intermediates(x, indices=indices, intermediates_only=True)
            assert len(some) == len(wanted)
            assert all(torch.equal(tap, taps[i]) for tap, i in zip(some, wanted))
        with pytest.raises(AssertionError):
            model.forward_intermediates(x, output_fmt='NLC')
        with pytest.raises(AssertionError):
            model.forward_intermediates(x, indices=[last + 1])


@pytest.mark.parametrize('kind', TINY)
def test_stop_early_and_prune_at_each_index(kind):
    model = create(kind, drop_rate=0.5)
    x = images(kind)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        logits = model(x)
        final, taps = model.forward_intermediates(x)
    ran = []
    for i in range(last + 1):
        handles = [stage.register_forward_hook(lambda *args: ran.append(args[0])) for stage in model.stages]
        with torch.no_grad():
            stopped, selected = model.forward_intermediates(x, indices=[i], stop_early=True)
        for handle in handles:
            handle.remove()
        assert ran == list(model.stages)[:i]
        ran.clear()
        assert torch.equal(selected[0], taps[i])
        assert torch.equal(stopped, [model.stem.pool(taps[0]), *taps[1:-1], final][i])

        for prune_norm in (False, True):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([i - last - 1], prune_norm=prune_norm) == [i]
            assert len(pruned.stages) == i
            assert pruned.num_features == taps[i].shape[1]
            with torch.no_grad():
                assert torch.equal(pruned.forward_intermediates(x, indices=[i], intermediates_only=True)[0], taps[i])
                features = pruned.forward_features(x)
                assert torch.equal(features, final if i == last and not prune_norm else taps[i])
                assert torch.equal(pruned(x), features)  # no head, no pool
            pruned.reset_classifier(7, 'avg')
            assert pruned(x).shape == (2, 7)
            assert pruned.head_hidden_size == taps[i].shape[1]
            assert not any(m.training for m in pruned.head.modules())

        pruned.reset_classifier(0, '')
        pruned.train().forward_features(x).sum().backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]

    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([last], prune_head=False)
    with torch.no_grad():
        assert torch.equal(pruned(x), logits)


def test_pruned_network_keeps_its_interface():
    model = create('resnext')
    model.prune_intermediate_layers([1, 2])
    assert list(model.k_values()) == ['stages.0.blocks.1', 'stages.1.blocks.0', 'stages.1.blocks.1']
    assert model.no_weight_decay() == {f'{name}.step.k' for name in model.k_values()}
    model.set_grad_checkpointing()
    final, taps = model.train().forward_intermediates(images('resnext'), indices=[1, 2])
    assert torch.equal(final, taps[-1])
    final.sum().backward()


def test_odd_image_size():
    for kind, sizes in [('basic', (33, 17, 9)), ('imagenet', (33, 17, 9, 5, 3))]:
        model = create(kind)
        x = torch.randn(1, 3, 65 if kind == 'imagenet' else 33, 65 if kind == 'imagenet' else 33)
        taps = model.forward_intermediates(x, intermediates_only=True)
        assert [tap.shape[-1] for tap in taps[-len(sizes):]] == list(sizes)


# ------------------------------------------------------------------------------------------------- classifier

def test_get_and_reset_classifier():
    model = create('basic', global_pool='max')
    x = images('basic')
    assert model.get_classifier() is model.head.fc
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(5)
        assert model.num_classes == 5
        assert model(x).shape == (2, 5)
        assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        assert not list(model.get_classifier().parameters())
        model.reset_classifier(4, 'catavgmax')
        assert model.head_hidden_size == 128
        assert model(x).shape == (2, 4)
        model.reset_classifier(0, '')
        assert torch.equal(model(x), model.forward_features(x))


@pytest.mark.parametrize('training', [False, True])
def test_reset_classifier_keeps_device_dtype_and_mode(training):
    model = create('basic').train(training).to(dtype=torch.bfloat16)
    called = []
    model.head.global_pool.register_forward_hook(lambda *args: called.append(1))
    model.reset_classifier(3)
    model(images('basic').bfloat16())
    assert called == [1]
    model.reset_classifier(5, 'avgmax')
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert all(m.training == training for m in model.modules())
    model = timm.create_model('lm_resnet20', device='meta')
    model.reset_classifier(5)
    assert model.get_classifier().weight.is_meta


def test_reset_classifier_leaves_the_rest_as_it_was():
    """A stem that was wrapped, hooks on the head and its dropout."""
    model = create('basic', drop_rate=0.1)
    model.stem.conv = torch.nn.Sequential(torch.nn.Identity(), model.stem.conv)
    model.head.drop.p = 0.5
    called = []
    model.head.register_forward_hook(lambda *_: called.append('head'))
    model.reset_classifier(5, 'avgmax')
    assert model(images('basic')).shape == (2, 5) and called == ['head'] and model.head.drop.p == 0.5
    model.reset_classifier(3, '')
    assert model(images('basic')).shape[:2] == (2, 3) and model(images('basic')).ndim == 4
    model.head = torch.nn.Identity()
    model.reset_classifier(5, 'avg')
    assert model(images('basic')).shape == (2, 5)


# ------------------------------------------------------------------------------------------- training machinery

@pytest.mark.parametrize('kind', TINY)
def test_group_matcher(kind):
    model = create(kind)
    names = [n for n, _ in model.named_parameters()]
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == set(names)
    assert groups['stem.conv.weight'] == 0
    assert groups['head.fc.weight'] == len(blocks(model)) + 1  # the last
    assert groups['norm.weight'] == len(blocks(model))  # with the last block
    # one group a block, in the order of the network, with all that the block owns
    prefixes = [f'stages.{s}.blocks.{b}.' for s, stage in enumerate(model.stages) for b in range(len(stage.blocks))]
    for i, prefix in enumerate(prefixes, start=1):
        assert [n for n in names if n.startswith(prefix)]
        assert {groups[n] for n in names if n.startswith(prefix)} == {i}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for i in range(len(model.stages)):
        assert {coarse[n] for n in names if n.startswith(f'stages.{i}.')} == {i + 1}


def step_counting(model, x):
    """Loss, gradients, and how often a block's first convolution ran, of one step in training mode."""
    calls = []
    conv = blocks(model)[-1].conv1
    handle = conv.register_forward_hook(lambda *args: calls.append(1))
    torch.manual_seed(3)
    loss = model.train()(x).pow(2).mean()
    loss.backward()
    handle.remove()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, len(calls)


@pytest.mark.parametrize('kind', TINY)
def test_grad_checkpointing(kind):
    """With random parts on: what is recomputed must be what was computed."""
    model = create(kind, drop_path_rate=0.3, state_noise=0.01, k_init=(-0.5, 0.5)).double()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images(kind, dtype=torch.float64)
    loss, grads, runs = step_counting(model, x)
    twin_loss, twin_grads, twin_runs = step_counting(twin, x)
    assert (runs, twin_runs) == (1, 2)
    torch.testing.assert_close(twin_loss, loss, rtol=1e-12, atol=0)
    assert all(g is not None for g in grads.values())
    for n in grads:
        torch.testing.assert_close(twin_grads[n], grads[n], rtol=1e-9, atol=1e-12, msg=n)
    twin.set_grad_checkpointing(False)
    assert step_counting(twin, x)[2] == 1


def test_grad_checkpointing_keeps_no_branch():
    """Between forward and backward only what enters a block is held."""
    def held(model):
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(images('basic'))
        total = sum(size for pointer, size in saved.items() if pointer not in parameters)
        assert out.requires_grad
        return total

    model = create('basic', layers=(6, 6, 6)).train()
    plain = held(model)
    model.set_grad_checkpointing()
    assert held(model) < plain / 3


@pytest.mark.parametrize('kind', TINY)
def test_init_weights_after_to_empty(kind):
    name, kwargs, _ = TINY[kind]
    model = timm.create_model(name, device='meta', dtype=torch.float64, zero_init_last=True, **kwargs)
    model.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 99)  # what is not reset shows
    model.init_weights()
    assert all(torch.isfinite(t).all() for t in (*model.parameters(), *model.buffers()))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
            assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
            assert norm.num_batches_tracked == 0
    assert all(-0.1 <= k.item() <= 0 for k in ks(model).values())
    last = [block.conv3 if hasattr(block, 'conv3') else block.conv2 for block in blocks(model)]
    assert all((conv.weight == 0).all() for conv in last)
    assert torch.isfinite(model.eval()(images(kind, dtype=torch.float64))).all()


def test_init_weights_resets_statistics_that_a_norm_leaves():
    model = timm.create_model('lm_resnet20', norm_layer='evonormb0', device='meta').to_empty(device='cpu')
    statistics = [buffer for name, buffer in model.named_buffers() if name.endswith('running_var')]
    assert statistics
    for buffer in statistics:
        buffer.fill_(torch.nan)
    model.init_weights()
    assert all((buffer == 1).all() for buffer in statistics)


def test_init_weights_is_what_the_constructor_draws():
    torch.manual_seed(0)
    model = timm.create_model('lm_resnet20')
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert (model.head.fc.bias == 0).all()
    # an init after construction draws from the same distributions
    before = {n: p.clone() for n, p in model.named_parameters() if p.numel() > 1000}
    stds = {n: p.std().item() for n, p in before.items()}
    model.init_weights()
    for n, std in stds.items():
        assert not torch.equal(model.get_parameter(n), before[n])
        assert model.get_parameter(n).std().item() == pytest.approx(std, rel=0.15)


# ---------------------------------------------------------------------------------------- pretrained configs

CIFAR_NAMES = [f'{family}_{name}' for family in ('lm', 'preact') for name in (
    'resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110', 'resnet164', 'resnext29_8x64d', 'resnext29_16x64d')]
IMAGENET_NAMES = [
    'lm_resnet18', 'lm_resnet34', 'lm_resnet50', 'lm_resnet101', 'lm_resnet152', 'lm_resnext50_32x4d',
    'lm_resnext101_32x8d', 'preact_resnext50_32x4d', 'preact_resnext101_32x8d']


def all_names():
    return timm.list_models(module='lm_resnet', include_tags=True)


def test_names():
    assert sorted(timm.list_models(module='lm_resnet')) == sorted(CIFAR_NAMES + IMAGENET_NAMES)


def test_num_features_and_classes_of_the_names():
    for name, width, classes in [
            ('lm_resnet20', 64, 10), ('preact_resnet110', 64, 10), ('lm_resnet164', 256, 100),
            ('lm_resnext29_8x64d', 1024, 100), ('lm_resnet34', 512, 1000), ('lm_resnet152', 2048, 1000),
            ('preact_resnext101_32x8d', 2048, 1000)]:
        model = timm.create_model(name, device='meta')
        assert isinstance(model, LMResNet)
        assert (model.num_features, model.head_hidden_size, model.num_classes) == (width, width, classes)


def test_cifar_configs():
    """Mean and standard deviation of the pixels of the train splits."""
    tags = {name: {n.partition('.')[2] for n in all_names() if n.partition('.')[0] == name} for name in CIFAR_NAMES}
    on_cifar = {path.stem: re.findall(r'\w+', path.read_text().partition('device_modules')[0])
                for path in RECIPES.glob('*_c10*.yaml')}
    assert on_cifar['plain_first_c10'].pop(on_cifar['plain_first_c10'].index('preact_resnet20'))  # it is not for this
    for name in CIFAR_NAMES:
        large = name.endswith(('164', 'd'))
        assert ({'resnext_c100'} if 'resnext' in name else {'best_c100', 'paper_c100'}) <= tags[name]
        assert large or {'best_c10', 'paper_c10'} <= tags[name]
        # a tag for each recipe of the network, and those of its kind for the other data
        recipes = {recipe for recipe, networks in on_cifar.items() if name in networks}
        assert recipes <= tags[name] <= recipes | {'best_c10', 'best_c100', 'paper_c10', 'paper_c100'}
        for tag in tags[name]:
            cfg = timm.get_pretrained_cfg(f'{name}.{tag}')
            if tag.endswith('_c10'):
                assert (cfg.mean, cfg.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
            else:
                assert (cfg.mean, cfg.std) == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
            assert cfg.num_classes == (10 if tag.endswith('_c10') else 100)
            assert cfg.input_size == (3, 32, 32)
            assert cfg.crop_pct == 1.0
            assert (cfg.first_conv, cfg.classifier) == ('stem.conv', 'head.fc')
        # a name without a tag is of the class count of its first tag, whichever has weights
        assert timm.get_pretrained_cfg(name).num_classes == (100 if large else 10)
        model = timm.create_model(name, device='meta')
        assert model.num_classes == (100 if large else 10)


def test_a_tag_sets_the_classes():
    assert timm.create_model('lm_resnet20.paper_c100', device='meta').num_classes == 100
    assert timm.create_model('lm_resnet20.paper_c10', device='meta').num_classes == 10


def test_new_weights_know_no_classes(tmp_path):
    """Else a network of ten other classes would be saved with the names of CIFAR-10."""
    cfg = timm.get_pretrained_cfg('lm_resnet20').to_dict()  # as timm's script of 1.0.31 hands it on
    for model, named in [
        (timm.create_model('lm_resnet20', num_classes=10), False),
        (timm.create_model('lm_resnet20', num_classes=10, pretrained_cfg=cfg), False),
        (timm.create_model('lm_resnet20.best_c10', pretrained=True), True),
    ]:
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        assert ('airplane' in (tmp_path / 'config.json').read_text()) == named
    assert not timm.create_model('lm_resnet18', device='meta').pretrained_cfg.get('description')  # of other weights
    assert timm.create_model(f'local-dir:{tmp_path}').pretrained_cfg['label_names'][0] == 'airplane'


def test_label_names():
    labels = timm.get_pretrained_cfg('lm_resnet20.paper_c10').label_names
    assert labels == ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
    labels = timm.get_pretrained_cfg('lm_resnet164.paper_c100').label_names
    assert len(set(labels)) == 100
    assert list(labels) == sorted(labels)  # the data set's labels are in alphabetical order
    # its superclass of large natural outdoor scenes
    assert [labels[i] for i in (23, 33, 49, 60, 71)] == ['cloud', 'forest', 'mountain', 'plain', 'sea']


def test_imagenet_configs_are_those_of_timm_s_weights():
    for depth, tag in [(18, 'ra4_e3600_r224_in1k'), (34, 'ra4_e3600_r224_in1k'), (50, 'a1h_in1k'), (101, 'a1h_in1k')]:
        theirs = timm.get_pretrained_cfg(f'resnetv2_{depth}.{tag}')
        ours = timm.get_pretrained_cfg(f'lm_resnet{depth}')
        assert ours.tag == f'resnetv2_{tag}'
        assert ours.hf_hub_id == f'timm/resnetv2_{depth}.{tag}'
        for field in ('mean', 'std', 'crop_pct', 'interpolation', 'input_size', 'pool_size', 'test_input_size',
                      'test_crop_pct', 'num_classes'):
            assert getattr(ours, field) == getattr(theirs, field), field


def test_imagenet_recipe_has_a_tag_without_weights():
    recipe = yaml.safe_load((RECIPES / 'paper_in1k.yaml').read_text())
    for name in ('lm_resnet50', 'lm_resnet101'):
        cfg = timm.get_pretrained_cfg(f"{name}.{recipe['tag']}")
        for field in ('num_classes', 'crop_pct', 'interpolation'):
            assert getattr(cfg, field) == recipe[field], field
        for field in ('input_size', 'mean', 'std'):
            assert getattr(cfg, field) == tuple(recipe[field]), field
        assert not cfg.has_weights


def test_only_names_with_a_source_are_listed_as_pretrained():
    listed = set(timm.list_pretrained()) & set(all_names())
    assert {'lm_resnet18.resnetv2_ra4_e3600_r224_in1k', 'lm_resnet50.resnetv2_a1h_in1k'} <= listed
    for name in all_names():
        cfg = timm.get_pretrained_cfg(name)
        assert (name in listed) == bool(cfg.file or cfg.hf_hub_id)
        assert not cfg.url
        if cfg.file:
            assert Path(cfg.file).is_file()


def test_weights_come_from_the_nearest_place(tmp_path, monkeypatch):
    monkeypatch.setattr(_weights, 'weights_dir', lambda: tmp_path)
    (tmp_path / 'published.json').write_text(
        '{"a.x": {"repo_id": "someone/a.x", "revision": "abc"}, "b.x": {"repo_id": "someone/b.x", "revision": "def"}}')
    (tmp_path / 'a.x').mkdir()
    (tmp_path / 'a.x' / 'model.safetensors').touch()
    cfg = dict(num_classes=3)
    assert _weights.weight_source('a.x', cfg) == dict(cfg, file=str(tmp_path / 'a.x' / 'model.safetensors'))
    assert _weights.weight_source('b.x', cfg) == dict(cfg, hf_hub_id='someone/b.x@def')
    assert _weights.weight_source('c.x', cfg) == cfg


def test_no_weights_no_pretrained():
    with pytest.raises(RuntimeError, match='[Nn]o pretrained weights'):
        timm.create_model('lm_resnet152', pretrained=True)


# ------------------------------------------------------------------------------------------ pretrained weights

def save(model, path):
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    return dict(file=str(path))


@pytest.mark.parametrize('depth', [18, 34, 50, 101])
def test_timm_s_plain_weights_load_with_k_zero(depth, tmp_path):
    torch.manual_seed(0)
    layers = (1, 2, 2, 1)  # is enough; how many each network has is told above, by its parameters
    theirs = timm.create_model(f'resnetv2_{depth}', layers=layers, zero_init_last=False).eval()
    randomize_norms(theirs)
    overlay = save(theirs, tmp_path / 'model.safetensors')
    ours = timm.create_model(f'lm_resnet{depth}', pretrained=True, pretrained_cfg_overlay=overlay, layers=layers).eval()
    assert ours.pretrained_cfg['tag'].startswith('resnetv2_')
    assert all((k == 0).all() for k in ks(ours).values())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('kwargs', [dict(k_per_channel=True), dict(k_trainable=False), dict(two_step=False)])
def test_timm_s_plain_weights_load_in_other_settings(kwargs, tmp_path):
    tiny = dict(layers=(1, 2, 1, 2), channels=(16, 32, 48, 64))
    overlay = save(timm.create_model('resnetv2_18', **tiny), tmp_path / 'model.safetensors')
    model = timm.create_model(
        'lm_resnet18', pretrained=True, pretrained_cfg_overlay=overlay, **tiny, **kwargs)
    assert all((k == 0).all() for k in model.k_values().values())


def test_k_in_a_checkpoint_is_kept(tmp_path):
    """Fine-tuned weights under the same tag bring their own k."""
    tiny = dict(layers=(1, 2, 1, 2), channels=(16, 32, 48, 64), k_init=0.25)
    overlay = save(timm.create_model('lm_resnet18', **tiny), tmp_path / 'model.safetensors')
    model = timm.create_model('lm_resnet18', pretrained=True, pretrained_cfg_overlay=overlay, **tiny | dict(k_init=0.))
    assert all((k == 0.25).all() for k in model.k_values().values())


@pytest.mark.parametrize('name, plain, kwargs, overlay', [
    ('lm_resnet20', 'preact_resnet20', {}, {}),
    ('lm_resnet20.paper_c10', 'preact_resnet20', {}, {}),
    ('lm_resnet152', 'resnetv2_50', dict(layers=(2, 1), channels=(16, 32)), {}),
    ('lm_resnet18', 'resnetv2_18', dict(layers=(2, 1), channels=(16, 32)), dict(tag='other_in1k')),
])
def test_missing_k_is_filled_for_those_tags_alone(name, plain, kwargs, overlay, tmp_path):
    overlay = overlay | save(timm.create_model(plain, **kwargs), tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match=r'[Mm]issing key.*step\.k'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.mark.parametrize('name, kwargs', [
    ('preact_resnet20', dict(two_step=True)),
    ('lm_resnet20', dict(two_step=False)),
    ('lm_resnet20', dict(layers=(5, 3, 3))),
    ('lm_resnet20', dict(layers=(3, 3, 2))),
])
def test_weights_of_other_steps_are_refused_with_another_head_too(name, kwargs):
    """There timm loads what fits and leaves the rest."""
    reason = 'the networks differ in depth' if 'layers' in kwargs else 'those with k belong to a two-step network'
    with pytest.raises(RuntimeError, match=rf'step\.k.*; {reason}'):
        timm.create_model(name, pretrained=True, num_classes=4, **kwargs)


@pytest.mark.parametrize('kwargs', [dict(layers=(5, 5, 5)), dict(layers=(2, 2, 2)), dict(two_step=False)])
def test_weights_of_other_steps_are_taken_as_far_as_they_go_where_that_is_asked_for(kwargs):
    whole = timm.create_model('lm_resnet20', pretrained=True).state_dict()
    model = timm.create_model('lm_resnet20', pretrained=True, pretrained_strict=False, **kwargs)
    state = model.state_dict()
    shared = state.keys() & whole.keys()
    assert len(shared) > 50 and all(torch.equal(state[name], whole[name]) for name in shared)


def test_other_missing_weights_are_not_filled(tmp_path):
    tiny = dict(layers=(2, 1), channels=(16, 32))
    theirs = timm.create_model('resnetv2_18', **tiny)
    state = theirs.state_dict()
    state.pop('norm.weight')
    save_file(state, tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match='norm.weight'):
        timm.create_model('lm_resnet18', pretrained=True, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'model.safetensors')), **tiny)


@pytest.mark.parametrize('kind', ['basic', 'plain', 'resnext'])
def test_saved_weights_load_by_name(kind, tmp_path):
    model = create(kind)
    name, kwargs, _ = TINY[kind]
    overlay = save(model, tmp_path / 'model.safetensors')
    overlay['num_classes'] = model.num_classes
    x = images(kind)
    with torch.no_grad():
        again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
        assert torch.equal(again(x), model(x))

        features = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **kwargs).eval()
        taps = model.forward_intermediates(x, intermediates_only=True)
        assert all(map(torch.equal, features(x), taps))

        kwargs = kwargs | dict(in_chans=1, num_classes=5)
        gray = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
        assert gray(images(kind, in_chans=1)).shape == (2, 5)
        torch.testing.assert_close(gray.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True))
        assert torch.equal(gray.norm.weight, model.norm.weight)
