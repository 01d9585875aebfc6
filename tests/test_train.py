"""Training: from a recipe to a run folder, with real images, through the command line."""
import copy
import csv
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from timm_lm import cli
from timm_lm.data import load_images
from timm_lm.decoded import DecodedImages
from timm_lm.loader import MemoryLoader, normalize
from timm_lm.training.accelerator import create_accelerator
from timm_lm.training.batches import resolve_input_config
from timm_lm.training.evaluate import evaluate
from timm_lm.training.network import create_model
from timm_lm.training.options import parse_options
from timm_lm.training.places import command_line
from timm_lm.training.result import record_trained_on, run_facts
from timm_lm.training.train import train
from timm_lm.weights_folder import load_folder, verify_folder

SMALL = ['--model-kwargs', 'layers=(2,2,2)', '--epochs', '2', '--warmup-epochs', '0']


def test_run_folder_tells_the_run(run_folder):
    with open(run_folder / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert {'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'} <= set(rows[0])
    metrics = [json.loads(line) for line in (run_folder / 'metrics.jsonl').read_text().splitlines()]
    assert list(metrics[1]['k']) == ['stages.0.blocks.1', 'stages.1.blocks.1', 'stages.2.blocks.1']
    assert metrics[0]['k'] != metrics[1]['k']
    assert yaml.safe_load((run_folder / 'args.yaml').read_text())['model_kwargs'] == {'layers': [2, 2, 2]}
    seen = metrics[-1]['eval']
    assert json.loads((run_folder / 'result.json').read_text())['seen_in_training'] == seen
    card = (run_folder / 'weights' / 'README.md').read_text()
    assert f"during the training, in its own precision, it was {100 - seen['top1']:.2f} %." in card
    from PIL import Image
    for name in ('curves.png', 'k.png'):
        assert Image.open(run_folder / name).size[0] > 500


def test_saved_k_is_the_last_one_of_the_run(run_folder):
    last = json.loads((run_folder / 'metrics.jsonl').read_text().splitlines()[-1])['k']
    state = load_file(run_folder / 'weights' / 'model.safetensors')
    for name, value in last.items():
        assert state[f'{name}.step.k'].tolist() == value
    assert json.loads((run_folder / 'result.json').read_text())['k'] == [value for (value,) in last.values()]


def test_training_learns_the_digits(digits, tmp_path, command):
    """Few epochs of 1,438 digits; chance is 90 % error, the demonstration's twelve reach about 1 %."""
    code, out, err = command('train', '-c', 'demo_digits', '--data-dir', digits, '--model-kwargs', 'layers=(2,1,1)',
                             '--epochs', '5', '--output', tmp_path, '--experiment', 'run')
    assert code == 0, err
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['top1'] > 80
    weights, error = tmp_path / 'run' / 'weights', f"{100 * result['errors'] / 359:.2f} %"
    assert f"\n{weights}: error {error} ({result['errors']} of 359 images, float32, eager, on the CPU)\n" in out
    code, out, err = command('validate', weights, '--data-dir', digits)
    assert code == 0, err
    assert out.startswith(f"{weights}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss "
                          f"{result['loss']:.4f}, {result['errors']} errors of 359 images ({error}), ")
    assert out.endswith(' images/s\n')
    # what timm gives back makes the same errors
    model = timm.create_model(f'local-dir:{weights}', pretrained=True).eval()
    data = load_images('test', digits, input_size=(1, 16, 16))
    with torch.inference_mode():
        logits = model(normalize(data.images, [0.3053 * 255], [0.3760 * 255]))
    right = logits.argsort(1, descending=True) == data.labels[:, None]
    assert (~right[:, 0]).sum().item() == result['errors']
    assert 100 * right[:, :5].sum().item() / 359 == pytest.approx(result['top5'])
    assert torch.nn.functional.cross_entropy(logits, data.labels).item() == pytest.approx(result['loss'], rel=1e-4)


def test_options_of_the_caller_stay(few_digits, tmp_path):
    """A notebook may change some of them, and train again."""
    args = parse_options(['-c', 'demo_digits', '--data-dir', str(few_digits), *SMALL, '--output', str(tmp_path)])
    args.lr, args.lr_base, args.dry_run = None, 0.1, True
    before = copy.deepcopy(vars(args))
    train(args)
    assert vars(args) == before


def test_network_with_shared_weights(few_digits, tmp_path, command):
    """As timm's CoaT has them; safetensors takes no two names for one memory."""
    code, _, err = command('train', '--model', 'coat_lite_tiny', '--data-dir', few_digits, '--num-classes', '10',
                           '--input-size', '3', '32', '32', '--model-kwargs', 'img_size=32', '--no-aug', '--epochs',
                           '1', '--warmup-epochs', '0', '--train-split', 'train[:128]', '--val-split', 'test',
                           '--output', tmp_path, '--experiment', 'run')
    assert code == 0, err
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    code, out, err = command('validate', tmp_path / 'run' / 'weights', '--data-dir', few_digits)
    assert code == 0 and f"{result['errors']} errors of 64 images" in out, err
    verify_folder(tmp_path / 'run' / 'weights')
    (checkpoint,) = (tmp_path / 'run' / 'checkpoints').iterdir()
    code, out, err = command('weights', checkpoint, '--output', tmp_path / 'again')
    assert code == 0, err
    state = load_file(tmp_path / 'run' / 'weights' / 'model.safetensors')
    again = load_file(tmp_path / 'again' / 'model.safetensors')
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_counts_of_few_classes_and_of_a_batch_that_is_filled_up():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    labels = torch.tensor([0, 1, 2, 0, 1])
    logits = torch.tensor([[2., 0., 1.], [0., 0., 3.], [1., 2., 3.], [5., 0., 0.], [0., 1., 0.]])
    loader = MemoryLoader(DecodedImages(images, labels), 4, [0.], [1.])
    result = evaluate(lambda batch: logits[(batch.flatten() * 255).round().long()], loader)
    assert (result['errors'], result['images'], result['top1'], result['top5']) == (1, 5, 80, 100)
    assert result['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_another_seed_gives_other_weights(few_digits, tmp_path, command):
    states = []
    for name, seed in (('a', 1), ('b', 2)):
        code, _, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, *SMALL[:2], '--epochs', 1,
                               '--warmup-epochs', 0, '--seed', seed, '--output', tmp_path, '--experiment', name,
                               '--no-amp')
        assert code == 0, err
        states.append(load_file(tmp_path / name / 'weights' / 'model.safetensors'))
    assert not torch.equal(*(state['stem.conv.weight'] for state in states))


@pytest.mark.parametrize('average', [False, True])
def test_weights_of_checkpoints(average, few_digits, tmp_path, command, fails, monkeypatch):
    (tmp_path / 'mine.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = command(
        'train', '-c', 'demo_digits', '--data-dir', few_digits, *SMALL, '--recovery-interval', 1, '--output', tmp_path,
        '--experiment', 'run', '--batch-size', 128, '--device-modules', 'mine',
        *(['--model-ema', '--model-ema-decay', 0.5] if average else []))
    assert code == 0, err
    del sys.modules['mine']  # as in another process
    run = tmp_path / 'run'
    best = re.search('`timm-lm (weights .*/step-[0-9]+)`', out)[1].split()
    steps = sorted((run / 'checkpoints').glob('step-*'))
    assert len(steps) == 4 and Path(best[1]) in steps
    made = {}
    for step in steps:
        code, out, err = command('weights', step)
        folder = run / f'weights-{step.name}'
        assert (code, out) == (0, f'{folder}\n'), err
        assert sys.modules.pop('mine')
        verify_folder(folder)
        assert (folder / 'config.json').read_bytes() == (run / 'weights' / 'config.json').read_bytes()
        made[step.name[-1]] = load_file(folder / 'model.safetensors')
    last = load_file(run / 'weights' / 'model.safetensors')
    assert made['4'].keys() == last.keys() and all(torch.equal(made['4'][name], last[name]) for name in last)
    assert len({tensors['stem.conv.weight'].sum().item() for tensors in made.values()}) == 4
    cards = [(run / f'weights-{step.name}' / 'README.md').read_text() for step in steps]
    for card, epochs in zip(cards, ('0.5 epochs of 2', '1 epoch of 2', '1.5 epochs of 2', '2 epochs of 2')):
        assert f'\n{epochs}, seed 42, ' in card and 'top-1 error' not in card
    told = json.loads((run / 'result.json').read_text())
    assert f"minutes in {told['precision']} on {told['hardware']}; {told['versions']}." in cards[0]
    assert told['command'] in cards[0]
    assert 'already exists' in fails('weights', steps[0])
    monkeypatch.chdir(run / 'checkpoints')
    shutil.rmtree(run / f'weights-{steps[1].name}')
    code, out, err = command('weights', steps[1].name)
    assert code == 0 and (run / f'weights-{steps[1].name}' / 'README.md').read_text() == cards[1], err
    (steps[0] / 'state.safetensors').write_bytes(b'')
    assert 'is damaged' in fails('weights', steps[0], '--output', tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_weights_of_a_checkpoint_whose_start_is_gone(weights, few_digits, tmp_path, command):
    start = shutil.copytree(weights, tmp_path / 'start')
    code, _, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, '--model', start, '--pretrained',
                           '--num-classes', 12, '--epochs', 1, '--warmup-epochs', 0, '--val-split', '', '--output',
                           tmp_path, '--experiment', 'run')
    assert code == 0, err
    shutil.rmtree(start)
    step = max((tmp_path / 'run' / 'checkpoints').glob('step-*'))
    code, _, err = command('weights', step, '--output', tmp_path / 'made')
    assert code == 0, err
    for name in ('model.safetensors', 'config.json'):
        assert (tmp_path / 'made' / name).read_bytes() == (tmp_path / 'run' / 'weights' / name).read_bytes()


def test_licence_of_the_weights_that_were_fine_tuned(weights, few_digits, tmp_path, command):
    """Their card and config tell that of the weights they started from; new weights have the package's."""
    start = shutil.copytree(weights, tmp_path / 'start')
    config = json.loads((start / 'config.json').read_text())
    assert config['pretrained_cfg']['license'] == 'apache-2.0'
    for licence, told in (('cc-by-nc-4.0', 'cc-by-nc-4.0'), (None, 'unknown')):
        config['pretrained_cfg']['license'] = licence
        (start / 'config.json').write_text(json.dumps(config))
        small = ['--model', 'lm_resnet20', '--model-kwargs', 'layers=(2,2,2)']
        for start_from, expected in (
                (['--model', start, '--pretrained'], told),
                (['--model', start], 'apache-2.0'),
                ([*small, '--grow-from', start], told),
                ([*small, '--initial-checkpoint', start / 'model.safetensors'], 'unknown')):
            args = parse_options(['-c', 'demo_digits', *map(str, start_from)])
            model = create_model(args)
            record_trained_on(args, model, resolve_input_config(args, model), None)
            assert (model.pretrained_cfg.get('license') or 'unknown') == expected
        code, _, err = command(
            'train', '-c', 'demo_digits', '--data-dir', few_digits, '--train-split', 'train[:64]', '--model', start,
            '--pretrained', '--epochs', 1, '--val-split', '', '--warmup-epochs', 0, '--output', tmp_path,
            '--experiment', told)
        assert code == 0, err
        made = tmp_path / told / 'weights'
        assert f'\nlicense: {told}\n' in (made / 'README.md').read_text()
        written = json.loads((made / 'config.json').read_text())['pretrained_cfg']
        assert written.get('license', 'unknown') == told


def test_gradient_accumulation_is_one_large_batch(few_digits, tmp_path, command):
    """Without batch statistics, two batches of 32 make the update of one batch of 64; so do all that there are."""
    states = []
    for name, batch, steps in (('one', 64, 1), ('two', 32, 2), ('whole', 256, 1), ('short', 32, 9)):
        code, _, err = command(
            'train', '-c', 'demo_digits', '--data-dir', few_digits, '--model-kwargs', 'layers=(1,1,1)',
            'norm_layer=groupnorm1', '--epochs', 1, '--warmup-epochs', 0, '--lr', 0.01, '--no-amp', '--no-aug',
            '--batch-size', batch, '--grad-accum-steps', steps, '--output', tmp_path, '--experiment', name)
        assert code == 0, err
        states.append(load_file(tmp_path / name / 'weights' / 'model.safetensors'))
    for one, other in (states[:2], states[2:]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_told_of_training_is_what_the_network_does(few_digits, tmp_path, command):
    """Of one that does not move, on images as they are."""
    code, _, err = command(
        'train', '-c', 'demo_digits', '--data-dir', few_digits, '--model-kwargs', 'layers=(1,1,1)',
        'norm_layer=groupnorm1', '--epochs', 1, '--warmup-epochs', 0, '--lr', 1e-30, '--weight-decay', 0, '--no-amp',
        '--no-aug', '--grad-accum-steps', 3, '--output', tmp_path, '--experiment', 'run')
    assert code == 0, err
    told = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text())['train']
    data = load_images('train', few_digits, input_size=(1, 16, 16))
    counted = evaluate(load_folder(tmp_path / 'run' / 'weights'), MemoryLoader(data, 64, [0.3053], [0.3760]))
    assert told['top1'] == pytest.approx(counted['top1']) and 0 < told['top1'] < 50
    assert told['loss'] == pytest.approx(counted['loss'], rel=1e-4)


def test_training_starts_from_an_initial_checkpoint(weights, few_digits, tmp_path, command):
    code, _, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, '--model', 'lm_resnet20',
                           '--model-kwargs', 'layers=(2,2,2)', '--initial-checkpoint', weights / 'model.safetensors',
                           '--epochs', '1', '--warmup-epochs', '0', '--lr', '1e-9', '--weight-decay', '0',
                           '--output', tmp_path, '--experiment', 'run')
    assert code == 0, err
    before = load_file(weights / 'model.safetensors')
    after = load_file(tmp_path / 'run' / 'weights' / 'model.safetensors')
    torch.testing.assert_close(after['stem.conv.weight'], before['stem.conv.weight'], rtol=1e-4, atol=1e-6)
    card = (tmp_path / 'run' / 'weights' / 'README.md').read_text()
    assert '1 epoch, starting from the weights of `model.safetensors`, seed 42, ' in card


def test_start_from_a_network_without_a_tag_is_told_with_the_default_one():
    args = parse_options(['-c', 'demo_digits', '--model', 'lm_resnet20', '--pretrained'])
    facts = run_facts(args, create_model(args), '', torch.device('cpu'), 1, {})
    assert facts['start'] == 'starting from the weights of `lm_resnet20.distill_c10`'


# Bad input


def copy_without(folder, target, name):
    shutil.copytree(folder, target)
    for path in target.glob(f'{name}*'):
        path.unlink()
    return target


def test_bad_data_is_named_and_nothing_is_written(few_digits, tmp_path, fails):
    (tmp_path / 'empty').mkdir()
    cases = {
        tmp_path / 'missing': 'does not exist',
        tmp_path / 'empty': 'has no Parquet files',
        copy_without(few_digits, tmp_path / 'no_test', 'test'): "has no split 'test'",
        copy_without(few_digits, tmp_path / 'no_train', 'train'): "has no split 'train'",
    }
    output = tmp_path / 'output'
    for folder, message in cases.items():
        line = fails('train', '-c', 'demo_digits', '--data-dir', folder, '--output', output)
        assert message in line and str(folder) in line
    for option, message in (
            (['--num-classes', '5'], 'labels up to 9, but the network has 5 classes'),
            (['--opt', 'sdg'], 'The optimizer sdg'),
            (['--sched', 'cosin'], 'cosin'),
            (['--torchcompile', 'nope'], "no backend 'nope'"),
            (['--torchcompile', 'ts'], "no backend 'ts'"),  # torch has it, Accelerate does not
            (['--torchcompile', '--torchcompile-mode', 'nope'], "no mode 'nope' of torch.compile; there are: "),
            (['--model', 'dla46_c', '--input-size', '1', '32', '32', '--grad-checkpointing'],
             'dla46_c cannot recompute in its backward pass'),
            (['--mixup', '0.2', '--mixup-off-epoch', '13'], '--mixup-off-epoch 13 is never reached: the run has 12 '),
            (['--two-step-epoch', '12'], '--two-step-epoch 12 is never reached: the run has 12 '),
            (['--interpolation', 'nope', '--train-interpolation', 'nope'], "no interpolation 'nope'"),
            (['--gp', 'nope'], 'cannot be made with these options'),
            (['--seed', '-1'], '--seed must not be negative'),
            (['--drop-path', '2'], '--drop-path must be'),
            (['--device', 'nope'], '--device nope is not a PyTorch device'),
            (['--device-modules', 'no_such_module'], "'no_such_module' cannot be imported"),
            (['--device-modules', ''], "'' cannot be imported"),
            (['--device-modules', '.mine'], "'.mine' cannot be imported"),
            (['--opt', 'momentum', '--opt-kwargs', 'fused=True', 'foreach=True'], 'The optimizer momentum cannot be'),
            (['--batch-size', '300'], 'less than one batch of 300'),
            (['--model', 'lm_resnet21'], "no model 'lm_resnet21'"),
            (['--model', 'lm_resnet20.nope'], "no tag 'nope'"),
            (['--model-kwargs', 'depth=3'], 'cannot be made with these options'),
            (['--mean', '0.1', '0.2'], '--mean and --std need one value, or one for each of the 1 channels'),
            (['--initial-checkpoint', str(tmp_path / 'no.safetensors')], 'does not exist'),
            (['--tta', '2'], '--tta is refused')):
        line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--output', output, *option)
        assert message in line
    assert not output.exists()


def test_run_folder_of_another_run_is_left_alone(run_folder, few_digits, fails):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob('*')}
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, *SMALL, '--output', run_folder.parent,
                 '--experiment', run_folder.name)
    assert 'holds another run' in line
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob('*')} == before


def test_card_shows_the_command_without_places():
    argv = ['train', '-c', 'paper_c10', '--data-dir', '/home/me/data', '--output=runs', '--experiment', 'a',
            '--lr', '1']
    assert command_line(argv) == 'timm-lm train -c paper_c10 --data-dir DIR --lr 1'
    assert command_line(['train', '--data-dir=/home/me']) == 'timm-lm train --data-dir DIR'
    argv = ['train', '-c', '/home/me/my.yaml', '--model', 'local-dir:/home/me/runs/tuned/weights', '--dataset',
            'hfds//home/me/digits', '--kd-model-name=/home/me/teacher', '--grow-from', '~/shallow', '--lr', '1/2',
            '--class-map', 'maps/all.txt', '-c/home/me/my.yaml', '--model-kwargs', 'x=/home/me/y', 'C:/Users/me/z', '/',
            "x='/home/me/y'", '--model-kwargs=x=/home/me/y', '-c=/home/me/my.yaml', '/weights',
            '--experiment=', '--seed', '-1', '--output', 'runs', '--epochs=3']
    assert command_line(argv) == (
        'timm-lm train -c my.yaml --model local-dir:tuned --dataset hfds/digits --kd-model-name=teacher --grow-from '
        'shallow --lr 1/2 --class-map maps/all.txt -cmy.yaml --model-kwargs x=y z / '
        + shlex.quote("x='y'") + ' --model-kwargs=x=y -c=my.yaml weights --seed -1 --epochs=3')


@pytest.mark.parametrize('names', [
    ['train-00000-of-00001-b42a775f407cee45', 'test-00000-of-00001-b42a775f407cee45'],
    ['plain_text/train/0000', 'plain_text/test/0000'],
])
def test_other_layouts_of_the_hub(few_digits, tmp_path, names):
    from timm_lm.data import load_images
    for split, name in zip(('train', 'test'), names):
        path = tmp_path / f'{name}.parquet'
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(few_digits / f'{split}-00000-of-00001.parquet', path)
    assert [len(load_images(split, tmp_path)) for split in ('train', 'test')] == [256, 64]


def test_unwritable_places_are_named(few_digits, tmp_path, fails):
    (tmp_path / 'file').write_text('')
    for output in (tmp_path / 'file', '/proc/nowhere'):
        line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--output', output)
        assert str(output) in line and '--output' in line


def test_class_names_are_those_of_the_data(tmp_path, command):
    """An image folder of ten classes gives its own names, not those of CIFAR-10."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for label in range(10):
            folder = tmp_path / 'data' / split / f'kind{label}'
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    code, _, err = command(
        'train', '-c', 'demo_digits', '--data-dir', tmp_path / 'data', '--input-size', 3, 32, 32, '--batch-size',
        10, '--epochs', 1, '--warmup-epochs', 0, '--model-kwargs', 'layers=(1,1,1)', '--output', tmp_path,
        '--experiment', 'run')
    assert code == 0, err
    config = json.loads((tmp_path / 'run' / 'weights' / 'config.json').read_text())
    assert config['label_names'] == [f'kind{label}' for label in range(10)]


def test_columns_stay_in_place_without_a_validation(few_digits, tmp_path, command):
    code, _, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, '--model-kwargs',
                           'layers=(1,1,1)', '--epochs', 3, '--warmup-epochs', 0, '--val-interval', 2, '--output',
                           tmp_path, '--experiment', 'run')
    assert code == 0, err
    with open(tmp_path / 'run' / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert [bool(row['eval_top1']) for row in rows] == [False, True, True]
    assert all(0 <= float(row['lr']) <= 0.1 for row in rows)


def test_run_can_be_repeated_from_its_options(run_folder, few_digits, tmp_path, command):
    code, _, err = command('train', '-c', run_folder / 'args.yaml', '--data-dir', few_digits, '--output', tmp_path,
                           '--experiment', 'again')
    assert code == 0, err
    again, first = (load_file(folder / 'weights' / 'model.safetensors') for folder in (tmp_path / 'again', run_folder))
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_fine_tuning_of_a_folder_keeps_the_shape_of_its_network(weights, few_digits, tmp_path, command):
    """The folder's network has fewer blocks than its name says; the new folder must say so too."""
    code, out, err = command('train', '-c', 'demo_digits', '--data-dir', few_digits, '--pretrained', '--model',
                             weights, '--epochs', 1, '--warmup-epochs', 0, '--output', tmp_path, '--experiment', 'run')
    assert code == 0 and f', starting from the weights of `{weights.parent.name}`\n' in out, err
    tuned = tmp_path / 'run' / 'weights'
    verify_folder(tuned)
    assert load_file(tuned / 'model.safetensors').keys() == load_file(weights / 'model.safetensors').keys()
    card = (tuned / 'README.md').read_text()
    assert '# lm_resnet20.demo_digits' in card
    assert f'1 epoch, starting from the weights of `{weights.parent.name}`, seed 42, ' in card


@pytest.mark.parametrize('text', ['a: [', '', '- a'])
def test_damaged_options_of_a_run_are_named(run_folder, few_digits, tmp_path, fails, text):
    run = shutil.copytree(run_folder, tmp_path / 'run')
    (run / 'args.yaml').write_text(text)
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, *SMALL, '--output', tmp_path,
                 '--experiment', 'run', '--resume', 'auto')
    assert str(run / 'args.yaml') in line and 'restore the file' in line
    assert (run / 'args.yaml').read_text() == text


def test_checkpoint_that_is_not_there_and_run_that_is_done(run_folder, few_digits, tmp_path, fails, command):
    run = shutil.copytree(run_folder, tmp_path / 'run')
    options = ['train', '-c', 'demo_digits', '--data-dir', few_digits, *SMALL, '--output', tmp_path, '--experiment',
               'run', '--resume']
    missing = run / 'checkpoints' / 'step-1'
    assert f'There is no checkpoint {missing}; give RUN/checkpoints/step-' in fails(*options, missing)
    code, out, err = command(*options, 'auto')
    assert code == 0, err
    assert 'all epochs are done, the weights are written again' in out
    before, after = (load_file(folder / 'weights' / 'model.safetensors') for folder in (run_folder, run))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((folder / 'result.json').read_text()) for folder in (run_folder, run))
    assert before['seen_in_training'] == after['seen_in_training'] is not None


@pytest.mark.parametrize('options, message', [
    (['--model-kwargs', 'num_classes=7'], '--model-kwargs has num_classes; use --num-classes instead'),
    (['--model-kwargs', 'drop_rate=0.1'], '--model-kwargs has drop_rate; use --drop instead.'),
    (['--model', 'levit_128s', '--input-size', '3', '224', '224', '--head-init-scale', '0.5', '--no-pretrained'],
     'The head of levit_128s is not a layer with a weight and a bias'),
])
def test_networks_that_can_not_be_made_so(few_digits, tmp_path, fails, options, message):
    assert message in fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--output', tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_memory_that_does_not_suffice_is_told(fails, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, 'list', lambda argv: torch.empty(10 ** 15))
    line = fails('list')
    assert 'There is too little memory' in line and 'use a smaller --batch-size' in line
    monkeypatch.setitem(cli.COMMANDS, 'list', lambda argv: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match='size'):
        fails('list')


@pytest.mark.parametrize('kind, said', [
    (RuntimeError, 'CUDA error: an illegal memory access was encountered'),
    (getattr(torch, 'AcceleratorError', RuntimeError), 'CUDA error: an illegal memory access was encountered'),
    (RuntimeError, 'HIP error: the operation cannot be performed'), (RuntimeError, 'miopenStatusUnknownError'),
    (RuntimeError, 'Triton Error [HIP]: Code: 1')])
def test_device_that_failed_is_told(fails, monkeypatch, kind, said):
    def work(argv):
        raise kind(f'{said}\nFor debugging consider passing ...')

    monkeypatch.setitem(cli.COMMANDS, 'list', work)
    line = fails('list')
    assert f'The device failed ({said}' in line
    assert 'A training resumes with --resume auto' in line


@pytest.mark.parametrize('engine, value', [
    ('deepspeed', 'True'), ('megatron_lm', 'true'), ('parallelism_config', 'true')])
def test_other_engines_of_accelerate_are_refused(few_digits, tmp_path, fails, monkeypatch, engine, value):
    monkeypatch.setenv(f'ACCELERATE_USE_{engine.upper()}', value)
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--output', tmp_path)
    assert f"Accelerate's settings ask for {engine}" in line


def test_settings_of_accelerate_do_not_compile(few_digits, tmp_path, command, monkeypatch):
    """A run that is told to be eager is: no graph is made."""
    monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', 'EAGER')
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    code, out, err = command(
        'train', '-c', 'demo_digits', '--data-dir', few_digits, '--model-kwargs', 'layers=(1,1,1)', '--epochs', 1,
        '--warmup-epochs', 0, '--output', tmp_path)
    assert code == 0 and re.search(r'(?m)^device .*, eager$', out), err
    assert not torch._dynamo.utils.counters['stats']


def test_settings_of_accelerate_do_not_change_what_is_compiled(tmp_path, monkeypatch):
    args, plugins = parse_options(['--torchcompile', 'aot_eager']), []
    for setting in ('false', 'true'):
        for name in ('FULLGRAPH', 'REGIONAL_COMPILATION'):
            monkeypatch.setenv(f'ACCELERATE_DYNAMO_USE_{name}', setting)
        plugins.append(create_accelerator(args, tmp_path).state.dynamo_plugin.to_dict())
    assert plugins[0] == plugins[1]


def test_images_that_are_not_square_are_cropped_by_timm(few_digits, tmp_path, command):
    """Whatever fits in memory: there a crop keeps the aspect, timm's does not."""
    for size, place in (((1, 16, 16), 'in memory'), ((1, 16, 24), "timm's transforms in 0 worker processes")):
        code, out, err = command(
            'train', '-c', 'demo_digits', '--data-dir', few_digits, '--input-size', *size, '--workers', 0, '--dry-run')
        assert code == 0 and place in out, err


@pytest.mark.parametrize('character', '#?')
@pytest.mark.parametrize('older', [False, True])
def test_path_that_older_timm_cuts_is_refused_before_the_training(
        few_digits, tmp_path, command, monkeypatch, character, older):
    if older:
        monkeypatch.setattr('timm_lm.training.run_folder.parse_model_name', lambda name: ('local-dir', 'a'))
    code, _, err = command(
        'train', '-c', 'demo_digits', '--data-dir', few_digits, '--output', tmp_path, '--experiment', f'a{character}b',
        '--dry-run')
    cuts = older or timm.models.parse_model_name(f'local-dir:a{character}b')[1] == 'a'
    assert code == (2 if cuts else 0) and ('cuts paths at # and ?' in err) == cuts
