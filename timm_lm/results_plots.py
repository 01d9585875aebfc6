"""The plots of the page of results: error against parameters, and the learned ``k`` by depth."""
from functools import cache
from pathlib import Path
from typing import Dict, List

import timm
from timm.models import get_arch_name

from .figures import new_figure, save_figure
from .network_size import count_parameters
from .results import Row


def with_k(rows: List[Row]) -> List[Row]:
    """The finished runs of networks that have a ``k``."""
    return [row for row in rows if row['k'] and row['status'] == 'done']


@cache
def _millions(network: str, num_classes: int) -> float:
    """Millions of parameters of the plain network of the same depth; one ``k`` per block is not counted."""
    plain = 'preact_' + network.removeprefix('preact_').removeprefix('lm_')
    return count_parameters(timm.create_model(plain, num_classes=num_classes, device='meta')) / 1e6


def plot_errors(runs: List[Row], published: List[Row], dataset: str, path: Path) -> bool:
    """Error against parameters: our LM and plain networks, and published ones."""
    classes = 100 if dataset == 'cifar100' else 10
    done = [row for row in runs if row['status'] == 'done' and row['top1_err'] and row['param_count']
            and 'resnext' not in row['model']]
    if not done:
        return False
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    others: Dict[str, List[Row]] = {}
    for row in published:
        if row['dataset'] == dataset and 'resnext' not in row['network']:
            kind = ', LM' if row['network'].startswith('lm_') else ', plain' if row['source'] == 'paper' else ''
            others.setdefault(row['source'] + kind, []).append(row)
    for label, rows in others.items():
        axes.scatter([_millions(row['network'], classes) for row in rows],
                     [float(row['top1_err']) for row in rows], marker='x', s=24, label=label)
    for prefix, marker in (('lm_', 'o'), ('preact_', 's')):
        rows = [row for row in done if row['model'].startswith(prefix)]
        if rows:
            axes.scatter([float(row['param_count']) for row in rows], [float(row['top1_err']) for row in rows],
                         marker=marker, label='LM, ours' if prefix == 'lm_' else 'plain, ours')
    axes.set(xlabel='parameters (millions)', ylabel='test error (%)', xscale='log')
    ticks = [0.2, 0.3, 0.5, 1, 2, 3]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    save_figure(figure, path)
    return True


def plot_k(rows: List[Row], path: Path) -> bool:
    """The learned ``k`` of each block, from the first to the last: a panel for each network, a line for each run."""
    panels: Dict[str, List[Row]] = {}
    for row in sorted(with_k(rows), key=lambda row: len(row['k'].split())):
        panels.setdefault(get_arch_name(row['model']), []).append(row)
    if not panels:
        return False
    figure = new_figure(9, 3.4 * -(-len(panels) // 2))
    grid = figure.subplots(-(-len(panels) // 2), 2, sharey=True, squeeze=False).flat
    for (network, runs), axes in zip(panels.items(), grid):  # in this order, as zip reads one more of the first
        for number, row in enumerate(runs):
            k = [float(value) for value in row['k'].split()]
            recipe, changed, _ = row['recipe'].partition(' with ')
            label = f"{recipe}{' (changed)' if changed else ''}, {row['epochs']} epochs, seed {row['seed']}"
            style = ('-', '--')[number // 10 % 2]  # matplotlib has ten colours
            axes.plot(range(1, len(k) + 1), k, style, color=f'C{number % 10}', marker='.', linewidth=1, label=label)
        axes.axhline(0, color='black', linewidth=0.8)
        axes.set(title=network, xlabel='block with a k', ylabel='k')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize='xx-small')
    for axes in grid:  # an odd number of networks leaves one empty
        axes.set_axis_off()
    save_figure(figure, path)
    return True
