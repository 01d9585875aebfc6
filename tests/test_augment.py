"""Augmentation of batches: what it does to images and targets, and that timm's own does the same."""
import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing

from timm_lm.augment import BatchMixup, normalize, pad_crop, random_erase, random_flip
from timm_lm.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def floats(*shape):
    return torch.randn(shape, generator=seeded(1))


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(1))


# Crops, flips and normalization


def test_pad_crop_takes_windows_of_the_padded_image():
    images = pixels(64, 3, 8, 8)
    cropped = pad_crop(images, 2, seeded())
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    places = set()
    for i in range(64):
        hits = [(y, x) for y in range(5) for x in range(5)
                if torch.equal(padded[i, :, y:y + 8, x:x + 8], cropped[i])]
        assert len(hits) == 1
        places.add(hits[0])
    assert len(places) > 15  # of 25 places, drawn 64 times


@pytest.mark.parametrize('dim', [-1, -2])
def test_flips_mirror_each_image_by_itself(dim):
    images = pixels(200, 3, 4, 4)
    generator = seeded()
    flipped = random_flip(images, dim, 0.5, generator)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(dim)).flatten(1).all(1)
    assert (same | mirrored).all() and 60 < mirrored.sum() < 140
    assert torch.equal(random_flip(images, dim, 0., generator), images)
    assert torch.equal(random_flip(images, dim, 1., generator), images.flip(dim))


def test_normalize_is_that_of_timm():
    images = pixels(6, 32, 32, 3)
    transform = timm.data.create_transform((3, 32, 32), crop_pct=1.0, mean=MEAN, std=STD)
    expected = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    mean, std = 255 * torch.tensor(MEAN), 255 * torch.tensor(STD)
    torch.testing.assert_close(normalize(images.permute(0, 3, 1, 2), mean, std), expected)


# Random erasing

UNTOUCHED = 100.  # a value that normal noise does not have


def erase(n, probability=1., mode='const', count=1, box_seed=0, noise_seed=0, size=(32, 24)):
    """Erase in uniform images: returns (images, mask of erased pixels (N, H, W))."""
    images = torch.full((n, 3, *size), UNTOUCHED)
    erased = random_erase(images, probability, mode, count, np.random.default_rng(box_seed), seeded(noise_seed))
    assert (images == UNTOUCHED).all()
    mask = erased != UNTOUCHED
    assert torch.equal(mask.any(1), mask.all(1))
    return erased, mask.all(1)


def test_erasing_hits_the_share_of_images_that_it_should():
    _, mask = erase(2000, probability=0.25)
    assert mask.flatten(1).any(1).float().mean() == pytest.approx(0.25, abs=0.04)  # 4 standard deviations
    assert not erase(100, probability=0.)[1].any()
    assert erase(100, probability=1.)[1].flatten(1).any(1).all()


def test_erased_boxes_are_rectangles_of_the_right_area_and_aspect():
    _, mask = erase(1000)
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):
        edges = torch.nn.functional.pad(line.int(), (1, 1)).diff().abs().sum(1)
        assert (edges == 2).all()  # one run each
    h, w = rows.sum(1), columns.sum(1)
    assert (h < 32).all() and (w < 24).all()
    # sides are rounded to whole pixels
    assert ((h - 0.5) * (w - 0.5) <= 32 * 24 / 3).all() and ((h + 0.5) * (w + 0.5) >= 32 * 24 * 0.02).all()
    assert ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all() and ((h + 0.5) / (w - 0.5) >= 0.3).all()
    # and the bounds are reached
    area, aspect = h * w / (32 * 24), h / w
    assert area.min() < 0.03 and area.max() > 0.32 and aspect.min() < 0.35 and aspect.max() > 1 / 0.35


@pytest.mark.parametrize('count', [1, 3])
def test_erasing_has_the_distribution_of_timm(count):
    _, ours = erase(4000, count=count)
    state = random.getstate()
    random.seed(0)
    images = torch.full((4000, 1, 32, 24), UNTOUCHED)
    RandomErasing(probability=1., mode='const', max_count=count, device='cpu')(images)
    random.setstate(state)
    theirs = images[:, 0] != UNTOUCHED
    # the chance of a pixel is near 0.25: the difference of two shares has a standard deviation of 0.01
    torch.testing.assert_close(ours.float().mean(0), theirs.float().mean(0), atol=0.045, rtol=0)
    areas = [mask.flatten(1).float().mean(1).quantile(torch.linspace(0, 1, 11)) for mask in (ours, theirs)]
    torch.testing.assert_close(*areas, atol=0.015, rtol=0)
    heights = [mask.any(2).float().mean() for mask in (ours, theirs)]
    torch.testing.assert_close(*heights, atol=0.015, rtol=0)


def test_what_is_erased_is_filled_as_the_mode_says():
    def values(mode):
        erased, mask = erase(500, mode=mode)
        return [image[:, inside] for image, inside in zip(erased, mask)]  # (C, erased pixels)

    noise = torch.cat(values('pixel'), 1)
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
    assert noise.unique().numel() > 0.9 * noise.numel()
    colours = values('rand')
    assert all((colour == colour[:, :1]).all() for colour in colours)
    colours = torch.stack([colour[:, 0] for colour in colours])
    assert colours.unique().numel() == 1500  # each box and channel its own
    assert colours.mean() == pytest.approx(0, abs=0.1) and colours.std() == pytest.approx(1, abs=0.1)
    assert all((value == 0).all() for value in values('const'))


def test_erasing_depends_on_its_two_seeds():
    first, mask = erase(50, mode='pixel', count=2)
    assert torch.equal(erase(50, mode='pixel', count=2)[0], first)
    assert not torch.equal(erase(50, mode='pixel', count=2, box_seed=1)[1], mask)
    other, same_mask = erase(50, mode='pixel', count=2, noise_seed=1)
    assert torch.equal(same_mask, mask) and not torch.equal(other, first)


def test_boxes_that_do_not_fit_are_left_out():
    assert not erase(200, count=2, size=(1, 64))[1].any()


def test_unknown_erasing_mode_is_named():
    with pytest.raises(UserError, match="no erasing mode 'noise'"):
        erase(2, mode='noise')


# Mixup and cutmix

MIXES = {
    'mixup': dict(mixup_alpha=0.8),
    'cutmix': dict(mixup_alpha=0., cutmix_alpha=1.),
    'both': dict(mixup_alpha=0.2, cutmix_alpha=1., switch_prob=0.4),
    'minmax': dict(mixup_alpha=0., cutmix_minmax=(0.2, 0.8)),
    'half': dict(mixup_alpha=1., cutmix_alpha=1., prob=0.5),
    'uncorrected': dict(mixup_alpha=0., cutmix_alpha=1., correct_lam=False),
}
MODES = ('batch', 'pair', 'elem')


def batch(n=8):
    return floats(n, 3, 16, 12), torch.arange(n) % 5


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('mix', MIXES)
def test_mixing_is_that_of_timm(mix, mode):
    settings = dict(MIXES[mix], mode=mode, num_classes=5, label_smoothing=0.1)
    images, labels = batch()
    changed = False
    for seed in range(5):
        state = np.random.get_state()
        np.random.seed(seed)
        expected, expected_targets = timm.data.Mixup(**settings)(images.clone(), labels)
        np.random.set_state(state)
        mixed, targets = BatchMixup(**settings)(images, labels, seed)
        torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(targets, expected_targets) and targets.dtype == torch.float32
        changed = changed or not torch.equal(mixed, images)
    assert changed
    assert torch.equal(images, batch()[0])


@pytest.mark.parametrize('mode', MODES)
def test_disabled_mixing_smooths_the_targets_alone(mode):
    images, labels = batch()
    mixup = BatchMixup(cutmix_alpha=1., mode=mode, num_classes=5, label_smoothing=0.1)
    mixup.mixup_enabled = False
    mixed, targets = mixup(images, labels, 0)
    assert torch.equal(mixed, images)
    smoothed = torch.nn.functional.one_hot(labels, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(targets, smoothed)


def test_odd_batches_are_named():
    with pytest.raises(UserError, match='need an even --batch-size, not 7'):
        BatchMixup(num_classes=5)(*batch(7), 0)


# All of them

AUGMENTATIONS = {
    'pad_crop': lambda images: pad_crop(images, 2, seeded()),
    'hflip': lambda images: random_flip(images, -1, 0.5, seeded()),
    'vflip': lambda images: random_flip(images, -2, 0.5, seeded()),
    **{f'erase {mode}': lambda images, mode=mode: random_erase(
        images, 0.5, mode, 2, np.random.default_rng(0), seeded()) for mode in ('pixel', 'rand', 'const')},
    **{f'mix {mode}': lambda images, mode=mode: BatchMixup(cutmix_alpha=1., mode=mode, num_classes=5)(
        images, torch.zeros(len(images), dtype=torch.long), 0)[0] for mode in MODES},
}


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_global_random_streams_play_no_part(name):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state()

    images = floats(8, 3, 16, 12)
    first = AUGMENTATIONS[name](images)
    random.random(), np.random.rand(), torch.rand(1)
    *before, torch_before = states()
    assert torch.equal(AUGMENTATIONS[name](images), first)
    *after, torch_after = states()
    assert before == after and torch.equal(torch_before, torch_after)


@pytest.mark.parametrize('name', [name for name in AUGMENTATIONS if name != 'pad_crop'])
def test_channels_last_is_kept_and_changes_nothing(name):
    images = floats(8, 3, 16, 12)
    plain = AUGMENTATIONS[name](images)
    last = AUGMENTATIONS[name](images.contiguous(memory_format=torch.channels_last))
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last) and not torch.equal(plain, images)
