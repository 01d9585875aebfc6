"""The page of results, made from the record of runs.

Besides the runs, a folder of results holds ``published.csv`` with published figures, ``tables.yaml`` with the tables of
the page, and ``remarks.md`` with remarks on them.
"""
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import yaml
from timm.models import get_arch_name

from .errors import UserError
from .files import write_text
from .parser import option_name
from .results import PUBLISHED_NAME, Row, read_rows
from .results_plots import plot_errors, plot_k, with_k
from .training.options import parse_options

PLOTTED = ('cifar10', 'cifar100')
SOURCES = ('paper', 'pytorch-cifar-models', 'pytorchcv')
_KEYS = {'title', 'dataset', 'recipe', 'pairs', 'published'}  # of each table
SUMMARY = ('Test errors of the LM networks that were trained to the end with an unmodified recipe, next to their plain '
           'twins trained with the same recipe and all published figures for the same depth. The weights that a recipe '
           'starts or distils from are named with its table below.')


def read_frame(results: Path) -> Tuple[List[Dict[str, Any]], str]:
    """The tables of the page and the remarks; a user's own record needs neither.

    Raises:
        UserError: If they cannot be read.
    """
    name = 'tables.yaml'
    try:
        path = results / name
        tables = yaml.safe_load(path.read_text(encoding='utf-8')) if path.exists() else []
        if not isinstance(tables, list) or any(
                not isinstance(table, dict) or not table.keys() >= _KEYS for table in tables):
            raise ValueError
        name = 'remarks.md'
        path = results / name
        return tables, path.read_text(encoding='utf-8').strip() if path.exists() else ''
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f'{results} has no readable {name}; fix it, or name another record with --results.') from e


def write_report(results: Path, page: Path) -> None:
    """Write the page of results and its plots from the files of a folder of results.

    Raises:
        UserError: If a file cannot be read, or there is nothing to report.
    """
    tables, remarks = read_frame(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    published = read_rows(results / PUBLISHED_NAME)
    runs = {path.stem: read_rows(path) for path in sorted(results.glob('*.csv')) if path.name != PUBLISHED_NAME}
    if not tables and not any(runs.values()):
        raise UserError(f'{results} has no record of runs; add some with --add, or name a record with --results.')
    lines = ['# Results', '', '<!-- made by `timm-lm report`; change results/ and run it again -->', '']
    lines += [*_summary(tables, runs, published)] if tables else []
    lines += ['## Remarks', '', remarks, ''] if remarks else []
    for table in tables:
        lines += _section(table, runs.get(table['dataset'], []), published)
    for dataset in PLOTTED:
        if plot_errors(runs.get(dataset, []), published, dataset, page.parent / f'error_{dataset}.png'):
            lines += [f'![Error against parameters on {dataset}](error_{dataset}.png)', '']
    all_rows = [row for rows in runs.values() for row in rows]
    if plot_k(all_rows, page.parent / 'k_by_depth.png'):
        lines += ['## The learned k', '', _about_k(all_rows), '', '![k of each block by depth](k_by_depth.png)', '']
    lines += _all_runs(runs)
    write_text(page, '\n'.join(lines).rstrip() + '\n')


def _summary(tables: List[Dict[str, Any]], runs: Dict[str, List[Row]], published: List[Row]) -> List[str]:
    """A table of the LM networks that have a finished run, next to all figures for the same depth."""
    lines = ['## Summary', '', SUMMARY, '', *_table_head([
        'network', 'data', 'recipe', 'ours, %', 'plain twin, %', *(f'{source}, %' for source in SOURCES)])]
    for table in tables:
        rows = runs.get(table['dataset'], [])
        for plain, name in table['pairs']:
            found = finished(rows, name, _recipe(table, name))
            if found:
                twin = _spread(finished(rows, plain, _recipe(table, plain)))
                others = (_of_depth(published, source, table['dataset'], name) for source in SOURCES)
                lines.append(table_line([
                    f'`{name}`', table['dataset'], f"`{table['recipe']}`", _spread(found), twin, *others]))
    return [*lines, '']


def _of_depth(published: List[Row], source: str, dataset: str, network: str) -> str:
    """A source's figures for an LM network and for both plain ones of its depth, each with network and recipe."""
    plain = network.removeprefix('lm_')
    names = [network, f'preact_{plain}', plain]
    rows = [row for name in names for row in published
            if (row['source'], row['dataset'], row['network']) == (source, dataset, name)]
    return ', '.join(f"{row['top1_err']} ({' '.join(filter(None, (row['network'], row['recipe'])))})" for row in rows)


def table_line(cells: Iterable[str]) -> str:
    """A line of a table in Markdown."""
    return '| ' + ' | '.join(cells) + ' |'


def _table_head(header: List[str]) -> List[str]:
    return [table_line(header), table_line(['---'] * len(header))]


def _section(table: Dict[str, Any], runs: List[Row], published: List[Row]) -> List[str]:
    recipe = table['recipe']
    sources = table['published']
    header = ['network', 'parameters', *(f'{source}, %' for source in sources), 'ours, %', 'k', 'command']
    rows: List[List[str]] = []
    verdicts = []
    for plain, lm in table['pairs']:
        pair = []
        for name in filter(None, (plain, lm)):
            found = finished(runs, name, _recipe(table, name))
            pair.append(found)
            options = ''.join(f' {option_name(option)} {value}' for option, value in _changes(table, name).items())
            rows.append([
                f'`{name}`', found[0]['param_count'] + ' M' if found else '',
                *(_published(published, source, table['dataset'], name, recipe) for source in sources),
                _spread(found), _k_range(found), f'`timm-lm train -c {name}.{recipe}{options} --data-dir DIR`',
            ])
        if len(pair) == 2 and all(pair):
            verdicts.append(_verdict(lm, *pair))
    text = [f"## {table['title']}", '']
    if table.get('text'):
        text += [table['text'], '']
    text += [*_table_head(header), *map(table_line, rows), '']
    return text + ([' '.join(verdicts), ''] if verdicts else [])


def _changes(table: Dict[str, Any], network: str) -> Dict[str, str]:
    """The recipe options that a table changes for a network, sorted by name as in the record."""
    return dict(sorted(table.get('changes', {}).get(network, {}).items()))


def _recipe(table: Dict[str, Any], network: str) -> str:
    """The name in the record of a table's recipe for a network."""
    changes = ', '.join(f'{option} {value}' for option, value in _changes(table, network).items())
    return table['recipe'] + (f' with {changes}' if changes else '')


def _verdict(lm: str, plain_runs: List[Row], lm_runs: List[Row]) -> str:
    """How an LM network compares with its twin, with the standard error of the difference of their error counts."""
    plain, own = _mean(plain_runs), _mean(lm_runs)
    variance = (plain * (100 - plain) + own * (100 - own)) / int(lm_runs[0]['images'])  # all seeds see the same images
    points, error = own - plain, variance ** 0.5
    verdict = ('beats' if points < -2 * error else 'is beaten by' if points > 2 * error else
               'cannot be told apart from')
    size = f'{abs(points) / error:.1f} standard errors' if error else '0.00 points'
    return (f'`{lm}` {verdict} its plain twin: {own:.2f} against {plain:.2f} %, a difference of {size}. (The standard '
            f'error is that of independent counts, {error:.2f} points; counted image by image it is smaller. Seeds add '
            'to it.)')


def finished(runs: List[Row], network: str, recipe: str) -> List[Row]:
    """The finished runs of a network with a recipe in its own number of epochs, in the order of seeds.

    Args:
        runs: Rows of one data set.
        network: Its name, without a tag.
        recipe: As the record names it, with its changes.
    """
    name, _, changes = recipe.partition(' with ')
    changed = re.search(r'\bepochs (\d+)', changes)
    epochs = int(changed[1]) if changed else _epochs(name)
    found = [row for row in runs if get_arch_name(row['model']) == network and row['recipe'] == recipe
             and row['status'] == 'done' and row['top1_err'] and int(row['epochs']) == epochs]
    return sorted(found, key=lambda row: int(row['seed']))


@cache
def _epochs(recipe: str) -> int:
    return parse_options(['-c', recipe]).epochs


def _mean(rows: List[Row]) -> float:
    return statistics.mean(float(row['top1_err']) for row in rows)


def _spread(rows: List[Row]) -> str:
    """Mean and standard deviation over seeds, or the figures of fewer than three runs."""
    if not rows:
        return ''
    errors = [float(row['top1_err']) for row in rows]
    if len(errors) == 1:
        return f'{errors[0]:.2f} (one seed)'
    seeds = len({row['seed'] for row in rows})
    runs = f'{len(rows)} runs of ' if len(rows) > seeds else ''
    figures = (f'{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}' if len(errors) > 2
               else ', '.join(f'{error:.2f}' for error in errors))
    return f"{figures} ({runs}{'one seed' if seeds == 1 else f'{seeds} seeds'})"


def _k_range(rows: List[Row]) -> str:
    if not rows or not rows[0]['k_min']:
        return ''
    return f"{min(float(row['k_min']) for row in rows):.2f} to {max(float(row['k_max']) for row in rows):.2f}"


def _published(rows: List[Row], source: str, dataset: str, network: str, recipe: str) -> str:
    """A source's figure for a network, and that for the post-activation one with its name."""
    def find(name: str) -> Optional[str]:
        return next((row['top1_err'] for row in rows if row['source'] == source and row['dataset'] == dataset
                     and row['network'] == name and row['recipe'] in ('', recipe)), None)

    other = network.replace('preact_', '').replace('resnetv2_', 'resnet')
    second = f'{find(other)} ({other})' if other != network and find(other) else ''
    return ', '.join(filter(None, (find(network), second)))


def _all_runs(runs: Dict[str, List[Row]]) -> List[str]:
    header = ['run', 'network', 'data', 'recipe', 'epochs', 'seed', 'error, %', 'during training, %', 'minutes',
              'hardware', 'precision', 'status', 'command']
    about = ('All runs on record, including poor and stopped ones. The error is counted with the saved weights, in '
             'float32 on the CPU; the one during training is of the last validation, in the precision of the training.')
    lines = ['## All runs', '', about, '', *_table_head(header)]
    shown = ('dataset', 'recipe', 'epochs', 'seed', 'top1_err', 'seen_top1_err', 'minutes', 'hardware', 'precision',
             'status', 'command')
    for row in (row for rows in runs.values() for row in rows):
        row = row | dict(command=row['command'] and f"`{row['command']}`")
        cells = [row['run'], f"`{get_arch_name(row['model'])}`", *(row[name] for name in shown)]
        lines.append(table_line(cells))
    return [*lines, '']


def _about_k(rows: List[Row]) -> str:
    """What the analogy with ODEs requires of ``k``, and how many runs satisfy it."""
    found = [[float(value) for value in row['k'].split()] for row in with_k(rows)]
    outside = sum(min(k) <= -1 or max(k) > 1 for k in found)
    return ('As a method for ODEs, the two-step rule is zero-stable only for -1 < k <= 1. '
            f'Of the {len(found)} finished LM runs, {outside} end with a `k` outside this range. Such a network works '
            'all the same, but the analogy with ODEs does not hold there. '
            f'{sum(max(k) > 0 for k in found)} runs end with a `k` above 0; in new networks it starts from [-0.1, 0].')
