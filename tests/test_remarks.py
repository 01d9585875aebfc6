"""What a person is told of data and files that could be meant otherwise: by a note, or by one line of error."""
import shutil

import pytest
from PIL import Image
from test_finetune import NAMES, image_folder

from timm_lm import data as data_module


@pytest.fixture
def dry(command):
    """Plan a fine-tuning; returns standard output."""
    def dry(folder, *options):
        code, out, err = command(
            'train', '-c', 'finetune', '--data-dir', folder, '--no-torchcompile', '--no-amp', '--batch-size', 4,
            '--dry-run', *options)
        assert code == 0, err
        return out
    return dry


def test_classes_without_names_and_images_left_out_are_told(tmp_path, dry):
    data = image_folder(tmp_path / 'data', 16)
    assert 'note:' not in dry(data)
    for split in ('train', 'validation'):
        shutil.rmtree(data / split / NAMES[-1])
    assert 'note: The data has 9 classes, the network 10' in dry(data)
    for path in sorted((data / 'train').rglob('*.png'))[:2]:
        Image.open(path).save(path.with_suffix('.webp'))
    out = dry(data, '--num-classes', 9)
    assert 'makes a head' not in out
    assert f"note: 2 images in {data / 'train'} left out, as timm does not read .webp" in out
    assert 'note:' not in dry(data, '--num-classes', 9, '--input-key', '.png;.webp')
    shutil.copy(path, path.with_suffix('.HEIC'))  # as phones write them; Pillow knows no such ending
    assert '1 image in' in dry(data, '--num-classes', 9, '--input-key', '.png;.webp')


def test_folder_in_that_of_a_class_is_named(tmp_path, fails):
    """Which timm takes for a class of its own."""
    data = image_folder(tmp_path / 'data', 16)
    first = min((data / 'train').rglob('*.png'))
    (first.parent / 'crops').mkdir()
    shutil.move(first, first.parent / 'crops')
    line = fails('train', '-c', 'finetune', '--data-dir', data, '--val-split', '', '--no-torchcompile', '--dry-run')
    assert 'labels up to 10, but the network has 10 classes' in line
    assert line.endswith(f"(its classes: crops, {', '.join(NAMES)}).")


@pytest.mark.parametrize('limit', [1 << 30, 0], ids=['in memory', 'by workers'])
def test_validation_tells_of_images_left_out(tmp_path, command, monkeypatch, limit):
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', limit)
    data = image_folder(tmp_path / 'data', 16)
    first = min((data / 'validation').rglob('*.png'))
    Image.open(first).save(first.with_suffix('.webp'))
    code, _, err = command('validate', 'lm_resnet20', '--data-dir', data, '--val-split', 'validation', '--workers', 0)
    assert code == 0 and f"note: 1 image in {data / 'validation'} left out" in err


def test_validation_of_classes_of_other_names(tmp_path, fails, command):
    data = image_folder(tmp_path / 'data', 16)
    for path in (data / 'validation').iterdir():
        path.rename(path.with_name(f'other {path.name}'))
    assert 'class numbers do not agree' in fails(
        'train', '-c', 'finetune', '--data-dir', data, '--num-classes', len(NAMES), '--no-torchcompile', '--dry-run')
    code, out, err = command('validate', 'lm_resnet20', '--data-dir', data, '--val-split', 'validation')
    assert code == 0 and 'errors of' in out
    assert 'timm-lm: note: No class of the data (other ' in err and 'airplane, automobile' in err


def test_other_images_than_the_run_was_started_with(tmp_path, command, fails):
    data = image_folder(tmp_path / 'data', 16)
    options = ['train', '-c', 'finetune', '--data-dir', data, '--num-classes', len(NAMES), '--no-torchcompile',
               '--batch-size', 4, '--epochs', 1, '--warmup-epochs', 0, '--model-kwargs', 'layers=(1,1,1)',
               '--no-pretrained', '--output', tmp_path, '--experiment', 'run']
    assert command(*options)[0] == 0
    first = min((data / 'train').rglob('*.png'))
    shutil.copy(first, first.with_name('more.png'))
    line = fails(*options, '--resume', 'auto')
    assert 'training images, the data now has' in line


def test_mistyped_kinds_of_data_sets_and_files_in_the_place_of_folders(tmp_path, fails):
    data = image_folder(tmp_path / 'data', 16)
    assert "The data set 'torchh/mnist' is not read" in fails(
        'train', '-c', 'finetune', '--data-dir', data, '--dataset', 'torchh/mnist', '--dry-run')
    (tmp_path / 'file').write_text('')
    assert 'is a file' in fails('train', '-c', 'finetune', '--data-dir', tmp_path / 'file', '--dry-run')


@pytest.mark.parametrize('options, message', [
    (['--pretrained-path', 'missing.pt'], '--pretrained-path missing.pt does not exist'),
    (['--initial-checkpoint', '.'], '--initial-checkpoint . is a folder; --model takes weights folders'),
    (['--resume', 'nosuch'], '--resume nosuch is not a checkpoint'),
    (['--model', 'preact_resnet20', '--two-step-epoch', 1], 'preact_resnet20 has none'),
])
def test_paths_and_steps_that_are_not_there(tmp_path, fails, options, message):
    data = image_folder(tmp_path / 'data', 16)
    assert message in fails(
        'train', '-c', 'finetune', '--data-dir', data, '--no-torchcompile', '--batch-size', 4, '--dry-run', *options)
