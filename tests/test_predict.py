"""Classes of single images, through the command line."""
import io
import json
import os
import shutil
import struct
import sys
from contextlib import suppress

import numpy as np
import pytest
import timm
import torch
from PIL import Image, features

from timm_lm.cli import main
from timm_lm.data import load_images
from timm_lm.errors import UserError
from timm_lm.export import export_model
from timm_lm.loader import normalize
from timm_lm.model_config import image_config, label_names
from timm_lm.models import LMResNet
from timm_lm.predict import find_images, predict
from timm_lm.weights_folder import load_folder, save_folder


@pytest.fixture(scope='module')
def pictures(few_digits, tmp_path_factory):
    """Folder of the first five test digits as PNG files, one of them in a subfolder, and a file of another kind."""
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'sub').mkdir()
    data = load_images('test', few_digits, input_size=(1, 8, 8))
    for i in range(5):
        Image.fromarray(data.images[i, 0].numpy()).save(folder / ('sub' if i == 4 else '') / f'{i}.png')
    (folder / 'notes.txt').write_text('no image')
    return folder


def test_predictions_are_those_of_the_network(pictures, weights, few_digits, command):
    code, out, err = command('predict', pictures, '--model', weights, '--json', '--topk', 10, '--batch-size', 3)
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [line['image'] for line in found] == [
        str(pictures / name) for name in ('0.png', '1.png', '2.png', '3.png', 'sub/4.png')]
    images = load_images('test', few_digits, input_size=(1, 16, 16)).images[:5]
    model = timm.create_model(f'local-dir:{weights}', pretrained=True).eval()
    with torch.inference_mode():
        expected = model(normalize(images, [0.3053 * 255], [0.3760 * 255])).softmax(1)
    for line, row in zip(found, expected):
        probabilities = {entry['class']: entry['probability'] for entry in line['classes']}
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        actual = torch.tensor([probabilities[str(i)] for i in range(10)])
        torch.testing.assert_close(actual, row, rtol=1e-4, atol=1e-5)
    in_batches = list(predict(model, [line['image'] for line in found], 10, batch_size=2))
    for prediction, line in zip(in_batches, found, strict=True):
        other = prediction.as_dict()
        assert other['image'] == line['image'] and other['classes'][0]['probability'] == pytest.approx(
            line['classes'][0]['probability'], rel=1e-4)


def test_folders_are_followed_to_where_they_are_linked(pictures, tmp_path):
    """As timm reads a folder of images."""
    linked = tmp_path / 'linked'
    linked.symlink_to(pictures)
    assert find_images([tmp_path]) == [linked / path.relative_to(pictures) for path in find_images([pictures])]


def test_table_has_names_and_shares(pictures, command):
    """The shipped network knows CIFAR-10's classes; grey digits are turned to RGB and enlarged."""
    code, out, err = command('predict', pictures / '0.png', '--model', 'lm_resnet20')
    assert code == 0, err
    (line,) = out.splitlines()
    _, out, _ = command('predict', pictures / '0.png', '--model', 'lm_resnet20', '--json')
    shares = [f"{entry['class']} {100 * entry['probability']:.1f} %" for entry in json.loads(out)['classes']]
    assert line == '  '.join([str(pictures / '0.png'), *shares]) and len(shares) == 3
    assert sum(name in line for name in (
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')) == 3


def test_names_of_another_head_are_not_taken(pictures):
    model = timm.create_model('lm_resnet20', pretrained=True, num_classes=12).eval()
    assert len(model.pretrained_cfg['label_names']) == 10
    (prediction,) = predict(model, [pictures / '0.png'], topk=12)
    assert {name for name, _ in prediction.classes} == {str(i) for i in range(12)}


def test_names_in_a_table(pictures, weights, tmp_path, command):
    """timm's config may name classes by number."""
    folder = shutil.copytree(weights, tmp_path / 'named')
    config = json.loads((folder / 'config.json').read_text())
    config['label_names'] = {str(i): f'nr {i}' for i in reversed(range(10))}
    (folder / 'config.json').write_text(json.dumps(config))
    code, out, err = command('predict', pictures / '0.png', '--model', folder, '--json', '--topk', 10)
    assert code == 0, err
    named = {entry['class']: entry['probability'] for entry in json.loads(out)['classes']}
    _, out, _ = command('predict', pictures / '0.png', '--model', weights, '--json', '--topk', 10)
    assert {f"nr {entry['class']}": entry['probability'] for entry in json.loads(out)['classes']} == named
    config['label_names'] = {'0': 'a', '1': 'b', '9': 'c'}  # not all have one
    (folder / 'config.json').write_text(json.dumps(config))
    assert label_names(load_folder(folder)) == ()


def test_grey_network_with_the_config_of_a_coloured_one(pictures, tmp_path):
    """As a user makes it, and as timm writes it for the Hub: the channels are those of the network."""
    model = timm.create_model('lm_resnet20.best_c10', pretrained=True, in_chans=1).eval()
    (prediction,) = predict(model, [pictures / '0.png'])
    assert prediction.error is None and prediction.classes[0][0] in model.pretrained_cfg['label_names']
    assert export_model(model, 'torch-export', tmp_path / 'model.pt2') < 1e-4
    save_folder(model, tmp_path / 'grey', 'card')
    config = json.loads((tmp_path / 'grey' / 'config.json').read_text())
    assert config['model_args']['in_chans'] == 1
    config['pretrained_cfg'] |= dict(input_size=[3, 32, 32], mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    (tmp_path / 'grey' / 'config.json').write_text(json.dumps(config))
    again = load_folder(tmp_path / 'grey')
    (prediction,) = predict(again, [pictures / '0.png'])
    config = image_config(again)
    assert prediction.error is None and config['input_size'] == (1, 32, 32)
    assert (*config['mean'], *config['std']) == pytest.approx((0.5, 0.3))


def tiff(pixels, bits, signed=False):
    """A grey TIFF of 12 packed bits, or of 16."""
    height, width = pixels.shape
    values = pixels.astype(np.uint16).ravel()
    if bits == 12:
        first, second = values[0::2] << 4, values[1::2] << 4
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    else:
        data = (values << 7 if signed else values * 257).astype('<u2').tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data),
            339: 2 if signed else 1}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack('<2sHI', b'II', 42, 8 + len(data)) + data + struct.pack('<H', len(tags)) + entries + bytes(4)


def test_16_bits_are_scaled(pictures, weights, tmp_path, command):
    with Image.open(pictures / '0.png') as image:
        pixels = np.asarray(image)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / '0.png')
    header = f'P5 {pixels.shape[1]} {pixels.shape[0]} 65535\n'.encode()
    (tmp_path / '0.pgm').write_bytes(header + (pixels.astype('>u2') * 257).tobytes())
    for name, kind in {'12.tif': (12,), '16.tif': (16,), 'signed.tif': (16, True)}.items():
        (tmp_path / name).write_bytes(tiff(pixels, *kind))
    names = '0.png', '0.pgm', '12.tif', '16.tif', 'signed.tif'
    assert {Image.open(tmp_path / name).mode for name in names}.isdisjoint({'L'})
    answers = []
    for path in (pictures / '0.png', *(tmp_path / name for name in names)):
        code, out, err = command('predict', path, '--model', weights, '--json', '--topk', 10)
        assert code == 0, err
        answers.append(json.loads(out)['classes'])
    assert all(answer == answers[0] for answer in answers)


def test_broken_images_are_named_and_the_rest_go_on(pictures, weights, tmp_path, command, monkeypatch):
    (tmp_path / 'cut.png').write_bytes((pictures / '0.png').read_bytes()[:60])
    listed = '\n'.join(map(str, (tmp_path / 'cut.png', pictures / '1.png', tmp_path / 'gone.png'))) + '\n'
    monkeypatch.setattr(sys, 'stdin', io.StringIO(listed))
    code, out, err = command('predict', '-', '--model', weights)
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == [str(pictures / '1.png')]
    assert [f'{name} is not a readable image' in line for name, line in zip(
        (tmp_path / 'cut.png', tmp_path / 'gone.png'), err.splitlines(), strict=True)] == [True, True]


def test_damaged_picture_of_any_kind_is_named(pictures, weights, tmp_path, command):
    kinds = [kind for kind in ('avif', 'webp', 'jpeg', 'tiff', 'gif') if kind != 'avif' or features.check('avif')]
    with Image.open(pictures / '0.png') as image:
        for kind in kinds:
            path = tmp_path / f'0.{kind}'
            image.resize((64, 64)).convert('RGB').save(path)
            data = path.read_bytes()
            path.write_bytes(data[:len(data) // 2] + b'damaged' * 4)
    paths = [tmp_path / f'0.{kind}' for kind in kinds]
    code, out, err = command('predict', *paths, pictures / '0.png', '--model', weights)
    assert code == 1 and out.startswith(str(pictures / '0.png'))
    assert [line.startswith(f'timm-lm: {path} is not a readable image') for path, line in zip(
        paths, err.splitlines(), strict=True)] == [True] * len(paths)


def test_no_program_is_started_for_an_image(pictures, weights, tmp_path, command):
    """Pillow reads PostScript through Ghostscript, whatever the file is called, also within another format."""
    with Image.open(pictures / '0.png') as image:
        image.save(tmp_path / '0.eps')
    eps = (tmp_path / '0.eps').read_bytes()
    fields = {(3, 60): b'\1\0', (3, 20): b'\x08', (3, 30): b'\x08', (3, 120): b'\5', (8, 10): eps}
    iptc = b''.join(struct.pack('>BBBH', 28, *tag, len(value)) + value for tag, value in fields.items())
    for kind, content in (('EPS', eps), ('IPTC', iptc)):
        (tmp_path / '0.png').write_bytes(content)
        code, _, err = command('predict', tmp_path / '0.png', '--model', weights)
        assert code == 1 and err == f"timm-lm: {tmp_path / '0.png'} is not a readable image ({kind} is not read)\n"


def test_names_that_command_the_terminal(pictures, weights, few_digits, tmp_path, command):
    """A line is a line, and a name cannot erase others."""
    folder = shutil.copytree(weights, tmp_path / 'named')
    config = json.loads((folder / 'config.json').read_text())
    config['label_names'] = [f'\x1b[2J{i}\nwolf é' for i in range(10)]
    (folder / 'config.json').write_text(json.dumps(config))
    code, out, err = command('predict', pictures / '0.png', '--model', folder)
    assert code == 0 and out.count('\n') == 1 and out.count(r'\nwolf é ') == out.count(r' \x1b[2J') == 3, err
    code, _, err = command('validate', folder, '--data-dir', few_digits)
    assert code == 0 and err.count('\n') == 1 and r'those of' in err and r'\x1b[2J0\nwolf é, ' in err
    image = shutil.copy(folder / 'config.json', tmp_path / '\x1b[2J.png')
    code, _, err = command('predict', image, tmp_path / 'a\nb.png', '--model', weights)
    assert code == 1 and err.count('\n') == 2 and '\x1b' not in err


def test_names_that_the_terminal_can_not_show(pictures, weights, tmp_path, monkeypatch):
    path = shutil.copy(pictures / '0.png', tmp_path / 'süß.png')
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='ascii'))
    assert main(['predict', str(path), '--model', str(weights)]) == 0
    assert written.getvalue().startswith(f'{tmp_path}/s\\xfc\\xdf.png  '.encode())


def test_names_from_a_pipe_need_not_be_text(pictures, weights, tmp_path, monkeypatch):
    path = os.fsencode(tmp_path) + b'/caf\xe9.png'
    with suppress(OSError):  # of systems that have no such names, where the file is one that is not there
        shutil.copy(pictures / '0.png', path)
    names = path + b'\n' + os.fsencode(pictures / '0.png') + b'\n'
    streams = {'stdin': io.BytesIO(names), 'stdout': io.BytesIO(), 'stderr': io.BytesIO()}
    for name, stream in streams.items():  # as Python makes them
        monkeypatch.setattr(sys, name, io.TextIOWrapper(
            stream, encoding='utf-8', errors='backslashreplace' if name == 'stderr' else 'strict'))
    code = main(['predict', '-', '--model', str(weights)])
    for name in ('stdout', 'stderr'):
        getattr(sys, name).flush()
    out, err = (streams[name].getvalue() for name in ('stdout', 'stderr'))
    is_there = os.path.exists(path)
    assert code == (0 if is_there else 1) and b'Traceback' not in err, err
    assert out.count(b'\n') == 1 + is_there and b'caf' in (out if is_there else err)


def test_memory_that_does_not_suffice_for_a_batch(pictures, weights, command, fails, monkeypatch):
    forward = LMResNet.forward
    monkeypatch.setattr(LMResNet, 'forward', lambda model, images: (
        forward(model, images) if len(images) < 5 else torch.empty(10 ** 15)))
    line = fails('predict', pictures, '--model', weights)
    assert 'There is too little memory' in line and 'use a smaller --batch-size' in line
    assert command('predict', pictures, '--model', weights, '--batch-size', 4)[0] == 0


def test_bad_input_of_predict(tmp_path, weights, fails):
    (tmp_path / 'empty').mkdir()
    assert 'holds no images' in fails('predict', tmp_path / 'empty', '--model', weights)
    for option in ('--topk', '--batch-size'):
        assert f'{option} must be at least 1' in fails('predict', tmp_path, option, 0)
    assert "no model 'lm_resnet21'" in fails('predict', __file__, '--model', 'lm_resnet21')


def test_network_for_other_channels_than_images_have(pictures):
    model = timm.create_model('lm_resnet20', in_chans=4, layers=(1, 1, 1)).eval()
    model.pretrained_cfg = model.pretrained_cfg | dict(input_size=(4, 32, 32), mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(UserError, match='decoded to 1 or 3 channels, not 4'):
        next(predict(model, [pictures]))


def test_interpolation_that_there_is_not(pictures):
    model = timm.create_model('lm_resnet20', layers=(1, 1, 1)).eval()
    model.pretrained_cfg = model.pretrained_cfg | dict(interpolation='sharp')
    with pytest.raises(UserError, match="names an unknown interpolation, 'sharp'"):
        next(predict(model, [pictures]))
