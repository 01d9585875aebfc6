"""Convolutions with packed weights compute what plain ones do, and step aside where a copy of weights cannot serve."""
import copy
import io

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import timm_lm
from timm_lm.packed_conv import PackedConv2d

OPTIONS = {
    '1x1': dict(kernel_size=1, bias=False),
    '3x3': dict(kernel_size=3, padding=1),
    'strided': dict(kernel_size=3, padding=1, stride=2, bias=False),
    'dilated': dict(kernel_size=3, padding=2, dilation=2),
    'grouped': dict(kernel_size=3, padding=1, groups=4),
    'not square': dict(kernel_size=(1, 3), padding=(0, 1), stride=(2, 1)),
}


def pair(**options):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, **(options or OPTIONS['3x3'])).eval().requires_grad_(False)
    return conv, PackedConv2d.from_conv(copy.deepcopy(conv))


def packed_calls(work):
    """What the work gives, and how often it ran the kernel for packed weights."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = work()
    return result, sum(event.name == 'mkldnn::_convolution_pointwise' for event in profiler.events())


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_outputs_are_those_of_a_convolution(options, layout):
    conv, packed = pair(**options)
    conv = conv.to(memory_format=torch.channels_last)
    for shape in ((1, 16, 12, 12), (3, 16, 9, 7), (1, 16, 12, 12)):
        x = torch.randn(shape).contiguous(memory_format=layout)
        out, calls = packed_calls(lambda x=x: packed(x))
        assert calls == 1
        torch.testing.assert_close(out, conv(x))
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_weights_are_packed_once_for_a_size():
    _, packed = pair()
    x = torch.randn(1, 16, 8, 8)
    packed(x)
    first = packed._packed[1]
    packed(x + 1)
    assert packed._packed[1] is first
    packed(torch.randn(2, 16, 8, 8))
    assert packed._packed[1] is not first


@pytest.mark.parametrize('change', ['load', 'assign', 'in place', 'data', 'dtype and back'])
def test_changed_weights_are_seen(change):
    conv, packed = pair()
    x = torch.randn(1, 16, 8, 8)
    packed(x)
    if change == 'dtype and back':
        packed.double().float()
    weights = {'weight': 2 * conv.weight, 'bias': conv.bias + 1}
    if change == 'in place':
        packed.weight.mul_(2)
        packed.bias.add_(1)
    elif change == 'data':
        packed.weight.data, packed.bias.data = weights['weight'], weights['bias']
    else:
        packed.load_state_dict(weights, assign=change == 'assign')
    conv.load_state_dict(weights)
    torch.testing.assert_close(packed(x), conv(x))


def test_passing_weights_are_seen():
    """Each call's weights are freed before the next one's are made, which often come to lie where they lay."""
    conv, packed = pair()
    x = torch.randn(1, 16, 8, 8)
    for scale in range(1, 9):
        found = functional_call(packed, {'weight': scale * conv.weight}, x)
        torch.testing.assert_close(found, functional_call(conv, {'weight': scale * conv.weight}, x))


def test_copies_and_files_go_without_the_packed_weights():
    conv, packed = pair()
    x = torch.randn(1, 16, 8, 8)
    expected = packed(x)
    assert packed.state_dict().keys() == conv.state_dict().keys()
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
    packed.compile(backend='eager')  # which is not copied by other modules either
    other = copy.deepcopy(packed)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    assert not other(x).any()


def test_gradients_flow():
    conv, packed = pair()
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    expected, = torch.autograd.grad(conv(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(packed(x).square().sum(), x)[0], expected)
    packed.requires_grad_()
    packed(x.detach()).sum().backward()
    assert packed.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert packed_calls(lambda: packed(x))[1] == 1
    packed.requires_grad_(False).bias.requires_grad_()
    packed.bias.grad = None
    packed(x.detach()).sum().backward()
    torch.testing.assert_close(packed.bias.grad, torch.full((32,), 2. * 8 * 8))


def in_autocast(layer, x):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        return layer(x)


def counted(layer, x):
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
    assert counter.get_total_flops() == 2 * out.numel() * 16 * 9
    return out


def forward_mode(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x + 1))).tangent


def without_onednn(layer, x):
    with torch.backends.mkldnn.flags(enabled=False):
        return layer(x)


def vmap_over_weights(layer, x):
    weights = torch.stack([layer.weight, 2 * layer.weight])
    return torch.func.vmap(lambda weight: functional_call(layer, {'weight': weight}, x))(weights)


STEPS_ASIDE = {
    'autocast': in_autocast,
    'double': lambda layer, x: layer.double()(x.double()),
    'no images': lambda layer, x: layer(x[:0]),
    'one image without a batch': lambda layer, x: layer(x[0]),
    'vmap': lambda layer, x: torch.func.vmap(layer)(x[:, None]),
    'vmap over weights': vmap_over_weights,
    'forward mode': forward_mode,
    'oneDNN turned off': without_onednn,
    'count of operations': counted,
    'torch.jit.trace': lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
    'torch.jit.script': lambda layer, x: torch.jit.script(layer)(x),
    'torch.fx': lambda layer, x: torch.fx.symbolic_trace(nn.Sequential(layer))(x),
    'torch.export': lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    'torch.compile': lambda layer, x: torch.compile(layer, backend='aot_eager', fullgraph=True)(x),
}


@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning', 'ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize('use', STEPS_ASIDE.values(), ids=STEPS_ASIDE)
def test_steps_aside(use):
    torch.compiler.reset()
    conv, packed = pair()
    x = torch.randn(3, 16, 8, 8)
    packed(x)
    found, calls = packed_calls(lambda: use(packed, x))
    assert calls == 0
    expected = use(conv, x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_weights_of_inference_mode():
    """They do not tell whether they changed, so no copy is made of them."""
    with torch.inference_mode():
        conv, packed = pair()
        x = torch.randn(1, 16, 8, 8)
        found, calls = packed_calls(lambda: packed(x))
        assert calls == 0
        torch.testing.assert_close(found, conv(x))


@pytest.mark.parametrize('owner, name', [
    (torch._C._nn, 'mkldnn_reorder_conv2d_weight'), (torch._C, '_get_mkldnn_enabled'), (forward_ad, '_current_level')])
def test_without_the_private_means_of_pytorch_convolutions_stay(owner, name, monkeypatch):
    model = timm.create_model('lm_resnet18', layers=(1, 1), channels=(64, 128)).eval()
    x = torch.randn(1, 3, 32, 32)

    def packed():
        optimized = timm_lm.optimize(model)
        torch.testing.assert_close(optimized(x), model(x))
        return [name for name, module in optimized.named_modules() if isinstance(module, PackedConv2d)]

    assert packed() == ['stages.1.blocks.0.conv1', 'stages.1.blocks.0.conv2']  # those of the first stage are small
    monkeypatch.delattr(owner, name)
    assert packed() == []


def test_random_stream_of_the_caller_stays():
    model = timm.create_model('lm_resnet20').eval()
    state = torch.get_rng_state()
    timm_lm.optimize(model)
    assert torch.equal(torch.get_rng_state(), state)
