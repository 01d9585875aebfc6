"""The command-line options of training: names, meanings and defaults are those of timm's ``train.py``.

Our own additions are in one group at the end.
"""
import argparse
from typing import Any, Dict, List, Mapping

from timm_lm.names import with_scheme
from timm_lm.parser import KeyValues, Parser

from .refused import add_refused_options

_FLAG = argparse.BooleanOptionalAction


def _named(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError('it is empty, as an unset variable is; name a folder')
    return text


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options for which images are read and how, shared by training and validation."""
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', type=_named, metavar='DIR',
                       help='data folder: Parquet in the Hub\'s layout, or images')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='timm\'s type and name, such as hfds/uoft-cs/cifar10 (default: what the folder holds)')
    group.add_argument('--val-split', metavar='NAME', default='validation',
                       help="split to validate on, '' for none in training")
    group.add_argument('--dataset-download', action=_FLAG, default=False,
                       help='allow torch/ data sets to be downloaded')
    group.add_argument('--class-map', metavar='FILE', default='', help='file of class names or numbers')
    group.add_argument('--input-key', metavar='NAME',
                       help='column of the images (default: image or img); for a folder of images the extensions to '
                            'read, such as .png;.webp')
    group.add_argument('--target-key', metavar='NAME',
                       help='column of the class numbers (default: label, labels or fine_label)')


def data_source(options: Mapping[str, Any]) -> Dict[str, Any]:
    """Where the images are according to these options, as keywords of ``load_images``."""
    names = ('data_dir', 'dataset', 'input_key', 'target_key', 'class_map')
    return {name: options[name] for name in names} | dict(download=options['dataset_download'])


def build_parser() -> argparse.ArgumentParser:
    """The parser of the training options."""
    parser = Parser(prog='timm-lm train', description='Train a network with a recipe of timm train-script options.',
                    allow_abbrev=False)
    parser.add_argument('-c', '--config', metavar='RECIPE',
                        help='a shipped recipe (`timm-lm recipe` lists them), NETWORK.RECIPE for another of its '
                             'networks, or a YAML file')

    add_data_options(parser)
    parser.add_argument('--train-split', metavar='NAME', default='train', help='split to train on')
    parser.add_argument('-j', '--workers', type=int, default=4, metavar='N',
                        help='worker processes that read images that are not in memory')
    parser.add_argument('--pin-mem', action=_FLAG, default=False, help='read batches into pinned memory')
    for add in (_add_model, _add_batches, _add_optimizer, _add_schedule, _add_augmentation,
                _add_loss, _add_average, _add_run, _add_additions):
        add(parser)
    add_refused_options(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model')
    group.add_argument('--model', type=with_scheme, metavar='NAME', default='lm_resnet20',
                       help='name in timm, weights folder or hf-hub:OWNER/NAME')
    group.add_argument('--pretrained', action=_FLAG, default=False, help='start from its pretrained weights')
    group.add_argument('--pretrained-path', metavar='FILE', help='file with the pretrained weights')
    group.add_argument('--initial-checkpoint', metavar='FILE', default='', help='start from these weights')
    group.add_argument('--num-classes', type=int, metavar='N', help='number of classes (default: the model\'s)')
    group.add_argument('--gp', metavar='POOL', help='global pooling of the head')
    group.add_argument('--in-chans', type=int, metavar='N', help='channels of the images')
    group.add_argument('--img-size', type=int, metavar='N', help='side of the images')
    group.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help='size of the images')
    group.add_argument('--crop-pct', type=float, metavar='X', help='share of the image that the centre crop keeps')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help='mean of each channel, for pixels in [0, 1]')
    group.add_argument('--std', type=float, nargs='+', metavar='X', help='standard deviation of each channel')
    group.add_argument('--interpolation', default='', metavar='NAME', help='how images are resized')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='NAME=VALUE',
                       help='further keyword arguments of the model')
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout rate')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth rate of the last block')
    group.add_argument('--drop-block', type=float, metavar='P', help='DropBlock rate')
    group.add_argument('--head-init-scale', type=float, metavar='X', help='factor applied to the initial head')
    group.add_argument('--head-init-bias', type=float, metavar='X', help='initial bias of the head')
    group.add_argument('--grad-checkpointing', action=_FLAG, default=False, help='recompute blocks during backward')


def _add_batches(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Batches and precision')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per batch and process')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N',
                       help='images per validation batch (default: batch size)')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per update')
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
                       help='how processes share running statistics after an epoch')
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
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='NAME=VALUE',
                       help='further keyword arguments of the optimizer')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Schedule')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='timm\'s name of the schedule')
    group.add_argument('--sched-on-updates', action=_FLAG, default=False, help='step at each update, not each epoch')
    group.add_argument('--lr', type=float, metavar='X', help='learning rate')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='X', help='rate at the base batch size')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='base batch size')
    group.add_argument('--lr-base-scale', default='', choices=('linear', 'sqrt', ''),
                       help='how the rate scales with batch size (default: sqrt for adaptive optimizers, else linear)')
    group.add_argument('--lr-noise', type=float, nargs='+', metavar='X', help='noise start and end, shares of the run')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='X', help='limit of the noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='X', help='standard deviation of the noise')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='length factor per cycle')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='rate factor per cycle')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, metavar='X', help='k-decay of cosine and poly')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='X', help='rate at the start of warm-up')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--warmup-prefix', action=_FLAG, default=False, help='warm-up before the schedule')
    group.add_argument('--min-lr', type=float, default=0., metavar='X', help='smallest rate')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                       help='epochs of multistep, each taking effect one epoch early')
    group.add_argument('--decay-epochs', type=float, metavar='N',
                       help='interval of step (default: 90); length of the decay of wsd and rsqrt, a share of the run '
                            'if below 1 (default: 0.2)')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='X',
                       help='factor of each drop; power of poly')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='patience of plateau')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the smallest rate')


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation')
    group.add_argument('--no-aug', action='store_true', default=False,
                       help='no crops, flips, colour changes or erasing; mixup and cutmix stay')
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
                       help='times an image occurs in a global batch (several processes)')
    group.add_argument('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'),
                       help='what fills an erased box')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='maximum number of boxes per image')
    group.add_argument('--mixup', type=float, default=0., metavar='ALPHA', help='mixup')
    group.add_argument('--cutmix', type=float, default=0., metavar='ALPHA', help='cutmix')
    group.add_argument('--cutmix-minmax', type=float, nargs=2, metavar='X', help='cutmix ratio range, instead of alpha')
    group.add_argument('--mixup-prob', type=float, default=1., metavar='P', help='probability of mixing')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P',
                       help='probability of cutmix if both are on')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares one draw')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N',
                       help='no mixing from this epoch on, counted from 0')
    group.add_argument('--train-interpolation', default='random', metavar='NAME',
                       help='interpolation of random resized crops')


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Loss')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')
    group.add_argument('--bce-loss', action=_FLAG, default=False, help='binary cross entropy')
    group.add_argument('--bce-sum', action=_FLAG, default=False, help='binary cross entropy summed over classes')
    group.add_argument('--bce-target-thresh', type=float, metavar='X', help='targets above it become 1, others 0')
    group.add_argument('--bce-pos-weight', type=float, metavar='X', help='weight of positive targets')
    group.add_argument('--kd-model-name', type=with_scheme, metavar='NAME_OR_FOLDER',
                       help='distil from the logits of this network')
    group.add_argument('--kd-distill-type', default='logit', choices=('logit',), help='what is distilled')
    group.add_argument('--kd-loss-type', default='kl', choices=('kl',), help='which divergence is used')
    group.add_argument('--kd-temperature', type=float, default=4., metavar='T', help='temperature of both softmaxes')
    group.add_argument('--distill-loss-weight', type=float, metavar='X',
                       help='weight of the divergence (default: 1, or 1 - task weight)')
    group.add_argument('--task-loss-weight', type=float, metavar='X', help='weight of the loss on labels (default: 1)')


def _add_average(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Averaged weights')
    group.add_argument('--model-ema', action=_FLAG, default=False, help='average the weights and validate the average')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay of the average')
    group.add_argument('--model-ema-warmup', action=_FLAG, default=False, help='start from a small decay')


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, metavar='N', help='random seed')
    group.add_argument('--log-interval', type=int, default=50, metavar='N',
                       help='updates between reports of the loss')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    group.add_argument('--resume', default='', metavar='WHAT',
                       help='auto: the newest intact checkpoint of the run, or start it; or a checkpoint folder')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='updates between checkpoints within an epoch, besides those after each (default: none)')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'),
                       help='metric that selects the best epoch')
    group.add_argument('--log-wandb', action=_FLAG, default=False, help='log to Weights & Biases')
    group.add_argument('--wandb-project', metavar='NAME', help='Weights & Biases project (default: timm-lm)')
    group.add_argument('--wandb-tags', nargs='+', default=[], metavar='TAG', help='tags of the Weights & Biases run')
    group.add_argument('--wandb-resume-id', default='', metavar='ID', help='Weights & Biases run to resume')
    group.add_argument('--output', default='', metavar='DIR', help='folder for runs (default: output/train)')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder of this run in --output')


def additions() -> List[str]:
    """Names of the options that timm's script does not have."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_additions(parser)
    return [action.dest for action in parser._actions]


def _add_additions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Additions to timm\'s options')
    group.add_argument('--pad-crop', type=int, default=0, metavar='N', help='pad by N pixels and crop at random')
    group.add_argument('--loader', default='auto', choices=('auto', 'memory', 'timm'),
                       help='decoded images in memory, or timm\'s transforms in worker processes; auto: memory if the '
                            'data fits and the augmentation can run there')
    group.add_argument('--grow-from', type=with_scheme, metavar='NAME_OR_FOLDER', default='',
                       help='start from the weights of a shallower network, with its blocks repeated')
    group.add_argument('--two-step-epoch', type=int, default=0, metavar='N',
                       help='epoch at which the two-step is switched on; k is 0 before')
    group.add_argument('--log-tensorboard', action=_FLAG, default=False, help='log to TensorBoard in the run folder')
    group.add_argument('--tag', default='', metavar='NAME', help='tag of the saved weights')
    group.add_argument('--dry-run', action='store_true', default=False,
                       help='load network and data, show what would be done, and exit')
