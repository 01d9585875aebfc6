"""Fine-tuning of shipped weights on images of other sizes and channels, from folders, Parquet and timm's data sets.

The images are scikit-learn's digits, enlarged. What is learned from a few of them in one to three batches is not looked
at, but what is carried over, recorded, and computed from the result.
"""
import inspect
import json
import re
import shutil
import struct

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from test_data import write_parquet
from timm.data import create_transform, resolve_data_config
from timm.models import adapt_input_conv

from timm_lm.data import load_images
from timm_lm.loader import MemoryLoader
from timm_lm.models._weights import weights_dir
from timm_lm.training import evaluate as evaluate_module
from timm_lm.weights_folder import save_folder, verify_folder

SHIPPED = weights_dir() / 'lm_resnet20.best_c10'
QUICK = ['--epochs', 1, '--warmup-epochs', 0, '--batch-size', 10, '--workers', 1]
NAMES = [f'digit{label}' for label in range(10)]


def some_digits(size, mode='RGB', train=3, validation=2):
    """(split, label, image) of the first digits of each class."""
    digits = load_digits()
    for label in range(10):
        rows = np.flatnonzero(digits.target == label)[:train + validation]
        for i, row in enumerate(rows):
            pixels = (digits.images[row] * (255 / 16)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).convert(mode)
            yield 'train' if i < train else 'validation', label, image


def image_folder(folder, size, mode='RGB', splits=True, **counts):
    for i, (split, label, image) in enumerate(some_digits(size, mode, **counts)):
        path = folder / (split if splits else '') / NAMES[label] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def parquet_folder(folder, size, mode='RGB'):
    images = list(some_digits(size, mode))
    for name in ('train', 'validation'):
        chosen = [(np.asarray(image), label) for split, label, image in images if split == name]
        write_parquet(folder / f'{name}-00000-of-00001.parquet', *map(list, zip(*chosen)))
    return folder


def mnist_folder(folder):
    """Digits in the files of MNIST, which torchvision reads."""
    images = list(some_digits(28, 'L'))
    raw = folder / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for split, prefix in (('train', 'train'), ('validation', 't10k')):
        chosen = [(np.asarray(image), label) for name, label, image in images if name == split]
        pixels, labels = map(np.stack, zip(*chosen))
        (raw / f'{prefix}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 2051, *pixels.shape) + pixels.tobytes())
        (raw / f'{prefix}-labels-idx1-ubyte').write_bytes(
            struct.pack('>2i', 2049, len(labels)) + labels.astype(np.uint8).tobytes())
    return folder


@pytest.fixture
def tune(command, tmp_path):
    """Fine-tune the shipped weights by the command of the README; returns the weights folder and its config."""
    def run(data, *options, model=SHIPPED):
        code, _, err = command(
            'train', '--pretrained', '--model', model, '--num-classes', 10, '--data-dir', data, *QUICK,
            '--output', tmp_path / 'runs', '--experiment', 'run', *options)
        assert code == 0, err
        weights = tmp_path / 'runs' / 'run' / 'weights'
        verify_folder(weights)
        return weights, json.loads((weights / 'config.json').read_text())
    return run


def test_run_of_a_weights_folder_without_a_name(tune, command, tmp_path):
    """The default run folder is named after the network, which may itself come from the weights of a run."""
    data = image_folder(tmp_path / 'data', 32, 'RGB', train=2, validation=2)
    weights, _ = tune(data)
    for model in (weights, f'local-dir:{weights}'):
        code, out, err = command('train', '--pretrained', '--model', model, '--num-classes', 10, '--data-dir', data,
                                 *QUICK, '--output', tmp_path / 'more', '--dry-run')
        assert code == 0, err
        assert re.search(r'more/\d{8}-\d{6}-\d{6}-run\n', out)


# Sizes and channels


@pytest.mark.parametrize('size, mode, options, input_size', [
    (28, 'L', ['--input-size', 1, 28, 28], [1, 28, 28]),
    (28, 'L', ['--in-chans', 1], [1, 32, 32]),
    (28, 'L', [], [3, 32, 32]),
    (64, 'RGB', ['--img-size', 64], [3, 64, 64]),
    (64, 'RGB', ['-c', 'finetune', '--no-torchcompile', '--input-size', 3, 64, 48], [3, 64, 48]),
    (224, 'RGB', ['--input-size', 3, 224, 224], [3, 224, 224]),
    (224, 'RGB', [], [3, 32, 32]),
])
def test_other_sizes_and_channels(tune, command, tmp_path, size, mode, options, input_size):
    """The weights folder records the size of the images, and all commands make the images that it asks for."""
    data = image_folder(tmp_path / 'data', size, mode, train=1, validation=1)
    weights, config = tune(data, *options)
    assert config['pretrained_cfg']['input_size'] == input_size
    assert config['label_names'] == NAMES
    result = json.loads((weights.parent / 'result.json').read_text())
    assert result['images'] == 10
    code, out, err = command('validate', weights, '--data-dir', data, '--val-split', 'validation')
    assert code == 0 and f"{result['errors']} errors of 10 images" in out, err
    code, out, err = command('predict', data / 'validation', '--model', weights, '--json', '--topk', 1)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(found) == 10, err
    assert sum(f"/{line['classes'][0]['class']}/" not in line['image'] for line in found) == result['errors']
    model = timm.create_model(f'local-dir:{weights}', pretrained=True)
    assert model(torch.randn(2, *input_size)).shape == (2, 10)


def by_hand(weights, paths, **config):
    """Loss and wrong images of a weights folder on image files, by timm alone."""
    model = timm.create_model(f'local-dir:{weights}', pretrained=True).eval()
    transform = create_transform(**(resolve_data_config({}, model=model) | config))
    labels = torch.tensor([NAMES.index(path.parent.name) for path in paths])
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(path).convert('RGB')) for path in paths]))
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) != labels).sum().item()


def validated(command, weights, data, *options):
    """Loss and wrong images of a weights folder on image files, as the command tells them."""
    code, out, err = command('validate', weights, '--data-dir', data, '--val-split', 'validation', *options)
    assert code == 0, err
    loss, errors = re.search(r'loss ([\d.]+), (\d+) errors of 20 images', out).groups()
    return float(loss), int(errors)


def test_images_are_made_alike_from_training_to_prediction(tune, command, tmp_path):
    """Of other proportions, cropped by a share, resized in another way than by default: all counts are timm's."""
    data = image_folder(tmp_path / 'data', 48)
    paths = sorted((data / 'validation').rglob('*.png'))
    for path in (data / 'train').rglob('*.png'), paths:
        for i, file in enumerate(path):
            image = Image.open(file)
            image.resize((48 + 4 * i % 20, 40)).save(file)
    start = shutil.copytree(SHIPPED, tmp_path / 'start')
    config = json.loads((start / 'config.json').read_text())
    config['pretrained_cfg'].update(test_input_size=[3, 64, 64], test_crop_pct=1.0, crop_mode='squash')
    (start / 'config.json').write_text(json.dumps(config))
    weights, config = tune(data, '--img-size', 24, '--crop-pct', 0.6, '--interpolation', 'bicubic', model=start)
    told = config['pretrained_cfg']
    assert (told['input_size'], told['crop_pct'], told['interpolation'], told['crop_mode']) == (
        [3, 24, 24], 0.6, 'bicubic', 'center')
    assert not {'test_input_size', 'test_crop_pct'} & told.keys()
    result = json.loads((weights.parent / 'result.json').read_text())
    loss, errors = by_hand(weights, paths)
    assert (result['loss'], result['errors']) == (pytest.approx(loss, rel=1e-4), errors)
    for crop_mode in ('center', 'squash', 'border'):
        told['crop_mode'] = crop_mode
        (weights / 'config.json').write_text(json.dumps(config))
        loss, errors = by_hand(weights, paths, crop_mode=crop_mode)
        assert validated(command, weights, data) == (pytest.approx(loss, abs=1e-4), errors)
        code, out, err = command('predict', data / 'validation', '--model', weights, '--json', '--topk', 1)
        found = [json.loads(line) for line in out.splitlines()]
        assert sum(f"/{line['classes'][0]['class']}/" not in line['image'] for line in found) == errors


def test_validation_compiles_the_network_and_lays_images_out(command, tmp_path, monkeypatch):
    data = image_folder(tmp_path / 'data', 32)
    kwargs = dict(layers=(2,), channels=(16,))
    weights = save_folder(timm.create_model('lm_resnet20', **kwargs), tmp_path / 'weights', '# card', kwargs)
    channels_last, evaluate = [], evaluate_module.evaluate

    def watched(forward, loader, **more):
        images, _ = next(iter(loader))
        channels_last.append(images.is_contiguous(memory_format=torch.channels_last))
        return evaluate(forward, loader, **more)

    monkeypatch.setattr(evaluate_module, 'evaluate', watched)
    graphs = torch._dynamo.utils.counters['stats']
    found = []
    for options in ([], ['--channels-last', '--torchcompile']):
        torch.compiler.reset()
        graphs.clear()
        loss, errors = validated(command, weights, data, *options)
        assert (graphs['unique_graphs'] > 0) == bool(options)
        found.append((loss, errors))
    torch.compiler.reset()
    assert channels_last == [False, True]
    (loss, errors), compiled = found
    assert compiled == (pytest.approx(loss, abs=1e-4), errors)


def test_first_convolution_of_a_grey_network_is_the_sum_over_colours(tune, tmp_path):
    """With a rate of almost nothing; all but the first convolution and the head is taken as it is."""
    data = image_folder(tmp_path / 'data', 28, 'L')
    weights, config = tune(data, '--input-size', 1, 28, 28, '--num-classes', 12, '--lr', 1e-9, '--weight-decay', 0)
    before, after = ({name: tensor.float() for name, tensor in load_file(folder / 'model.safetensors').items()}
                     for folder in (SHIPPED, weights))
    # timm rounds the sum to the precision of the file
    summed = before['stem.conv.weight'].sum(1, keepdim=True)
    torch.testing.assert_close(after['stem.conv.weight'], summed, rtol=2 ** -11, atol=1e-6)
    assert after['head.fc.weight'].shape[0] == 12
    for name in before.keys() - {'stem.conv.weight', 'head.fc.weight', 'head.fc.bias'}:
        if 'running' not in name and 'num_batches' not in name:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    rgb = json.loads((SHIPPED / 'config.json').read_text())['pretrained_cfg']
    for key in ('mean', 'std'):  # no figure of grey images is known, so that of the colours
        assert config['pretrained_cfg'][key] == pytest.approx([sum(rgb[key]) / 3])


def test_mean_of_grey_images_can_be_given(tune, tmp_path):
    data = image_folder(tmp_path / 'data', 28, 'L')
    _, config = tune(data, '--input-size', 1, 28, 28, '--mean', 0.3)
    assert config['pretrained_cfg']['mean'] == [0.3]
    rgb = json.loads((SHIPPED / 'config.json').read_text())['pretrained_cfg']['std']
    assert config['pretrained_cfg']['std'] == pytest.approx([sum(rgb) / 3])


def test_rgb_network_from_the_grey_one(tune, tmp_path):
    """And back: a weights folder of one channel is a start for images of three; older timm cannot, and it is said."""
    grey, _ = tune(image_folder(tmp_path / 'grey', 28, 'L'), '--input-size', 1, 28, 28)
    grey = shutil.copytree(grey, tmp_path / 'start')
    shutil.rmtree(tmp_path / 'runs')
    options = [image_folder(tmp_path / 'rgb', 40), '--input-size', 3, 40, 40, '--mean', .5, '--std', .2]
    if 'base_chans' not in inspect.signature(adapt_input_conv).parameters:
        with pytest.raises(AssertionError, match=r'do not fit the network lm_resnet20 .*stem\.conv\.weight'):
            tune(*options, model=grey)
        return
    weights, config = tune(*options, model=grey)
    assert config['pretrained_cfg']['input_size'] == [3, 40, 40] and config['pretrained_cfg']['mean'] == [.5] * 3
    assert load_file(weights / 'model.safetensors')['stem.conv.weight'].shape[1] == 3


def test_few_images_are_not_filled_up_to_a_large_batch(tmp_path):
    """A count of 10 large images would take as long as one of 125."""
    data = load_images('validation', image_folder(tmp_path, 16, validation=1), input_size=(3, 16, 16))
    loader = MemoryLoader(data, 125, [0.5] * 3, [0.5] * 3)
    for batches in (loader, MemoryLoader(data, 4, [0.5] * 3, [0.5] * 3).on_cpu(125)):
        [(images, labels)] = batches
        assert images.shape == (10, 3, 16, 16) and sorted(labels.tolist()) == list(range(10))
    second = MemoryLoader(data, 125, [0.5] * 3, [0.5] * 3, rank=1, world_size=3)  # of 4, 3 and 3 images
    assert [len(labels) for _, labels in second] == [4]


# Where the images come from


@pytest.mark.parametrize('make, options, names', [
    (lambda folder: image_folder(folder, 40), [], NAMES),
    (lambda folder: image_folder(folder, 40), ['--dataset', 'torch/image_folder'], NAMES),
    (lambda folder: parquet_folder(folder, 40), [], None),
    (lambda folder: parquet_folder(folder, 28, 'L'), ['--in-chans', '1'], None),
    (mnist_folder, ['--dataset', 'torch/mnist'], [
        '0 - zero', '1 - one', '2 - two', '3 - three', '4 - four', '5 - five', '6 - six', '7 - seven', '8 - eight',
        '9 - nine']),
], ids=['folder', 'torch folder', 'Parquet', 'grey Parquet', 'MNIST'])
def test_sources(tune, command, tmp_path, make, options, names):
    data = make(tmp_path / 'data')
    weights, config = tune(data, *options)
    assert config.get('label_names') == names
    split = 'test' if make is mnist_folder else 'validation'  # timm takes the one for the other
    assert f'on the split `{split}`' in ' '.join((weights / 'README.md').read_text().split())
    errors = json.loads((weights.parent / 'result.json').read_text())['errors']
    source = options if '--dataset' in options else []
    code, out, err = command('validate', weights, '--data-dir', data, '--val-split', 'validation', *source)
    assert code == 0 and f'{errors} errors of 20 images' in out, err


# Folders that would be read wrongly


def test_folder_without_the_split_is_refused(tmp_path, fails):
    """timm would take all images below the folder, those trained on too."""
    data = image_folder(tmp_path / 'data', 16)
    assert "has no split 'test' (it has: train, validation)" in fails('validate', SHIPPED, '--data-dir', data)
    train = ['train', '--pretrained', '--data-dir', data, '--output', tmp_path / 'runs', *QUICK]
    for split in ('part', ''):
        assert f"has no split '{split}'" in fails(*train, '--train-split', split)
    shutil.move(data / 'validation', data / 'test')
    assert "has no split 'validation' (it has: test, train); add the images, name one" in fails(*train)
    # timm would train on what is to be validated too
    shutil.move(data / 'test', data / 'Val')
    shutil.move(data / 'train', data / 'Train')
    for split in ('Val', ''):
        assert "has no split 'train' (it has: Train, Val)" in fails(*train, '--val-split', split)
    shutil.move(data / 'Val', data / 'test_set')
    shutil.move(data / 'Train', data / 'training_set')
    assert "has no folder 'train' (it has: test_set, training_set)" in fails(*train, '--val-split', 'test_set')
    shutil.move(data / 'training_set', data / 'validation')
    assert "has no split 'train' (it has: validation); add the images, name one" in fails(*train)
    shutil.move(data / 'validation', data / 'training_set')
    shutil.move(data / 'training_set', data / 'train')
    line = fails(*train)
    assert "has no split 'validation' (it has: train)" in line and 'or train without validation (--val-split=)' in line
    assert "has no split 'part' (it has: train)" in fails(*train, '--train-split', 'part')
    assert not (tmp_path / 'runs').exists()


def test_folder_of_images_by_a_recipe_of_another_data_set(tmp_path, fails, command):
    data = image_folder(tmp_path / 'data', 16)
    train = ['train', '-c', 'paper_c10', '--data-dir', data, '--dry-run', '--val-split', 'validation',
             '--batch-size', 8]
    assert 'add --dataset=' in fails(*train)
    code, out, err = command(*train, '--dataset=')
    assert code == 0 and '--input-key img and --target-key label ignored' in out, err


def test_other_names_of_the_splits_are_known(tune, tmp_path):
    data = image_folder(tmp_path / 'data', 16)
    shutil.move(data / 'train', data / 'training')
    shutil.move(data / 'validation', data / 'val')
    weights, _ = tune(data)
    assert json.loads((weights.parent / 'result.json').read_text())['images'] == 20


def test_folder_of_classes_alone_is_not_validated_on_itself(tune, command, fails, tmp_path):
    data = image_folder(tmp_path / 'data', 16, splits=False)
    line = fails('train', '--pretrained', '--data-dir', data, '--output', tmp_path / 'runs', *QUICK)
    assert "has no folder 'train' (it has: digit0, digit1" in line and 'images would be the same' in line
    weights, _ = tune(data, '--val-split', '')
    assert 'errors' not in json.loads((weights.parent / 'result.json').read_text())
    code, out, err = command('validate', weights, '--data-dir', data)
    assert code == 0 and 'of 50 images' in out, err


def test_missing_class_is_named(tune, fails, tmp_path):
    """timm numbers the classes of each split by itself: without digit4, digit5 would be number 4."""
    data = image_folder(tmp_path / 'data', 16)
    weights, _ = tune(data)
    shutil.rmtree(data / 'validation' / 'digit4')
    line = fails('validate', weights, '--data-dir', data, '--val-split', 'validation')
    assert 'The 9 classes of the data are not the 10 of' in line and 'digit4' in line
    line = fails('train', '--pretrained', '--data-dir', data, '--output', tmp_path / 'other', *QUICK)
    assert 'are not the 10 of the training split' in line and 'digit4' in line


def test_class_map_numbers_the_classes_of_all_splits(tune, command, tmp_path):
    data = image_folder(tmp_path / 'data', 16)
    shutil.rmtree(data / 'validation' / 'digit4')
    (tmp_path / 'classes.txt').write_text('\n'.join(NAMES) + '\n')
    weights, config = tune(data, '--class-map', tmp_path / 'classes.txt')
    assert config['label_names'] == NAMES
    errors = json.loads((weights.parent / 'result.json').read_text())['errors']
    code, out, err = command('validate', weights, '--data-dir', data, '--val-split', 'validation', '--class-map',
                             tmp_path / 'classes.txt')
    assert code == 0 and f'{errors} errors of 18 images' in out, err
