"""The networks in other forms: TorchScript, fx, torch.compile, and files of all formats, against eager mode."""
import shutil

import onnxruntime
import pytest
import timm
import torch
from forked import Command
from timm.models import create_feature_extractor
from torch import nn

from timm_lm import export
from timm_lm.errors import UserError
from timm_lm.export import FORMATS, export_model
from timm_lm.models import LMResNet
from timm_lm.weights_folder import load_folder

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


# ------------------------------------------------------------------------------------------------ exported files

@pytest.mark.parametrize('form', FORMATS)
def test_exported_file_computes_the_same_for_any_batch_size(kind, form, tmp_path):
    """By the export's own comparison, with the file as it loads."""
    assert export_model(create(kind, scriptable=True), form, tmp_path / 'model') < 1e-5


@torch.no_grad()
def test_other_formats_need_no_lerp(images):
    """Which Core ML's converter does not know, neither of a trace nor of an exported program."""
    model = create('lm')
    graphs = str(torch.jit.trace(model, images).inlined_graph), str(torch.export.export(model, (images,)).graph)
    assert all('conv' in graph and 'lerp' not in graph for graph in graphs)


@pytest.mark.parametrize('form, ending', [('onnx', '.onnx'), ('torch-export', '.pt2'), ('torchscript', '.pt')])
def test_exported_file_computes_the_same(form, ending, weights, tmp_path, command):
    path = tmp_path / 'out' / f'model{ending}'
    code, out, err = command('export', weights, '--format', form, '--output', path)
    assert code == 0, err
    assert out.startswith(f'{path}: ') and 'batches of any size' in out
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing else is left
    images = torch.randn(7, 1, 16, 16)
    if form == 'onnx':
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        logits = torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])
    else:
        logits = (torch.export.load(path).module() if form == 'torch-export' else torch.jit.load(path))(images)
    with torch.inference_mode():
        expected = timm.create_model(f'local-dir:{weights}', pretrained=True).eval()(images)
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-3, atol=1e-4)


def test_exported_run_is_named_after_it(run_folder, tmp_path, command, monkeypatch):
    run = shutil.copytree(run_folder, tmp_path / 'tuned')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, 'export_model', lambda model, kind, path: path.write_text(kind) and 0.)
    for source in (run / 'weights', 'tuned/weights'):
        code, out, err = command('export', source, '--format', 'torch-export')
        assert code == 0 and out.startswith('tuned.pt2: '), err
    monkeypatch.chdir(run / 'weights')
    code, out, err = command('export', '.', '--format', 'torch-export')
    assert code == 0 and out.startswith('tuned.pt2: '), err


def test_export_that_fails_leaves_nothing(weights, tmp_path, fails, monkeypatch):
    (tmp_path / 'file').write_text('')
    assert 'choose another --output' in fails('export', weights, '--output', tmp_path / 'file' / 'model.onnx')
    for folder in (tmp_path, '.', '/'):
        assert f'{folder} is a folder; name a file with --output' in fails('export', weights, '--output', folder)

    def not_for_scripts(self, *images):
        return images[0]

    with monkeypatch.context() as patch:
        patch.setattr(LMResNet, 'forward', not_for_scripts)
        line = fails('export', weights, '--format', 'torchscript', '--output', tmp_path / 'model.pt')
        assert 'cannot be written as torchscript (Compiled functions can' in line
    for sizes in ((2, 5), (1, 2), ()):  # of the batches that the file is right for
        def written(model, images, path, sizes=sizes):
            path.touch()
            return lambda images: model(images) * (1 if len(images) in sizes else 1.001)

        monkeypatch.setitem(export.FORMATS, 'torch-export', (written, '.pt2'))
        line = fails('export', weights, '--format', 'torch-export', '--output', tmp_path / 'model.pt2')
        assert 'computes something else' in line
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_export_of_what_is_no_number_is_refused(weights, tmp_path):
    model = load_folder(weights)
    torch.nn.init.constant_(model.head.fc.bias, float('nan'))
    with pytest.raises(UserError, match='computes something else .difference nan'):
        export_model(model, 'torch-export', tmp_path / 'model.pt2')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('form', FORMATS)
def test_export_onto_a_full_disk(form, weights, tmp_path):
    code, _, err = Command(
        'export', weights, '--format', form, '--output', tmp_path / 'model', file_limit=50_000).wait()
    assert code == 2 and err.count('timm-lm: error: ') == 1 and 'Traceback' not in err, err
    assert 'File too large' in err and not list(tmp_path.iterdir())


def test_onnx_runtime_that_is_too_old_is_told(weights, tmp_path, fails, monkeypatch):
    class InvalidGraph(Exception):
        """As onnxruntime's own, which have no other base."""

    def session(*args, **kwargs):
        raise InvalidGraph('Unsupported model IR version: 99, max supported IR version: 10')

    monkeypatch.setattr(onnxruntime, 'InferenceSession', session)
    line = fails('export', weights, '--output', tmp_path / 'model.onnx')
    assert 'onnxruntime cannot read the file (Unsupported model IR version: 99' in line and 'install a newer' in line
    assert not list(tmp_path.iterdir())
