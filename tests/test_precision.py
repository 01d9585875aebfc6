"""Which precision and layout pay on a device, and what is done on one without bfloat16."""
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from test_train import SMALL

from timm_lm import precision
from timm_lm.run_row import read_run
from timm_lm.training import accelerator
from timm_lm.training import evaluate as evaluate_module
from timm_lm.training.optimizer import begin_momentum, create_optimizer
from timm_lm.training.options import parse_options

NOTE = 'this CPU has no instructions for bfloat16'


@pytest.fixture(params=[True, False], ids=['bfloat16', 'no bfloat16'])
def has_bfloat16(request, monkeypatch):
    """A CPU with the instructions and one without, whatever this machine has."""
    monkeypatch.setattr('timm_lm.precision.cpu_has_bfloat16', lambda: request.param)
    return request.param


def test_instructions_are_those_that_linux_tells(monkeypatch):
    """PyTorch's own account and that of the system, which older versions of PyTorch are judged by, agree."""
    path = Path('/proc/cpuinfo')
    words = set(re.split(r'\s+', path.read_text())) if path.is_file() else set()
    expected = bool(words & {'avx512_bf16', 'amx_bf16', 'bf16'})
    if path.is_file():
        assert precision.cpu_has_bfloat16() == expected
    monkeypatch.delattr(precision.torch.cpu, 'get_capabilities', raising=False)
    assert precision.cpu_has_bfloat16() == expected  # False where no system tells it


@pytest.mark.parametrize('flags, expected', [
    ('flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile', True),
    ('flags\t\t: fpu avx2 avx512f avx512_vnni', False),
    ('flags\t\t: fpu avx512f amx_bf16', True),
    ('Features\t: fp asimd bf16 i8mm', True),
    ('Features\t: fp asimd svebf16x', False),
    ('model name\t: bf16', False),
])
def test_instructions_of_other_machines(monkeypatch, flags, expected):
    monkeypatch.delattr(precision.torch.cpu, 'get_capabilities', raising=False)
    monkeypatch.setattr(precision.Path, 'read_text', lambda path: f'processor\t: 0\n{flags}\nbogomips\t: 1\n')
    assert precision.cpu_has_bfloat16() == expected


def test_training_computes_in_the_precision_that_it_says_and_records(
        has_bfloat16, few_digits, tmp_path, command, monkeypatch):
    """A run on a CPU without bfloat16 is told to be one in float32, in all that it leaves, and goes on as one."""
    convolved, forward = set(), torch.nn.Conv2d.forward

    def watched(self, x):
        y = forward(self, x)
        convolved.add((self.training, y.dtype))
        return y

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', watched)
    options = ['-c', 'demo_digits', '--data-dir', few_digits, '--train-split', 'train[:64]', *SMALL, '--output',
               tmp_path, '--experiment', 'run']
    code, out, err = command('train', *options)
    assert code == 0, err
    name = 'bfloat16' if has_bfloat16 else 'float32'
    assert {dtype for training, dtype in convolved if training} == {getattr(torch, name)}
    assert f'cpu, {name}, eager' in out
    assert (NOTE in out) == (not has_bfloat16)
    run = tmp_path / 'run'
    assert yaml.safe_load((run / 'args.yaml').read_text())['amp'] == has_bfloat16
    assert json.loads((run / 'result.json').read_text())['precision'] == name
    assert f' minutes in {name} on ' in (run / 'weights' / 'README.md').read_text()
    row = read_run(run)
    assert row['precision'] == name and 'amp' not in row['recipe']
    code, out, err = command('train', *options, '--resume', 'auto')
    assert code == 0 and 'Resuming from' in out, err


def test_a_run_in_another_precision_is_not_gone_on_with(few_digits, tmp_path, command, fails, monkeypatch):
    options = ['train', '-c', 'demo_digits', '--data-dir', few_digits, *SMALL, '--output', tmp_path,
               '--experiment', 'run']
    monkeypatch.setattr('timm_lm.precision.cpu_has_bfloat16', lambda: False)
    code, _, err = command(*options)
    assert code == 0, err
    monkeypatch.setattr('timm_lm.precision.cpu_has_bfloat16', lambda: True)
    assert 'amp (was False, is True)' in fails(*options, '--resume', 'auto')
    code, out, err = command(*options, '--resume', 'auto', '--no-amp')
    assert code == 0, err
    assert 'Resuming from' in out


def test_validation_in_bfloat16_where_the_cpu_has_it(has_bfloat16, weights, few_digits, command, monkeypatch):
    seen, evaluate = [], evaluate_module.evaluate

    def watched(forward, loader, **more):
        seen.append(forward(next(iter(loader))[0]).dtype)
        return evaluate(forward, loader, **more)

    monkeypatch.setattr(evaluate_module, 'evaluate', watched)
    code, out, err = command('validate', weights, '--data-dir', few_digits, '--amp')
    assert code == 0, err
    assert 'of 64 images' in out
    assert (f'note: {NOTE}' in err) == (not has_bfloat16)
    assert seen == [torch.bfloat16 if has_bfloat16 else torch.float32]


def test_gpu_without_bfloat16_trains_in_float32(monkeypatch):
    """Without a GPU here, by what PyTorch would tell of one."""
    monkeypatch.setattr(accelerator, '_on_cpu', lambda args: False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation, s=supported: s)
        args = parse_options(['-c', 'paper_c10'])
        note = accelerator.settle_precision(args)
        assert args.amp == supported and ('this GPU has no instructions for bfloat16' in note) == (not supported)
    args = parse_options(['-c', 'paper_c10', '--amp-dtype', 'float16'])
    assert accelerator.settle_precision(args) == '' and args.amp


def test_what_gpus_of_apple_lack_is_left_out(few_digits, command, monkeypatch):
    """By what PyTorch and Accelerate would tell of one."""
    monkeypatch.delenv('ACCELERATE_USE_CPU', raising=False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    for supported in (torch.__version__ >= '2.6', False):
        monkeypatch.setattr(precision, 'is_bf16_available', lambda s=supported: s)
        args = parse_options(['-c', 'demo_digits'])
        notes = accelerator.settle_precision(args), accelerator.settle_layout(args)
        assert args.amp == supported and ('bfloat16 on this GPU needs macOS 14' in notes[0]) == (not supported)
        assert not args.channels_last and 'channels_last on this GPU' in notes[1]
    args = parse_options(['-c', 'demo_digits', '--device', 'cpu'])
    assert accelerator.settle_layout(args) == '' and args.channels_last
    monkeypatch.setattr(accelerator, '_device_type', lambda args: 'mps')
    code, out, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, '--device', 'cpu', '--dry-run')
    assert code == 0, err
    assert all(f'note: {note}' in out for note in notes)


def test_gpus_of_intel_are_found_by_older_pytorch(monkeypatch):
    monkeypatch.delenv('ACCELERATE_USE_CPU', raising=False)
    monkeypatch.delattr(torch, 'accelerator', raising=False)
    for kind in (torch.cuda, torch.backends.mps, torch.xpu):
        monkeypatch.setattr(kind, 'is_available', lambda: False)
    assert accelerator._on_cpu(parse_options([]))
    monkeypatch.setattr(torch.xpu, 'is_available', lambda: True)
    assert not accelerator._on_cpu(parse_options([]))


@pytest.mark.parametrize('name', ['momentum', 'lookahead_momentum'])
def test_fused_momentum_begins_by_zero(name):
    model = torch.nn.Linear(2, 2)
    optimizer = create_optimizer(parse_options(['--opt', name]), model)
    begin_momentum(optimizer)
    base = getattr(optimizer, '_base_optimizer', optimizer)
    assert base.defaults['fused']
    for parameter in model.parameters():
        assert base.state[parameter]['momentum_buffer'].eq(0).all()


@pytest.mark.parametrize('nesterov', [True, False])
def test_momentum_of_fused_sgd_outlives_an_overflow_in_the_first_step(nesterov):
    """As float16 with a scaler has it. From zero all is as without an overflow; else the memory's garbage is taken."""
    def trained(first, begin, fused=True):
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=nesterov, fused=fused)
        if begin:
            begin_momentum(optimizer)
        scaler = torch.amp.GradScaler('cpu', init_scale=4.)
        for gradient in (*first, 1., 2.):
            weight.grad = torch.full_like(weight, gradient * scaler.get_scale())
            scaler.scale(weight.sum().detach())
            scaler.step(optimizer)
            scaler.update()
        return weight.detach()

    expected = trained([], begin=False, fused=False)
    torch.testing.assert_close(trained([], begin=True), expected)
    torch.testing.assert_close(trained([float('inf')], begin=True), expected)
