"""The options of a training: timm's train-script dialect, recipes in YAML, and what is refused with a reason.

Names, meanings and defaults are those of timm's ``train.py``; our own additions are in one group at the end.
"""
import argparse
import ast
import difflib
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Type

import yaml

from timm_lm.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / 'recipes'

# Options of timm's train script that this engine does not take, each with the reason.
_NOT_YET = 'it is not supported by this engine yet; timm\'s own train.py takes it'
_OWN_LOADER = 'images are decoded once into memory, where only pad-and-crop and flips are applied; use timm\'s train.py'
_OTHER_NETWORK = 'it does not apply to these networks'
REFUSED: Dict[str, str] = {
    **dict.fromkeys([
        'aa', 'aug_repeats', 'aug_splits', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'jsd_loss',
        'resplit', 'train_crop_mode', 'vflip', 'reprob', 'remode', 'recount', 'mixup', 'cutmix', 'cutmix_minmax',
        'mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch', 'epoch_repeats', 'input_img_mode',
        'train_num_samples', 'val_num_samples', 'save_images', 'tta',
    ], _OWN_LOADER),
    **dict.fromkeys([
        'workers', 'pin_mem', 'no_prefetcher', 'use_multi_epochs_loader', 'worker_seeding',
    ], 'images are in memory and no worker processes are used; leave it out'),
    **dict.fromkeys([
        'no_resume_opt', 'start_epoch', 'pretrained_path',
        'bce_loss', 'bce_sum', 'bce_target_thresh', 'bce_pos_weight', 'model_ema', 'model_ema_force_cpu',
        'model_ema_decay', 'model_ema_warmup', 'sync_bn', 'dist_bn', 'head_init_scale', 'head_init_bias',
        'kd_model_name', 'kd_distill_type', 'kd_loss_type', 'distill_loss_weight', 'task_loss_weight', 'kd_temperature',
        'kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type', 'log_wandb', 'wandb_project',
        'wandb_tags', 'wandb_resume_id', 'model_dtype', 'synchronize_step', 'eval_metric', 'patience_epochs',
    ], _NOT_YET),
    **dict.fromkeys(['drop_block', 'drop_connect', 'bn_momentum', 'bn_eps', 'split_bn'], _OTHER_NETWORK),
    **dict.fromkeys(['torchscript', 'fuser'], 'training is compiled by torch.compile; use --torchcompile'),
    **dict.fromkeys(['fast_norm'], 'it needs a package of its own; leave it out'),
    **dict.fromkeys(['no_ddp_bb', 'local_rank'], 'Accelerate owns the processes; use `accelerate launch`'),
    **dict.fromkeys(['dataset_trust_remote_code'], 'code of a data set is never run'),
    **dict.fromkeys([
        'train_img_sizes', 'train_batch_sizes', 'train_size_probs', 'train_size_schedule', 'train_size_schedule_spread',
        'train_size_random_mix', 'train_batches_per_epoch', 'variable_batch_loss_scale', 'naflex_loader',
        'naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes', 'naflex_patch_size_probs',
        'naflex_loss_scale', 'naflex_patchify_channels_first',
    ], 'shapes are static here'),
}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
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


class Parser(argparse.ArgumentParser):
    """Argument parser that reports by UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message[0].upper()}{message[1:]}; see `{self.prog} --help`.')


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which images are read, and how; training and validation share them."""
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR', help='folder of the data: Parquet in the Hub\'s layout, or images')
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
    flag = argparse.BooleanOptionalAction
    parser.add_argument('-c', '--config', metavar='RECIPE', help='a shipped recipe (see timm-lm recipe) or a YAML file')

    add_data_options(parser)
    parser.add_argument('--train-split', metavar='NAME', default='train', help='split that is trained on')

    group = parser.add_argument_group('Model')
    group.add_argument('--model', metavar='NAME', default='lm_resnet20', help='name in timm (default: lm_resnet20)')
    group.add_argument('--pretrained', action=flag, default=False, help='start from its pretrained weights')
    group.add_argument('--initial-checkpoint', metavar='FILE', default='', help='start from these weights')
    group.add_argument('--num-classes', type=int, metavar='N', help='classes (default: the model\'s)')
    group.add_argument('--gp', metavar='POOL', help='global pooling of the head')
    group.add_argument('--in-chans', type=int, metavar='N', help='channels of the images')
    group.add_argument('--img-size', type=int, metavar='N', help='side of the images')
    group.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help='size of the images')
    group.add_argument('--crop-pct', type=float, metavar='X', help='share of the image that the centre crop keeps')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help='mean of each channel, pixels in [0, 1]')
    group.add_argument('--std', type=float, nargs='+', metavar='X', help='standard deviation of each channel')
    group.add_argument('--interpolation', default='', metavar='NAME', help='of resizing')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_KeyValues, metavar='NAME=VALUE',
                       help='further keywords of the model')
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout rate')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth rate of the last block')
    group.add_argument('--grad-checkpointing', action=flag, default=False, help='recompute blocks in backward')

    group = parser.add_argument_group('Batches and precision')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images of a batch of a process')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='(default: batch size)')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches of an update')
    group.add_argument('--channels-last', action=flag, default=False, help='channels_last memory layout')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile')
    group.add_argument('--no-torchcompile', dest='torchcompile', action='store_const', const=None, help='run eagerly')
    group.add_argument('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    group.add_argument('--amp', action=flag, default=False, help='mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='its lower precision')
    group.add_argument('--device', metavar='NAME', help='cpu, or what Accelerate finds (default)')
    group.add_argument('--device-modules', nargs='+', metavar='MODULE', help='modules to import first')

    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='sgd', metavar='NAME', help='timm\'s name; sgd is Nesterov, momentum is not')
    group.add_argument('--opt-eps', type=float, metavar='X', help='epsilon')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='X', help='betas')
    group.add_argument('--momentum', type=float, default=0.9, metavar='X', help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='X', help='weight decay')
    group.add_argument('--clip-grad', type=float, metavar='X', help='clip gradients')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='how')
    group.add_argument('--layer-decay', type=float, metavar='X', help='layer-wise decay of the learning rate')
    group.add_argument('--layer-decay-min-scale', type=float, default=0., metavar='X', help='its smallest factor')
    group.add_argument('--layer-decay-no-opt-scale', type=float, metavar='X', help='freeze layers below this factor')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=_KeyValues, metavar='NAME=VALUE',
                       help='further keywords of the optimizer')

    group = parser.add_argument_group('Schedule')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='timm\'s name of the schedule')
    group.add_argument('--sched-on-updates', action=flag, default=False, help='step by update, not by epoch')
    group.add_argument('--lr', type=float, metavar='X', help='learning rate')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='X', help='rate at the base batch size')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='base batch size')
    group.add_argument('--lr-base-scale', default='', metavar='NAME', help='linear or sqrt')
    group.add_argument('--lr-noise', type=float, nargs='+', metavar='X', help='noise on and off, shares of the run')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='X', help='limit of the noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='X', help='its standard deviation')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='growth of cycles')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='decay of cycles')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, metavar='X', help='k-decay of cosine and poly')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='X', help='rate at the start of warm-up')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--warmup-prefix', action=flag, default=False, help='warm-up before the schedule')
    group.add_argument('--min-lr', type=float, default=0., metavar='X', help='smallest rate')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                       help='epochs of multistep, each acting one epoch early')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N', help='interval of step')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='X', help='factor of a drop')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the smallest rate')

    group = parser.add_argument_group('Augmentation and loss')
    group.add_argument('--no-aug', action='store_true', default=False, help='no augmentation at all')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='X',
                       help='of random resized crops: must be 1 1')
    group.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='X', help='must be 1 1')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='X', help='must be 0')
    group.add_argument('--train-interpolation', default='random', metavar='NAME',
                       help='must be that of validation')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')

    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, metavar='N', help='random seed')
    group.add_argument('--log-interval', type=int, default=50, metavar='N',
                       help='batches between two readings of the loss')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between two validations')
    group.add_argument('--resume', default='', metavar='WHAT',
                       help='auto: the newest whole checkpoint of the run, or start it; or the folder of a checkpoint')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='batches between two checkpoints inside an epoch, beside those after each (default: none)')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument('--output', default='', metavar='DIR', help='folder of runs (default: output/train)')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder of this run in it')

    group = parser.add_argument_group('Additions to timm\'s options')
    group.add_argument('--pad-crop', type=int, default=0, metavar='N', help='pad by N pixels and crop at random')
    group.add_argument('--tag', default='', metavar='NAME', help='tag of the saved weights')

    for name, reason in REFUSED.items():
        names = ['-j', '--workers'] if name == 'workers' else [_option(name)]
        parser.add_argument(*names, nargs='*', dest=name, action=_refuse(reason), help=argparse.SUPPRESS)
    return parser


def _option(name: str) -> str:
    return '--' + name.replace('_', '-')


def _refuse(reason: str) -> Type[argparse.Action]:
    class Refuse(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            raise UserError(f'{option_string} is refused: {reason}.')
    return Refuse


# Recipes


def list_recipes() -> List[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def find_recipe(name: str) -> Path:
    """The file of a recipe, a shipped one by its name.

    Raises:
        UserError: If there is no such recipe.
    """
    shipped = RECIPES / f'{name}.yaml'
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, list_recipes(), n=1)
    hint = f' Did you mean {near[0]}?' if near else ''
    raise UserError(f"There is no recipe '{name}'.{hint} Shipped are: {', '.join(list_recipes())}.")


def _read_recipe(path: Path, actions: Dict[str, argparse.Action]) -> Dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise UserError(f'The recipe {path} is not readable YAML ({str(e).splitlines()[0]}).') from e
    if not isinstance(values, dict):
        raise UserError(f'The recipe {path} must hold "option: value" lines.')
    return {name: _recipe_value(path, str(name), value, actions) for name, value in values.items()}


def _recipe_value(path: Path, name: str, value: Any, actions: Dict[str, argparse.Action]) -> Any:
    if name in REFUSED:
        raise UserError(f"The option '{name}' in {path} is refused: {REFUSED[name]}.")
    if name not in actions:
        near = difflib.get_close_matches(name, actions, n=1)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f"The option '{name}' in {path} is unknown{hint}")
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
    except (TypeError, ValueError):
        raise UserError(f"The option '{name}' in {path} can not be '{value}'.") from None


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
    actions = {action.dest: action for action in parser._actions if action.dest not in (*REFUSED, 'help', 'config')}
    actions['torchcompile'] = next(a for a in parser._actions if '--torchcompile' in a.option_strings)
    first = Parser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument('-c', '--config')
    config = first.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**_read_recipe(find_recipe(config), actions))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], options, n=1)
        hint = f'; did you mean {near[0]}?' if near else f'; see `{prog} --help`'
        raise UserError(f"Unknown argument '{unknown[0]}'{hint}")
    for name in REFUSED:
        delattr(args, name)
    check_options(args)
    return args


def check_options(args: argparse.Namespace) -> None:
    """Find impossible values before anything is done.

    Raises:
        UserError: At the first one.
    """
    for name in ('epochs', 'batch_size', 'grad_accum_steps', 'log_interval', 'val_interval', 'checkpoint_hist'):
        if getattr(args, name) < 1:
            raise UserError(f'{_option(name)} must be at least 1, not {getattr(args, name)}.')
    for name in ('pad_crop', 'recovery_interval', 'seed', 'weight_decay', 'warmup_epochs', 'min_lr', 'momentum'):
        if getattr(args, name) < 0:
            raise UserError(f'{_option(name)} must not be negative, it is {getattr(args, name)}.')
    if not 0 <= (args.drop_path or 0.) < 1:
        raise UserError(f'--drop-path must be at least 0 and less than 1, not {args.drop_path}.')
    if args.validation_batch_size is not None and args.validation_batch_size < 1:
        raise UserError(f'--validation-batch-size must be at least 1, not {args.validation_batch_size}.')
    for name in ('hflip', 'smoothing', 'drop'):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f'{_option(name)} must be between 0 and 1, not {getattr(args, name)}.')
    if args.lr is not None and args.lr <= 0:
        raise UserError(f'--lr must be positive, not {args.lr}.')
    if args.sched == 'multistep':
        milestones = args.decay_milestones
        if sorted(set(milestones)) != list(milestones):
            raise UserError(f'--decay-milestones must increase, they are {milestones}.')
        if milestones[-1] > args.epochs:
            raise UserError(f'The schedule is longer than the run: --decay-milestones {milestones} with --epochs '
                            f'{args.epochs}; change one of them.')
    if args.warmup_epochs >= args.epochs and args.sched != 'none' and not args.warmup_prefix:
        raise UserError(f'--warmup-epochs {args.warmup_epochs} leave nothing of --epochs {args.epochs}.')
    if args.no_aug:
        args.hflip, args.pad_crop = 0., 0
        return
    for name, neutral in (('scale', [1.0, 1.0]), ('ratio', [1.0, 1.0]), ('color_jitter', 0.0)):
        if getattr(args, name) != neutral:
            raise UserError(f'{_option(name)} {getattr(args, name)} is refused: {_OWN_LOADER}, or set it to {neutral}.')
    if args.train_interpolation not in ('', args.interpolation):
        raise UserError('--train-interpolation must be that of --interpolation: images are resized once.')
