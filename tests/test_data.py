"""Data: finding and decoding splits, the cache, limits of memory, and files that are broken or of other kinds."""
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import timm.data
import torch
from forked import Command
from PIL import Image

from timm_lm import data as data_module
from timm_lm import timm_data
from timm_lm.data import TooLarge, check_class_names, load_images, open_images
from timm_lm.decoded import DecodedImages, read_cache, write_cache
from timm_lm.errors import UserError
from timm_lm.parquet import find_parquet


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format='PNG')
    return buffer.getvalue()


def write_parquet(path, arrays, labels=None, column='image'):
    cells = [dict(bytes=a if isinstance(a, bytes) else png(a), path=None) for a in arrays]
    labels = range(len(cells)) if labels is None else labels
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: cells, 'label': list(labels)}), path)


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def image_folder(folder, files, split='test'):
    """Write encoded images, by turns into two classes."""
    for i, content in enumerate(files):
        path = folder / split / ('cat', 'dog')[i % 2] / f'{i // 2}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]


# Finding and decoding


def test_pixels_labels_and_names_come_through(digits):
    from sklearn.datasets import load_digits
    train, test = (load_images(split, digits, input_size=(1, 8, 8)) for split in ('train', 'test'))
    assert (len(train), len(test)) == (1438, 359)
    assert train.class_names == tuple('0123456789')
    source = load_digits()
    ours = torch.cat([train.images, test.images]).flatten(1).sort(dim=0).values
    theirs = torch.tensor(source.images * (255 / 16)).to(torch.uint8).flatten(1).sort(dim=0).values
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.cat([train.labels, test.labels]).bincount(), torch.tensor(source.target).bincount())


def test_crabs_of_cifar100_on_the_hub_have_their_name(tmp_path, images):
    """Its files misspell it, which is no other class; names of other data are left as they are."""
    shared = timm.get_pretrained_cfg('lm_resnet20.best_c100').label_names
    misspelt = ['cra' if name == 'crab' else name for name in shared]
    for names, known in ((misspelt, shared), (['cra', 'b'], ('cra', 'b'))):
        path = tmp_path / str(len(names)) / 'test-00000-of-00001.parquet'
        write_parquet(path, images[:2])
        info = json.dumps(dict(info=dict(features=dict(label=dict(names=names, _type='ClassLabel')))))
        pq.write_table(pq.read_table(path).replace_schema_metadata({'huggingface': info}), path)
        loaded = load_images('test', path.parent)
        assert loaded.class_names == known
    found = load_images('test', tmp_path / '100').class_names
    assert check_class_names(found, shared, of='lm_resnet20.best_c100') == ''


def test_reading_parquet_does_not_import_pandas(tmp_path, images):
    """Which pyarrow does where it is installed, and which takes 40 MiB."""
    write_parquet(tmp_path / 'train-00000-of-00001.parquet', images)
    script = tmp_path / 'script.py'
    script.write_text('import sys\nfrom timm_lm.data import load_images\n'
                      "print(len(load_images('train', sys.argv[1])), 'pandas' in sys.modules)\n")
    assert Command(tmp_path, script=script).wait() == (0, f'{len(images)} False\n', '')


def test_part_by_a_share_and_a_number_is_refused(tmp_path, images):
    """The package datasets takes both for shares."""
    write_parquet(tmp_path / 'train-00000-of-00001.parquet', images)
    for part in ('train[20%:2]', 'train[1:-25%]'):
        with pytest.raises(UserError, match='has one bound in % and one in images'):
            load_images(part, tmp_path)


def test_shards_are_read_in_order_from_any_depth(tmp_path, images):
    for i in (2, 0, 1):
        write_parquet(tmp_path / 'plain_text' / f'train-0000{i}-of-00003.parquet', images[2 * i:2 * i + 2],
                      [2 * i, 2 * i + 1], column='img')
    loaded = load_images('train', tmp_path)
    assert loaded.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(loaded.images, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def test_other_sizes_are_resized_as_timm_does(tmp_path):
    big = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    write_parquet(tmp_path / 'test.parquet', [big])
    loaded = load_images('test', tmp_path, input_size=(3, 32, 32), crop_pct=0.875, interpolation='bicubic')
    transform = timm.data.create_transform(
        (3, 32, 32), crop_pct=0.875, interpolation='bicubic', mean=(0, 0, 0), std=(1, 1, 1))
    expected = (transform(Image.fromarray(big)) * 255).round().to(torch.uint8)
    assert torch.equal(loaded.images[0], expected)


def test_image_folder_opens_through_timm(tmp_path, images):
    for split in ('train', 'test'):
        for i, name in enumerate(('cat', 'dog')):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / '0.png').write_bytes(png(images[i]))
    loaded = load_images('test', tmp_path)
    assert loaded.labels.tolist() == [0, 1]
    assert torch.equal(loaded.images[1], torch.from_numpy(images[1]).permute(2, 0, 1))


@pytest.mark.parametrize('part, rows', [
    ('[:50%]', (0, 3)), ('[50%:]', (3, 6)), ('[-1:]', (5, 6)), ('[1:-1]', (1, 5)), ('[:]', (0, 6)),
    ('[20%:-25%]', (1, 4)), ('[0:50%]', (0, 3)),
])
def test_part_of_a_split(tmp_path, images, part, rows):
    write_parquet(tmp_path / 'train-00000-of-00002.parquet', images[:4])
    write_parquet(tmp_path / 'train-00001-of-00002.parquet', images[4:], [4, 5])
    loaded, opened = load_images(f'train{part}', tmp_path), open_images(f'train{part}', tmp_path)
    expected = list(range(*rows))
    assert loaded.labels.tolist() == opened.labels.tolist() == [label for _, label in opened] == expected
    assert torch.equal(loaded.images, torch.from_numpy(np.stack(images)[expected]).permute(0, 3, 1, 2))
    assert np.array_equal(np.asarray(opened[0][0]), images[expected[0]])


@pytest.mark.parametrize('part', ['[3:3]', '[:7]', '[-7:]', '[4:2]', '[90%:110%]'])
def test_part_that_is_not_there_is_refused(tmp_path, images, part):
    write_parquet(tmp_path / 'train.parquet', images)
    with pytest.raises(UserError, match="The split 'train' has 6 images and no part"):
        load_images(f'train{part}', tmp_path)


def test_part_of_other_data_is_refused(tmp_path, images):
    for split in ('train', 'test'):
        (tmp_path / split / 'cat').mkdir(parents=True)
        (tmp_path / split / 'cat' / '0.png').write_bytes(png(images[0]))
    for read in (load_images, open_images):
        for dataset in ('', 'torch/image_folder'):
            with pytest.raises(UserError, match='a part of a split, which only Parquet has'):
                read('train[:90%]', tmp_path, dataset=dataset)


def test_broken_image_of_a_part_is_named_by_its_row(tmp_path, images):
    write_parquet(tmp_path / 'train.parquet', [*images[:3], b'no image'])
    part = open_images('train[2:]', tmp_path)
    with pytest.raises(UserError, match='Row 3 of .* is not a readable image'):
        part[1]


def test_keys_name_endings_of_a_folder_of_images_and_else_columns(tmp_path, images):
    for name in ('cat', 'dog'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        (tmp_path / 'train' / name / '0.png').write_bytes(png(images[0]))
        Image.fromarray(images[1]).save(tmp_path / 'train' / name / '1.jpg')
    assert len(load_images('train', tmp_path)) == 4
    assert len(load_images('train', tmp_path, input_key='.png')) == 2
    for source in (dict(), dict(dataset='torch/image_folder')):
        for keys in (dict(input_key='img'), dict(target_key='label')):
            loaded = load_images('train', tmp_path, **source, **keys)
            assert len(loaded) == 4 and 'ignored, as' in loaded.remark and list(keys.values())[0] in loaded.remark
    assert not load_images('train', tmp_path, input_key='.png').remark


@pytest.fixture
def classes(tmp_path, images):
    """Folder of images in folders by class: of cat two, of dog one."""
    for i, name in enumerate(('cat/0.png', 'cat/1.png', 'dog/0.png')):
        path = tmp_path / 'pictures' / 'train' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(images[i]))
    return tmp_path / 'pictures'


@pytest.mark.parametrize('content, names, labels, remark', [
    ('cat\ndog\n', ('cat', 'dog'), [0, 0, 1], ''),
    ('dog\ncat\n\n', ('dog', 'cat'), [1, 1, 0], ''),
    ('cat\nhog\n', ('cat', 'hog'), [0, 0], 'left out, as --class-map does not name dog.'),
    ('\ufeffcat\ndog\n', ('\ufeffcat', 'dog'), [1], '2 images in {root} left out, as --class-map does not name cat.')
])
def test_class_map(classes, tmp_path, content, names, labels, remark):
    (tmp_path / 'classes.txt').write_text(content, encoding='utf-8')
    loaded = load_images('train', classes, class_map=str(tmp_path / 'classes.txt'))
    assert (loaded.class_names, loaded.labels.tolist()) == (names, labels)
    assert loaded.remark.endswith(remark.format(root=classes / 'train')) and bool(loaded.remark) == bool(remark)


@pytest.mark.parametrize('numbers, names', [
    ({'cat': 0, 'dog': 0}, ('cat',)), ({'dog': 0, 'cat': 2}, None), ({'dog': 1, 'cat': 0}, ('cat', 'dog'))])
def test_names_of_classes_are_known_by_their_numbers(classes, tmp_path, numbers, names):
    (tmp_path / 'classes.pkl').write_bytes(pickle.dumps(numbers))
    loaded = load_images('train', classes, class_map=str(tmp_path / 'classes.pkl'))
    assert loaded.class_names == names and sorted(loaded.labels.tolist()) == sorted(
        [numbers['cat']] * 2 + [numbers['dog']])


@pytest.mark.parametrize('content', [b'', b'no pickle'])
def test_class_map_that_can_not_be_read(classes, tmp_path, content):
    (tmp_path / 'classes.pkl').write_bytes(content)
    with pytest.raises(UserError, match="timm could not open the split 'train'"):
        load_images('train', classes, class_map=str(tmp_path / 'classes.pkl'))


def test_images_outside_the_folders_of_classes_are_no_class(classes, images):
    hidden = classes / 'train' / '.ipynb_checkpoints' / '0.png'
    hidden.parent.mkdir()
    hidden.write_bytes(png(images[0]))
    for dataset in ('', 'torch/image_folder'):
        with pytest.raises(UserError, match=r'has images in \.ipynb_checkpoints, which would be a class; move'):
            load_images('train', classes, dataset=dataset)
    hidden.rename(classes / 'train' / '0.png')
    with pytest.raises(UserError, match='has images beside its folders of classes, which would be a class; move'):
        load_images('train', classes)


def test_only_endings_that_are_not_read_are_told(classes, images):
    (classes / 'train' / 'dog' / '1.webp').write_bytes(png(images[4]))
    Image.fromarray(images[5]).save(classes / 'train' / 'dog' / '2.jpg')
    remark = load_images('train', classes).remark
    assert '1 image in ' in remark
    advice, = re.findall('--input-key "(.+)"', remark)
    for endings in (advice, advice.upper()):
        loaded = load_images('train', classes, input_key=endings)
        assert (loaded.remark, len(loaded)) == ('', 5)


def test_endings_that_are_not_read_are_told_where_no_image_is_left(classes):
    for path in sorted(classes.rglob('*.png')):
        path.rename(path.with_suffix('.BMP'))
    with pytest.raises(UserError, match='Found 0 images .* 3 images in .* left out, as timm does not read .bmp by def'):
        load_images('train', classes)


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_16_bits_of_a_folder_are_scaled(tmp_path, dataset):
    (tmp_path / 'test' / 'cat').mkdir(parents=True)
    Image.fromarray(np.full((32, 32), 2 << 8, np.uint16)).save(tmp_path / 'test' / 'cat' / '0.png')
    assert load_images('test', tmp_path, dataset=dataset).images.unique().tolist() == [2]


@pytest.mark.parametrize('dataset, options, message', [
    ('torch/mnist', {}, "torch/mnist has no split 'trian'; there are train and test"),
    ('torch/CIFAR10', {}, "has no split 'trian'"),
    ('torch/image_folder', {}, "has no split 'trian' .it has: train"),
    ('torch/image_folder', dict(split=''), "has no split '' .it has: train"),
    ('', dict(split=''), "has no split '' .it has: train"),
    ('ImageFolder', {}, "data set 'ImageFolder' is not read; --dataset begins with hfds/ or torch/ .* Leave it out"),
    ('wds/shards', {}, "'wds/shards' is not read; .*wds/, tfds/ and hfids/ can be read from end to end only"),
    ('torch/image_folder', dict(split='train', class_map='classes.txt'), 'timm takes no --class-map for torch/'),
])
def test_what_timm_would_take_for_something_else_is_refused(classes, dataset, options, message):
    with pytest.raises(UserError, match=message):
        load_images(**dict(dict(split='trian', data_dir=classes, dataset=dataset), **options))


def test_class_goes_before_what_else_is_known_of_an_image(images):
    class Digits:  # as torchvision has QMNIST
        targets = torch.tensor([[3, 77], [1, 78]])

        def __len__(self):
            return 2

    assert timm_data._dataset_labels(Digits()).tolist() == [3, 1]


def test_parquet_is_found_behind_links(tmp_path, images):
    write_parquet(tmp_path / 'there' / 'test.parquet', images)
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here' / 'data').symlink_to(tmp_path / 'there')
    assert load_images('test', tmp_path / 'here').labels.tolist() == list(range(6))


def test_columns_are_those_that_are_named(tmp_path, images):
    cells = [dict(bytes=png(array), path=None) for array in images]
    table = pa.table(dict(picture=cells, image=cells[::-1], fine=[5, 4, 3, 2, 1, 0], label=[0] * 6))
    pq.write_table(table, tmp_path / 'test.parquet')
    seen = {}
    for picture in ('picture', 'image'):
        for label in ('fine', 'label'):
            keys = dict(input_key=picture, target_key=label)
            loaded, opened = (load(**keys, split='test', data_dir=tmp_path) for load in (load_images, open_images))
            assert loaded.labels.tolist() == opened.labels.tolist()
            assert np.array_equal(np.asarray(opened[0][0]), loaded.images[0].permute(1, 2, 0).numpy())
            seen[picture, label] = loaded
    assert seen['image', 'fine'].labels.tolist() == [5, 4, 3, 2, 1, 0] and not seen['image', 'label'].labels.any()
    assert torch.equal(seen['image', 'fine'].images.flip(0), seen['picture', 'fine'].images)
    with pytest.raises(UserError, match="no target column 'other'"):
        load_images('test', tmp_path, target_key='other')


@pytest.mark.parametrize('one, other', [
    (dict(crop_pct=1.), dict(crop_pct=.5)), (dict(interpolation='bilinear'), dict(interpolation='bicubic')),
    (dict(crop_mode='center'), dict(crop_mode='squash')), (dict(input_size=(3, 32, 32)), dict(input_size=(1, 32, 32))),
])
def test_cache_is_of_the_way_in_which_images_were_made(tmp_path, one, other):
    write_parquet(tmp_path / 'test.parquet', [np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)])
    first, second, again = (load_images('test', tmp_path, **options).images for options in (one, other, one))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_missing_data_is_named(tmp_path, images):
    with pytest.raises(UserError, match='does not exist'):
        find_parquet(tmp_path / 'nowhere', 'train')
    with pytest.raises(UserError, match='has no Parquet files'):
        find_parquet(tmp_path, 'train')
    write_parquet(tmp_path / 'train-00000-of-00002.parquet', images)
    with pytest.raises(UserError, match=r"no split 'test' \(it has: train\)"):
        find_parquet(tmp_path, 'test')
    with pytest.raises(UserError, match='should have 2 shards but has 1'):
        find_parquet(tmp_path, 'train')
    write_parquet(tmp_path / 'a' / 'test.parquet', images)
    write_parquet(tmp_path / 'b' / 'test.parquet', images)
    with pytest.raises(UserError, match=r'several subfolders \(a, b\)'):
        find_parquet(tmp_path, 'test')


@pytest.mark.parametrize('cell', ['cat/0.png', dict(bytes=None, path='cat/0.png')], ids=['string', 'struct'])
def test_paths_in_the_place_of_images_are_named(tmp_path, cell):
    """As the package datasets writes a folder of images to Parquet."""
    pq.write_table(pa.table(dict(image=[cell] * 2, label=[0, 1])), tmp_path / 'test.parquet')
    for load in (load_images, open_images):
        with pytest.raises(UserError, match="'image' of .* holds paths of images, not the images; give the folder"):
            load('test', tmp_path)


def test_broken_files_are_named(tmp_path, images, monkeypatch):
    write_parquet(tmp_path / 'row' / 'test.parquet', [images[0], b'no image'])
    with pytest.raises(UserError, match='Row 1 of .* is not a readable image'):
        load_images('test', tmp_path / 'row')
    write_parquet(tmp_path / 'cut' / 'test.parquet', images)
    path = tmp_path / 'cut' / 'test.parquet'
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match='not a readable Parquet file'):
        load_images('test', tmp_path / 'cut')
    write_parquet(tmp_path / 'text' / 'test.parquet', images, labels=list('abcdef'))
    for limit in (0, data_module.MEMORY_LIMIT):  # through datasets, and by ourselves
        monkeypatch.setattr(data_module, 'MEMORY_LIMIT', limit)
        with pytest.raises(UserError, match=r"holds string, not class numbers; .*class_encode_column\('label'\)"):
            open_images('test', tmp_path / 'text')
    write_parquet(tmp_path / 'none' / 'test.parquet', images, labels=[*range(5), None])
    with pytest.raises(UserError, match='has no class number in 1 rows; remove these'):
        load_images('test', tmp_path / 'none')
    write_parquet(tmp_path / 'column' / 'test.parquet', images, column='picture')
    with pytest.raises(UserError, match='no input column .*--input-key'):
        load_images('test', tmp_path / 'column')


def broken_png():
    """A PNG whose compressed data is cut into chunks at a wrong place."""
    content = bytearray(png(noise(0)))
    place = content.index(b'IDAT')
    length = int.from_bytes(content[place - 4:place], 'big')
    content[place - 4:place] = (length // 2).to_bytes(4, 'big')
    return bytes(content)


def enormous_bmp():
    buffer = io.BytesIO()
    Image.fromarray(noise(0)).save(buffer, format='BMP')
    content = bytearray(buffer.getvalue())
    content[18:22] = (1 << 28).to_bytes(4, 'little')  # the width
    return bytes(content)


@pytest.mark.parametrize('content', [b'', b'no image', png(noise(0))[:-600], broken_png(), enormous_bmp()],
                         ids=['empty', 'text', 'cut', 'chunks', 'size'])
def test_a_broken_file_is_named_and_not_replaced_by_the_next(tmp_path, content):
    folder = image_folder(tmp_path, [png(noise(1)), png(noise(2)), content, png(noise(3))])
    path = tmp_path / 'test' / 'cat' / '1.png'
    for read in (lambda: load_images('test', folder), lambda: list(open_images('test', folder))):
        with pytest.raises(UserError, match=r'^Image 1 of the data \(.*\) is not a readable image') as e:
            read()
        assert f'({path})' in str(e.value) and '\n' not in str(e.value)


def test_labels_are_known_without_decoding(tmp_path):
    """Files that no decoder reads, in folders and in a tar file."""
    folder = image_folder(tmp_path, [b'no image'] * 5)
    data = open_images('test', folder)
    assert data.labels.tolist() == [0, 0, 0, 1, 1] and data.class_names == ('cat', 'dog')
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(folder / 'test', '.')
    data = open_images('test', tmp_path / 'all.tar', dataset='folder')
    assert data.labels.tolist() == [0, 0, 0, 1, 1] and data.class_names == ('cat', 'dog')


def test_images_of_a_tar_file(tmp_path):
    folder = image_folder(tmp_path, [png(noise(i)) for i in range(4)])
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(folder / 'test', '.')
    loaded = load_images('test', tmp_path / 'all.tar', dataset='folder')
    assert torch.equal(loaded.images, load_images('test', folder).images)
    assert loaded.images[1].permute(1, 2, 0).tolist() == noise(2).tolist()
    (tmp_path / 'cut.tar').write_bytes((tmp_path / 'all.tar').read_bytes()[:700])
    with pytest.raises(UserError, match='timm could not open the split'):
        load_images('test', tmp_path / 'cut.tar', dataset='folder')


def test_training_on_a_tar_file_is_not_validated_on_its_own_images(tmp_path, fails):
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(image_folder(tmp_path, [png(noise(i)) for i in range(4)]) / 'test', '.')
    line = fails('train', '--model', 'lm_resnet20', '--dataset', 'folder', '--data-dir', tmp_path / 'all.tar',
                 '--num-classes', 2, '--output', tmp_path / 'runs')
    assert 'all.tar is one archive without splits' in line and not (tmp_path / 'runs').exists()


# What fits into memory


def test_files_are_not_read_to_find_that_they_do_not_fit(few_digits, monkeypatch):
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', 1000)
    monkeypatch.setattr('timm_lm.data.sha256', lambda path: pytest.fail('read as a whole'))
    with pytest.raises(UserError, match='more than the 0.0 GiB held in memory'):
        load_images('test', few_digits)


def test_split_must_fit_machine_and_device(few_digits, monkeypatch):
    size = len(load_images('train', few_digits)) * 3 * 32 * 32
    kept, ask = torch.device('cuda'), os.sysconf
    for host, device, fits in ((4 * size, 4 * size, True), (4 * size - 4, 4 * size, False),
                               (4 * size, 4 * size - 4, False)):
        pages = dict(SC_PAGE_SIZE=4, SC_PHYS_PAGES=host // 4)
        monkeypatch.setattr(os, 'sysconf', lambda name, pages=pages: pages[name] if name in pages else ask(name))
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda asked, size=device: (
            SimpleNamespace(total_memory=size) if asked == kept else pytest.fail('another device')))
        with nullcontext() if fits else pytest.raises(TooLarge, match='more than the 0.0 GiB held in memory'):
            load_images('train', few_digits, device=kept)


def test_split_must_fit_once_for_each_process_of_a_machine(few_digits, monkeypatch):
    size = len(load_images('train', few_digits)) * 3 * 32 * 32
    pages, ask = dict(SC_PAGE_SIZE=4, SC_PHYS_PAGES=2 * size), os.sysconf
    monkeypatch.setattr(os, 'sysconf', lambda name: pages[name] if name in pages else ask(name))
    for processes, fits in (('2', True), ('3', False)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
        with nullcontext() if fits else pytest.raises(TooLarge, match='more than the 0.0 GiB held in memory'):
            load_images('train', few_digits)


def test_split_must_fit_the_container(few_digits, monkeypatch, tmp_path):
    size = len(load_images('train', few_digits)) * 3 * 32 * 32
    monkeypatch.setattr(data_module, '_CONTAINER_LIMITS', [tmp_path / 'memory.max', tmp_path / 'nowhere'])
    for limit, fits in (('max', True), (f'{4 * size}', True), (f'{4 * size - 4}', False)):
        (tmp_path / 'memory.max').write_text(f'{limit}\n')
        with nullcontext() if fits else pytest.raises(TooLarge, match='more than the 0.0 GiB held in memory'):
            load_images('train', few_digits)


# The cache


def test_second_time_comes_from_the_cache(tmp_path, images, monkeypatch):
    write_parquet(tmp_path / 'test.parquet', images)
    first = load_images('test', tmp_path)
    monkeypatch.setattr(data_module, '_decode_all', None)  # a second decoding would fail
    second = load_images('test', tmp_path)
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_cached_splits_that_nobody_reads_are_removed(tmp_path):
    one = DecodedImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1))
    names = ('unused', 'read', 'new')
    for name in names:
        write_cache(tmp_path / f'{name}.safetensors', one)
    (tmp_path / '.unused.safetensors.7').write_text('left by a kill')
    (tmp_path / 'lost.safetensors').symlink_to('nowhere')  # which cannot be looked at
    month = time.time() - 31 * 86400
    for path in tmp_path.iterdir():
        if not path.is_symlink() and path.name != 'new.safetensors':
            os.utime(path, (month, month))
    assert read_cache(tmp_path / 'read.safetensors') is not None
    write_cache(tmp_path / 'another.safetensors', one)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f'{name}.safetensors' for name in ('another', 'lost', 'new', 'read')]


def test_changed_data_and_cut_caches_are_decoded_anew(tmp_path, images, own_cache):
    write_parquet(tmp_path / 'test.parquet', images[:3])
    before = set(own_cache.rglob('*.safetensors'))
    assert len(load_images('test', tmp_path)) == 3
    (cache,) = set(own_cache.rglob('*.safetensors')) - before
    cache.write_bytes(cache.read_bytes()[:-100])
    assert torch.equal(load_images('test', tmp_path).images[2], torch.from_numpy(images[2]).permute(2, 0, 1))
    write_parquet(tmp_path / 'test.parquet', images[3:])
    assert torch.equal(load_images('test', tmp_path).images[0], torch.from_numpy(images[3]).permute(2, 0, 1))


def test_folder_of_images_comes_from_the_cache_until_it_changes(tmp_path, images, own_cache, monkeypatch):
    def write(name, array):
        (tmp_path / 'test' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'test' / name).write_bytes(png(array))

    def load():
        found = load_images('test', tmp_path)
        return found.images[:, :, 0, 0].tolist(), found.labels.tolist(), found.class_names

    for i, array in enumerate(images[:4]):
        write(f"{('cat', 'dog')[i % 2]}/{i}.png", array)
    before = set(own_cache.rglob('*.safetensors'))
    first = load()
    with monkeypatch.context() as patched:
        patched.setattr(data_module, '_decode_all', None)  # a second decoding would fail
        assert load() == first and first[1:] == ([0, 0, 1, 1], ('cat', 'dog'))
    write('cat/0.png', images[5])
    changed = load()
    assert changed[0][0] == images[5][0, 0].tolist() and changed[0][1:] == first[0][1:]
    (tmp_path / 'test' / 'cat').rename(tmp_path / 'test' / 'eel')
    pixels, *names = load()
    assert pixels == changed[0][2:] + changed[0][:2] and names == [[0, 0, 1, 1], ('dog', 'eel')]
    assert len(set(own_cache.rglob('*.safetensors')) - before) == 1


def test_other_images_of_the_same_name_size_and_age_are_not_mistaken(tmp_path):
    seen = []
    path = tmp_path / 'test' / 'cat' / '0.png'
    path.parent.mkdir(parents=True)
    for value in (1, 2):
        before = path.stat().st_ctime_ns if path.exists() else 0
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path, compress_level=0)
        os.utime(path, (1, 1))
        while path.stat().st_ctime_ns == before:  # some systems count in ticks of the clock
            os.utime(path, (1, 1))
        seen.append(load_images('test', tmp_path).images.unique().tolist())
    assert seen == [[1], [2]]


def test_all_images_that_can_not_be_read_are_told_at_once(tmp_path, images):
    for i in range(9):
        path = tmp_path / 'test' / 'cat' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'no image' if i in (0, 3, 4) else png(images[0]))
    with pytest.raises(UserError) as e:
        load_images('test', tmp_path)
    first, *_, last = str(e.value).split('; repair or remove it. ')
    assert '0.png) is not a readable image' in first
    assert re.fullmatch(r'The same applies to 2 more: Image 3 of .*3\.png\), Image 4 of the data \(.*4\.png\)\.', last)


def test_classes_that_differ_in_case_alone_have_one_order(tmp_path, images):
    """timm's own changes from process to process."""
    letters = 'ABCDEFGH'
    for name in (*letters, *letters.lower()):
        (tmp_path / 'test' / name).mkdir(parents=True)
        (tmp_path / 'test' / name / '0.png').write_bytes(png(np.full((32, 32, 3), ord(name), np.uint8)))
    loaded = load_images('test', tmp_path)
    assert ''.join(loaded.class_names) == 'AaBbCcDdEeFfGgHh'
    assert [chr(image.max()) for image in loaded.images] == [loaded.class_names[label] for label in loaded.labels]


def test_image_that_is_a_link_to_nowhere_is_named(tmp_path, images):
    (tmp_path / 'test' / 'cat').mkdir(parents=True)
    (tmp_path / 'test' / 'cat' / '0.png').write_bytes(png(images[0]))
    (tmp_path / 'test' / 'cat' / '1.png').symlink_to('nowhere.png')
    with pytest.raises(UserError, match='Image 1 of the data .*1.png. is not a readable image'):
        load_images('test', tmp_path)


def test_no_place_for_a_cache_is_no_error(tmp_path, images, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr('huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE', str(tmp_path / 'file' / 'assets'))
    write_parquet(tmp_path / 'data' / 'test.parquet', images)
    assert len(load_images('test', tmp_path / 'data')) == 6


def test_other_data_of_the_same_name_size_and_age_is_not_mistaken(tmp_path):
    loaded = []
    for name, value in (('a', 1), ('b', 2)):
        path = tmp_path / name / 'test.parquet'
        write_parquet(path, [np.full((32, 32, 3), value, np.uint8)])
        os.utime(path, (1, 1))
        loaded.append(load_images('test', path.parent).images.unique().tolist())
    assert loaded == [[1], [2]]


def test_copied_folder_is_read_alike(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'copy')
    again = load_images('test', dataset=f"hfds/{tmp_path / 'copy'}", input_size=(1, 8, 8))
    assert torch.equal(again.images, load_images('test', digits, input_size=(1, 8, 8)).images)


def test_worker_that_is_no_copy_reads_parquet_itself(tmp_path, images):
    for shard in range(2):
        write_parquet(tmp_path / f'train-{shard:05}-of-00002.parquet', images)
    opened = open_images('train', tmp_path)
    assert len(opened) == 2 * len(images)
    sent = pickle.dumps(opened)
    assert len(sent) < 5_000 + 8 * len(opened)  # no images
    received = pickle.loads(sent)
    for index in (0, len(images) - 1, len(images), 2 * len(images) - 1):
        assert np.array_equal(received[index][0], opened[index][0])
        assert np.array_equal(received[index][0], images[index % len(images)])


def test_folder_of_images_is_searched_for_parquet_once(classes, monkeypatch):
    walks, walk = [], data_module.files_below
    monkeypatch.setattr(data_module, 'files_below', lambda folder: walks.append(folder) or walk(folder))
    load_images('train', classes)
    assert len(walks) == 1
