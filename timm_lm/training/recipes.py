"""Recipes, which are YAML files of options: the shipped ones by name, and reading any of them."""
import argparse
import difflib
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml

from timm_lm.errors import UserError, one_line
from timm_lm.parser import KeyValues

from .refused import REFUSED, asks

RECIPES = Path(__file__).resolve().parents[1] / 'recipes'
# Those that were chosen by looking at errors on the test split.
CHOSEN_ON_TEST = (
    'best_c10', 'best_c100', 'demo_c10', 'distill_c10', 'distill_c100', 'grow_c10', 'grow_c100', 'regrow_c100')


def list_recipes() -> List[str]:
    """Names of the shipped recipes, each the tag of the weights that it produces."""
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def find_recipe(name: str) -> Tuple[Path, Optional[str]]:
    """The file of a recipe, and the network if the name has one.

    Args:
        name: A shipped recipe (``paper_c10``), one with another of its networks (``lm_resnet56.paper_c10``; fine-tuning
            is for any), or a file.

    Raises:
        UserError: If there is no such recipe.
    """
    model, _, recipe = name.rpartition('.')
    for stem, network in ((name, None), (recipe, model)):
        if stem in list_recipes():
            path = RECIPES / f'{stem}.yaml'
            text = path.read_text(encoding='utf-8')
            for_any = re.search('(?m)^pretrained: true', text)
            told = ' '.join(re.findall('(?m)^(?:#|model:).*', text))  # not those that it starts or learns from
            if network and not for_any and network not in re.findall(r'\w+', told):
                raise UserError(f"The recipe {stem} is not for {network}; `timm-lm recipe {stem}` shows what it is "
                                'for, and --model takes any network.')
            return path, network
    if Path(name).is_file():
        return Path(name), None
    near = difflib.get_close_matches(recipe, list_recipes(), n=1)
    hint = f" Did you mean {'.'.join(filter(None, (model, near[0])))}?" if near else ''
    raise UserError(f"There is no recipe '{name}'.{hint} Shipped are: {', '.join(list_recipes())}.")


def recipe_title(name: str) -> str:
    """What a shipped recipe is for: the first line of its header."""
    path, _ = find_recipe(name)
    return path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_recipe(path: Path, actions: Dict[str, argparse.Action]) -> Dict[str, Any]:
    """The options of a recipe, as the actions of the parser take them.

    Raises:
        UserError: If it is not YAML of options, or one is unknown, refused or has an impossible value.
    """
    try:
        values = yaml.load(path.read_text(encoding='utf-8'), _Loader) or {}  # a safe one
    except (yaml.YAMLError, ValueError, OSError) as e:  # not UTF-8, or a date that there is not
        raise UserError(f'The recipe {path} is not readable YAML ({one_line(e)}).') from e
    if not isinstance(values, dict):
        raise UserError(f'The recipe {path} must hold "option: value" lines.')
    asked = {str(name): value for name, value in values.items()
             if name not in REFUSED or asks(str(name), value)}
    return {name: _recipe_value(path, name, value, actions) for name, value in asked.items()}


def _recipe_value(path: Path, name: str, value: Any, actions: Dict[str, argparse.Action]) -> Any:
    if name in REFUSED:
        raise UserError(f"The option '{name}' in {path} is refused: {REFUSED[name]}.")
    if name not in actions:
        near = difflib.get_close_matches(name, actions, n=1)
        hint = f'did you mean {near[0]}?' if near else 'see `timm-lm train --help`.'
        raise UserError(f"The option '{name}' in {path} is unknown; {hint}")
    action = actions[name]
    if value is None:
        if action.default is not None:
            raise UserError(f"The option '{name}' in {path} has no value; give it one, or leave it out.")
        return None
    if isinstance(action, KeyValues):
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
        raise UserError(f"The option '{name}' in {path} cannot be '{value}'{choices}.") from None


def _convert(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, (list, dict, bool)):
        raise ValueError
    kind = action.type or str
    assert callable(kind)
    converted = kind(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError
    return converted
