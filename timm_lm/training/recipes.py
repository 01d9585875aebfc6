"""The shipped recipes: found by name, and told in a line."""
import difflib
import re
from pathlib import Path
from typing import List, Optional, Tuple

from timm_lm.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / 'recipes'


def list_recipes() -> List[str]:
    """Names of the shipped recipes, each the tag of the weights that it makes."""
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def find_recipe(name: str) -> Tuple[Path, Optional[str]]:
    """The file of a recipe, and the network if the name tells one.

    Args:
        name: A shipped recipe (``paper_c10``), one for another of its networks (``lm_resnet56.paper_c10``), where
            fine-tuning is for any, or a file.

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
                raise UserError(f"The recipe {stem} is not for {network}; `timm-lm recipe {stem}` tells what it is "
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
