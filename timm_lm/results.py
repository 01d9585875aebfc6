"""The record of runs: rows in CSV files, and the page of results that is made of them.

A folder of results holds ``<dataset>.csv`` with a row for each run, ``published.csv`` with figures of others,
``tables.yaml`` with the tables of the page, and ``remarks.md`` with what there is to say about them.
"""
import csv
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import yaml

from .errors import UserError
from .files import save_figure, write_text
from .precision import asked_precision

# timm's columns of results, then ours: errors and parameters as timm counts them (%, millions).
COLUMNS = (
    'model', 'img_size', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'crop_pct', 'interpolation',
    'dataset', 'recipe', 'seed', 'epochs', 'errors', 'images', 'seen_top1_err', 'k_min', 'k_max', 'k', 'minutes',
    'hardware', 'precision', 'versions', 'command', 'run', 'status',
)
# Options that differ between runs of one recipe: which network and seed, and how it is computed.
_SAME_RECIPE = ('model', 'seed', 'device', 'validation_batch_size', 'torchcompile', 'torchcompile_mode', 'loader',
                'amp', 'amp_dtype', 'channels_last')
DATASETS = {'CIFAR-10': 'cifar10', 'CIFAR-100': 'cifar100', 'ImageNet': 'imagenet-1k'}
PLOTTED = ('cifar10', 'cifar100')

Row = Dict[str, str]


# Rows


def read_run(folder: Union[str, Path]) -> Row:
    """The row of a run folder, also of a run that did not end.

    Raises:
        UserError: If it is no run folder.
    """
    try:
        return _read_run(Path(folder))
    except (AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as e:
        reason = f'it does not tell {e}' if isinstance(e, KeyError) else e
        raise UserError(f'{folder} is not the folder of a run ({reason}).') from e


def _read_run(folder: Path) -> Row:
    from .training.checkpoint import CheckpointStore
    from .training.report import RunLog
    args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
    epochs = RunLog(folder).rows()
    path = folder / 'result.json'
    result = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    if not epochs:
        raise ValueError('no epoch was finished')
    seen = result.get('seen_in_training') or next((row['eval'] for row in reversed(epochs) if row['eval']), None)
    last = {} if result else CheckpointStore(folder / 'checkpoints').newest_state()
    network = last.get('facts', {}).get('pretrained_cfg', {})
    architecture = network.get('architecture') or args['model'].partition('.')[0]
    last_k = [statistics.mean(values) for values in epochs[-1]['k'].values()]
    done = len(epochs)
    row: Dict[str, Any] = dict(
        model=result.get('model') or '.'.join(filter(None, (architecture, args['tag']))),
        img_size=(result.get('input_size') or args['input_size'] or [''])[-1],
        param_count=f"{result['parameters'] / 1e6:.3f}" if 'parameters' in result else '',
        crop_pct=args['crop_pct'] or '',
        interpolation=args['interpolation'],
        dataset=_dataset(args, result or last.get('facts', {})),
        recipe=_recipe(args, result.get('processes') or last.get('processes', 1)),
        seed=args['seed'],
        epochs=done,
        seen_top1_err=f"{100 - seen['top1']:.2f}" if seen else '',
        precision=asked_precision(args),
        run=folder.name,
        status='done' if result else f"stopped after epoch {done} of {args['epochs']}",
        **{name: result.get(name, '') for name in ('minutes', 'hardware', 'versions', 'command')},
    )
    return with_result({name: str(row.get(name, '')) for name in COLUMNS}, dict(k=last_k) | result)


def with_result(row: Row, result: Mapping[str, Any]) -> Row:
    """A row with the errors that a result counts, if it does, and with its ``k``."""
    k = result['k']
    if k:
        row = row | dict(k_min=f'{min(k):.3f}', k_max=f'{max(k):.3f}', k=' '.join(f'{value:.3f}' for value in k))
    shown = {name: str(result[name]) for name in ('errors', 'images') if name in result}
    for name in ('top1', 'top5'):
        if name in result:
            shown |= {name: f'{result[name]:.2f}', f'{name}_err': f'{100 - result[name]:.2f}'}
    return row | shown


def _recipe(args: Dict[str, Any], processes: int) -> str:
    """Name of the recipe of a run, with what was changed in it; the batch is that of all processes."""
    from .training.options import parse_options
    from .training.places import without_place
    from .training.recipes import list_recipes
    from .training.run_folder import FREE_OPTIONS
    if args['tag'] not in list_recipes():
        return args['tag']
    shipped = yaml.safe_load(yaml.safe_dump(vars(parse_options(['-c', args['tag']]))))
    run = args | dict(batch_size=args['batch_size'] * processes)
    changed = [f'{name} {without_place(str(run[name]))}' for name, value in shipped.items()
               if name not in (*FREE_OPTIONS, *_SAME_RECIPE) and name in run and run[name] != value]
    return args['tag'] + (f" with {', '.join(changed)}" if changed else '')


def _dataset(args: Dict[str, Any], told: Mapping[str, Any]) -> str:
    from .training.places import folder_name
    name = args['dataset'].removeprefix('hfds/')
    return folder_name(name) if name else told.get('folder') or folder_name(args['data_dir'] or '')


def read_rows(path: Path) -> List[Row]:
    """The rows of a file, none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def add_runs(folders: Sequence[Union[str, Path]], results: Path) -> List[Path]:
    """Add runs to the files of their data sets; a run of the same name is replaced.

    Returns:
        The files that were written.

    Raises:
        UserError: If a folder is no run folder, or if the record has a run of its name that is another; then nothing is
            written.
    """
    rows = [read_run(folder) for folder in folders]
    check_rows(rows, results)
    return add_rows(rows, results)


def check_rows(rows: Sequence[Row], results: Path) -> None:
    """Check that rows take the place of none but earlier ones of the same run.

    Raises:
        UserError: If the record, or the rows themselves, have two networks or seeds by one name of a run.
    """
    for dataset in {row['dataset'] for row in rows}:
        known: Dict[str, Row] = {}
        for row in (*read_rows(results / f'{dataset}.csv'), *(row for row in rows if row['dataset'] == dataset)):
            other = known.setdefault(row['run'], row)
            if any(other[name] != row[name] for name in ('model', 'seed')):
                raise UserError(f"There would be two runs {row['run']} of {dataset} ({other['model']} of seed "
                                f"{other['seed']} and {row['model']} of seed {row['seed']}); rename the run folder.")


def add_rows(rows: Sequence[Row], results: Path) -> List[Path]:
    """Add rows to the files of their data sets, as ``add_runs`` does."""
    written = []
    for dataset in sorted({row['dataset'] for row in rows}):
        path = results / f'{dataset}.csv'
        merged = {row['run']: row for row in read_rows(path)}
        merged.update((row['run'], row) for row in rows if row['dataset'] == dataset)
        text = [','.join(COLUMNS)]
        for row in sorted(merged.values(), key=lambda row: (row['recipe'], row['model'], row['run'])):
            text.append(','.join(_quoted(row.get(name, '')) for name in COLUMNS))
        results.mkdir(parents=True, exist_ok=True)
        write_text(path, '\n'.join(text) + '\n')
        written.append(path)
    return written


def _quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if set(value) & set(',"\n') else value


# The page


def read_frame(results: Path) -> Tuple[List[Dict[str, Any]], str]:
    """The tables of the page and the remarks.

    Raises:
        UserError: If a file is missing or can not be read.
    """
    name = 'tables.yaml'
    try:
        tables = yaml.safe_load((results / name).read_text(encoding='utf-8'))
        name = 'remarks.md'
        return tables, (results / name).read_text(encoding='utf-8').strip()
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f'{results} has no readable {name}; run this in a checkout, or name its results with '
                        '--results.') from e


def write_report(results: Path, page: Path) -> None:
    """Write the page of results and its pictures, from the files of a folder of results.

    Raises:
        UserError: If a file is missing or can not be read.
    """
    tables, remarks = read_frame(results)
    published = read_rows(results / 'published.csv')
    runs = {dataset: read_rows(results / f'{dataset}.csv') for dataset in DATASETS.values()}
    others = [path.stem for path in sorted(results.glob('*.csv')) if path.stem not in ('published', *runs)]
    runs |= {dataset: read_rows(results / f'{dataset}.csv') for dataset in others}
    lines = ['# Results', '', '<!-- made by `timm-lm report`; change results/ and run it again -->', '', remarks, '']
    for table in tables:
        lines += _section(table, runs.get(table['dataset'], []), published)
    page.parent.mkdir(parents=True, exist_ok=True)
    for dataset in PLOTTED:
        if _plot_errors(runs[dataset], published, dataset, page.parent / f'error_{dataset}.png'):
            lines += [f'![Error against parameters on {dataset}](error_{dataset}.png)', '']
    if _plot_k([row for rows in runs.values() for row in rows], page.parent / 'k_by_depth.png'):
        lines += ['## The learned k', '', '![k of each block by depth](k_by_depth.png)', '']
    lines += _all_runs(runs)
    write_text(page, '\n'.join(lines).rstrip() + '\n')


def _section(table: Dict[str, Any], runs: List[Row], published: List[Row]) -> List[str]:
    recipe = table['recipe']
    sources = table['published']
    header = ['network', 'parameters', *(f'{source}, %' for source in sources), 'ours, %', 'k', 'command']
    rows = [header, ['---'] * len(header)]
    verdicts = []
    for plain, lm in table['pairs']:
        pair = []
        for name in filter(None, (plain, lm)):
            found = finished(runs, name, recipe)
            pair.append(found)
            rows.append([
                f'`{name}`', found[0]['param_count'] + ' M' if found else '',
                *(_published(published, source, table['dataset'], name, recipe) for source in sources),
                _spread(found), _k_range(found), f'`timm-lm train -c {name}.{recipe} --data-dir DIR`',
            ])
        if len(pair) == 2 and all(pair):
            verdicts.append(_verdict(lm, *pair))
    text = [f"## {table['title']}", '']
    if table.get('text'):
        text += [table['text'], '']
    text += ['| ' + ' | '.join(row) + ' |' for row in rows] + ['']
    return text + ([' '.join(verdicts), ''] if verdicts else [])


def _verdict(lm: str, plain_runs: List[Row], lm_runs: List[Row]) -> str:
    """Whether an LM network beats its twin, with the standard error of a difference of two such counts of errors."""
    plain, own = _mean(plain_runs), _mean(lm_runs)
    variance = (plain * (100 - plain) + own * (100 - own)) / int(lm_runs[0]['images'])  # all seeds see the same images
    return (f"`{lm}` {'beats' if own < plain else 'does not beat'} its plain twin: {own:.2f} against {plain:.2f} %. "
            f'The number of test images alone gives this difference a standard error of up to {variance ** 0.5:.2f} %, '
            'seeds add theirs.')


def finished(runs: List[Row], network: str, recipe: str) -> List[Row]:
    """The runs of a network that ended by a recipe in its own number of epochs, the seeds in order."""
    from .training.options import parse_options
    epochs = parse_options(['-c', recipe]).epochs
    found = [row for row in runs if row['model'].partition('.')[0] == network and row['recipe'] == recipe
             and row['status'] == 'done' and row['top1_err'] and int(row['epochs']) == epochs]
    return sorted(found, key=lambda row: int(row['seed']))


def _mean(rows: List[Row]) -> float:
    return statistics.mean(float(row['top1_err']) for row in rows)


def _spread(rows: List[Row]) -> str:
    """Mean and standard deviation over seeds, or the one figure that there is."""
    if not rows:
        return ''
    errors = [float(row['top1_err']) for row in rows]
    if len(errors) == 1:
        return f'{errors[0]:.2f} (one seed)'
    seeds = len({row['seed'] for row in rows})
    runs = f'{len(rows)} runs of ' if len(rows) > seeds else ''
    return (f'{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} '
            f"({runs}{'one seed' if seeds == 1 else f'{seeds} seeds'})")


def _k_range(rows: List[Row]) -> str:
    if not rows or not rows[0]['k_min']:
        return ''
    return f"{min(float(row['k_min']) for row in rows):.2f} to {max(float(row['k_max']) for row in rows):.2f}"


def _published(rows: List[Row], source: str, dataset: str, network: str, recipe: str) -> str:
    """A source's figure for a network; where it has only the post-activation one, that, by its name."""
    def find(name: str) -> Optional[str]:
        return next((row['top1_err'] for row in rows if row['source'] == source and row['dataset'] == dataset
                     and row['network'] == name and row['recipe'] in ('', recipe)), None)

    if find(network):
        return find(network) or ''
    other = network.replace('preact_', '').replace('resnetv2_', 'resnet')
    return f'{find(other)} ({other})' if other != network and find(other) else ''


def _all_runs(runs: Dict[str, List[Row]]) -> List[str]:
    header = ['run', 'network', 'data', 'recipe', 'epochs', 'seed', 'error, %', 'seen in training, %', 'minutes',
              'hardware', 'precision', 'status']
    about = 'Poor and stopped runs too. Errors are counts on the saved file, in float32 on the CPU.'
    lines = ['## All runs', '', about, '',
             '| ' + ' | '.join(header) + ' |', '| ' + ' | '.join(['---'] * len(header)) + ' |']
    shown = ('dataset', 'recipe', 'epochs', 'seed', 'top1_err', 'seen_top1_err', 'minutes', 'hardware', 'precision',
             'status')
    for row in (row for rows in runs.values() for row in rows):
        cells = [row['run'], f"`{row['model'].partition('.')[0]}`", *(row[name] for name in shown)]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return [*lines, '']


# Pictures


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def parameter_count(network: str, num_classes: int) -> float:
    """Millions of parameters of the plain network of the same depth; a ``k`` a block is none of them."""
    import timm
    name = 'preact_' + network.removeprefix('preact_').removeprefix('lm_')
    model = timm.create_model(name, num_classes=num_classes, device='meta')
    return sum(p.numel() for p in model.parameters()) / 1e6


def _plot_errors(runs: List[Row], published: List[Row], dataset: str, path: Path) -> bool:
    """Error against parameters: our LM and plain networks, and published ones."""
    classes = 100 if dataset == 'cifar100' else 10
    done = [row for row in runs if row['status'] == 'done' and row['top1_err'] and row['param_count']]
    if not done:
        return False
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for source in dict.fromkeys(row['source'] for row in published):
        rows = [row for row in published if row['source'] == source and row['dataset'] == dataset
                and 'resnext' not in row['network']]
        if rows:
            axes.scatter([parameter_count(row['network'], classes) for row in rows],
                         [float(row['top1_err']) for row in rows], marker='x', s=24, label=source)
    for prefix, marker in (('lm_', 'o'), ('preact_', 's')):
        rows = [row for row in done if row['model'].startswith(prefix)]
        if rows:
            axes.scatter([float(row['param_count']) for row in rows], [float(row['top1_err']) for row in rows],
                         marker=marker, label='LM, ours' if prefix == 'lm_' else 'plain, ours')
    axes.set(xlabel='parameters (millions)', ylabel='test error (%)', xscale='log')
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    save_figure(figure, path)
    return True


def _plot_k(rows: List[Row], path: Path) -> bool:
    """The learned ``k`` of each block, from the first to the last of the network."""
    rows = [row for row in rows if row['k'] and row['status'] == 'done']
    if not rows:
        return False
    figure = _figure(7, 3.6 + 0.1 * len(rows))
    axes = figure.subplots()
    for row in rows:
        k = [float(value) for value in row['k'].split()]
        places = [i / max(1, len(k) - 1) for i in range(len(k))]
        network, (recipe, changed, _) = row['model'].partition('.')[0], row['recipe'].partition(' with ')
        axes.plot(places, k, marker='.', label=f"{network} {recipe}{' (changed)' if changed else ''}, "
                                               f"{row['epochs']} epochs, seed {row['seed']}")
    axes.axhline(0, color='black', linewidth=0.8)
    axes.set(xlabel='depth (0: first block with a k, 1: last)', ylabel='k')
    axes.grid(alpha=0.3)
    figure.legend(fontsize='x-small', loc='outside lower center', ncols=2)
    save_figure(figure, path)
    return True
