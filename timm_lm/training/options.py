"""The options of a training, merged from timm's defaults, a recipe and the command line."""
import argparse
import copy
import difflib
from functools import cache
from typing import Any, Dict, Optional, Sequence

from timm_lm.errors import UserError
from timm_lm.parser import Parser
from timm_lm.timm_data import SPLIT_NAMES, TRAIN_OR_TEST

from .arguments import build_parser
from .option_rules import ONLY_WITH, check_effect, check_options, overridden, usual_decay_epochs, without_effect
from .recipes import find_recipe, read_recipe


def parse_options(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Options of a training: timm's defaults, then the recipe, then the command line.

    Args:
        argv: Arguments of the command.

    Returns:
        The options, by timm's names.

    Raises:
        UserError: If an option is unknown, refused, or has an impossible value.
    """
    parser = build_parser()
    given = defaults = _defaults()
    actions = {action.dest: action for action in parser._actions if action.dest in defaults.keys() - {'config'}}
    actions['torchcompile'] = next(a for a in parser._actions if '--torchcompile' in a.option_strings)
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument('-c', '--config')
    config = first.parse_known_args(argv)[0].config
    if config:
        path, model = find_recipe(config)
        given = defaults | read_recipe(path, actions) | (dict(model=model) if model else {})
        _unset_usual_decay(given)
        check_effect(without_effect(given), given, defaults, defaults)
        parser.set_defaults(**given)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], options, n=1)
        hint = f'did you mean {near[0]}?' if near else f'see `{parser.prog} --help`.'
        if not unknown[0].startswith('-'):
            hint = 'name the data with --data-dir.'
        raise UserError(f"Unknown argument '{unknown[0]}'; {hint}")
    if args.val_split in SPLIT_NAMES[1] and args.dataset.lower() in TRAIN_OR_TEST:
        args.val_split = 'test'  # which timm takes for any other name, and validation is its default
    _unset_usual_decay(vars(args))
    check_options(args)
    check_effect((*without_effect(vars(args)), *overridden(vars(args))), vars(args), given, defaults)
    if args.no_aug:
        args.hflip, args.vflip, args.pad_crop, args.reprob = 0., 0., 0, 0.
    for names, _ in without_effect(vars(args)):
        _reset(args, *names)
    for leaders in ONLY_WITH:  # of all spellings of off, the one of timm's defaults, if these are off
        _reset(args, *(leader for leader in leaders if not getattr(args, leader) and not defaults[leader]))
    if args.decay_epochs is None:
        args.decay_epochs = usual_decay_epochs(args.sched)
    return args


def turn_off(args: argparse.Namespace, leader: str) -> None:
    """Reset an option, and those that have no effect without it, to timm's defaults.

    Otherwise what a recipe sets for the latter would be recorded next to an option that is off, which would be refused
    as a recipe.
    """
    _reset(args, leader, *ONLY_WITH[leader,])


def _reset(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        setattr(args, name, copy.copy(_defaults()[name]))


def _unset_usual_decay(options: Dict[str, Any]) -> None:
    """Take a schedule's usual ``--decay-epochs`` as not given.

    A run records it in args.yaml with every schedule, and that file must be accepted as a recipe although most
    schedules do not read it.
    """
    if options['decay_epochs'] == usual_decay_epochs(options['sched']):
        options['decay_epochs'] = None


@cache
def _defaults() -> Dict[str, Any]:
    actions = build_parser()._actions
    return {action.dest: action.default for action in actions if action.default is not argparse.SUPPRESS}
