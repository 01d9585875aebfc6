"""Which values the options of a training can have, alone and in combination."""
import argparse
import math
from functools import cache
from typing import Any, Dict, Iterable, Iterator, List, Tuple

from timm.optim import get_optimizer_info

from timm_lm.errors import UserError
from timm_lm.parser import option_name

_POSITIVE = (
    'img_size', 'input_size', 'crop_pct', 'std', 'lr', 'lr_base', 'lr_base_size', 'lr_noise_pct', 'lr_cycle_mul',
    'lr_k_decay', 'decay_epochs', 'decay_rate', 'clip_grad', 'layer_decay', 'kd_temperature')
_AT_LEAST_1 = (
    'epochs', 'batch_size', 'validation_batch_size', 'grad_accum_steps', 'log_interval', 'val_interval',
    'checkpoint_hist', 'num_classes', 'in_chans', 'recount', 'lr_cycle_limit')
_NOT_NEGATIVE = (
    'pad_crop', 'recovery_interval', 'seed', 'weight_decay', 'warmup_epochs', 'warmup_lr', 'min_lr', 'momentum',
    'mixup', 'cutmix', 'mixup_off_epoch', 'workers', 'aug_repeats', 'cooldown_epochs', 'patience_epochs',
    'lr_cycle_decay', 'two_step_epoch')
_SHARES = (
    'hflip', 'vflip', 'reprob', 'mixup_prob', 'mixup_switch_prob', 'drop', 'model_ema_decay',
    'grayscale_prob', 'gaussian_blur_prob', 'color_jitter_prob', 'lr_noise', 'drop_block')

# Options that have an effect only together with one of others.
ONLY_WITH: Dict[Tuple[str, ...], Tuple[str, ...]] = {
    ('bce_loss',): ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'),
    ('model_ema',): ('model_ema_decay', 'model_ema_warmup'),
    ('kd_model_name',): (
        'kd_distill_type', 'kd_loss_type', 'kd_temperature', 'distill_loss_weight', 'task_loss_weight'),
    ('log_wandb',): ('wandb_project', 'wandb_tags', 'wandb_resume_id'),
    ('mixup', 'cutmix', 'cutmix_minmax'): ('mixup_prob', 'mixup_mode', 'mixup_off_epoch'),
    ('reprob',): ('remode', 'recount'),
    ('pretrained',): ('pretrained_path',),
    ('layer_decay',): ('layer_decay_min_scale', 'layer_decay_no_opt_scale'),
    ('clip_grad',): ('clip_mode',),
    ('torchcompile',): ('torchcompile_mode',),
    ('amp',): ('amp_dtype',),
    ('lr_noise',): ('lr_noise_pct', 'lr_noise_std'),
    ('warmup_epochs',): ('warmup_lr', 'warmup_prefix'),
    ('color_jitter',): ('color_jitter_prob',),
    ('val_split',): ('val_interval', 'validation_batch_size', 'eval_metric'),
}

# Options of the schedule that only some of timm's schedules read.
_OF_SCHEDULES: Dict[Tuple[str, ...], Tuple[str, ...]] = {
    ('decay_milestones',): ('multistep',),
    ('decay_epochs',): ('step', 'wsd', 'rsqrt'),
    ('decay_rate',): ('step', 'multistep', 'plateau', 'poly'),
    ('patience_epochs',): ('plateau',),
    ('min_lr',): ('cosine', 'tanh', 'poly', 'plateau', 'wsd', 'rsqrt'),
    ('lr_k_decay',): ('cosine', 'poly'),
    ('lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit'): ('cosine', 'tanh', 'poly'),
    ('cooldown_epochs',): ('cosine', 'tanh', 'poly', 'wsd', 'rsqrt'),
}

# Options of the augmentation, which --no-aug turns off.
_AUGMENTATION = (
    'hflip', 'vflip', 'pad_crop', 'reprob', 'remode', 'recount', 'scale', 'ratio', 'train_crop_mode', 'color_jitter',
    'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'train_interpolation')

# Options that another one replaces.
_INSTEAD = {'lr': ('lr_base', 'lr_base_size', 'lr_base_scale'), 'input_size': ('img_size',)}


def check_options(args: argparse.Namespace) -> None:
    """Find impossible values before anything else is done.

    Raises:
        UserError: At the first one.
    """
    _check_ranges(args)
    _check_schedule(args)
    _check_pairs(args)


def _check_ranges(args: argparse.Namespace) -> None:
    values: Dict[str, List[Any]] = {  # one or several, none if it was left out
        name: value if isinstance(value, list) else [value] for name, value in vars(args).items() if value is not None}

    def check(names: Any, possible: Any, must: str) -> None:
        for name in names:
            if not all(map(possible, values.get(name, []))):
                raise UserError(f'{option_name(name)} {must} {getattr(args, name)}.')

    check(values, lambda x: not isinstance(x, float) or math.isfinite(x), 'must be a finite number, not')
    check(_POSITIVE, lambda x: x > 0, 'must be positive, not')
    check(_AT_LEAST_1, lambda x: x >= 1, 'must be at least 1, not')
    check(_NOT_NEGATIVE, lambda x: x >= 0, 'must not be negative, it is')
    check(_SHARES, lambda x: 0 <= x <= 1, 'must be between 0 and 1, not')
    check(['drop_path', 'smoothing'], lambda x: 0 <= x < 1, 'must be at least 0 and less than 1, not')
    check(['aug_repeats'], lambda x: x == 0 or x >= 1, 'must be 0 or at least 1, not')
    check(['seed'], lambda x: x < 2 ** 32, 'must be less than 2**32, not')
    info = _optimizer_info(args.opt)
    if args.opt_betas is not None and info is not None and info.has_betas and len(args.opt_betas) != info.num_betas:
        raise UserError(f'--opt-betas takes {info.num_betas} numbers with --opt {args.opt}, not {args.opt_betas}.')
    if args.cutmix_minmax is not None and not 0 <= args.cutmix_minmax[0] < args.cutmix_minmax[1] <= 1:
        raise UserError(f'--cutmix-minmax takes two increasing shares of a side, not {args.cutmix_minmax}.')
    for name in ('scale', 'ratio'):
        value = getattr(args, name)
        if value and not 0 < value[0] <= value[1]:
            raise UserError(f'{option_name(name)} takes two positive numbers, the smaller one first, not {value}.')


def _check_schedule(args: argparse.Namespace) -> None:
    for name in ('layer_decay', 'lr_noise'):
        if args.sched == 'none' and getattr(args, name):
            raise UserError(f'{option_name(name)} is done by the schedule; use one other than --sched none, such as '
                            'constant in newer timm.')
    if args.sched == 'multistep' and args.decay_milestones:
        milestones = args.decay_milestones
        if sorted(set(milestones)) != list(milestones):
            raise UserError(f'--decay-milestones must increase, they are {milestones}.')
        if milestones[-1] > args.epochs:
            raise UserError(f'The schedule is longer than the run: --decay-milestones {milestones} with --epochs '
                            f'{args.epochs}; change one of them.')
    if args.lr_noise and not (sorted(set(args.lr_noise)) == args.lr_noise[:2] and args.lr_noise[0] < 1):
        raise UserError('--lr-noise takes one or two increasing shares of the run, where the noise begins and ends, '
                        f'not {args.lr_noise}.')
    interval = usual_decay_epochs(args.sched) if args.decay_epochs is None else args.decay_epochs
    if args.sched == 'step' and interval >= args.epochs:
        raise UserError(f'The schedule is longer than the run: --decay-epochs {interval:g} with --epochs '
                        f'{args.epochs}; change one of them.')
    if not args.val_split and args.sched == 'plateau':
        raise UserError('--sched plateau lowers the rate based on validation; give --val-split, or another schedule.')
    if args.warmup_epochs >= args.epochs and args.sched != 'none' and not args.warmup_prefix:
        raise UserError(f'--warmup-epochs {args.warmup_epochs} leave nothing of --epochs {args.epochs}.')
    epochs = args.epochs + (args.warmup_epochs if args.warmup_prefix else 0)
    after_warmup = -(-epochs // args.val_interval) - args.warmup_epochs // args.val_interval
    if args.sched == 'plateau' and args.patience_epochs + 2 >= after_warmup:  # the first sets the value to beat
        raise UserError(f'The schedule is longer than the run: --patience-epochs {args.patience_epochs} with --epochs '
                        f'{args.epochs} and {after_warmup} validations after the warm-up; change one of them.')
    if args.sched in ('cosine', 'tanh', 'poly') and args.lr_cycle_mul < 1:
        cycles = sum(args.epochs * args.lr_cycle_mul ** i for i in range(args.lr_cycle_limit))
        most = args.epochs / (1 - args.lr_cycle_mul)  # if there were infinitely many
        if int(cycles) + args.cooldown_epochs >= most:
            raise UserError(f'--lr-cycle-mul {args.lr_cycle_mul:g} makes cycles so short that they come to an end '
                            f'before --cooldown-epochs {args.cooldown_epochs} do; change one of them.')


def _check_pairs(args: argparse.Namespace) -> None:
    if args.in_chans is not None and args.input_size is not None and args.in_chans != args.input_size[0]:
        raise UserError(f'--in-chans {args.in_chans} and the {args.input_size[0]} channels of --input-size differ; '
                        'leave one out.')
    if args.wandb_resume_id and not args.resume:
        raise UserError('--wandb-resume-id continues the log of a run; give --resume too.')
    if mixes(args) and args.batch_size % 2:
        raise UserError(f'Mixup and cutmix mix pairs: --batch-size must be even, not {args.batch_size}.')
    starts = [name for name in ('pretrained', 'initial_checkpoint', 'grow_from') if getattr(args, name)]
    if args.grow_from and len(starts) > 1:
        raise UserError(f"{' and '.join(map(option_name, starts))} both set the initial weights; leave one out.")
    if args.loader == 'memory' and not_in_memory(args):
        raise UserError(f"--loader memory cannot do {', '.join(not_in_memory(args))}; use --loader timm, or turn them "
                        'off.')


def usual_decay_epochs(sched: str) -> float:
    """The default of ``--decay-epochs``, as in timm's schedules."""
    return 0.2 if sched in ('rsqrt', 'wsd') else 90.


def mixes(args: argparse.Namespace) -> bool:
    """Whether the options ask for mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def not_in_memory(args: argparse.Namespace) -> List[str]:
    """The requested augmentation that can be done only image by image, not on batches in memory."""
    if args.no_aug:
        return []
    off = dict(
        scale=[1.0, 1.0],
        ratio=[1.0, 1.0],
        train_crop_mode=None,
        color_jitter=0.0,
        grayscale_prob=0.0,
        gaussian_blur_prob=0.0,
        aa=None,
        train_interpolation=args.interpolation,
    )
    asked = {name: getattr(args, name) for name in off}
    return [f'{option_name(name)} {value}' for name, value in asked.items() if value and value != off[name]]


def without_effect(values: Dict[str, Any]) -> Iterator[Tuple[Tuple[str, ...], str]]:
    """Options that have no effect given the others, and why."""
    for leaders, followers in ONLY_WITH.items():
        if not any(values[leader] for leader in leaders):
            yield followers, f"without {' or '.join(map(option_name, leaders))}; give both"
    for names, schedules in _OF_SCHEDULES.items():
        if values['sched'] not in schedules:
            yield names, f"with --sched {values['sched']}; it is for {', '.join(schedules)}. Take one of these"
    if values['sched'] == 'none':
        warmup = ('warmup_epochs',) if values['warmup_epochs'] else ()
        yield (*warmup, 'warmup_lr', 'warmup_prefix', 'sched_on_updates'), 'with --sched none; take a schedule'
    if values['lr_cycle_limit'] == 1:
        yield ('lr_cycle_mul', 'lr_cycle_decay'), 'without --lr-cycle-limit of at least 2; give both'
    if not (values['mixup'] and (values['cutmix'] or values['cutmix_minmax'])):
        yield ('mixup_switch_prob',), 'without --mixup and --cutmix; give both'
    if values['torchcompile'] not in (None, '', 'inductor'):
        yield ('torchcompile_mode',), f"with --torchcompile {values['torchcompile']}; use --torchcompile inductor"
    yield _unread_by_optimizer(values['opt']), f"with --opt {values['opt']}, which has none; take another optimizer"


@cache
def _optimizer_info(opt: str) -> Any:
    """timm's registry entry of an optimizer, None for an unknown one, which is reported when it is created."""
    try:
        return get_optimizer_info(opt.lower().split('_')[-1])  # lookahead_NAME wraps the optimizer NAME
    except ValueError:
        return None


def _unread_by_optimizer(opt: str) -> Tuple[str, ...]:
    info = _optimizer_info(opt)
    if info is None:
        return ()
    read = dict(momentum=info.has_momentum, opt_eps=info.has_eps, opt_betas=info.has_betas)
    return tuple(name for name, is_read in read.items() if not is_read)


def overridden(values: Dict[str, Any]) -> Iterator[Tuple[Tuple[str, ...], str]]:
    """Options that others replace or turn off, and why; a recipe may have both, as a run records what it computed."""
    for taken, left_out in _INSTEAD.items():
        if values[taken] is not None:
            yield left_out, f'with {option_name(taken)}, which may come from the recipe; give that one'
    if values['no_aug']:
        yield tuple(name for name in _AUGMENTATION if values[name]), 'with --no-aug; take that one back'


def check_effect(idle: Iterable[Tuple[Tuple[str, ...], str]], values: Dict[str, Any], before: Dict[str, Any],
                 defaults: Dict[str, Any]) -> None:
    """Refuse options that were changed, by a recipe or after it, but are idle.

    Raises:
        UserError: At the first one.
    """
    for names, why in idle:
        for name in names:
            if values[name] not in (before[name], defaults[name]):
                raise UserError(f'{option_name(name)} does nothing {why}, or leave it out.')
