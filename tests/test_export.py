"""The networks in other forms: TorchScript, fx, torch.export, torch.compile and ONNX, against eager mode."""
import io

import onnxruntime
import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import nn

# k away from its start, so that a k that is lost or flipped on the way shows
NETWORKS = {
    'lm': ('lm_resnet18', dict(layers=(1, 2), channels=(16, 32), stem_chs=16, k_init=(-0.9, -0.5))),  # for ImageNet
    'per channel': ('lm_resnet20', dict(layers=(2,), channels=(16,), k_init=(-0.9, -0.5), k_per_channel=True)),
    'history': ('lm_resnext29_8x64d', dict(
        layers=(1, 2), channels=(32, 64), stem_chs=16, cardinality=2, k_init=(-0.9, -0.5), num_classes=10)),
    'plain': ('preact_resnet20', dict(layers=(1, 2), channels=(16, 32))),
}
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32, other kernels

pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')  # deprecated, yet part of timm's interface


def create(kind, **kwargs):
    name, tiny = NETWORKS[kind]
    torch.manual_seed(0)
    return timm.create_model(name, **tiny, **kwargs).eval()


@pytest.fixture(params=NETWORKS)
def kind(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def more_images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def k_names(names):
    return [name for name in names if name.endswith('.step.k')]


def step(model, x):
    """Loss and gradients of one step in training mode, the loss so large that no gradient is within the tolerance."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = 3e3 * model(x).pow(2).mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_the_outputs_depend_on_k(images):
    """Else agreement with eager mode below would say nothing of the two-step update."""
    for kind in ('lm', 'per channel', 'history'):
        model = create(kind)
        expected = model(images)
        with torch.no_grad():
            for name in k_names(model.state_dict()):
                model.get_parameter(name).neg_()
        assert (model(images) - expected).abs().max() > 100 * CLOSE['atol']


# ------------------------------------------------------------------------------------------------- TorchScript

@torch.no_grad()
def test_script(kind, images, more_images):
    model = create(kind, scriptable=True)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    assert scripted.state_dict().keys() == model.state_dict().keys()
    for x in (images, more_images):
        torch.testing.assert_close(scripted(x), model(x), **CLOSE)


def test_script_trains(kind, images):
    model = create(kind, scriptable=True, drop_path_rate=0.1, state_noise=0.01).train()
    scripted = torch.jit.script(model)
    assert [*scripted.k_values()] == [*model.k_values()] and scripted.no_weight_decay() == model.no_weight_decay()
    expected = step(model, images)
    for a, e in zip(step(scripted, images), expected, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)
    assert not torch.equal(scripted(images), scripted(images))  # noise
    scripted.eval()
    assert torch.equal(scripted(images), scripted(images))


@torch.no_grad()
@pytest.mark.parametrize('out_indices', [None, (0, 1), (0,)])
def test_script_of_features(kind, images, out_indices):
    kwargs = {} if out_indices is None else dict(out_indices=out_indices)
    model = create(kind, scriptable=True, features_only=True, **kwargs)
    features = torch.jit.script(model)(images)
    expected = model(images)
    assert len(features) == len(expected) == len(out_indices or model.feature_info.channels())
    for a, b in zip(features, expected):
        torch.testing.assert_close(a, b, **CLOSE)


# -------------------------------------------------------------------------------------------------------- fx

@torch.no_grad()
def test_fx(kind, images, more_images):
    model = create(kind)
    traced = torch.fx.symbolic_trace(model)
    for x in (images, more_images):
        torch.testing.assert_close(traced(x), model(x), **CLOSE)


@pytest.mark.filterwarnings('ignore:NOTE. The nodes')  # drop path is traced in training alone
def test_fx_feature_extractor_trains(kind, images):
    model = create(kind, drop_path_rate=0.1).train()
    extractor = create_feature_extractor(model, ['stages.0', 'head'])
    out = extractor(images)
    assert out['stages.0'].shape[0] == 2
    out['head'].pow(2).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    extractor.eval()
    with torch.no_grad():
        out = extractor(images)
        torch.testing.assert_close(out['head'], model(images), **CLOSE)
        state = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
        torch.testing.assert_close(out['stages.0'], state, **CLOSE)


# ---------------------------------------------------------------------------------------- torch.export, ONNX

def dynamic_batch():
    return ({0: torch.export.Dim('batch', min=1, max=64)},)


@torch.no_grad()
def test_export_with_any_batch_size(kind, images, more_images):
    model = create(kind)
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic_batch())
    assert k_names(program.state_dict) == k_names(model.state_dict())
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    for x in (images, more_images, more_images[:1]):
        torch.testing.assert_close(exported(x), model(x), **CLOSE)


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
def test_other_formats_need_no_lerp(images):
    """Which Core ML's converter does not know, neither of a trace nor of an exported program."""
    model = create('lm')
    graphs = str(torch.jit.trace(model, images).inlined_graph), str(torch.export.export(model, (images,)).graph)
    assert all('conv' in graph and 'lerp' not in graph for graph in graphs)


def export_onnx(model, images, path):
    if torch.__version__ >= '2.6':
        torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=dynamic_batch()).save(path)
    else:  # the newer exporter of torch 2.5 fails at the classifier of timm's ResNetV2 too, if the batch is dynamic
        torch.onnx.export(
            model, (images,), path, dynamo=False, input_names=['images'], dynamic_axes=dict(images={0: 'batch'}))


@torch.no_grad()
def test_onnx_with_any_batch_size(kind, images, more_images, tmp_path):
    model = create(kind)
    path = str(tmp_path / 'model.onnx')
    export_onnx(model, images, path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    image_input, = session.get_inputs()
    assert isinstance(image_input.shape[0], str) and image_input.shape[1:] == [3, 32, 32]
    for x in (images, more_images, more_images[:1]):
        logits, = session.run(None, {image_input.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), **CLOSE)


# --------------------------------------------------------------------------------------------- torch.compile

class CountingBackend:
    """Runs the captured graph as it is, and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: nn.Module, example_inputs):
        self.graphs += 1
        return graph.forward


@torch.no_grad()
def test_compile_gives_one_graph(kind, images):
    backend = CountingBackend()
    model = create(kind)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images), model(images), **CLOSE)
    torch.testing.assert_close(compiled(images + 1), model(images + 1), **CLOSE)
    before = model(images)
    for name in k_names(model.state_dict()):  # k is read from the network, not baked in
        model.get_parameter(name).add_(0.3)
    torch.testing.assert_close(compiled(images), model(images), **CLOSE)
    assert kind == 'plain' or not torch.allclose(compiled(images), before, **CLOSE)
    assert backend.graphs == 1


@pytest.mark.parametrize('kind, checkpointing', [('lm', False), ('history', False), ('history', True)])
def test_compiled_gradients(kind, checkpointing, images):
    model = create(kind).train()
    expected = step(model, images)
    model.set_grad_checkpointing(checkpointing)
    actual = step(torch.compile(model, fullgraph=True, backend='aot_eager'), images)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


def test_random_parts_compile(images):
    backend = CountingBackend()
    model = create('history', drop_rate=0.1, drop_path_rate=0.1, state_noise=0.01, state_noise_type='uniform').train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        assert all(torch.isfinite(t).all() for t in step(compiled, images))
    assert backend.graphs == 1


def test_compiled_by_inductor(images):
    model = create('per channel').train()
    expected = step(model, images)
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            actual = step(compiled, images)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


@torch.no_grad()
def test_compiled_features(images):
    model = create('history', features_only=True)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for a, b in zip(compiled(images), model(images), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
