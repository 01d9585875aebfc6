"""The row of a run folder in the record, and its recipe as the record names it."""
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Union

import yaml

from .errors import UserError
from .precision import asked_precision
from .results import COLUMNS, Row, add_rows
from .timm_data import TORCH_FOLDERS
from .training.checkpoint import CheckpointStore
from .training.option_rules import without_effect
from .training.options import parse_options
from .training.places import folder_name, last_name, without_place
from .training.recipes import list_recipes
from .training.run_folder import FREE_OPTIONS, read_args, read_result
from .training.run_log import RunLog

# Further options that may differ between runs of one recipe: network, seed, names of columns, how it is computed.
_SAME_RECIPE = ('model', 'seed', 'input_key', 'target_key', 'validation_batch_size', 'loader', 'amp', 'amp_dtype',
                'channels_last')


def read_run(folder: Union[str, Path]) -> Row:
    """The row of a run folder, even of a run that did not finish.

    Raises:
        UserError: If it is not a run folder.
    """
    try:
        return _read_run(Path(folder))
    except (AttributeError, KeyError, OSError, TypeError, UserError, ValueError) as e:
        reason = f'it has no {e}' if isinstance(e, KeyError) else e
        raise UserError(f'{folder} is not a run folder ({reason}).') from e


def _read_run(folder: Path) -> Row:
    args, result = read_args(folder), read_result(folder)
    epochs = RunLog(folder).rows()
    if not epochs:
        raise ValueError('no epoch was finished')
    seen = result.get('seen_in_training') or next((row['eval'] for row in reversed(epochs) if row['eval']), None)
    last = {} if result else CheckpointStore(folder / 'checkpoints').newest_state()
    facts = last.get('facts', {})
    told = result or (facts | dict(minutes=round(last['seconds'] / 60, 1)) if last else {})
    network = facts.get('pretrained_cfg', {})
    architecture = network.get('architecture') or args['model'].partition('.')[0]
    last_k = [statistics.mean(values) for values in epochs[-1]['k'].values()]
    done = result.get('epochs', len(epochs))
    row: Dict[str, Any] = dict(
        model=result.get('model') or '.'.join(filter(None, (architecture, args['tag']))),
        img_size=(result.get('input_size') or network.get('input_size') or args['input_size'] or [''])[-1],
        param_count=f"{result['parameters'] / 1e6:.3f}" if 'parameters' in result else '',
        crop_pct=told.get('crop_pct') or network.get('crop_pct') or args['crop_pct'] or '',
        interpolation=args['interpolation'],
        dataset=_dataset(args, told),
        recipe=_recipe(args, (last or told).get('processes', 1)),
        seed=args['seed'],
        epochs=done,
        seen_top1_err=f"{100 - seen['top1']:.2f}" if seen else '',
        precision=asked_precision(args),
        run=folder_name(str(folder)),
        status='done' if result else f"stopped after epoch {done} of {last.get('epochs', args['epochs'])}",
        **{name: told.get(name, '') for name in ('minutes', 'hardware', 'versions', 'command')},
    )
    return with_result({name: str(row.get(name, '')) for name in COLUMNS}, dict(k=last_k) | result)


def with_result(row: Row, result: Mapping[str, Any]) -> Row:
    """A row with the ``k`` of a result, and with its errors if they were counted."""
    k = result['k']
    if k:
        row = row | dict(k_min=f'{min(k):.3f}', k_max=f'{max(k):.3f}', k=' '.join(f'{value:.3f}' for value in k))
    shown = {name: str(result[name]) for name in ('errors', 'images') if name in result}
    for name in ('top1', 'top5'):
        if name in result:
            shown |= {name: f'{result[name]:.2f}', f'{name}_err': f'{100 - result[name]:.2f}'}
    return row | shown


def _recipe(args: Dict[str, Any], processes: int) -> str:
    """Name of the recipe of a run, with its changes; the batch size is that of all processes together."""
    if args['tag'] not in list_recipes():
        return args['tag']
    shipped = yaml.safe_load(yaml.safe_dump(vars(parse_options(['-c', args['tag']]))))
    run = args | dict(batch_size=args['batch_size'] * processes)
    idle = {name for names, _ in without_effect(shipped | run) for name in names}

    def told(name: str) -> str:
        shorten = last_name if name in ('grow_from', 'kd_model_name') else without_place
        return f'{name} {shorten(str(run[name]))}'

    same = {*FREE_OPTIONS, *_SAME_RECIPE, *idle}
    if run['sched'] != 'plateau':  # otherwise they only determine the best epoch
        same |= {'eval_metric', 'val_interval'}
    changed = [told(name) for name, value in shipped.items()
               if name not in same and run[name] != value]
    return args['tag'] + (f" with {', '.join(changed)}" if changed else '')


def _dataset(args: Dict[str, Any], told: Mapping[str, Any]) -> str:
    dataset = args['dataset']
    kind = dataset.partition('/')[0]
    if kind not in ('hfds', 'torch') or dataset.lower() in TORCH_FOLDERS:
        return folder_name(told.get('folder') or args['data_dir'] or '')
    return folder_name(dataset.lower() if kind == 'torch' else dataset)


def add_runs(folders: Sequence[Union[str, Path]], results: Path) -> List[Path]:
    """Add runs to the record, as ``add_rows`` does.

    Raises:
        UserError: If a folder is not a run folder, or the record has another run of the same name; then nothing is
            written.
    """
    return add_rows([read_run(folder) for folder in folders], results)
