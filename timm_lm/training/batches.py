"""The training data: splits in memory or read by workers, and the batches made from them."""
import argparse
import hashlib
from functools import partial
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import auto_augment, create_transform

from timm_lm.augment import BatchMixup
from timm_lm.data import (
    Split,
    TooLarge,
    check_class_names,
    check_labels,
    is_archive,
    load_images,
    looks_for_split_folder,
    open_images,
)
from timm_lm.decoded import DecodedImages
from timm_lm.errors import UserError, one_line
from timm_lm.loader import Augmentation, BatchLoader, MemoryLoader, WorkerLoader
from timm_lm.model_config import TimmModel, image_channels, image_config
from timm_lm.timm_data import check_split_folder

from .arguments import data_source
from .checkpoint import Checkpoint
from .option_rules import mixes, not_in_memory
from .processes import differs, first_of_machine_first

MAX_CROP_PCT = 2.  # above 1, images are padded, as some networks of timm need


def resolve_input_config(args: argparse.Namespace, model: TimmModel) -> Dict[str, Any]:
    """Size, mean, standard deviation and resizing of the images: from the options, then from the network.

    Raises:
        UserError: If they do not fit the channels of the network.
    """
    try:
        config = image_config(model, vars(args))
    except AssertionError as e:
        raise UserError('--mean and --std need one value, or one for each of the '
                        f'{image_channels(model)} channels.') from e
    config.pop('crop_mode', None)
    if config['crop_pct'] > MAX_CROP_PCT:
        raise UserError(f"--crop-pct is a share of the side, such as 0.875, not {config['crop_pct']:g}.")
    return config


@torch.no_grad()
def check_input(model: TimmModel, data_config: Dict[str, Any], name: str) -> None:
    """Run a network on an image of the size that it will get, as some accept only one size.

    Raises:
        UserError: If it does not accept it.
    """
    size = data_config['input_size']
    try:
        model.eval()(torch.zeros(1, *size))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"{name} does not take images of {'x'.join(map(str, size))} ({one_line(e)}); give another "
                        '--input-size, or what it needs for this one with --model-kwargs.') from e


def load_split(
        args: argparse.Namespace,
        split: str,
        data_config: Dict[str, Any],
        show: bool,
        is_training: bool = False,
        device: Optional[torch.device] = None,
        kind: Optional[str] = None,
) -> Split:
    """A split of the data that the options name: decoded in memory, or to be decoded by worker processes.

    Args:
        args: Options.
        split: Name of the split.
        data_config: ``input_size``, ``crop_pct`` and ``interpolation`` of the images.
        show: Show a progress bar while decoding.
        is_training: Whether the split is trained on.
        device: Where to keep it if it is held in memory.
        kind: How it is read, as ``--loader`` names it; None to follow the options.

    Raises:
        UserError: If there is no such split, or training and validation images would be the same.
    """
    kind = kind or args.loader
    if looks_for_split_folder(args.data_dir, args.dataset):  # with validation, each split has its own folder
        check_split_folder(args.data_dir, split, required=bool(args.val_split))
    if args.val_split and is_archive(args.data_dir, args.dataset):
        raise UserError(f"{args.data_dir} is one archive without splits, so training and validation images would be "
                        'the same; unpack it into folders train and validation, or give --val-split= to skip '
                        'validation.')
    source = data_source(vars(args))
    _, height, width = data_config['input_size']
    # to a size that is not square, a crop in memory keeps the aspect, and timm's does not
    one_by_one = is_training and (not_in_memory(args) or height != width and not args.no_aug)
    if kind == 'memory' or kind == 'auto' and not one_by_one:
        try:
            return load_images(
                split,
                input_size=data_config['input_size'],
                crop_pct=1.0 if is_training else data_config['crop_pct'],  # timm crops validation images only
                crop_mode='squash' if is_training and args.no_aug else 'center',
                interpolation=data_config['interpolation'],
                progress=show,
                device=device,
                **source,
            )
        except TooLarge:
            if kind == 'memory':
                raise
    return open_images(split, channels=data_config['input_size'][0], **source)


def load_data(
        args: argparse.Namespace,
        model: TimmModel,
        data_config: Dict[str, Any],
        accelerator: Accelerator,
        checkpoint: Optional[Checkpoint],
) -> Tuple[Split, Optional[Split]]:
    """The splits to train on and, if the options name one, to validate on.

    Args:
        args: Options.
        model: The network.
        data_config: ``input_size``, ``crop_pct`` and ``interpolation`` of the images.
        accelerator: Manages device and processes.
        checkpoint: The one to resume from, None for a new run.

    Raises:
        UserError: If a split cannot be loaded, or does not fit the network or the run that is resumed.
    """
    with first_of_machine_first(accelerator):
        load = partial(
            load_split, args, data_config=data_config, show=accelerator.is_main_process, device=accelerator.device)
        # a resumed run reads images as before, whatever fits on this machine
        kind = checkpoint.state['loader'] if checkpoint else None
        try:
            train_set = load(args.train_split, is_training=True, kind=kind)
        except TooLarge as e:
            if kind is None:
                raise
            raise UserError(f'{str(e).partition(";")[0]}; the run started with its images in memory and can only '
                            'resume where they fit. Start another run with another --experiment.') from e
        eval_set = load(args.val_split) if args.val_split else None
    if differs(isinstance(train_set, DecodedImages)):  # the two kinds are augmented with different seeds
        raise UserError('The training images fit into the memory of some processes and not of others; give --loader '
                        'timm to all of them.')
    if differs(tuple(_digest(data) for data in (train_set, eval_set) if data is not None)):
        raise UserError('The processes find different data (the labels or the names of the classes are not the same); '
                        'give the same to all of them.')
    for data in (train_set, eval_set):
        if data is not None:
            check_class_names(data.class_names, train_set.class_names, of='the training split', may_be_disjoint=False)
            check_labels(data, model.num_classes)
    if checkpoint is not None:
        before = checkpoint.state['facts']['pretrained_cfg'].get('label_names')
        check_class_names(train_set.class_names, before, of='the run when it was started', may_be_disjoint=False)
    return train_set, eval_set


def _digest(data: Split) -> str:
    return hashlib.sha256(data.labels.cpu().numpy().tobytes() + repr(data.class_names).encode()).hexdigest()


def create_loader(args: argparse.Namespace, data: Split, data_config: Dict[str, Any],
                  accelerator: Accelerator, num_classes: int, is_training: bool = False) -> BatchLoader:
    """Batches of a split for this process.

    Raises:
        UserError: If the augmentation is impossible.
    """
    batch_size = args.batch_size if is_training else args.validation_batch_size or args.batch_size
    in_memory = isinstance(data, DecodedImages)
    if is_training and args.aug_repeats and accelerator.num_processes == 1:
        raise UserError('--aug-repeats repeats images over processes, but there is only one; leave it out, or use '
                        'several.')
    common: Dict[str, Any] = dict(
        is_training=is_training,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        channels_last=args.channels_last,
        repeats=args.aug_repeats,
    )
    if is_training:
        common['augmentation'] = _augmentation(args, num_classes, data_config['input_size'], flips=in_memory)
    mean, std = data_config['mean'], data_config['std']
    if isinstance(data, DecodedImages):
        return MemoryLoader(data, batch_size, mean, std, accelerator.device, **common)
    transform = _transform(args, data_config, is_training)
    return WorkerLoader(
        data, batch_size, mean, std, accelerator.device, transform, args.workers,
        pin_memory=args.pin_mem, **common)


def _augmentation(args: argparse.Namespace, num_classes: int, input_size: Sequence[int], flips: bool) -> Augmentation:
    """The augmentation of batches; flips only if timm's transforms have not done them."""
    mixup = None
    if args.cutmix_minmax is not None:
        low, high = args.cutmix_minmax
        for side in input_size[1:]:
            if int(side * low) >= int(side * high):  # timm draws whole pixels
                raise UserError(f'--cutmix-minmax {low} {high} spans less than a pixel of {side}; choose others.')
    if mixes(args):
        mixup = BatchMixup(
            args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=num_classes)
    return Augmentation(
        args.pad_crop, args.hflip if flips else 0., args.vflip if flips else 0., args.reprob, args.remode,
        args.recount, mixup, args.mixup_off_epoch)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _take_no_bits(transform: Any) -> Any:
    """Let timm's RandAugment and the like still posterize to 0 bits, a black image, which Pillow 13 refuses."""
    for part in getattr(transform, 'transforms', ()):
        for ops in getattr(part, 'policy', None) or [getattr(part, 'ops', ())]:
            for op in ops:
                if getattr(op, 'aug_fn', None) is auto_augment.posterize:
                    op.aug_fn = _posterize
    return transform


def _transform(args: argparse.Namespace, data_config: Dict[str, Any], is_training: bool) -> Any:
    """timm's transform of an image to uint8 (C, H, W)."""
    common: Dict[str, Any] = dict(input_size=data_config['input_size'], use_prefetcher=True)
    try:
        if not is_training:
            return create_transform(
                crop_pct=data_config['crop_pct'], interpolation=data_config['interpolation'], **common)
        transform = create_transform(
            is_training=True,
            no_aug=args.no_aug,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.,
            auto_augment=args.aa,
            interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
            mean=data_config['mean'],
            std=data_config['std'],
            **common,
        )
        return _take_no_bits(transform)
    except (AssertionError, KeyError, TypeError, ValueError) as e:
        raise UserError(f'The augmentation cannot be made with these options ({type(e).__name__}: {e}); see --aa, '
                        '--train-interpolation and the others in their group.') from e
