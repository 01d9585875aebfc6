"""What only a GPU does: CUDA graphs, float16 with its scaler, random states, kernels of its own, and failing."""
import copy
import json
import shutil

import pytest
import timm
import torch
from helpers import OUR_PATH, fresh_python
from safetensors.torch import load_file
from test_inference import difference, images, made
from torch._dynamo.utils import counters
from torch.autograd import grad

import timm_lm
from timm_lm.layers import fused_two_step, two_step
from timm_lm.training.loop import Training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'false')  # tests/conftest.py keeps the others from it


SMALL = ['--model-kwargs', 'layers=(2,1,1)', '--warmup-epochs', '0', '--epochs', '2', '--model-ema',
         '--model-ema-decay', '0.5']


@pytest.fixture
def run(command, few_digits, tmp_path):
    def run(name, *options):
        code, _, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, *SMALL, '--output', tmp_path,
                               '--experiment', name, *options)
        assert code == 0, err
        return tmp_path / name
    return run


def final(folder):
    return load_file(folder / 'weights' / 'model.safetensors')


def test_float16_goes_on_from_its_scaler_and_random_states(run, tmp_path):
    options = ['--amp', '--amp-dtype', 'float16', '--no-torchcompile', '--drop-path', '0.3', '--recovery-interval', '1']
    whole = run('whole', *options)
    newest = sorted((whole / 'checkpoints').glob('step-*'))[2]
    cut = shutil.copytree(whole, tmp_path / 'cut')
    for path in (cut / 'checkpoints').glob('step-*'):
        if path.name > newest.name:
            shutil.rmtree(path)
    state = json.loads((newest / 'state.json').read_text())
    assert state['scaler']['scale'] > 0 and 'process0/cuda' in load_file(newest / 'state.safetensors')
    run('cut', *options, '--resume', 'auto')
    for name, tensor in final(whole).items():
        torch.testing.assert_close(final(cut)[name], tensor, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_cuda_graphs_end_near_the_eager_run(run, accumulate):
    options = ['--no-amp', '--grad-accum-steps', accumulate]
    counters.clear()
    graphs = run('graphs', *options, '--torchcompile', '--torchcompile-mode', 'reduce-overhead')
    assert counters['inductor']['cudagraph_skips'] == 0
    eager = run('eager', *options, '--no-torchcompile')
    for name, tensor in final(eager).items():
        torch.testing.assert_close(final(graphs)[name], tensor, rtol=2e-2, atol=2e-2)


def test_probabilities_of_a_confident_network_add_up_to_one_in_the_gradient(run, monkeypatch):
    """Of logits of 20 and in bfloat16, where the sum of the gradient over the classes tells it."""
    shares = []
    update, step = Training._update, Training.step

    def confident(self, images, targets, *where):
        if not shares:
            head = self.model.get_classifier()
            with torch.no_grad():
                head.weight.mul_(200)
                head.bias.copy_(torch.linspace(-3, 3, len(head.bias)))
                targets = self.model(images).argmax(1)
        step(self, images, targets, *where)

    def noted(self, *where):
        g = self.model.get_classifier().weight.grad.double()
        shares.append((g.sum(0).norm() / g.norm()).item())
        update(self, *where)

    monkeypatch.setattr(Training, 'step', confident)
    monkeypatch.setattr(Training, '_update', noted)
    run('run', '--amp', '--amp-dtype', 'bfloat16', '--torchcompile', '--torchcompile-mode', 'reduce-overhead',
        '--mixup', '0', '--cutmix', '0', '--smoothing', '0', '--epochs', '1')
    assert shares[0] < 0.01


def test_optimized_network_computes_the_same(weights, monkeypatch):
    """To 1e-5, if TF32 is off."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    trained = timm.create_model(f'local-dir:{weights}', pretrained=True).eval()
    for model in (trained, made('lm_resnet164', dict(layers=(1, 2, 1)))):
        model, x = model.cuda(), images(model).cuda()
        with torch.inference_mode():
            assert difference(timm_lm.optimize(model)(x), model(x)) < 1e-5


def test_validation_on_the_gpu_counts_as_on_the_cpu(weights, few_digits, command):
    told = [command('validate', weights, '--data-dir', few_digits, '--device', device)[1].partition('loss')[0]
            for device in ('cpu', 'cuda')]
    assert told[0] == told[1] and 'top-1' in told[0]


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels, as they are called."""
    from timm_lm.layers import two_step_kernels  # which needs Triton
    called = []

    def noted(name, real):
        return lambda *args: called.append(name) or real(*args)

    for name in ('update', 'gradients'):
        monkeypatch.setattr(two_step_kernels, name, noted(name, getattr(two_step_kernels, name)))
    return called


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_large_update_is_one_kernel_each_way(kernels, dtype, layout):
    f, x, x_prev, g = (torch.randn(65, 64, 33, 33, device='cuda', dtype=dtype).contiguous(memory_format=layout)
                       for _ in range(4))
    states = [tensor.requires_grad_() for tensor in (f, x, x_prev, torch.tensor([-0.3], device='cuda'))]
    wide = [tensor.detach().double().requires_grad_() for tensor in states]
    expected = wide[0] + (1 - wide[3]) * wide[1] + wide[3] * wide[2]
    two_step(*states)  # the kernels are tried once
    kernels.clear()
    out = two_step(*states)
    *found, dk = grad(out, states, g)
    assert kernels == ['update', 'gradients']
    *right, right_dk = grad(expected, wide, g.double())
    for value, wanted in zip((out, *found), (expected, *right)):
        assert (value.double() - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()
    assert (dk.double() - right_dk).abs() <= 1e-6 * (g.double() * (wide[2] - wide[1])).norm()


@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_network_with_large_states_learns_by_the_kernels(kernels, grad_checkpointing, monkeypatch):
    """As near to float64 as without them: where a rounding turns a ReLU, a gradient moves by more than the rounding."""
    fused_two_step._has_triton.cache_clear()
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch.manual_seed(0)
    model = timm.create_model('lm_resnet18', num_classes=10).cuda()
    images = torch.randn(64, 3, 224, 224, device='cuda')

    def gradients(dtype=torch.float32):
        network = copy.deepcopy(model).to(dtype)
        network.set_grad_checkpointing(grad_checkpointing)
        network(images.to(dtype)).logsumexp(1).sum().backward()
        return {name: p.grad.double() for name, p in network.named_parameters()}

    fused = gradients()
    assert kernels.count('gradients') == 3  # the first one is the trial
    kernels.clear()
    right = gradients(torch.float64)
    monkeypatch.setattr(fused_two_step, 'FUSED_ON', 'nowhere')
    plain = gradients()
    assert not kernels
    for name in ('stem.conv.weight', 'head.fc.weight'):
        usual, found = ((gradient[name] - right[name]).norm() / right[name].norm() for gradient in (plain, fused))
        assert found <= 3 * usual + 1e-6 and usual < 0.05, name


def test_device_that_failed_is_told(tmp_path):
    code = """
import os
import torch
from timm_lm import cli
cli.COMMANDS['list'] = lambda argv: torch.zeros(1, device='cuda')[torch.tensor([5], device='cuda')].cpu()
code = cli.main(['list'])
print(f'exit code {code}', flush=True)
os._exit(0)  # what PyTorch does at the end with a device that failed is its own affair
"""
    # a daemon that shares the GPU among processes would end all of them
    result = fresh_python('-c', code, cwd=tmp_path, PYTHONPATH=OUR_PATH, CUDA_MPS_PIPE_DIRECTORY=str(tmp_path))
    assert 'exit code 2' in result.stdout and 'timm-lm: error: The device failed (CUDA error: ' in result.stderr
    assert 'Traceback' not in result.stderr
