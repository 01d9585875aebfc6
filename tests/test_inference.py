"""The inference form computes what the network does, and goes where the network goes."""
import copy

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized

import timm_lm
from timm_lm.export import FORMATS, export_model
from timm_lm.inference import ChannelClamp
from timm_lm.models._weights import weights_dir
from timm_lm.packed_conv import PackedConv2d

NETWORKS = [
    ('lm_resnet20', {}),
    ('lm_resnet20', dict(k_per_channel=True, k_init=(-0.9, 0.9), state_noise=0.5, drop_path_rate=0.5)),
    ('lm_resnet20', dict(norm_layer='groupnorm1')),
    ('preact_resnet20', {}),
    ('lm_resnet164', dict(layers=(1, 2, 2))),
    ('lm_resnext29_8x64d', dict(base_width=4)),
    ('lm_resnet18', dict(num_classes=5)),
    ('lm_resnet50', dict(num_classes=5)),
]


def made(name, kwargs):
    """A network whose norms have statistics, scales and shifts of their own, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def images(model, n=2):
    return torch.randn(n, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name, kwargs', NETWORKS, ids=lambda value: value if isinstance(value, str) else None)
def test_outputs_are_those_of_the_network(name, kwargs):
    model = made(name, kwargs)
    before = copy.deepcopy(model.state_dict())
    x = images(model)
    optimized = timm_lm.optimize(model.train())
    with torch.no_grad():
        assert difference(optimized(x), model.eval()(x)) < 1e-5
    assert not optimized.training and not any(p.requires_grad for p in optimized.parameters())
    # the network is as it was
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any(p.requires_grad for p in model.parameters())


def test_shipped_weights():
    names = sorted(path.name for path in weights_dir().glob('*.*') if path.is_dir())
    assert 'lm_resnet20.best_c10' in names
    for name in names:
        model = timm.create_model(name, pretrained=True).eval()
        x = images(model, 16)
        with torch.no_grad():
            assert difference(timm_lm.optimize(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize('name, norms, clamps', [
    ('lm_resnet20', 1 + 2 + 9, 0), ('lm_resnet50', 1 + 4, 12), ('lm_resnet164', 1 + 3, 54)])
def test_norms_are_folded(name, norms, clamps):
    """Left are the last of all, those of shortcuts, and the first of each block before a 3x3 convolution."""
    optimized = timm_lm.optimize(timm.create_model(name))
    for kind, number in ((nn.BatchNorm2d, norms), (ChannelClamp, clamps)):
        assert sum(isinstance(module, kind) for module in optimized.modules()) == number
    assert not any(name.endswith('step.k') for name, _ in optimized.named_parameters())
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last)
               for module in optimized.modules() if isinstance(module, nn.Conv2d))


def change_first_norm(model, **values):
    """A network with some values of channels replaced in the first norm of its second block."""
    norm = model.stages[0].blocks[1].norm1
    with torch.no_grad():
        for name, (channel, value) in values.items():
            getattr(norm, name)[channel] = value
    return model


@pytest.mark.parametrize('values, is_folded', [
    (dict(weight=(slice(0, 9), -1.5)), True),  # of 64 channels
    (dict(weight=(slice(0, 9), 0), bias=(slice(0, 5), 1.5)), True),
    (dict(weight=(slice(0, 9), 1e-38), running_mean=(slice(0, 5), 30)), True),
    (dict(weight=(slice(0, 9), 1e-15), bias=(slice(0, 5), -2)), True),
    (dict(running_mean=(slice(0, 9), 20)), True),
    (dict(running_mean=(slice(0, 9), -1e4)), False),  # would be rounded
])
def test_channels_of_all_scales_and_shifts(values, is_folded):
    model = change_first_norm(made('lm_resnet164', dict(layers=(2, 1, 1))), **values)
    x = images(model)
    optimized = timm_lm.optimize(model)
    assert isinstance(optimized.stages[0].blocks[1].norm1, ChannelClamp) == is_folded
    with torch.no_grad():
        assert difference(optimized(x), model(x)) < 1e-5
        assert difference(timm_lm.optimize(model.double())(x.double()), model(x.double())) < 1e-12


def test_channel_that_is_off_stays_off_in_half_precision():
    """Where its bound would be infinite."""
    model = change_first_norm(made('lm_resnet164', dict(layers=(2, 1, 1))), weight=(slice(0, 9), 1e-6),
                              bias=(slice(0, 9), -0.5))
    x = images(model).half()
    with torch.no_grad():
        expected = copy.deepcopy(model).half()(x).float()
        assert difference(timm_lm.optimize(model).half()(x).float(), expected) < 0.01


@pytest.mark.parametrize('change', [
    lambda block: prune.l1_unstructured(block.conv1, 'weight', 0.3),
    lambda block: setattr(block.norm1, 'act', nn.SiLU()),
    lambda block: block.norm1.act.register_forward_hook(lambda *args: None),
    lambda block: setattr(block, 'conv1', nn.Conv2d(64, 16, 1, padding=1)),
    lambda block: setattr(block, 'conv1', nn.Conv2d(64, 16, 1, groups=2)),
], ids=['pruned', 'activation', 'hook', 'padding', 'groups'])
def test_first_norm_that_cannot_be_a_clamp_stays(change):
    model = made('lm_resnet164', dict(layers=(2, 1, 1)))
    change(model.stages[0].blocks[1])
    x = images(model)
    optimized = timm_lm.optimize(model)
    with torch.no_grad():
        if model.stages[0].blocks[1].conv1.padding == (0, 0):  # otherwise the branch has another size than the state
            assert difference(optimized(x), model(x)) < 1e-5
    assert isinstance(optimized.stages[0].blocks[1].norm1, nn.BatchNorm2d)
    assert isinstance(optimized.stages[1].blocks[0].norm1, ChannelClamp)


@pytest.mark.parametrize('kwargs', [{}, dict(k_per_channel=True)])
def test_k_is_told_as_before(kwargs):
    model = made('lm_resnet20', kwargs)
    found, expected = timm_lm.optimize(model).k_values(), model.k_values()
    assert list(found) == list(expected) and len(found) == 6
    assert all(torch.equal(found[name], k) for name, k in expected.items())


@pytest.mark.parametrize('parametrize', [weight_norm, spectral_norm])
def test_convolution_of_other_weights_stays(parametrize):
    model = made('lm_resnet20', {})
    parametrize(model.stages[0].blocks[0].conv1)
    x = images(model)
    optimized = timm_lm.optimize(model)
    with torch.no_grad():
        assert difference(optimized(x), model(x)) < 1e-5
    assert is_parametrized(optimized.stages[0].blocks[0].conv1)
    assert isinstance(optimized.stages[0].blocks[0].norm2, nn.BatchNorm2d)
    assert not isinstance(optimized.stages[0].blocks[1].norm2, nn.BatchNorm2d)


@pytest.mark.parametrize('used', [False, True])
@pytest.mark.parametrize('name', ['conv1', 'conv2'])
def test_pruned_convolution_stays(name, used):
    """Its weights are made of others by a hook, and it still is an nn.Conv2d."""
    model = made('lm_resnet20', {})
    prune.l1_unstructured(getattr(model.stages[0].blocks[1], name), 'weight', 0.3)
    x = images(model)
    if used:
        model(x)
    optimized = timm_lm.optimize(model)
    with torch.no_grad():
        assert difference(optimized(x), model(x)) < 1e-5
    conv = getattr(optimized.stages[0].blocks[1], name)
    assert type(conv) is nn.Conv2d and (conv.weight == 0).float().mean() > 0.25


def test_pruned_k_stays_pruned():
    model = made('lm_resnet20', dict(k_per_channel=True, k_init=(-0.9, -0.5)))
    prune.l1_unstructured(model.stages[0].blocks[1].step, 'k', 0.5)
    x = images(model)
    optimized = timm_lm.optimize(model)
    with torch.no_grad():
        assert difference(optimized(x), model(x)) < 1e-5
    assert (optimized.stages[0].blocks[1].step.k == 0).sum() == 8


def test_nothing_is_computed_again_for_a_backward_pass():
    model = made('lm_resnet20', {})
    model.set_grad_checkpointing()
    switches = [[stage.grad_checkpointing for stage in net.stages] for net in (model, timm_lm.optimize(model))]
    assert switches == [[True] * 3, [False] * 3]


@pytest.mark.parametrize('name', ['conv1', 'norm2', 'step', 'drop_path', 'noise'])
def test_hooks_are_called(name):
    model = made('lm_resnet20', dict(drop_path_rate=0.1, state_noise=0.1))
    called = []
    getattr(model.stages[0].blocks[1], name).register_forward_hook(lambda *args: called.append(name))
    optimized = timm_lm.optimize(model)
    assert difference(optimized(images(model)), model(images(model))) < 1e-5
    assert called == [name] * 2


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, freeze_batch_norm_2d])
@pytest.mark.parametrize('name, kwargs, norms', [
    ('lm_resnet20', {}, 1 + 2 + 9), ('lm_resnet164', dict(layers=(1, 2, 1)), 1 + 3)])
def test_other_batch_norms_are_folded(convert, name, kwargs, norms):
    model = convert(made(name, kwargs))
    kind = type(model.norm)
    assert not issubclass(kind, nn.BatchNorm2d)
    x = images(model)
    optimized = timm_lm.optimize(model)
    with torch.no_grad():
        assert difference(optimized(x), model.eval()(x)) < 1e-5
    assert sum(isinstance(module, kind) for module in optimized.modules()) == norms


@pytest.mark.parametrize('act_layer', ['relu', 'prelu'])
def test_half_precision(act_layer):
    model = made('lm_resnet20', dict(act_layer=act_layer)).to(torch.bfloat16)
    x = images(model).to(torch.bfloat16)
    optimized = timm_lm.optimize(model)
    assert {p.dtype for p in optimized.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert difference(optimized(x).float(), model.float()(x.float())) < 0.1


def test_shared_convolution_in_half_precision():
    model = made('lm_resnet20', {}).to(torch.bfloat16)
    first, second = (model.stages[0].blocks[i] for i in (1, 2))
    second.conv1 = first.conv1
    optimized = timm_lm.optimize(model)
    assert {p.dtype for p in optimized.parameters()} == {torch.bfloat16}
    x = images(model).to(torch.bfloat16)
    with torch.no_grad():
        assert difference(optimized(x).float(), model.float()(x.float())) < 0.1


@pytest.mark.parametrize('feature_cls', ['getter', 'hook'])
def test_features(feature_cls):
    model = timm.create_model('lm_resnet18', features_only=True, feature_cls=feature_cls).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(timm_lm.optimize(model)(x), model(x), strict=True):
            assert difference(found, expected) < 1e-5


@pytest.mark.parametrize('name, kwargs, formats', [
    ('lm_resnet18', dict(layers=(2, 1), channels=(64, 128)), ['torch-export', 'torchscript']),
    ('lm_resnet164', dict(layers=(2, 1, 1), base_width=128), FORMATS),  # with clamps of channels, from both sides
], ids=['basic', 'bottleneck'])
@pytest.mark.filterwarnings('ignore:No complete tensor found')
def test_goes_where_the_network_goes(name, kwargs, formats, tmp_path):
    """The exported files are loaded, and compared for several batch sizes."""
    model = change_first_norm(made(name, dict(scriptable=True, **kwargs)), weight=(slice(0, 9), -1.5))
    optimized = timm_lm.optimize(model)
    assert any(isinstance(module, PackedConv2d) for module in optimized.modules())
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        assert difference(optimized(x), expected) < 1e-5  # its packed weights stay behind in all that follows
        for kind in formats:
            assert export_model(optimized, kind, tmp_path / 'model') < 1e-5
        assert difference(torch.compile(optimized, backend='aot_eager')(x), expected) < 1e-5


def test_saved_weights_load_into_another_optimized_network():
    """With each k, which is a weight like the others; convolutions keep no copies of the weights that they had."""
    kwargs = dict(layers=(1, 2), channels=(64, 128))  # its second stage is packed
    source, target = (made('lm_resnet18', dict(kwargs, k_init=k)) for k in (0.5, -0.5))
    target.init_weights()
    source, target = timm_lm.optimize(source), timm_lm.optimize(target)
    assert isinstance(target.stages[1].blocks[1].conv2, PackedConv2d)
    x = images(source)
    with torch.inference_mode():
        assert difference(target(x), source(x)) > 0.1
        target.load_state_dict(source.state_dict())
        assert torch.equal(target(x), source(x))


def test_network_of_others_is_refused():
    with pytest.raises(ValueError, match='no residual blocks of timm-lm'):
        timm_lm.optimize(nn.Conv2d(3, 4, 1))
