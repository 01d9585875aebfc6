"""Batches: from memory and from worker processes, what they depend on, and which of the two a training takes."""
import json
import multiprocessing
import os
import pickle
import random
import re
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import rewrite
from PIL import Image
from test_data import image_folder, noise, png, write_parquet
from timm.data import Mixup, create_transform

from timm_lm import data as data_module
from timm_lm.augment import BatchMixup
from timm_lm.data import open_images
from timm_lm.decoded import DecodedImages
from timm_lm.errors import UserError
from timm_lm.loader import IGNORE_LABEL, Augmentation, MemoryLoader, WorkerLoader, _seed
from timm_lm.training.batches import _transform, create_loader, load_split
from timm_lm.training.options import parse_options

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CPU = torch.device('cpu')

pytestmark = pytest.mark.filterwarnings('ignore:This DataLoader will create')  # more processes than processors


def loader(n=20, **kwargs):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return MemoryLoader(DecodedImages(images, torch.arange(n)), 6, MEAN, STD, **kwargs)


def same(batches, others):
    """Whether two lists of batches are equal bit for bit."""
    return len(batches) == len(others) and all(
        torch.equal(mine, other) for pair in zip(batches, others) for mine, other in zip(*pair))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Folder of Parquet: 24 colour images of several sizes to train on, 10 to test on."""
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('test', 10)):
        sizes = [(32, 32) if i % 3 == 0 else (40 + i, 56) for i in range(count)]
        arrays = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        write_parquet(folder / f'{split}.parquet', arrays, [i % 10 for i in range(count)])
    return folder


def loaders(folder, *argv):
    """(training, validation) batches of a folder, as `timm-lm train` makes them by these options."""
    args = parse_options(['--data-dir', str(folder), '--val-split', 'test', *map(str, argv)])
    size = args.input_size or (3, 32, 32)
    config = dict(input_size=tuple(size), crop_pct=args.crop_pct or 1., interpolation=args.interpolation or 'bilinear',
                  mean=(0.5,) * size[0], std=(0.25,) * size[0])
    accelerator = Accelerator(cpu=True)
    return tuple(
        create_loader(args, load_split(args, split, config, False, is_training), config, accelerator, 10, is_training)
        for split, is_training in (('train', True), ('test', False)))


# From memory


def test_evaluation_counts_every_image_once_in_batches_of_one_shape():
    batches = list(loader())
    assert [images.shape for images, _ in batches] == [(6, 3, 8, 8)] * 4
    labels = torch.cat([labels for _, labels in batches])
    assert labels[:20].tolist() == list(range(20))
    assert (labels[20:] == IGNORE_LABEL).all()


def test_training_batches_depend_on_seed_epoch_and_batch_alone():
    def batches(start=0, epoch=0, **kwargs):
        augmentation = Augmentation(
            padding=2, hflip=0.5, vflip=0.5, erase=0.5, mixup=BatchMixup(0.2, cutmix_alpha=1., num_classes=20))
        one = loader(is_training=True, augmentation=augmentation, **kwargs)
        one.set_epoch(epoch)
        return list(one.batches(start))

    whole = batches()
    assert len(whole) == 3 and all(targets.shape == (6, 20) for _, targets in whole)
    torch.rand(3), np.random.rand(3), random.random()  # the global streams play no part
    assert same(batches(), whole)
    assert same(batches(start=1), whole[1:])
    assert not same(batches(epoch=1), whole)
    assert not same(batches(seed=1), whole)


def test_each_epoch_shows_each_image_once():
    one = loader(n=24, is_training=True)
    orders = []
    for epoch in range(2):
        one.set_epoch(epoch)
        orders.append(torch.cat([labels for _, labels in one]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24)) and orders[0] != orders[1]


@pytest.mark.parametrize('is_training', [True, False])
def test_processes_share_the_data_without_overlap(is_training):
    shards = []
    for rank in range(3):
        one = loader(n=20, is_training=is_training, rank=rank, world_size=3)
        assert len(one) == (1 if is_training else 2)
        shards.append([label for _, labels in one for label in labels.tolist() if label != IGNORE_LABEL])
    seen = [label for shard in shards for label in shard]
    assert len(set(seen)) == len(seen) == (18 if is_training else 20)


def test_too_little_data_for_a_batch_is_named():
    with pytest.raises(UserError, match='5 images, less than one batch of 6'):
        loader(n=5, is_training=True)


def test_memory_format():
    images, _ = next(iter(loader(channels_last=True)))
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('repeats', [2, 3])
def test_repeated_augmentation(repeats):
    """Two processes: an image occurs so many times in the global batch, each time augmented in another way."""
    ranks = [loader(n=24, is_training=True, augmentation=Augmentation(erase=1.), rank=rank, world_size=2,
                    repeats=repeats) for rank in range(2)]
    seen = []
    for epoch in range(2):
        for one in ranks:
            one.set_epoch(epoch)
        batches = [[torch.cat(parts) for parts in zip(*pair)] for pair in zip(*ranks)]
        assert len(batches) == len(ranks[0]) == 2  # 24 images on 2 processes in batches of 6
        for images, labels in batches:
            assert labels.unique(return_counts=True)[1].tolist() == [repeats] * (12 // repeats)
            assert len(images.unique(dim=0)) == 12
        seen.append(torch.cat([labels for _, labels in batches]).tolist())
    assert seen[0] != seen[1]


@pytest.mark.parametrize('options', [
    ['--mixup', 0.4, '--cutmix', 1, '--mixup-prob', 0.5, '--mixup-switch-prob', 0.2],
    ['--cutmix-minmax', 0.2, 0.8, '--mixup-mode', 'elem'],
    ['--cutmix', 1, '--mixup-mode', 'pair', '--smoothing', 0.3],
])
def test_mixing_is_that_of_timm_by_the_same_options(few_digits, options):
    plain, mixed = (loaders(few_digits, '-c', 'demo_digits', '--batch-size', 16, *more)[0] for more in ([], options))
    args = parse_options(['-c', 'demo_digits', *map(str, options)])
    timms = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                  label_smoothing=args.smoothing, num_classes=10)
    for step, ((images, labels), (mixed_images, targets)) in enumerate(zip(plain, mixed, strict=True)):
        np.random.seed(_seed(mixed.seed, mixed.epoch, step, mixed.rank))
        expected, wanted = timms(images.clone(), labels)
        torch.testing.assert_close(mixed_images, expected)
        torch.testing.assert_close(targets, wanted)


def test_mixing_ends_at_its_epoch(few_digits):
    options = ['-c', 'demo_digits', '--smoothing', 0.2]
    plain = loaders(few_digits, *options)[0]
    mixed = loaders(few_digits, *options, '--mixup', 1, '--mixup-off-epoch', 2)[0]
    for epoch in range(4):
        plain.set_epoch(epoch)
        mixed.set_epoch(epoch)
        (images, labels), (mixed_images, targets) = next(iter(plain)), next(iter(mixed))
        smoothed = torch.nn.functional.one_hot(labels, 10) * 0.8 + 0.2 / 10
        if epoch < 2:
            assert not torch.equal(mixed_images, images) and not torch.allclose(targets, smoothed)
        else:
            assert torch.equal(mixed_images, images)
            torch.testing.assert_close(targets, smoothed)


def test_boxes_are_erased_from_mixed_images(few_digits):
    """As in timm: an erased box is empty, not half of a partner's image."""
    options = ['-c', 'demo_digits', '--mixup', 1, '--reprob', 1, '--remode', 'const']
    mixed = loaders(few_digits, *options[:-4])[0]
    erased = loaders(few_digits, *options)[0]
    (images, _), (with_boxes, _) = next(iter(mixed)), next(iter(erased))
    inside = with_boxes != images
    assert inside.flatten(1).any(1).all()
    assert (with_boxes[inside] == 0).all()


# By worker processes

HEAVY = ['--aa', 'rand-m9-mstd0.5-inc1', '--color-jitter', 0.4, '--scale', 0.3, 1, '--vflip', 0.5, '--grayscale-prob',
         0.2, '--gaussian-blur-prob', 0.2, '--mixup', 0.2, '--cutmix', 1, '--reprob', 0.5, '--batch-size', 4]


def test_workers_change_nothing_in_a_batch(photos):
    """RandAugment, jitter, random crops, erasing and mixing: bit for bit the same for 0, 1 and 2 worker processes."""
    whole = list(loaders(photos, *HEAVY, '--workers', 0)[0])
    assert len(whole) == 6 and whole[0][0].shape == (4, 3, 32, 32) and whole[0][1].shape == (4, 10)
    for workers in (1, 2):
        one = loaders(photos, *HEAVY, '--workers', workers)[0]
        first = next(iter(one))  # a pass that is not finished
        assert same([first], whole[:1])
        assert same(list(one), whole)
        assert same(list(one.batches(4)), whole[4:])
        one.set_epoch(1)
        assert not any(same([mine], [other]) for mine, other in zip(one, whole))
    assert not same(list(loaders(photos, *HEAVY, '--workers', 0, '--seed', 1)[0]), whole)


@pytest.mark.parametrize('options', [
    ['--aa', 'rand-m9-mstd0.5-inc1'], ['--reprob', 1], ['--reprob', 1, '--recount', 3],
    ['--reprob', 1, '--remode', 'const'], ['--mixup', 1],
], ids=lambda words: ' '.join(map(str, words)))
def test_each_way_to_augment_reaches_the_batches(photos, options):
    base = ['--color-jitter', 0, '--hflip', 0, '--train-interpolation', 'bilinear', '--batch-size', 4, '--workers', 0]
    changed, plain = (list(loaders(photos, *base, *more)[0]) for more in (options, options[:-2]))
    assert not any(torch.equal(images, other) for (images, _), (other, _) in zip(changed, plain, strict=True))


@pytest.mark.parametrize('option, keyword', [
    ('--aa rand-m5-inc1', dict(auto_augment='rand-m5-inc1')), ('--aa original', dict(auto_augment='original')),
    ('--color-jitter 0.9', dict(color_jitter=0.9)),
    ('--color-jitter-prob 0.3', dict(color_jitter_prob=0.3)), ('--grayscale-prob 0.5', dict(grayscale_prob=0.5)),
    ('--gaussian-blur-prob 0.5', dict(gaussian_blur_prob=0.5)), ('--scale 0.3 0.5', dict(scale=(0.3, 0.5))),
    ('--ratio 2 3', dict(ratio=(2, 3))), ('--train-crop-mode rkrc', dict(train_crop_mode='rkrc')),
    ('--train-interpolation nearest', dict(interpolation='nearest')), ('--hflip 0.2', dict(hflip=0.2)),
    ('--vflip 0.4', dict(vflip=0.4)), ('--no-aug', dict(no_aug=True, interpolation='bilinear')),
])
def test_transform_of_the_options_is_that_of_timm(option, keyword):
    config = dict(input_size=(3, 32, 32), mean=MEAN, std=STD, crop_pct=0.9, interpolation='bilinear')
    mine = _transform(parse_options(['--data-dir', 'DIR', *option.split()]), config, is_training=True)
    # what timm's script gives
    defaults: dict = dict(color_jitter=0.4, interpolation='random', scale=(0.08, 1.), ratio=(3 / 4, 4 / 3))
    theirs = create_transform(
        (3, 32, 32), is_training=True, use_prefetcher=True, mean=MEAN, std=STD, **defaults | keyword)
    image = Image.fromarray(noise(0)).resize((48, 40))
    for seed in range(12):
        found = []
        for transform in (mine, theirs):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            found.append(torch.as_tensor(transform(image)))
        assert torch.equal(*found)


@pytest.mark.parametrize('policy', ['rand-m10-p1-inc1', 'rand-m9-mstd9-p1-inc1', 'augmix-m10', 'original'])
def test_posterizing_to_no_bits_is_black(policy):
    """As timm's operation had it before Pillow 13."""
    config = dict(input_size=(3, 32, 32), mean=MEAN, std=STD, crop_pct=0.9, interpolation='bilinear')
    transform = _transform(parse_options(['--data-dir', 'DIR', '--aa', policy]), config, is_training=True)
    (part,) = (part for part in transform.transforms if hasattr(part, 'ops') or hasattr(part, 'policy'))
    ops = [op for ops in getattr(part, 'policy', None) or [part.ops] for op in ops if op.name.startswith('Posterize')]
    image = Image.fromarray(noise(0))
    for op in pickle.loads(pickle.dumps(ops)):
        for bits, largest in ((8, 255), (1, 128), (0, 0), (-3, 0)):
            assert np.asarray(op.aug_fn(image, bits, **op.kwargs)).max() == largest
    assert ops
    random.seed(0)
    np.random.seed(0)
    for _ in range(40):
        transform(image)


def test_augmentation_that_can_not_be_made(photos):
    with pytest.raises(UserError, match='The augmentation cannot be made with these options'):
        loaders(photos, '--aa', 'random', '--batch-size', 4)


def test_global_random_streams_are_left_as_they_were(photos):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state()

    one = loaders(photos, *HEAVY, '--workers', 0)[0]
    whole = list(one)
    random.random(), np.random.rand(), torch.rand(1)
    *before, torch_before = states()
    assert same(list(one), whole)
    *after, torch_after = states()
    assert before == after and torch.equal(torch_before, torch_after)


def test_each_reading_of_an_image_is_augmented_anew(tmp_path):
    """Twelve equal images, each read by two processes, in two epochs: 24 different ones."""
    write_parquet(tmp_path / 'train.parquet', [noise(0)] * 12)
    data = open_images('train', tmp_path)
    transform = create_transform((3, 32, 32), is_training=True, use_prefetcher=True)
    seen = []
    for rank in range(2):
        one = WorkerLoader(data, 6, MEAN, STD, CPU, transform, workers=0, is_training=True, rank=rank, world_size=2,
                           repeats=2)
        for epoch in range(2):
            one.set_epoch(epoch)
            seen += [images for images, _ in one]
    assert torch.cat(seen).unique(dim=0).shape == (24, 3, 32, 32)


def test_worker_that_is_killed_is_told(few_digits, tmp_path, fails, monkeypatch):
    monkeypatch.setattr('timm_lm.loader._Seeded.__getitem__', lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method('fork', force=True)  # so that the worker is a copy with what was set
    try:
        line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--loader', 'timm', '--workers', 1,
                     '--output', tmp_path)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert 'The processes that read images failed (DataLoader worker (pid' in line and 'use fewer --workers' in line


@pytest.mark.parametrize('kind', ['memory', 'timm'])
@pytest.mark.parametrize('option, dim', [('--hflip', 3), ('--vflip', 2)])
def test_flips_are_done_once(photos, kind, option, dim):
    off = ['--loader', kind, '--workers', 0, '--scale', 1, 1, '--ratio', 1, 1, '--color-jitter', 0, '--hflip', 0,
           '--train-interpolation', '', '--batch-size', 4]
    upright, flipped = (list(loaders(photos, *off, *more)[0]) for more in ([], [option, 1]))
    assert len(upright) > 1
    assert all(torch.equal(images.flip(dim), other) for (images, _), (other, _) in zip(upright, flipped, strict=True))


@pytest.mark.parametrize('options, pinned', [([], False), (['--pin-mem'], True)])
def test_batches_of_workers_are_pinned_on_request(photos, options, pinned):
    batches = loaders(photos, '--loader', 'timm', '--workers', 0, '--batch-size', 4, *options)
    assert [split.loader.pin_memory for split in batches] == [pinned] * 2


def test_crop_of_the_options_is_done_in_memory(few_digits):
    plain, cropped = (list(loaders(few_digits, '-c', 'demo_digits', '--pad-crop', n)[0]) for n in (0, 2))
    assert not same(cropped, plain)
    assert all(torch.equal(labels, others) for (_, labels), (_, others) in zip(plain, cropped, strict=True))


@pytest.mark.parametrize('width, more', [
    (48, ['--no-aug']),
    (60, ['--no-aug']),
    (48, ['--train-interpolation', '', '--scale', 1, 1, '--ratio', 1, 1, '--color-jitter', 0, '--hflip', 0]),
])
def test_training_in_memory_sees_whole_images(tmp_path, width, more):
    """The share of a centre crop is for validation; images are those of timm's transforms."""
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        write_parquet(tmp_path / f'{split}.parquet', [rng.integers(0, 256, (48, width, 3), dtype=np.uint8)] * 8)
    common = ['--crop-pct', 0.5, '--batch-size', 4, '--workers', 0, *more]
    (memory, shown), (workers, _) = (loaders(tmp_path, *common, '--loader', kind) for kind in ('memory', 'timm'))
    assert same(list(memory), list(workers))
    assert not torch.equal(next(iter(shown))[0], next(iter(memory))[0])


@pytest.mark.parametrize('options', [
    [],
    ['--crop-pct', 0.875, '--interpolation', 'bicubic'],
    ['-c', 'demo_digits', '--input-size', 1, 20, 20],
])
def test_validation_is_that_of_memory(photos, options):
    """Images of the right size and others, in colour and grey; the last batch is filled up."""
    common = [*options, '-b', 4, '-vb', 4, '--train-interpolation', '', '--scale', 1, 1, '--ratio', 1, 1,
              '--color-jitter', 0]
    memory = list(loaders(photos, *common, '--loader', 'memory')[1])
    assert [labels.tolist() for _, labels in memory][-1] == [8, 9, IGNORE_LABEL, IGNORE_LABEL]
    for workers in (0, 1):
        assert same(list(loaders(photos, *common, '--loader', 'timm', '--workers', workers)[1]), memory)


def test_counting_at_the_end_is_of_the_whole_split():
    """What one of several processes counts the final weights on."""
    data = loader(n=20).data
    shard = loader(n=20, rank=1, world_size=2, channels_last=True)
    images = torch.cat([images[labels != IGNORE_LABEL] for images, labels in shard.on_cpu(8)])
    labels = torch.cat([labels for _, labels in shard.on_cpu(8)])
    assert labels.tolist() == [*range(20), *[IGNORE_LABEL] * 4]
    assert images.is_contiguous()
    assert torch.equal(images, torch.cat([batch for batch, _ in loader(n=20)])[:20])
    assert len(shard) == 2 and data.images.shape == (20, 3, 8, 8)


def test_counting_at_the_end_by_workers_is_of_the_whole_split(photos):
    shard = WorkerLoader(
        open_images('test', photos), 4, MEAN, STD, CPU, create_transform((3, 32, 32), use_prefetcher=True), workers=1,
        rank=1, world_size=2)
    assert [labels.tolist() for _, labels in shard] == [[1, 3, 5, 7], [9, *[IGNORE_LABEL] * 3]]
    assert [labels.tolist() for _, labels in shard.on_cpu(5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize('kind', ['parquet', 'folder'])
def test_images_can_be_sent_to_a_worker(photos, tmp_path, kind):
    """Worker processes that are not forked, as on macOS, Windows, and from Python 3.14 on, get the data by pickle."""
    folder = photos if kind == 'parquet' else image_folder(tmp_path, [png(np.zeros((32, 32, 3), np.uint8))] * 10)
    one = WorkerLoader(open_images('test', folder), 4, MEAN, STD, CPU, create_transform((3, 32, 32),
                       use_prefetcher=True), workers=0)
    images = one.loader.dataset
    sent = pickle.loads(pickle.dumps(images))
    assert len(sent) == 10
    for index in range(10):
        (image, label), (other, other_label) = images[index, (0,)], sent[index, (0,)]
        assert np.array_equal(image, other) and label == other_label


# Images that cannot be read


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_a_worker_can_not_read_is_named_in_one_line(tmp_path, workers):
    path = tmp_path / 'test.parquet'
    write_parquet(path, [*(png(noise(i)) for i in range(5)), b'no image'])
    one = WorkerLoader(open_images('test', tmp_path), 4, MEAN, STD, CPU, create_transform((3, 32, 32),
                       use_prefetcher=True), workers=workers)
    message = ''
    try:
        list(one)
    except UserError as e:  # not pytest.raises, whose traceback would hold the process
        message = str(e)
    assert message.startswith(f'Row 5 of {path} is not a readable image') and '\n' not in message


def test_a_training_on_an_image_that_a_worker_can_not_read(few_digits, tmp_path, fails):
    data = tmp_path / 'data'
    rng = np.random.default_rng(0)
    digits = [png(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(20)]
    write_parquet(data / 'train.parquet', [*digits, b'no image'], [i % 10 for i in range(21)])
    write_parquet(data / 'test.parquet', digits, [i % 10 for i in range(20)])
    line = fails('train', '-c', 'demo_digits', '--data-dir', data, '--aa', 'rand-m5', '--workers', 1, '-b', 7,
                 '--model-kwargs', 'layers=(1,1,1)', '--output', tmp_path, '--experiment', 'run')
    assert line.startswith(f"timm-lm: error: Row 20 of {data / 'train.parquet'} is not a readable image")
    assert {path.name for path in (tmp_path / 'run').iterdir()} <= {'.lock', 'args.yaml', 'checkpoints'}


def test_augmentation_that_images_are_too_small_for(few_digits, tmp_path, fails):
    """timm's blur is 23 pixels wide, and mirrors the image at its sides."""
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--input-size', 1, 8, 8, '--workers', 1,
                 '--gaussian-blur-prob', 1, '--pad-crop', 0, '--output', tmp_path)
    assert re.search(r'Row \d+ of .*parquet cannot be transformed by these options \(.*Padding size', line)


# Which of them a training takes

LIMIT = 50_000  # bytes of a decoded split
LARGE = ['--input-size', 1, 20, 20]  # 256 digits then take 102,400 bytes, 64 take 25,600


@pytest.mark.parametrize('options, limit, kinds', [
    ([], None, (MemoryLoader, MemoryLoader)),
    (['--loader', 'memory', '--mixup', 0.2, '--reprob', 0.2, '--vflip', 0.5], None, (MemoryLoader, MemoryLoader)),
    (['--aa', 'rand-m5'], None, (WorkerLoader, MemoryLoader)),
    (['--color-jitter', 0.4], None, (WorkerLoader, MemoryLoader)),
    (['--scale', 0.5, 1], None, (WorkerLoader, MemoryLoader)),
    (['--no-aug'], None, (MemoryLoader, MemoryLoader)),
    (['--loader', 'timm'], None, (WorkerLoader, WorkerLoader)),
    (LARGE, LIMIT, (WorkerLoader, MemoryLoader)),
])
def test_loader_by_options(few_digits, monkeypatch, options, limit, kinds):
    if limit:
        monkeypatch.setattr(data_module, 'MEMORY_LIMIT', limit)
    assert tuple(type(one) for one in loaders(few_digits, '-c', 'demo_digits', *options)) == kinds


def test_run_that_goes_on_reads_its_images_as_before(few_digits, tmp_path, command, fails, monkeypatch):
    """Also where they would fit into memory by now, as other loaders draw other crops and flips."""
    words = ['train', '-c', 'demo_digits', '--data-dir', few_digits, *LARGE, '--model-kwargs', 'layers=(1,1,1)',
             '--epochs', 2, '--warmup-epochs', 0, '--batch-size', 128, '--hflip', 0.5, '--scale', 1, 1, '--ratio', 1, 1,
             '--workers', 0, '--no-amp', '--output', tmp_path, '--experiment', 'run']
    with monkeypatch.context() as patch:
        patch.setattr(data_module, 'MEMORY_LIMIT', LIMIT)
        code, _, err = command(*words)
    assert code == 0, err
    weights = tmp_path / 'run' / 'weights' / 'model.safetensors'
    before = weights.read_bytes()
    code, out, err = command(*words[:-4], '--resume', tmp_path / 'run' / 'checkpoints' / 'step-000000002')
    assert code == 0 and 'Resuming from' in out and weights.read_bytes() == before, err
    state = tmp_path / 'run' / 'checkpoints' / 'step-000000002' / 'state.json'
    assert json.loads(state.read_text())['loader'] == 'timm'
    rewrite(state, loader='memory')
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', LIMIT)
    line = fails(*words[:-4], '--resume', state.parent)
    assert 'the run started with its images in memory and can only resume where they fit' in line


def test_loader_that_is_refused(few_digits, tmp_path, fails, monkeypatch):
    train = ['train', '-c', 'demo_digits', '--data-dir', few_digits, '--output', tmp_path / 'output', '--loader',
             'memory']
    line = fails(*train, '--aa', 'rand-m5', '--color-jitter', 0.4)
    assert '--loader memory cannot do --color-jitter 0.4, --aa rand-m5; use --loader timm' in line
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', LIMIT)
    line = fails(*train, *LARGE)
    assert "The split 'train' takes" in line and 'held in memory; use --loader timm or a smaller --input-size' in line
    assert not (tmp_path / 'output').exists()


def test_validate_reads_what_does_not_fit_in_memory_by_workers(weights, few_digits, command, monkeypatch):
    words = ['validate', weights, '--data-dir', few_digits, '--workers', '1']
    code, out, err = command(*words)
    assert code == 0, err
    size = (few_digits / 'test-00000-of-00001.parquet').stat().st_size
    assert size < 64 * 16 * 16  # between them is a limit for decoded images that encoded ones keep
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', size)
    monkeypatch.setattr(data_module, 'read_cache', lambda *_: None)  # it fitted when it was decoded before
    made, start = [], WorkerLoader.__init__
    monkeypatch.setattr(WorkerLoader, '__init__', lambda self, *args, **more: made.append(start(self, *args, **more)))
    code, other, err = command(*words)
    assert code == 0 and made, err
    assert other.rpartition(',')[0] == out.rpartition(',')[0] and '64 images' in out
