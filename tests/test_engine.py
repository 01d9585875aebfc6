"""The parts of a training at work in short runs: averages, the two-step's switch, teachers, schedules, optimizers,
what is shown, trackers."""
import csv
import json
import os
import pickle
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import timm
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from timm.layers import DropBlock2d
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils.agc import unitwise_norm
from torch.overrides import TorchFunctionMode

from timm_lm.data import load_images
from timm_lm.errors import UserError
from timm_lm.loader import MemoryLoader
from timm_lm.run_row import read_run
from timm_lm.training import loop, plan
from timm_lm.training.evaluate import evaluate
from timm_lm.training.loop import Training
from timm_lm.training.network import create_model, prepare_network
from timm_lm.training.optimizer import create_optimizer
from timm_lm.training.options import parse_options
from timm_lm.training.run_log import LiveLine
from timm_lm.training.train import train
from timm_lm.weights_folder import load_folder

# float32 on the CPU; 256 images in batches of 64 are 4 updates an epoch
BASE = ['-c', 'demo_digits', '--model-kwargs', 'layers=(1,1,1)', '--warmup-epochs', '0', '--no-amp']
TWO_STEP = ['--model-kwargs', 'layers=(2,1,1)']  # with one k
AT_REST = ['--lr', '1e-30', '--weight-decay', '0', '--epochs', '1']  # no weight moves
BY_EPOCH = ['--no-sched-on-updates']


@pytest.fixture
def run(few_digits, tmp_path, command):
    """Train by the command line, in a folder of this name: returns (run folder, standard output, standard error)."""
    def run(name, *options, base=tmp_path):
        code, out, err = command('train', *BASE, '--data-dir', few_digits, '--output', base, '--experiment', name,
                                 *options)
        assert code == 0, err
        return base / name, out, err
    return run


@pytest.fixture(scope='module')
def plain(few_digits, tmp_path_factory):
    """A run of two epochs, with a checkpoint after each update."""
    output = tmp_path_factory.mktemp('plain')
    return train(parse_options([
        *BASE, '--data-dir', str(few_digits), '--epochs', '2', '--recovery-interval', '1', '--checkpoint-hist', '100',
        '--output', str(output), '--experiment', 'run']))


def summary(folder):
    with open(folder / 'summary.csv') as f:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(f)]


def metrics(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def rates(folder):
    return [row['lr'] for row in summary(folder)]


def weights_of(folder):
    return load_file(folder / 'weights' / 'model.safetensors')


def checkpoint(folder, updates, group='model'):
    tensors = load_file(folder / 'checkpoints' / f'step-{updates:09d}' / 'state.safetensors')
    return {name.partition('/')[2]: tensor for name, tensor in tensors.items() if name.startswith(f'{group}/')}


def state(folder, updates):
    return json.loads((folder / 'checkpoints' / f'step-{updates:09d}' / 'state.json').read_text())


def checkpoint_names(folder):
    return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def parameters(state):
    return {name: tensor for name, tensor in state.items() if 'running_' not in name and 'num_batches' not in name}


def first_weights(*options):
    """Those that a run with these options begins with."""
    args = parse_options([*BASE, *map(str, options)])
    torch.manual_seed(args.seed)
    return create_model(args).state_dict()


def cut(folder, updates, target):
    """A copy of a finished run as it was after so many updates."""
    shutil.copytree(folder, target)
    for name in ('weights', 'result.json'):
        shutil.rmtree(target / name) if (target / name).is_dir() else (target / name).unlink()
    for path in (target / 'checkpoints').iterdir():
        if int(path.name.removeprefix('step-')) > updates:
            shutil.rmtree(path)
    return target


# Averaged weights


@pytest.mark.parametrize('options, decay', [
    (['--model-ema-decay', 0.5], lambda update: 0.5),
    # timm's warm-up of the decay, gamma 1 and power 2/3
    (['--model-ema-warmup'], lambda update: min(1 - update ** (-2 / 3), 0.9998)),
])
def test_average_of_the_weights(run, plain, few_digits, tmp_path, options, decay):
    """The average is the one of the plain run's checkpoints; it is what is validated and saved."""
    options = ['--model-ema', *options, '--epochs', 2]
    folder, *_ = run('ema', *options)
    average = checkpoint(plain, 1)  # the average begins with the weights after the first update
    for update in range(2, 9):
        share = decay(update)
        average = {name: share * average[name] + (1 - share) * tensor if tensor.is_floating_point() else tensor
                   for name, tensor in checkpoint(plain, update).items()}
    found = weights_of(folder)
    torch.testing.assert_close(found, average, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found['stem.conv.weight'], weights_of(plain)['stem.conv.weight'], atol=1e-4)
    # the network goes on as if nothing had been averaged or validated
    assert equal(checkpoint(folder, 8), checkpoint(plain, 8)) and equal(checkpoint(folder, 4), checkpoint(plain, 4))
    # what was validated is the average
    data = load_images('test', few_digits, input_size=(1, 16, 16))
    counted = evaluate(load_folder(folder / 'weights'), MemoryLoader(data, 64, [0.3053], [0.3760]))
    seen = metrics(folder)[-1]['eval']
    assert seen['errors'] == counted['errors'] and seen['loss'] == pytest.approx(counted['loss'], rel=1e-5)
    assert seen['loss'] != pytest.approx(metrics(plain)[-1]['eval']['loss'], rel=1e-4)
    # and it is in the checkpoints
    resumed = cut(folder, 4, tmp_path / 'resumed')
    run('resumed', *options, '--resume', 'auto')
    assert equal(weights_of(resumed), found)


def test_torchcompile_compiles_the_network(run):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run('run', '--torchcompile', 'aot_eager', '--epochs', '1')
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    torch.compiler.reset()


def test_k_on_record_is_that_of_the_average(run):
    folder, *_ = run('ema', *TWO_STEP, '--model-ema', '--model-ema-decay', '0.9', '--epochs', '1', '--lr', '0.5')
    k = weights_of(folder)['stages.0.blocks.1.step.k'].item()
    ((last,),) = metrics(folder)[-1]['k'].values()
    found = read_run(folder)
    assert found['k'] == found['k_min'] == f'{k:.3f}' != f'{last:.3f}'


def test_drop_is_off_by_default_whatever_the_network_s_own_default_is():
    options = ['--model', 'ghostnet_050', '--num-classes', '10']
    assert timm.create_model('ghostnet_050').drop_rate > 0
    assert [create_model(parse_options([*options, *more])).drop_rate for more in ([], ['--drop', '0.1'])] == [0, 0.1]


def test_drop_block_is_for_networks_that_have_it():
    options = ['--model', 'resnet10t', '--num-classes', '10', '--drop-block', '0.1']
    rates = {module.drop_prob for module in create_model(parse_options(options)).modules()
             if isinstance(module, DropBlock2d)}
    assert rates == {0.1}
    options[1] = 'lm_resnet20'
    with pytest.raises(UserError, match="lm_resnet20 cannot be made .* argument 'drop_block_rate'"):
        create_model(parse_options(options))
    create_model(parse_options([*options, '--drop-block', '0']))
    with pytest.raises(UserError, match="unexpected keyword argument 'drop_block_rate'"):
        create_model(parse_options([*options, '--pretrained']))


# The two-step's switch


def test_environment_does_not_scale_the_gradients(run, monkeypatch):
    """Accelerate divides the loss by a number of its own, which launchers of other programs may have left."""
    states = []
    for name in ('as-ever', 'scaled'):
        folder, *_ = run(name, '--epochs', 1)
        states.append(load_file(folder / 'weights' / 'model.safetensors'))
        monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4')
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


def test_two_step_is_switched_on_at_its_epoch(run, tmp_path):
    """Until then the run is that of the plain network, bit for bit; then k moves from where a new network starts."""
    torch.manual_seed(0)
    start = timm.create_model('lm_resnet20', layers=(2, 1, 1), in_chans=1).state_dict()
    save_file(start, tmp_path / 'two_step.safetensors')
    save_file({name: tensor for name, tensor in start.items() if not name.endswith('step.k')},
              tmp_path / 'twin.safetensors')
    common = [*TWO_STEP, '--epochs', 3]
    options = [*common, '--initial-checkpoint', tmp_path / 'two_step.safetensors', '--two-step-epoch', 1]
    folder, *_ = run('lm', *options, '--recovery-interval', 1, '--checkpoint-hist', 100)
    twin, *_ = run('twin', *common, '--model', 'preact_resnet20', '--initial-checkpoint',
                   tmp_path / 'twin.safetensors')

    name = 'stages.0.blocks.1.step.k'
    ks = [checkpoint(folder, update)[name].item() for update in range(1, 13)]
    assert ks[:4] == [0] * 4 and 0 not in ks[4:] and len(set(ks[4:])) > 6
    found, plain = metrics(folder), metrics(twin)
    assert [row['k']['stages.0.blocks.1'] for row in found] == [[0.], [ks[7]], [ks[11]]]
    state = checkpoint(folder, 4)
    del state[name]
    assert equal(state, checkpoint(twin, 4))
    assert found[0]['train']['loss'] == plain[0]['train']['loss']
    assert {key: found[0]['eval'][key] for key in ('loss', 'errors')} == {
        key: plain[0]['eval'][key] for key in ('loss', 'errors')}
    assert found[1]['train']['loss'] != plain[1]['train']['loss']

    for updates in (2, 4, 6):  # before, at and after the switch
        resumed = cut(folder, updates, tmp_path / f'from{updates}')
        run(resumed.name, *options, '--resume', 'auto')
        assert equal(weights_of(resumed), weights_of(folder)), updates


def test_two_step_starts_as_in_a_new_network(run):
    kwargs = ['--model-kwargs', 'layers=(2,2,2)', 'k_init=(0.2,0.3)']
    folder, *_ = run('run', *AT_REST, *kwargs, '--epochs', 2, '--two-step-epoch', 1)
    before, after = (list(row['k'].values()) for row in metrics(folder))
    assert before == [[0.]] * 3
    assert all(0.2 < k < 0.3 for (k,) in after) and len({k for (k,) in after}) == 3


# A teacher


def test_distillation_adds_the_weighted_losses(run, weights):
    """No weight moves, so that the losses of the same batches can be compared."""
    def loss(name, *options):
        return metrics(run(name, *AT_REST, *options)[0])[0]['train']['loss']

    teacher = ['--kd-model-name', weights]
    task = loss('task', *teacher, '--task-loss-weight', 1, '--distill-loss-weight', 0)
    divergence = loss('distill', *teacher, '--task-loss-weight', 0, '--distill-loss-weight', 1)
    assert task == loss('plain') and divergence > 0.01
    assert loss('both', *teacher) == pytest.approx(task + divergence, rel=1e-5)
    assert loss('share', *teacher, '--task-loss-weight', 0.3) == pytest.approx(0.3 * task + 0.7 * divergence, rel=1e-5)
    assert loss('warm', *teacher, '--task-loss-weight', 0, '--distill-loss-weight', 1, '--kd-temperature', 1) != (
        pytest.approx(divergence, rel=1e-3))


def test_student_comes_near_its_teacher(run, weights):
    folder, out, _ = run('run', '--kd-model-name', weights, '--task-loss-weight', 0, '--epochs', 3)
    losses = [row['train_loss'] for row in summary(folder)]
    assert losses[-1] < 0.8 * losses[0]
    assert f', distilled from the weights of `{weights.parent.name}`\n' in out
    card = (folder / 'weights' / 'README.md').read_text()
    assert f'3 epochs, distilled from the weights of `{weights.parent.name}`, seed ' in card


def test_loss_is_left_out_of_what_is_compiled(run, monkeypatch):
    """Within it, a GPU's compiler takes logits in bfloat16 rounded in one pass and unrounded in the other."""
    compiled = []

    def noted(self, *args):
        compiled.append(torch.compiler.is_compiling())
        return forward(self, *args)

    forward = torch.nn.CrossEntropyLoss.forward
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, 'forward', noted)
    run('run', '--torchcompile', 'eager', '--epochs', 1)
    assert compiled == [False] * 4


# Schedules


def rates_of_timm(*options):
    """The rate after each update, where timm's train.py stepped its schedule."""
    args = parse_options([*BASE, *map(str, options)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    updates_per_epoch = 256 // args.batch_size
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    found, num_updates = [], 0
    for epoch in range(epochs):
        for _ in range(updates_per_epoch):
            num_updates += 1
            scheduler.step_update(num_updates=num_updates)
            found.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1, None)
    return found


SCHEDULES = dict(  # options, epochs, and how many different rates at least these have at their ends
    step=([*BY_EPOCH, '--sched', 'step', '--decay-epochs', 2, '--decay-rate', 0.5, '--epochs', 6], 6, 3),
    multistep=([*BY_EPOCH, '--sched', 'multistep', '--decay-milestones', 2, 5, '--epochs', 6, '--warmup-epochs', 2,
                '--warmup-lr', 0.01, '--warmup-prefix'], 8, 5),
    cycles=(['--sched', 'cosine', '--lr-cycle-limit', 2, '--lr-cycle-decay', 0.5, '--epochs', 3, '--min-lr', 0.001,
             '--cooldown-epochs', 1], 7, 5),
    noise=([*BY_EPOCH, '--sched', 'cosine', '--lr-noise', 0.3, 0.9, '--lr-noise-pct', 0.5, '--epochs', 6], 6, 6),
    tanh=(['--sched', 'tanh', '--lr-noise', 0.5, '--lr-noise-std', 0.2, '--epochs', 4, '--warmup-epochs', 1,
           '--warmup-lr', 0.02], 4, 4),
    poly=([*BY_EPOCH, '--sched', 'poly', '--decay-rate', 0.5, '--lr-k-decay', 2, '--epochs', 5], 5, 5),
)
if hasattr(timm.scheduler, 'WSDLRScheduler'):  # older timm has none of these
    SCHEDULES.update(
        wsd=(['--sched', 'wsd', '--decay-epochs', 0.5, '--epochs', 5, '--warmup-epochs', 1], 5, 3),
        rsqrt=(['--sched', 'rsqrt', '--decay-epochs', 1, '--epochs', 5, '--warmup-epochs', 1], 5, 5),
        constant=([*BY_EPOCH, '--sched', 'constant', '--epochs', 4, '--warmup-epochs', 2], 4, 3),
    )


@pytest.mark.parametrize('options, epochs, different', SCHEDULES.values(), ids=SCHEDULES)
def test_planned_rates_are_those_of_timm(options, epochs, different):
    options = [*options, '--batch-size', 128]
    expected = rates_of_timm(*options)
    assert len(expected) == 2 * epochs and len(set(expected[1::2])) >= different
    args = parse_options([*BASE, *map(str, options)])
    drawn = plan.rates(args, 2)  # before each update, or of each epoch
    assert drawn[1:] == pytest.approx(expected[:-1] if args.sched_on_updates else expected[3::2], rel=1e-12)


@pytest.mark.parametrize('name', ['multistep', 'cycles'])
def test_rates_of_a_run_are_those_of_timm(run, name):
    """Of a schedule by epoch, and one that steps on updates."""
    options = [*SCHEDULES[name][0], '--batch-size', 128]
    folder, *_ = run('run', *options, '--val-split', '')
    assert rates(folder) == pytest.approx(rates_of_timm(*options)[1::2], rel=1e-12)


def tell_at_validations(monkeypatch, metric, values):
    """Have the validations find these values, by epoch."""
    evaluate = Training.evaluate

    def told(training, loader, epoch):
        return evaluate(training, loader, epoch) | {metric: values[epoch]}

    monkeypatch.setattr(Training, 'evaluate', told)


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler:FutureWarning')
def test_picture_of_plateau_is_of_what_a_run_without_progress_does(run, monkeypatch):
    """With a validation every second epoch."""
    tell_at_validations(monkeypatch, 'top1', [0.] * 8)
    options = [*BY_EPOCH, '--sched', 'plateau', '--patience-epochs', 1, '--decay-rate', 0.5, '--epochs', 8,
               '--batch-size', 128, '--val-interval', 2]
    folder, *_ = run('run', *options)
    assert rates(folder) == plan.rates(parse_options([*BASE, *map(str, options)]), 2) == [0.1] * 6 + [0.05] * 2


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler:FutureWarning')
@pytest.mark.parametrize('metric, values, epoch', [
    ('top1', [2., 3., 3., 3., 4., 4., 4., 5.], 3),  # soon out of patience
    ('loss', [9., 8., 8., 8., 7., 7., 7., 6.], 4),  # just lowered
])
def test_plateau_lowers_the_rate_and_resumes(run, tmp_path, monkeypatch, metric, values, epoch):
    """At the second epoch in a row that is no better than the best; gone on with after one of them."""
    tell_at_validations(monkeypatch, metric, values)
    options = [*BY_EPOCH, '--sched', 'plateau', '--patience-epochs', 1, '--decay-rate', 0.5, '--epochs', 8,
               '--batch-size', 128, '--eval-metric', metric]
    folder, *_ = run('whole', *options)
    expected = [0.1] * 4 + [0.05] * 3 + [0.025]
    assert rates(folder) == expected
    resumed = cut(folder, 2 * epoch, tmp_path / 'resumed')
    _, out, _ = run('resumed', *options, '--resume', 'auto')
    assert f'epoch {epoch + 1}, batch 1' in out
    assert rates(resumed) == expected and equal(weights_of(resumed), weights_of(folder))


@pytest.mark.parametrize('metric, values', [('loss', [2., 1., 1., 3.]), ('top5', [50., 70., 70., 60.])])
def test_checkpoint_of_the_best_epoch_stays(run, tmp_path, monkeypatch, metric, values):
    """Of two that are as good, the first; also in a run that goes on from it."""
    tell_at_validations(monkeypatch, metric, values)
    options = ['--epochs', 4, '--eval-metric', metric, '--checkpoint-hist', 1]
    whole = run('run', *options)
    cut(whole[0], 8, tmp_path / 'resumed')
    for folder, out, _ in (whole, run('resumed', *options, '--resume', 'auto')):
        assert [row[f'eval_{metric}'] for row in summary(folder)] == values
        assert checkpoint_names(folder) == ['step-000000008', 'step-000000016']
        line = next(line for line in out.splitlines() if line.startswith('best '))
        assert line.startswith(f'best {metric} {values[1]:.4g} after epoch 2 (`timm-lm weights ')
        assert 'step-000000008' in line
        assert equal(weights_of(folder), checkpoint(folder, 16))


# First weights


@pytest.mark.parametrize('model, classes', [('lm_resnet20', 10), ('lm_resnet20', 12), ('preact_resnet20', 12)])
def test_pretrained_weights_from_a_file(run, plain, model, classes):
    """As with timm's script, all but the head, which is made anew for any number of classes."""
    path = plain / 'weights' / 'model.safetensors'
    folder, *_ = run('run', *AT_REST, '--model', model, '--pretrained', '--pretrained-path', path, '--num-classes',
                     classes)
    found, before = parameters(weights_of(folder)), parameters(load_file(path))
    heads = [(state.pop('head.fc.weight'), state.pop('head.fc.bias')) for state in (found, before)]
    assert equal(found, before)
    assert heads[0][0].shape == (classes, 64, 1, 1) and not torch.equal(heads[0][0][:10], heads[1][0])
    assert 'epoch, starting from the weights of `model.safetensors`, ' in (folder / 'weights/README.md').read_text()
    config = (folder / 'weights' / 'config.json').read_text()
    assert f'"num_classes": {classes}' in config and str(path) not in config
    assert load_folder(folder / 'weights').num_classes == classes


@pytest.mark.parametrize('content', [b'', b'no weights', pickle.dumps(dict(state_dict=1)), b'aa: {}', b'M\1'])
@pytest.mark.parametrize('option', ['--initial-checkpoint', '--pretrained-path'])
def test_file_that_holds_no_weights_is_named(tmp_path, fails, option, content):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    more = ['--pretrained'] if option == '--pretrained-path' else []
    line = fails('train', *BASE, '--data-dir', tmp_path, option, path, *more)
    told = 'cannot be made with these options' if more else f'{path} could not be loaded'
    assert told in line


def test_network_of_a_weights_folder_without_its_weights(run, plain):
    folder, *_ = run('run', *AT_REST, '--model', plain / 'weights')
    found, first, trained = weights_of(folder), first_weights(), weights_of(plain)
    assert torch.equal(found['stem.conv.weight'], first['stem.conv.weight'])
    assert not torch.equal(found['stem.conv.weight'], trained['stem.conv.weight'])


def test_pooling_of_the_head_is_saved(run, command):
    """With the weights at the end, and with those of a checkpoint."""
    folder, *_ = run('run', *AT_REST, '--gp', 'max', '--val-split', '')
    code, made, err = command('weights', *(folder / 'checkpoints').iterdir())
    assert code == 0, err
    for weights in (folder / 'weights', Path(made.strip())):
        assert json.loads((weights / 'config.json').read_text())['model_args']['global_pool'] == 'max'
        model = load_folder(weights)
        features = model.forward_features(torch.randn(2, 1, 16, 16))
        assert torch.equal(model.forward_head(features, pre_logits=True).flatten(1), features.amax((2, 3)))


def test_head_starts_from_scale_and_bias(run):
    folder, *_ = run('run', *AT_REST, '--head-init-scale', 0.5, '--head-init-bias', -2)
    found, first = weights_of(folder), first_weights()
    assert torch.equal(found['head.fc.weight'], 0.5 * first['head.fc.weight']) and (found['head.fc.bias'] == -2).all()
    assert torch.equal(found['stem.conv.weight'], first['stem.conv.weight'])


# Optimizers


@pytest.mark.parametrize('name', ['sgd', 'momentum', 'adamw'])
def test_fused_where_there_is_a_kernel(name):
    args = parse_options([*BASE, '--opt', name])
    optimizer = create_optimizer(args, create_model(args))
    assert all(group['fused'] for group in optimizer.param_groups)


@pytest.mark.parametrize('name', ['lion', 'lamb'])
def test_optimizers_without_a_fused_kernel_train(run, name):
    folder, *_ = run('run', '--opt', name, '--lr', 0.01, '--epochs', 3)
    losses = [row['train_loss'] for row in summary(folder)]
    assert losses[2] < losses[0]
    assert not torch.equal(weights_of(folder)['stem.conv.weight'], first_weights()['stem.conv.weight'])


@pytest.mark.parametrize('name', ['momentum', 'adamw', 'lamb', 'lookahead_momentum'])
def test_resumed_states_have_the_layout_of_their_weights(run, tmp_path, monkeypatch, name):
    """Fused kernels read both in the order of memory, which is channels_last here; lamb has no such kernel, and counts
    its steps by group."""
    options = ['--opt', name, '--lr', 0.01, '--epochs', 2]
    folder, *_ = run('whole', *options)
    resumed = cut(folder, 4, tmp_path / 'resumed')
    found = []
    resume = Training.resume

    def spy(training, checkpoint):
        progress = resume(training, checkpoint)
        optimizer = training.plain_optimizer
        found.extend(getattr(optimizer, '_base_optimizer', optimizer).state.items())
        return progress

    monkeypatch.setattr(Training, 'resume', spy)
    run('resumed', *options, '--resume', 'auto')
    assert any(not p.is_contiguous() for p, _ in found)
    for p, values in found:
        moments = [value for value in values.values() if isinstance(value, torch.Tensor) and value.shape == p.shape]
        assert len(moments) >= (1 if name == 'momentum' else 2)
        assert all(moment.stride() == p.stride() for moment in moments)
    assert equal(weights_of(resumed), weights_of(folder))


@pytest.mark.parametrize('options, message', [
    (['--opt', 'kron'], '--opt kron is refused: its state cannot be saved'),
    (['--opt', 'adahessian'], '--opt adahessian is refused: it needs second derivatives'),
    (['--sched', 'plateau', '--val-split', ''], '--sched plateau lowers the rate based on validation'),
    (['--amp', '--amp-dtype', 'float16', '--device', 'cpu'], '--amp in float16 is for GPUs'),
    (['--sched', 'Cosine'], 'The schedule Cosine cannot be made with these options'),
    (['--opt', 'sgdd'], 'The optimizer sgdd cannot be made with these options'),
    (['--opt-kwargs', 'lr=0.5', 'weight_decay=1'], '--opt-kwargs cannot set lr, weight_decay; use'),
    (['--cutmix-minmax', '0.1', '0.12'], '--cutmix-minmax 0.1 0.12 spans less than a pixel of 16'),
    (['--cutmix-minmax', '0.3', '0.32', '--input-size', '1', '32', '40'], 'spans less than a pixel of 40'),
    (['--crop-pct', '87.5', '--input-size', '1', '224', '224'],
     '--crop-pct is a share of the side, such as 0.875, not 87.5'),
    (['--device', 'cuda:7'], '--device cuda:7 is not what Accelerate chose'),
    (['--device', 'gpu'], '--device gpu is not a PyTorch device'),
    (['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1', '--input-size', '1', '32', '32'],
     'vit_tiny_patch16_224 does not take images of 1x32x32 (Input height (32) doesn'),
    (['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'num_heads=0'], 'made with these options (integer'),
    (['--model', 'convnext_atto', '--model-kwargs', 'depths=(2,2)'], 'made with these options (tuple index'),
    (['--class-map', 'map.txt'], '--class-map numbers the classes of folders of images; the Parquet files in'),
    (['--aug-repeats', '2'], '--aug-repeats repeats images over processes, but there is only one'),
    (['--resume', 'a/run/checkpoints/step-1', '--experiment', 'other'], 'in the folder of the checkpoint, a/run, not'),
])
def test_what_can_not_be_done_is_refused(few_digits, tmp_path, fails, options, message):
    assert message in fails('train', *BASE, '--data-dir', few_digits, '--output', tmp_path / 'runs', *options)
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('options, message', [
    (['--clip-grad', '1', '--clip-mode', 'agc'], '--clip-mode agc cannot clip sharded weights'),
    (['--opt', 'lookahead_sgd'], '--opt lookahead_sgd cannot look ahead with sharded weights'),
    (['--model-ema'], '--model-ema cannot average sharded weights'),
])
def test_what_sharded_weights_do_not_allow_is_refused(options, message):
    args = parse_options([*BASE, *options])
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, device=torch.device('cpu'))
    with pytest.raises(UserError, match=message):
        Training(args, accelerator, create_model(args), range(4), {}, None, None)


def test_shared_batch_statistics_on_the_cpu_are_refused():
    args = parse_options([*BASE, '--sync-bn'])
    model = create_model(args)
    processes = SimpleNamespace(
        num_processes=2, device=torch.device('cpu'), distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(UserError, match='--sync-bn needs GPUs'):
        prepare_network(args, model, processes)
    processes.num_processes = 1
    assert prepare_network(args, model, processes) is model


def test_shared_batch_statistics_on_gpus():
    args = parse_options([*BASE, '--sync-bn'])
    shared = prepare_network(args, create_model(args), SimpleNamespace(
        num_processes=2, device=torch.device('cuda'), distributed_type=DistributedType.MULTI_GPU))
    norms = [module for module in shared.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)


def test_checkpoints_inside_an_epoch_come_at_updates(run):
    """Every 3 updates, each of 2 batches of 8; and at the end."""
    folder, *_ = run('run', '--batch-size', 32, '--epochs', 1, '--grad-accum-steps', 2, '--recovery-interval', 3)
    assert checkpoint_names(folder) == ['step-000000003', 'step-000000004']
    assert [state(folder, updates)['progress']['batch'] for updates in (3, 4)] == [6, 0]


def test_cuda_graphs_free_their_outputs_before_each_update_and_validation_batch(run, monkeypatch):
    """Not between the batches of an update, whose gradients are such outputs."""
    calls = []
    init, update = Training.__init__, Training._update

    def with_graphs(training, *args):
        init(training, *args)
        training.uses_cuda_graphs = True

    monkeypatch.setattr(Training, '__init__', with_graphs)
    monkeypatch.setattr(Training, '_update', lambda *args: (calls.append('update'), update(*args)))
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: calls.append('free'))
    run('run', '--batch-size', 32, '--epochs', 1, '--grad-accum-steps', 3, '--validation-batch-size', 16)
    assert calls == ['free', 'update'] * 3 + ['free'] * 4  # 8 batches to train on, 4 to validate on


class Unread(TorchFunctionMode):
    """Fails where a value is read from a tensor, or the size of a result depends on values."""

    READING = {'item', 'tolist', 'numpy', 'cpu', 'nonzero', 'masked_select', 'unique', 'equal', 'allclose',
               '__bool__', '__int__', '__float__', '__index__'}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        index = args[1] if name in ('__getitem__', '__setitem__') else ()
        parts = index if isinstance(index, tuple) else (index,)
        by_mask = any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)
        if name in self.READING or by_mask:
            pytest.fail(f'{name} reads from the device')
        return function(*args, **kwargs or {})


def test_a_batch_and_a_step_do_not_wait_for_the_device(run, monkeypatch):
    """No value is read from it, as a GPU would stand still meanwhile."""
    step, batches, made = Training.step, MemoryLoader.batches, []

    def step_without_reading(*args):
        with Unread():
            step(*args)

    def batches_without_reading(*args):
        found = batches(*args)
        while True:
            with Unread():
                batch = next(found, None)
            if batch is None:
                return
            made.append(batch)
            yield batch

    monkeypatch.setattr(Training, 'step', step_without_reading)
    monkeypatch.setattr(MemoryLoader, 'batches', batches_without_reading)
    run('run', '--epochs', 1, '--model-ema', '--grad-accum-steps', 2, '--hflip', 0.5, '--vflip', 0.5, '--reprob', 0.5,
        '--mixup', 0.2, '--cutmix', 1, '--mixup-mode', 'elem', '--pad-crop', 2)
    assert [targets.shape for _, targets in made[:4]] == [(64, 10)] * 4  # mixed


@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_clipped_gradients(run, mode):
    """By the one update of a run, whose rate is 1; adaptive clipping leaves the head out."""
    folder, *_ = run('run', '--epochs', 1, '--batch-size', 256, '--opt', 'momentum', '--lr', 1, '--weight-decay', 0,
                     '--clip-grad', 1e-3, '--clip-mode', mode)
    first = first_weights()
    moved = {name: tensor - first[name] for name, tensor in parameters(weights_of(folder)).items()}
    norm = torch.cat([d.flatten() for d in moved.values()]).norm().item()
    if mode == 'norm':
        assert norm == pytest.approx(1e-3, rel=0.02)
    elif mode == 'value':
        assert max(d.abs().max().item() for d in moved.values()) == pytest.approx(1e-3, rel=0.02) and norm > 2e-3
    else:
        shares = {name: (unitwise_norm(d) / unitwise_norm(first[name]).clamp_(min=1e-3)).max().item()
                  for name, d in moved.items()}
        assert min(shares.pop(f'head.fc.{name}') for name in ('weight', 'bias')) > 2e-3
        assert max(shares.values()) == pytest.approx(1e-3, rel=0.02)


def test_layer_decay_slows_the_lower_layers(run):
    folder, *_ = run('run', *BY_EPOCH, '--layer-decay', 0.5, '--sched', 'step',
                     '--decay-epochs', 0.5, '--decay-rate', 1, '--epochs', 1)
    groups = state(folder, 4)['optimizer']['param_groups']
    assert {group['lr'] for group in groups} == {0.1 * 0.5 ** i for i in range(5)}  # stem, three blocks, head
    assert rates(folder) == [pytest.approx(sum(group['lr'] for group in groups) / len(groups))]  # as timm's summary
    assert all(group['lr'] == pytest.approx(0.1 * group['lr_scale']) for group in groups)


@pytest.mark.parametrize('recipe, options, k', [
    ('resnext_c100', ['--model-kwargs', 'layers=(2,1)', 'channels=(64,128)', 'cardinality=2'],
     ['stages.0.blocks.1', 'stages.1.blocks.0']),  # it projects the history where the shape changes
    ('paper_in1k', ['--model', 'lm_resnet18', '--input-size', 3, 48, 48, '--workers', 1, '--model-kwargs',
                    'layers=(1,2)', 'channels=(16,32)'], ['stages.1.blocks.1']),
])
def test_recipes_of_other_networks_train(run, recipe, options, k):
    """Grouped bottlenecks, and crops by workers: shortly, on small networks and few digits."""
    folder, out, _ = run('run', '-c', recipe, '--dataset', '', '--input-key', 'image', '--target-key', 'label',
                         '--val-split', 'test', '--sched', 'cosine', '--epochs', 1, '--batch-size', 64,
                         '--no-torchcompile', *options)
    assert list(metrics(folder)[-1]['k']) == k
    assert ('in 1 worker processes' in out) == (recipe == 'paper_in1k')


def test_recipe_for_a_new_head_trains_the_head_alone(run):
    folder, *_ = run('run', '-c', 'finetune_head', '--model', 'lm_resnet20.best_c10', '--input-key', 'image',
                     '--target-key', 'label', '--train-split', 'train[:64]', '--val-split', 'test[:16]', '--epochs', 1,
                     '--batch-size', 32, '--no-torchcompile', '--model-kwargs', 'layers=(3,3,3)')
    before = timm.create_model('lm_resnet20.best_c10', pretrained=True)
    moved = {name for name, parameter in parameters(weights_of(folder)).items()
             if not torch.equal(parameter, before.get_parameter(name))}
    assert moved == {'head.fc.weight', 'head.fc.bias'}


def test_gradient_checkpointing_trains_alike(run, monkeypatch):
    recompute = Mock(side_effect=timm.models.checkpoint)
    monkeypatch.setattr('timm_lm.models.lm_resnet.checkpoint', recompute)
    options = [*TWO_STEP, '--epochs', 2]
    folder, *_ = run('plain', *options)
    assert not recompute.called
    saving, *_ = run('saving', *options, '--grad-checkpointing')
    assert recompute.called
    found, expected = parameters(weights_of(saving)), parameters(weights_of(folder))
    assert equal(found, expected) and 'stages.0.blocks.1.step.k' in found
    assert [row['train_loss'] for row in summary(saving)] == [row['train_loss'] for row in summary(folder)]


# What is shown


def test_dry_run_shows_the_plan_and_makes_nothing(few_digits, tmp_path, command):
    code, out, err = command(
        'train', *BASE, *BY_EPOCH, '--data-dir', few_digits, '--output', tmp_path / 'output', '--dry-run', '--sched',
        'multistep', '--decay-milestones', 6, '--epochs', 12, '--grad-accum-steps', 2)
    assert code == 0, err
    assert not (tmp_path / 'output').exists()
    lines = dict(re.match(r'(\S+(?: folder)?)\s+(.*)', line).groups() for line in out.splitlines()[:6])
    assert lines['network'].startswith('lm_resnet20: 77,658 parameters, 10 classes, images 1x16x16, ')
    assert lines['network'].endswith(', new weights')
    assert lines['data'] == '256 images to train on (in memory), 64 to validate on'
    assert lines['batches'] == '64 images x 2 accumulated, 2 updates an epoch'
    assert lines['device'] == 'cpu, float32, eager'
    assert str(tmp_path / 'output') in lines['run folder']
    assert lines['schedule'] == 'sgd, weight decay 0.0005; multistep, rate 0.1; 12 epochs, 24 updates'
    top, *_, bottom, axis, epochs = out.splitlines()[6:]
    # 72 columns for 12 epochs; in timm's multistep the rate of a milestone begins one epoch early
    assert re.fullmatch(r' +0\.1 \|█{30}', top) and re.fullmatch(r' +0 \|█{30}[▁▂▃▄▅▆▇]{42}', bottom)
    assert axis.strip() == '+' + '-' * 72 and epochs.split() == ['1', 'epoch', '12']


LIVE = r'loss ([\d.]+), error ([\d.]+) %, (?:\d+:)?\d\d:\d\d left, [\d,]+ images/s, lr ([\d.e+-]+)'


def test_lines_at_the_log_interval_and_tables(run):
    folder, out, _ = run('run', '--epochs', 3, '--log-interval', 2, '--val-interval', 2)
    found = [match.groups() for match in re.finditer(rf'^epoch (\d)/3 step (\d)/4: {LIVE}$', out, re.M)]
    assert [(epoch, step) for epoch, step, *_ in found] == [(e, s) for e in '123' for s in '24']
    rows = summary(folder)
    for (_, _, loss, error, lr), row in zip(found[1::2], rows, strict=True):  # at the end of an epoch
        assert loss == f"{row['train_loss']:.3f}" and error == f"{100 - row['train_top1']:.2f}"
        assert lr == f"{row['lr']:.2e}"

    blocks = re.split(r'^(?=epoch \d/3 +loss)', out, flags=re.M)[1:]
    for epoch, (block, row) in enumerate(zip(blocks, rows, strict=True), 1):
        header, train, *more = block.splitlines()
        assert header.split() == ['epoch', f'{epoch}/3', 'loss', 'error', '%', 'top-5', '%', 'images/s', 'lr']
        name, loss, error, _, lr = train.split()
        assert (name, loss, error, lr) == (
            'train', f"{row['train_loss']:.4f}", f"{100 - row['train_top1']:.2f}", f"{row['lr']:.2e}")
        assert ('eval_loss' in row) == (epoch > 1)
        if epoch > 1:
            name, loss, error, top5, _ = more[0].split()
            assert (name, loss, error, top5) == (
                'eval', f"{row['eval_loss']:.4f}", f"{100 - row['eval_top1']:.2f}", f"{100 - row['eval_top5']:.2f}")
        assert any(line.startswith('  eval') for line in more) == (epoch > 1)


def test_rate_and_time_left(run, plain, tmp_path, monkeypatch):
    """By a clock that only steps of 64 images and validations move, by half a second and three seconds."""
    now, shown = 0., []
    step, evaluate = Training.step, loop.evaluate

    def half_a_second(*args):
        nonlocal now
        now += 0.5
        step(*args)

    def three_seconds(*args, **more):
        nonlocal now
        now += 3
        return evaluate(*args, **more)

    monkeypatch.setattr(loop, 'time', SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Training, 'step', half_a_second)
    monkeypatch.setattr(loop, 'evaluate', three_seconds)
    monkeypatch.setattr(LiveLine, 'show', lambda live, *values: shown.append(values))

    folder, *_ = run('run', '--epochs', 5, '--log-interval', 2, '--val-interval', 2)
    assert [row['train']['images_per_second'] for row in metrics(folder)] == [128] * 5
    assert [(epoch, step) for epoch, step, *_ in shown] == [(epoch, step) for epoch in range(5) for step in (2, 4)]
    *_, images_per_second, left = zip(*shown)
    assert set(images_per_second) == {128}
    # of the validations, after epochs 2, 4 and 5, what they take is known from the first one on
    assert left == (9, 8, 7, 6, 5 + 6, 4 + 6, 3 + 6, 2 + 6, 1 + 3, 3)

    shown.clear()
    resumed = cut(plain, 2, tmp_path / 'resumed')  # in the middle of an epoch
    run('resumed', '--epochs', 2, '--log-interval', 1, '--resume', 'auto')
    assert [row['train']['images_per_second'] for row in metrics(resumed)] == [128] * 2
    assert [values[:2] + values[-2:] for values in shown] == [
        (0, 3, 128, 2.5), (0, 4, 128, 2), *((1, step, 128, (4 - step) / 2 + 3) for step in (1, 2, 3, 4))]
    for epoch, step, loss, error, *_ in shown:  # of the epoch so far
        total, right = state(plain, 4 * epoch + step)['sums']
        assert (loss, error) == pytest.approx((total / step, 100 - 100 * right / (64 * step)))


def test_one_line_on_a_terminal(run, monkeypatch):
    import fcntl
    import termios
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, b'\x20\x00\x78\x00' + bytes(4))  # 32 rows of 120 columns
    shown = []

    def read():
        try:
            while data := os.read(controller, 4096):
                shown.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(terminal, 'w') as stderr:
        monkeypatch.setattr(sys, 'stderr', stderr)
        _, out, _ = run('run', '--epochs', 2, '--log-interval', 2)
        monkeypatch.undo()
    reader.join()
    os.close(controller)
    text = b''.join(shown).decode()
    assert '\n' not in text and text.count('\r') >= 4
    for epoch in (1, 2):
        assert re.search(rf'epoch {epoch}/2 4/4[^\r]*{LIVE}', text)
    assert 'step' not in out.split('run folder')[1].split('best')[0]
    assert text.rpartition('\r')[0].endswith(' ') and not text.rpartition('\r')[2].strip()  # wiped at the end


# Trackers


def test_tensorboard_reads_what_the_summary_tells(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder, *_ = run('run', '--epochs', 2, '--log-tensorboard')
    events = [path.parent for path in folder.rglob('events.out.tfevents.*')]
    read = {}
    for path in events:
        accumulator = EventAccumulator(str(path)).Reload()
        for tag in accumulator.Tags()['scalars']:
            read[tag] = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    rows = summary(folder)
    for tag, column in (('eval/top1', 'eval_top1'), ('eval/loss', 'eval_loss'), ('train/loss', 'train_loss'),
                        ('train/top1', 'train_top1'), ('lr', 'lr')):
        steps, values = zip(*read[tag])
        assert steps == (0, 1) and values == pytest.approx([row[column] for row in rows], rel=1e-6)


def test_wandb_keeps_an_offline_run(run, tmp_path, monkeypatch):
    import wandb
    for name, value in (('MODE', 'offline'), ('DIR', str(tmp_path)), ('SILENT', 'true'), ('CACHE_DIR', str(tmp_path)),
                        ('CONFIG_DIR', str(tmp_path)), ('DATA_DIR', str(tmp_path))):
        monkeypatch.setenv(f'WANDB_{name}', value)
    asked = []
    init = wandb.init

    def noted(**kwargs):
        asked.append(kwargs)
        return init(**kwargs)

    monkeypatch.setattr(wandb, 'init', noted)
    folder, *_ = run('run', '--epochs', 2, '--log-wandb', '--wandb-project', 'digits', '--wandb-tags', 'short', 'small',
                     '--wandb-resume-id', 'earlier', '--resume', 'auto')
    wandb.teardown()  # its process writes the rest
    (kwargs,) = asked
    assert (kwargs['project'], kwargs['tags'], kwargs['dir']) == ('digits', ['short', 'small'], str(folder))
    assert kwargs['name'] == folder.name == 'run' and (kwargs['id'], kwargs['resume']) == ('earlier', 'must')
    (file,) = folder.glob('wandb/offline-run-*/run-*.wandb')
    content = file.read_bytes()
    assert all(word in content for word in (b'eval_top1', b'train_loss', b'epoch', b'digits'))


def test_wandb_without_a_key_is_told_and_the_run_can_go_on(few_digits, tmp_path, fails, command, monkeypatch):
    for name in ('API_KEY', 'MODE'):
        monkeypatch.delenv(f'WANDB_{name}', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('NETRC', str(tmp_path / 'none'))
    argv = 'train', *BASE, '--data-dir', few_digits, '--output', tmp_path / 'output', '--experiment', 'run'
    line = fails(*argv, '--log-wandb')
    assert 'Weights & Biases could not start (No API key' in line and 'WANDB_MODE=offline' in line
    code, _, err = command(*argv, '--resume', 'auto')
    assert code == 0, err


@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_a_tracker_that_is_not_installed_is_named(few_digits, tmp_path, fails, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as Python itself marks what cannot be imported
    line = fails('train', *BASE, '--data-dir', few_digits, '--output', tmp_path / 'output', f'--log-{name}')
    assert f"--log-{name} needs the package {name}; run `pip install 'timm-lm[trackers]'`." in line
    assert not (tmp_path / 'output').exists()
