"""The table of the networks in the README: their sizes, the paper's errors, and those of the shipped weights."""
import re
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import timm

from .card import recorded_error
from .errors import UserError
from .files import write_text
from .models._weights import weights_dir
from .names import model_tags, our_models
from .network_size import network_size
from .results import PUBLISHED_NAME, Row, read_rows
from .results_page import table_line

_START = '<!-- networks: made by `timm-lm report --readme README.md` -->'
_END = '<!-- end of networks -->'


def network_table(results: Path) -> List[str]:
    """Lines of a Markdown table of all networks: size, the paper's error and that of the shipped weights.

    Args:
        results: Folder of results, for the paper's figures.
    """
    published = read_rows(results / PUBLISHED_NAME)
    header = ['network', 'images', 'parameters', 'MACs', 'error in the paper, %', 'error of weights that ship, %']
    lines = [table_line(header), table_line(['---', '---', '---:', '---:', '---', '---'])]
    for name in _in_order(our_models()):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        parameters, macs = network_size(name, cfg.num_classes, cfg.input_size)
        lines.append(table_line([
            f'`{name}`', 'x'.join(map(str, cfg.input_size)), f'{parameters / 1e6:.2f} M', f'{macs / 1e6:,.0f} M',
            _errors({row['recipe']: row['top1_err'] for row in _of_paper(published, name)}), _errors(_shipped(name)),
        ]))
    return lines


def _in_order(names: Sequence[str]) -> List[str]:
    """Small images first, ResNets before ResNeXts, depths as numbers, each network before its plain twin."""
    def key(name: str) -> Tuple[int, bool, List[int], bool]:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        numbers = list(map(int, re.findall(r'\d+', name)))
        return cfg.input_size[-1], 'resnext' in name, numbers, name.startswith('preact')
    return sorted(names, key=key)


def _of_paper(published: List[Row], network: str) -> List[Row]:
    return [row for row in published if row['source'] == 'paper' and row['network'] == network]


def _shipped(network: str) -> Dict[str, str]:
    """Recorded errors of the shipped weights of a network, by tag, the lowest first."""
    errors = {tag: recorded_error(weights_dir() / f'{network}.{tag}') for tag in model_tags(network)}
    found = sorted((error, tag) for tag, error in errors.items() if error is not None)
    return {tag: f'{error:.2f}' for error, tag in found}


def _errors(by_recipe: Dict[str, str]) -> str:
    return ', '.join(f'{error} (`{recipe}`)' for recipe, error in by_recipe.items())


def write_table(results: Path, page: Path) -> None:
    """Write the table of networks between its two marks in a page.

    Raises:
        UserError: If the page cannot be read or has no such marks.
    """
    try:
        text = page.read_text(encoding='utf-8')
    except (OSError, ValueError) as e:  # not UTF-8
        reason = e.strerror if isinstance(e, OSError) else e
        raise UserError(f'{page} cannot be read ({reason}); name the README of a checkout.') from e
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not start or not end:
        raise UserError(f"{page} has no place for the table of networks; put '{_START}' and '{_END}' there.")
    write_text(page, '\n'.join([before + start, '', *network_table(results), '', end + after]))
