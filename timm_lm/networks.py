"""The networks in figures: parameters, multiply-accumulate operations, errors; and the table of them in the README."""
import copy
import re
from functools import cache
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .card import recorded_error
from .errors import UserError
from .files import write_text
from .model_config import TimmModel
from .models._weights import weights_dir
from .names import model_tags, our_models
from .results import Row, read_rows

_START = '<!-- networks: made by `timm-lm report --readme README.md` -->'
_END = '<!-- end of networks -->'


@cache
def network_size(architecture: str, num_classes: int, input_size: Tuple[int, int, int]) -> Tuple[int, float]:
    """Parameters and MACs, counted without memory for either."""
    model = timm.create_model(architecture, num_classes=num_classes, device='meta')
    return sum(p.numel() for p in model.parameters()), _count_and_spoil(model, input_size)


def count_macs(model: TimmModel, input_size: Sequence[int]) -> float:
    """Multiply-accumulate operations of one image (C, H, W)."""
    return _count_and_spoil(copy.deepcopy(model).to('meta'), input_size)


def _count_and_spoil(model: TimmModel, input_size: Sequence[int]) -> float:
    """MACs of a network on the meta device, which loses its norms: PyTorch's counter takes them apart to find none."""
    for module in list(model.eval().modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device='meta'))
    return counter.get_total_flops() / 2  # it counts two for each


def network_table(results: Path) -> List[str]:
    """Lines of a Markdown table of all networks: size, the paper's error and that of the weights that ship.

    Args:
        results: Folder of results, for what the paper printed.
    """
    published = read_rows(results / 'published.csv')
    header = ['network', 'images', 'parameters', 'MACs', 'error in the paper, %', 'error of weights that ship, %']
    lines = [_line(header), _line(['---', '---', '---:', '---:', '---', '---'])]
    for name in _in_order(our_models()):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        parameters, macs = network_size(name, cfg.num_classes, cfg.input_size)
        lines.append(_line([
            f'`{name}`', 'x'.join(map(str, cfg.input_size)), f'{parameters / 1e6:.2f} M', f'{macs / 1e6:,.0f} M',
            _errors({row['recipe']: row['top1_err'] for row in _of_paper(published, name)}), _errors(_shipped(name)),
        ]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'


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
    """Recorded errors of the shipped weights of a network, by tag."""
    errors = {tag: recorded_error(weights_dir() / f'{network}.{tag}') for tag in model_tags(network)}
    return {tag: f'{error:.2f}' for tag, error in errors.items() if error is not None}


def _errors(by_recipe: Dict[str, str]) -> str:
    return ', '.join(f'{error} (`{recipe}`)' for recipe, error in by_recipe.items())


def split_page(page: Path) -> Tuple[str, str]:
    """What stands before and after the table of networks in a page, the marks around it included.

    Raises:
        UserError: If the page can not be read or has no such marks.
    """
    try:
        text = page.read_text(encoding='utf-8')
    except (OSError, ValueError) as e:  # no UTF-8
        reason = e.strerror if isinstance(e, OSError) else e
        raise UserError(f'{page} can not be read ({reason}); name the README of a checkout.') from e
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not start or not end:
        raise UserError(f"{page} has no place for the table of networks; put '{_START}' and '{_END}' there.")
    return before + start, end + after


def write_table(results: Path, page: Path) -> None:
    """Write the table of networks between its two marks in a page.

    Raises:
        UserError: As ``split_page``.
    """
    before, after = split_page(page)
    write_text(page, '\n'.join([before, '', *network_table(results), '', after]))
