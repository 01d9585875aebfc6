"""The options of a training: timm's train-script dialect, recipes in YAML, and what is refused with a reason.

Names, meanings and defaults are those of timm's ``train.py``; our own additions are in one group at the end.
"""
import argparse
import ast
import copy
import difflib
from functools import cache
from pathlib import Path
from typing import Any, Dict, NoReturn, Optional, Sequence, Type

import yaml

from timm_lm.errors import UserError, one_line
from timm_lm.names import with_scheme
from timm_lm.splits import SPLIT_NAMES, TRAIN_OR_TEST

from .option_rules import (
    ONLY_WITH,
    check_options,
    check_taken,
    check_unread,
    option_name,
    unread,
    usual_decay_epochs,
)
from .recipes import find_recipe

# Options of timm's train script that this engine does not take, each with the reason; one that is set to off asks for
# nothing and passes.
_SPLITS = 'batches are not split by augmentation here'
_STATIC = 'the shapes of batches are static here'
_RESUME = '--resume goes on exactly where a run stopped; to start another run from its weights use --initial-checkpoint'
REFUSED: Dict[str, str] = {
    **dict.fromkeys(['aug_splits', 'jsd_loss', 'resplit', 'split_bn'], _SPLITS),
    **dict.fromkeys(['epoch_repeats', 'train_num_samples', 'val_num_samples'], 'data sets are of known size here'),
    **dict.fromkeys(['start_epoch', 'no_resume_opt'], _RESUME),
    **dict.fromkeys(['torchscript', 'fuser'], 'training is compiled by torch.compile; use --torchcompile'),
    'local_rank': 'Accelerate owns the processes; use `accelerate launch`',
    **dict.fromkeys(['bn_momentum', 'bn_eps'], 'timm itself gives them to EfficientNets only; use --model-kwargs'),
    **dict.fromkeys(['kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type'],
                    'distillation is by logits here'),
    **dict.fromkeys(['train_img_sizes', 'train_batch_sizes', 'train_size_probs', 'train_size_schedule',
                     'train_size_schedule_spread', 'train_size_random_mix', 'train_batches_per_epoch',
                     'variable_batch_loss_scale', 'naflex_loader', 'naflex_train_seq_lens', 'naflex_max_seq_len',
                     'naflex_patch_sizes', 'naflex_patch_size_probs', 'naflex_loss_scale',
                     'naflex_patchify_channels_first'], _STATIC),
    'dataset_trust_remote_code': 'code of a data set is never run',
    'drop_connect': 'timm calls it --drop-path now',
    'amp_impl': "mixed precision is PyTorch's own",
    'fast_norm': 'norms are computed in the precision that autocast has for them',
    'input_img_mode': 'the channels of the images follow --in-chans and --input-size',
    'model_dtype': 'weights are float32; lower precision is --amp',
    'model_ema_force_cpu': 'the average stays on the device of the training, where it is validated',
    'no_prefetcher': 'batches are always normalised on the device',
    'save_images': 'nothing is drawn in the loop',
    'synchronize_step': 'the host never waits for the device inside a step',
    'tta': 'each image is validated once',
    'use_multi_epochs_loader': 'worker processes stay from epoch to epoch anyway',
    'worker_seeding': 'each image has a seed of its own, whatever worker reads it',
    # of timm 1.0.30 and later
    **dict.fromkeys(['loss', 'loss_class_weight', 'loss_pos_weight', 'loss_weight_power', 'class_stats'],
                    'losses are cross entropy and --bce-loss here'),
    **dict.fromkeys(['multilabel_threshold', 'target_format', 'task'], 'each image has one label here'),
    **dict.fromkeys(['lr_decay_fn', 'lr_stable_timescale'], 'schedules have the options of timm 1.0.26 here'),
    'save_epochs': 'the newest checkpoints stay, by --checkpoint-hist',
    'stop_epoch': 'a run ends with its schedule; change --epochs',
    'pretrained_cfg_overlay': 'give --pretrained-path, --mean and the like instead',
}

# Other names that timm's script has for them.
_OTHER_NAMES = {'local_rank': '--local_rank', 'train_batches_per_epoch': '--train-steps-per-epoch'}

# What timm's script writes for some of them if nothing was asked for.
_TIMM_DEFAULTS: Dict[str, Any] = {
    'amp_impl': 'native', 'kd_token_distill_type': 'soft', 'naflex_loss_scale': 'linear', 'naflex_max_seq_len': 576,
    'naflex_train_seq_lens': [128, 256, 576, 784, 1024], 'train_size_random_mix': 0.1,
    'train_size_schedule': 'constant', 'train_size_schedule_spread': 0.65, 'variable_batch_loss_scale': 'none',
    'worker_seeding': 'all',
}


def _literal(text: str) -> Any:
    words = {'true': True, 'false': False, 'null': None, 'none': None}  # as recipes may spell them
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


_FLAG = argparse.BooleanOptionalAction


def _named(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError('it is empty, as an unset variable is; name a folder')
    return text


class _KeyValues(argparse.Action):
    """``name=value`` pairs, the values as Python literals."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for pair in values:
            name, separator, value = pair.partition('=')
            if not separator:
                raise UserError(f"{option_string} takes pairs name=value, not '{pair}'.")
            pairs[name] = _literal(value)
        setattr(namespace, self.dest, pairs)


class _Help(argparse.HelpFormatter):
    """Help that tells each default that says something, where the text does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        told = '(default' in text or isinstance(action, argparse._HelpAction)
        if told or action.default in (None, False, '', argparse.SUPPRESS) or action.default in ([], {}):
            return text
        value = ' '.join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f'{text} (default: {value})'


class Parser(argparse.ArgumentParser):
    """Argument parser that reports by UserError, and tells defaults in its help."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault('formatter_class', _Help)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message[0].upper()}{message[1:]}; see `{self.prog} --help`.')


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which images are read, and how; training and validation share them."""
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', type=_named, metavar='DIR',
                       help='folder of the data: Parquet in the Hub\'s layout, or images')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='timm\'s type and name, such as hfds/uoft-cs/cifar10 (default: what the folder holds)')
    group.add_argument('--val-split', metavar='NAME', default='validation', help='split that is validated on')
    group.add_argument('--dataset-download', action=argparse.BooleanOptionalAction, default=False,
                       help='let torch/ data sets download')
    group.add_argument('--class-map', metavar='FILE', default='', help='file of class names or numbers')
    group.add_argument('--input-key', metavar='NAME', help='column of the images')
    group.add_argument('--target-key', metavar='NAME', help='column of the labels')


def build_parser(prog: str = 'timm-lm train') -> argparse.ArgumentParser:
    """The parser of a training."""
    parser = Parser(prog=prog, description='Train a network by a recipe of timm train-script options.',
                     allow_abbrev=False)
    parser.add_argument('-c', '--config', metavar='RECIPE',
                        help='a shipped recipe (see timm-lm recipe), one for another of its networks such as '
                             'lm_resnet56.paper_c10, or a YAML file')

    add_data_options(parser)
    parser.add_argument('--train-split', metavar='NAME', default='train', help='split that is trained on')
    parser.add_argument('-j', '--workers', type=int, default=4, metavar='N',
                        help='processes that read images, where they are not in memory')
    parser.add_argument('--pin-mem', action=_FLAG, default=False, help='read batches into pinned memory')
    for add in (_add_model, _add_batches, _add_optimizer, _add_schedule, _add_augmentation,
                _add_loss, _add_average, _add_run, _add_additions):
        add(parser)
    for name, reason in REFUSED.items():
        names = filter(None, (option_name(name), _OTHER_NAMES.get(name)))
        parser.add_argument(*names, nargs='*', dest=name, action=_refuse(name, reason), help=argparse.SUPPRESS)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model')
    group.add_argument('--model', type=with_scheme, metavar='NAME', default='lm_resnet20',
                       help='name in timm, weights folder or hf-hub:OWNER/NAME (default: lm_resnet20)')
    group.add_argument('--pretrained', action=_FLAG, default=False, help='start from its pretrained weights')
    group.add_argument('--pretrained-path', metavar='FILE', help='a file to take the pretrained weights from')
    group.add_argument('--initial-checkpoint', metavar='FILE', default='', help='start from these weights')
    group.add_argument('--num-classes', type=int, metavar='N', help='classes (default: the model\'s)')
    group.add_argument('--gp', metavar='POOL', help='global pooling of the head')
    group.add_argument('--in-chans', type=int, metavar='N', help='channels of the images')
    group.add_argument('--img-size', type=int, metavar='N', help='side of the images')
    group.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help='size of the images')
    group.add_argument('--crop-pct', type=float, metavar='X', help='share of the image that the centre crop keeps')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help='mean of each channel, pixels in [0, 1]')
    group.add_argument('--std', type=float, nargs='+', metavar='X', help='standard deviation of each channel')
    group.add_argument('--interpolation', default='', metavar='NAME', help='how images are resized')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_KeyValues, metavar='NAME=VALUE',
                       help='further keywords of the model')
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout rate')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth rate of the last block')
    group.add_argument('--drop-block', type=float, metavar='P', help='rate of dropped blocks of pixels')
    group.add_argument('--head-init-scale', type=float, metavar='X', help='factor on the initial head')
    group.add_argument('--head-init-bias', type=float, metavar='X', help='bias that the head starts from')
    group.add_argument('--grad-checkpointing', action=_FLAG, default=False, help='recompute blocks in backward')


def _add_batches(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Batches and precision')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images of a batch of a process')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N',
                       help='images of a batch of validation (default: batch size)')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches of an update')
    group.add_argument('--channels-last', action=_FLAG, default=False, help='channels_last memory layout')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile')
    group.add_argument('--no-torchcompile', dest='torchcompile', action='store_const', const=None, help='run eagerly')
    group.add_argument('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    group.add_argument('--amp', action=_FLAG, default=False, help='mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'),
                       help='lower precision of --amp')
    group.add_argument('--device', metavar='NAME', help='cpu, or what Accelerate finds (default)')
    group.add_argument('--no-ddp-bb', action='store_true', default=False,
                       help='each process keeps its own running statistics during an epoch')
    group.add_argument('--sync-bn', action=_FLAG, default=False, help='batch statistics over all processes')
    group.add_argument('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''),
                       help='after an epoch, share the running statistics of processes')
    group.add_argument('--device-modules', nargs='+', metavar='MODULE', help='modules to import first')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='sgd', metavar='NAME', help='timm\'s name; sgd is Nesterov, momentum is not')
    group.add_argument('--opt-eps', type=float, metavar='X', help='epsilon')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='X', help='betas')
    group.add_argument('--momentum', type=float, default=0.9, metavar='X', help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='X', help='weight decay')
    group.add_argument('--clip-grad', type=float, metavar='X', help='clip gradients')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'),
                       help='how gradients are clipped')
    group.add_argument('--layer-decay', type=float, metavar='X', help='layer-wise decay of the learning rate')
    group.add_argument('--layer-decay-min-scale', type=float, default=0., metavar='X',
                       help='smallest factor of --layer-decay')
    group.add_argument('--layer-decay-no-opt-scale', type=float, metavar='X', help='freeze layers below this factor')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=_KeyValues, metavar='NAME=VALUE',
                       help='further keywords of the optimizer')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Schedule')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='timm\'s name of the schedule')
    group.add_argument('--sched-on-updates', action=_FLAG, default=False, help='step by update, not by epoch')
    group.add_argument('--lr', type=float, metavar='X', help='learning rate')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='X', help='rate at the base batch size')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='base batch size')
    group.add_argument('--lr-base-scale', default='', choices=('linear', 'sqrt', ''),
                       help='how the rate follows the batch (default: sqrt for adaptive optimizers, else linear)')
    group.add_argument('--lr-noise', type=float, nargs='+', metavar='X', help='noise on and off, shares of the run')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='X', help='limit of the noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='X', help='standard deviation of the noise')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='growth of cycles')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='decay of cycles')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, metavar='X', help='k-decay of cosine and poly')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='X', help='rate at the start of warm-up')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--warmup-prefix', action=_FLAG, default=False, help='warm-up before the schedule')
    group.add_argument('--min-lr', type=float, default=0., metavar='X', help='smallest rate')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                       help='epochs of multistep, each acting one epoch early')
    group.add_argument('--decay-epochs', type=float, metavar='N',
                       help='interval of step (default: 90); length of the decay of wsd and rsqrt, below 1 a share of '
                            'the run (default: 0.2)')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='X',
                       help='factor of a drop; the power of poly')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='patience of plateau')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the smallest rate')


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation')
    group.add_argument('--no-aug', action='store_true', default=False,
                       help='no crops, flips, colours and erasing; mixing stays')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'), help='timm\'s kind of random crop')
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.0], metavar='X',
                       help='areas of random resized crops')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='X',
                       help='aspect ratios of random resized crops')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    group.add_argument('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='X', help='strength of colour jitter')
    group.add_argument('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter')
    group.add_argument('--grayscale-prob', type=float, metavar='P', help='probability of a grey image')
    group.add_argument('--gaussian-blur-prob', type=float, metavar='P', help='probability of a blurred image')
    group.add_argument('--aa', metavar='POLICY', help='AutoAugment or RandAugment, as timm spells policies')
    group.add_argument('--aug-repeats', type=float, default=0, metavar='N',
                       help='times that an image occurs in a global batch (several processes)')
    group.add_argument('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'),
                       help='what fills an erased box')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='most boxes of an image')
    group.add_argument('--mixup', type=float, default=0., metavar='ALPHA', help='mixup')
    group.add_argument('--cutmix', type=float, default=0., metavar='ALPHA', help='cutmix')
    group.add_argument('--cutmix-minmax', type=float, nargs=2, metavar='X', help='cutmix by ratio, without alpha')
    group.add_argument('--mixup-prob', type=float, default=1., metavar='P', help='probability of mixing')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P',
                       help='probability of cutmix where both are on')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares a draw')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on')
    group.add_argument('--train-interpolation', default='random', metavar='NAME',
                       help='how random resized crops are resized')


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Loss')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')
    group.add_argument('--bce-loss', action=_FLAG, default=False, help='binary cross entropy')
    group.add_argument('--bce-sum', action=_FLAG, default=False, help='binary cross entropy summed over classes')
    group.add_argument('--bce-target-thresh', type=float, metavar='X', help='targets above it become 1, others 0')
    group.add_argument('--bce-pos-weight', type=float, metavar='X', help='weight of positive targets')
    group.add_argument('--kd-model-name', type=with_scheme, metavar='NAME_OR_FOLDER',
                       help='distil from the logits of this network')
    group.add_argument('--kd-distill-type', default='logit', choices=('logit', 'feature', 'token'),
                       help='what is distilled; logit alone is supported')
    group.add_argument('--kd-loss-type', default='kl', choices=('kl',), help='by which divergence')
    group.add_argument('--kd-temperature', type=float, default=4., metavar='T', help='temperature of both softmaxes')
    group.add_argument('--distill-loss-weight', type=float, metavar='X',
                       help='weight of the divergence (default: 1, or 1 - task weight)')
    group.add_argument('--task-loss-weight', type=float, metavar='X', help='weight of the loss on labels (default: 1)')


def _add_average(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Averaged weights')
    group.add_argument('--model-ema', action=_FLAG, default=False, help='average the weights, and validate these')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay of the average')
    group.add_argument('--model-ema-warmup', action=_FLAG, default=False, help='start from a small decay')


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, metavar='N', help='random seed')
    group.add_argument('--log-interval', type=int, default=50, metavar='N',
                       help='updates between two readings of the loss')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between two validations')
    group.add_argument('--resume', default='', metavar='WHAT',
                       help='auto: the newest whole checkpoint of the run, or start it; or the folder of a checkpoint')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='updates between two checkpoints inside an epoch, beside those after each (default: none)')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'),
                       help='what tells the best epoch')
    group.add_argument('--log-wandb', action=_FLAG, default=False, help='log to Weights & Biases')
    group.add_argument('--wandb-project', metavar='NAME', help='project of Weights & Biases (default: timm-lm)')
    group.add_argument('--wandb-tags', nargs='+', default=[], metavar='TAG', help='tags of the run in Weights & Biases')
    group.add_argument('--wandb-resume-id', default='', metavar='ID', help='run of Weights & Biases to go on with')
    group.add_argument('--output', default='', metavar='DIR', help='folder of runs (default: output/train)')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder of this run in --output')


def _add_additions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Additions to timm\'s options')
    group.add_argument('--pad-crop', type=int, default=0, metavar='N', help='pad by N pixels and crop at random')
    group.add_argument('--loader', default='auto', choices=('auto', 'memory', 'timm'),
                       help='decoded images in memory, or timm\'s transforms in worker processes; auto: memory where '
                            'the data fits and the augmentation can be done there')
    group.add_argument('--grow-from', type=with_scheme, metavar='NAME_OR_FOLDER', default='',
                       help='start from the weights of a shallower network, with its blocks repeated')
    group.add_argument('--two-step-epoch', type=int, default=0, metavar='N',
                       help='epoch at which the two-step is switched on; before it k is 0')
    group.add_argument('--log-tensorboard', action=_FLAG, default=False, help='log to TensorBoard in the run folder')
    group.add_argument('--tag', default='', metavar='NAME', help='tag of the saved weights')
    group.add_argument('--dry-run', action='store_true', default=False, help='show what would be done, and end')


def _refuse(name: str, reason: str) -> Type[argparse.Action]:
    class Refuse(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            items = [_literal(item) for item in values]
            if not values or _asks(name, items[0] if len(items) == 1 else items):
                raise UserError(f'{option_string} is refused: {reason}.')
    return Refuse


def _asks(name: str, value: Any) -> bool:
    """Whether a value of a refused option asks for something: it is neither off nor timm's default."""
    return bool(value) and value != _TIMM_DEFAULTS.get(name)


# Recipes


def _read_recipe(path: Path, actions: Dict[str, argparse.Action]) -> Dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise UserError(f'The recipe {path} is not readable YAML ({one_line(e)}).') from e
    if not isinstance(values, dict):
        raise UserError(f'The recipe {path} must hold "option: value" lines.')
    asked = {str(name): value for name, value in values.items()
             if name not in REFUSED or _asks(str(name), value)}
    if asked.get('data', '') is None:  # timm's older name of data_dir, which it writes beside that
        del asked['data']
    return {name: _recipe_value(path, name, value, actions) for name, value in asked.items()}


def _recipe_value(path: Path, name: str, value: Any, actions: Dict[str, argparse.Action]) -> Any:
    if name in REFUSED:
        raise UserError(f"The option '{name}' in {path} is refused: {REFUSED[name]}.")
    if name == 'data':
        raise UserError(f"The option 'data' in {path} is timm's older name of data_dir; name it so.")
    if name not in actions:
        near = difflib.get_close_matches(name, actions, n=1)
        hint = f'did you mean {near[0]}?' if near else 'see `timm-lm train --help`.'
        raise UserError(f"The option '{name}' in {path} is unknown; {hint}")
    action = actions[name]
    if value is None:
        if action.default is not None:
            raise UserError(f"The option '{name}' in {path} has no value; give it one, or leave it out.")
        return None
    if isinstance(action, _KeyValues):
        if not isinstance(value, dict):
            raise UserError(f"The option '{name}' in {path} must hold pairs, not '{value}'.")
        return value
    many = action.nargs in ('+', '*') or isinstance(action.nargs, int) and action.nargs > 0
    if isinstance(action, (argparse.BooleanOptionalAction, argparse._StoreTrueAction)):
        if not isinstance(value, bool):
            raise UserError(f"The option '{name}' in {path} must be true or false, not '{value}'.")
        return value
    try:
        if many:
            items = list(value) if isinstance(value, (list, tuple)) else [value]
            if isinstance(action.nargs, int) and len(items) != action.nargs:
                raise ValueError
            return [_convert(action, item) for item in items]
        return _convert(action, value)
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        choices = f"; it can be {', '.join(map(str, filter(None, action.choices)))}" if action.choices else ''
        raise UserError(f"The option '{name}' in {path} can not be '{value}'{choices}.") from None


def _convert(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, (list, dict, bool)):
        raise ValueError
    kind = action.type or str
    assert callable(kind)
    converted = kind(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError
    return converted


def parse_options(argv: Optional[Sequence[str]] = None, prog: str = 'timm-lm train') -> argparse.Namespace:
    """Options of a training: timm's defaults, then the recipe, then the command line.

    Args:
        argv: Arguments of the command.
        prog: Its name in messages.

    Returns:
        The options, by timm's names.

    Raises:
        UserError: If an option is unknown, refused, or has an impossible value.
    """
    parser = build_parser(prog)
    given = defaults = {
        action.dest: action.default for action in parser._actions if action.dest not in (*REFUSED, 'help')}
    actions = {action.dest: action for action in parser._actions if action.dest not in (*REFUSED, 'help', 'config')}
    actions['torchcompile'] = next(a for a in parser._actions if '--torchcompile' in a.option_strings)
    first = Parser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument('-c', '--config')
    config = first.parse_known_args(argv)[0].config
    if config:
        path, model = find_recipe(config)
        given = defaults | _read_recipe(path, actions) | (dict(model=model) if model else {})
        if given['decay_epochs'] == usual_decay_epochs(given['sched']):  # as a run records it
            given['decay_epochs'] = None
        check_unread(given, defaults, defaults)
        parser.set_defaults(**given)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], options, n=1)
        hint = f'did you mean {near[0]}?' if near else f'see `{prog} --help`.'
        if not unknown[0].startswith('-'):
            hint = 'name the data with --data-dir.'
        raise UserError(f"Unknown argument '{unknown[0]}'; {hint}")
    for name in REFUSED:
        delattr(args, name)
    if args.val_split in SPLIT_NAMES[1] and args.dataset.lower() in TRAIN_OR_TEST:
        args.val_split = 'test'  # which timm takes for any other name, and validation is its default
    if args.no_aug:
        args.hflip, args.vflip, args.pad_crop, args.reprob = 0., 0., 0, 0.
    if args.decay_epochs == usual_decay_epochs(args.sched):
        args.decay_epochs = None
    check_options(args)
    check_unread(vars(args), given, defaults)
    check_taken(vars(args), given, defaults)
    for names, _ in unread(vars(args)):
        _reset(args, *names)
    for leaders in ONLY_WITH:  # of all ways to spell off that of timm's defaults, where these are off
        _reset(args, *(leader for leader in leaders if not getattr(args, leader) and not defaults[leader]))
    if args.decay_epochs is None:
        args.decay_epochs = usual_decay_epochs(args.sched)
    return args


def turn_off(args: argparse.Namespace, *leaders: str) -> None:
    """Put options back to timm's default, and those with them that mean nothing without them.

    What a recipe gives them may stand beside an option that the command line takes back; recorded like that it would be
    refused as a recipe.
    """
    _reset(args, *leaders, *ONLY_WITH[leaders])


def _reset(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        setattr(args, name, copy.copy(_defaults()[name]))


@cache
def _defaults() -> Dict[str, Any]:
    return {action.dest: action.default for action in build_parser('')._actions}
