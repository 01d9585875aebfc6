"""What a training ends with: a weights folder whose card gives the result and how it was obtained."""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import timm
import torch

import timm_lm
from timm_lm.card import render_card
from timm_lm.files import write_text
from timm_lm.layers.steps import k_values
from timm_lm.loader import BatchLoader
from timm_lm.machine import processor_name, usable_cores
from timm_lm.model_config import TimmModel, record_data
from timm_lm.names import is_repo_name, saved_model_args, with_default_tag
from timm_lm.network_size import count_parameters
from timm_lm.precision import asked_precision
from timm_lm.timm_data import TORCH_FOLDERS
from timm_lm.weights_folder import CARD_NAME, load_folder, save_folder

from .evaluate import COUNT_BATCH_SIZE, evaluate
from .places import folder_name, last_name, start_word
from .recipes import CHOSEN_ON_TEST
from .run_folder import RESULT_NAME
from .run_log import write_line

# Entries of a network's config that say where its weights come from.
_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'origin_url')
DATASET_NAMES = {'uoft-cs/cifar10': 'CIFAR-10', 'uoft-cs/cifar100': 'CIFAR-100'}
# The same images on the Hub.
_OF_TORCHVISION = {
    'torch/cifar10': 'uoft-cs/cifar10', 'torch/cifar100': 'uoft-cs/cifar100', 'torch/mnist': 'ylecun/mnist',
    'torch/fashion_mnist': 'zalando-datasets/fashion_mnist'}


def save_weights(args: argparse.Namespace, model: TimmModel, folder: Path, eval_loader: Optional[BatchLoader],
                 seen: Optional[Dict[str, float]], epochs: int, seconds: float, facts: Mapping[str, Any]) -> None:
    """Write the weights folder, then count the errors of what was written: in float32, eager, on the CPU."""
    told: Dict[str, Any] = dict(seen_in_training=seen) | run_result(args, model, epochs, seconds, facts)
    options = vars(args)
    weights = save_folder(model, folder / 'weights', run_card(told, options, model), facts['model_args'])
    if eval_loader is not None:
        threads = torch.get_num_threads()
        if facts['processes'] > 1:  # a launcher gives each process one thread or a few; the others wait now
            torch.set_num_threads(usable_cores())
        result = evaluate(load_folder(weights), eval_loader.on_cpu(COUNT_BATCH_SIZE))
        torch.set_num_threads(threads)
        told = result | told
        write_text(weights / CARD_NAME, run_card(told, options, model))
        write_line(f"{weights}: error {100 - result['top1']:.2f} % ({result['errors']} of {result['images']} images, "
                   'float32, eager, on the CPU)')
    write_text(folder / RESULT_NAME, json.dumps(told, indent=2) + '\n')


def record_trained_on(args: argparse.Namespace, model: TimmModel, data_config: Dict[str, Any],
                      class_names: Optional[Sequence[str]]) -> None:
    """Record in a network's config what it is trained on."""
    if args.initial_checkpoint or args.pretrained_path:
        licence: Optional[str] = 'unknown'
    else:  # that of its initial weights stays
        licence = None if args.pretrained or args.grow_from else 'apache-2.0'
    # validation crops the centre, as in timm's script, even if the network came with another crop mode
    record_data(
        model, tag=args.tag or None, class_names=class_names, crop_mode='center', license=licence, **data_config)


def run_facts(args: argparse.Namespace, model: TimmModel, command: str, device: torch.device, processes: int,
              recorded: Mapping[str, Any]) -> Dict[str, Any]:
    """JSON-serialisable facts about a run when it starts: its network, its data, and what it runs on.

    Args:
        args: Options.
        model: The network.
        command: The command line.
        device: What it runs on.
        processes: How many there are.
        recorded: What a resumed run recorded when it started; it has the arguments that its network was made with.
    """
    if recorded:
        model_args = dict(recorded['model_args'])
    else:
        model_args = saved_model_args(args.model) | (dict(global_pool=args.gp) if args.gp else {}) | args.model_kwargs
    for name in ('in_chans', 'num_classes'):  # recorded from the network itself
        model_args.pop(name, None)
    cfg = {name: value for name, value in model.pretrained_cfg.items() if name not in _SOURCES}
    facts = dict(
        pretrained_cfg=cfg,
        model_args=model_args,
        num_classes=model.num_classes,
        in_chans=getattr(model, 'in_chans', None),
        start=recorded['start'] if recorded else _start(vars(args)),
        folder=folder_name(args.data_dir or args.dataset.removeprefix('hfds/')),
        command=command,
        hardware=_hardware(device) + (f', {processes} processes' if processes > 1 else ''),
        processes=processes,
        versions=f'timm-lm {timm_lm.__version__}, timm {timm.__version__}, torch {torch.__version__}',
    )
    return json.loads(json.dumps(facts, default=str))


def run_result(args: argparse.Namespace, model: TimmModel, epochs: float, seconds: float,
               facts: Mapping[str, Any]) -> Dict[str, Any]:
    """What ``result.json`` records of a run, except for its errors."""
    architecture = model.pretrained_cfg['architecture']
    return dict(
        model=f'{architecture}.{args.tag}' if args.tag else architecture,
        parameters=count_parameters(model),
        input_size=model.pretrained_cfg['input_size'],
        crop_pct=model.pretrained_cfg['crop_pct'],
        k=mean_k(model),  # with model_ema not those of the last update
        epochs=epochs,
        seed=args.seed,
        minutes=round(seconds / 60, 1),
        precision=asked_precision(vars(args)),
        **{name: facts[name] for name in ('start', 'folder', 'command', 'hardware', 'processes', 'versions')},
    )


def run_card(told: Mapping[str, Any], args: Mapping[str, Any], model: TimmModel, saved_in: str = 'float32') -> str:
    """The card of the weights of a run.

    Args:
        told: What ``result.json`` holds; without a count of errors the card has none. ``of_epochs``: the planned
            epochs of the run, if it had fewer.
        args: Options of the run.
        model: The network.
        saved_in: Precision of the saved weights.
    """
    dataset, dataset_name = _dataset(args, told['folder'])
    seen = told['seen_in_training']
    is_counted = 'errors' in told
    return render_card(
        told['model'],
        dataset=dataset,
        dataset_name=dataset_name,
        split=args['val_split'],
        train_split=args['train_split'],
        error=100 - told['top1'] if is_counted else None,
        error_count=int(told['errors']) if is_counted else None,
        num_images=int(told['images']) if is_counted else None,
        seen_error=100 - seen['top1'] if seen else None,
        saved_in=saved_in,
        precision=asked_precision(args),
        license=model.pretrained_cfg.get('license') or 'unknown',
        base_model=_base_model(args),
        chosen_on_test=(dataset or told['folder']) in (*DATASET_NAMES, 'cifar10', 'cifar100') and (
            args['val_split'] == 'test' and args['tag'] in CHOSEN_ON_TEST),
        of_epochs=told.get('of_epochs'),
        k=_k_summary(model),
        **{name: told[name] for name in (
            'start', 'parameters', 'input_size', 'command', 'epochs', 'seed', 'minutes', 'hardware', 'versions')},
    )


def _start(args: Mapping[str, Any]) -> str:
    """What weights a run starts from and learns from, '' for new ones; of a path only the last name."""
    source = args['initial_checkpoint'] or args['pretrained'] and (args['pretrained_path'] or args['model'])
    grown = args['grow_from']
    said = ((start_word(args['model'], grown), grown), ('starting from', source),
            ('distilled from', args['kd_model_name']))
    return ', '.join(f'{how} the weights of `{last_name(with_default_tag(name))}`' for how, name in said if name)


def _base_model(args: Mapping[str, Any]) -> Optional[str]:
    """The repo of the Hub whose weights a run starts from, None if they are others."""
    others = args['initial_checkpoint'] or args['pretrained_path']
    if not args['pretrained'] or others or not is_repo_name(args['model']):
        return None
    return str(args['model']).removeprefix('hf-hub:').partition('@')[0]


def mean_k(model: TimmModel) -> List[float]:
    """``k`` of each block, the mean over channels if there is one per channel."""
    return [k.mean().item() for k in k_values(model).values()]


def _k_summary(model: TimmModel) -> str:
    values = [v for k in k_values(model).values() for v in k.tolist()]
    return f'{min(values):.3f} to {max(values):.3f}' if values else ''


def _dataset(args: Mapping[str, Any], folder: str) -> Tuple[str, str]:
    """Id on the Hub ('' if it has none) and name of the data set; a folder is named by its last name only."""
    kind, _, name = args['dataset'].partition('/')
    hub_id = _OF_TORCHVISION.get(args['dataset'].lower(), '')
    if kind == 'hfds' and (name in DATASET_NAMES or not Path(name).is_dir()):
        hub_id = name
    if hub_id:
        return hub_id, DATASET_NAMES.get(hub_id, hub_id)
    is_folder = kind != 'torch' or args['dataset'].lower() in TORCH_FOLDERS
    return '', folder if is_folder else name.lower()


def _hardware(device: torch.device) -> str:
    if device.type in ('cuda', 'xpu'):
        return getattr(torch, device.type).get_device_name(device)
    if device.type != 'cpu':
        return {'mps': 'Apple GPU'}.get(device.type, device.type)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"
