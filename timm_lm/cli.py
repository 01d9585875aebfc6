"""The ``timm-lm`` command: each subcommand reads its options, calls the package, and prints."""
import argparse
import fnmatch
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch

from . import __version__
from .card import recorded_error
from .errors import RESUME, UserError, one_line, printable
from .layers.steps import k_values
from .model_config import TimmModel, image_config
from .models._weights import weights_dir
from .names import is_repo_name, load_model, model_tags, our_models, timm_source, with_scheme
from .network_size import count_macs, count_parameters, network_size
from .parser import Parser
from .training.streams import reader_is_gone
from .weights_folder import verify_folder

EXIT_USER_ERROR = 2
_WHICH = 'name in timm, with or without a tag, weights folder, or hf-hub:OWNER/NAME'
PATIENCE = 10  # seconds that other processes of a machine wait for the first one to report why it ends


def _train(argv: List[str]) -> None:
    """train a network with a recipe"""
    from accelerate import PartialState

    from .training.options import parse_options
    from .training.places import command_line
    from .training.signals import Interrupted
    from .training.streams import outlasting_output
    from .training.train import train

    args = parse_options(argv)
    with outlasting_output():
        try:
            train(args, command_line(['train', *argv]))
        except Interrupted as e:  # in all processes at once
            if PartialState().is_local_main_process:
                print(f'timm-lm: {e}', file=sys.stderr, flush=True)
            PartialState().wait_for_everyone()  # when one process ends, the launcher ends the others
            sys.exit(e.exit_code)


def _recipe(argv: List[str]) -> None:
    """list the shipped recipes, print one, or give its path"""
    from .training.arguments import additions
    from .training.recipes import find_recipe, list_recipes, recipe_title

    parser = _parser('recipe', _recipe)
    parser.add_argument('name', nargs='?', help='a recipe to print')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--path', action='store_true', help='print only its path')
    form.add_argument('--timm', action='store_true', help="leave out the options that timm's script does not have")
    args = parser.parse_args(argv)
    if args.name is None:
        _print_table(['recipe', 'description'], [[name, recipe_title(name)] for name in list_recipes()])
        return
    path, model = find_recipe(args.name)
    if args.path:
        if model and not re.search(f'(?m)^model: {re.escape(model)}$', path.read_text(encoding='utf-8')):
            recipe = args.name.rpartition('.')[2]
            raise UserError(f'The file of {recipe} is for its own network; give the path that `timm-lm recipe --path '
                            f'{recipe}` prints, and --model {model}.')
        print(path)
        return
    text = path.read_text(encoding='utf-8')
    if model:
        text = re.sub('(?m)^model: .*', lambda _: f'model: {model}', text)
    if args.timm:
        text = re.sub(rf"(?m)^({'|'.join(additions())}):.*\n", '', text)
    print(text, end='')


def _validate(argv: List[str]) -> None:
    """count the errors of a network on a data set"""
    from .training.arguments import add_data_options, data_source
    from .training.evaluate import COUNT_BATCH_SIZE

    parser = _parser('validate', _validate)
    parser.add_argument('model', metavar='MODEL_OR_FOLDER', help=_WHICH)
    add_data_options(parser)
    parser.set_defaults(val_split='test')
    parser.add_argument('-b', '--batch-size', type=int, default=COUNT_BATCH_SIZE, metavar='N', help='images per batch')
    parser.add_argument('-j', '--workers', type=int, default=4, metavar='N',
                        help='processes that read images if they do not fit in memory')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast instead of float32')
    parser.add_argument('--channels-last', action='store_true', help='channels_last memory layout')
    parser.add_argument('--torchcompile', action=argparse.BooleanOptionalAction, default=False,
                        help='compile the network')
    parser.add_argument('--device', metavar='NAME', default='cpu', help='where the network runs')
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, not {args.batch_size}.')
    if args.workers < 0:
        raise UserError(f'--workers must be at least 0, not {args.workers}.')

    from .validate import validate

    result = validate(
        args.model, args.val_split, _device(args.device), args.batch_size, args.workers, args.amp, args.channels_last,
        args.torchcompile, **data_source(vars(args)))
    print(f"{args.model}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}, "
          f"{result['errors']} errors of {result['images']} images ({100 - result['top1']:.2f} %), "
          f"{result['images_per_second']:.0f} images/s")


def _list(argv: List[str]) -> None:
    """list the networks and their tags"""
    parser = _parser('list', _list)
    parser.add_argument('filter', nargs='?', default='*', help='wildcard for names, such as "lm_resnet*"')
    parser.add_argument('--pretrained', action='store_true', help='only tags that have weights')
    args = parser.parse_args(argv)

    rows = []
    for name in fnmatch.filter(our_models(), args.filter):
        for tag in model_tags(name):
            full = f'{name}.{tag}'
            if not args.pretrained or timm.models.is_model_pretrained(full):
                rows.append([full, *_facts(full)])
    if not rows:
        raise UserError(f"No network matches '{args.filter}'; `timm-lm list` shows all.")
    _print_table(['model', 'classes', 'parameters', 'MACs', 'weights', 'test error'], rows)


def _info(argv: List[str]) -> None:
    """show one network: parameters, MACs, tags, recorded error, and its k"""
    parser = _parser('info', _info)
    parser.add_argument('model', metavar='MODEL_OR_FOLDER', help=_WHICH)
    args = parser.parse_args(argv)

    name = timm_source(args.model)
    is_folder, is_repo, source = name.startswith('local-dir:'), is_repo_name(name), name.removeprefix('local-dir:')
    # a name whose weights are on the Hub is shown without them
    load = is_folder or is_repo or _source(source) == 'shipped'
    model: TimmModel = load_model(name) if load else timm.create_model(name).eval()
    cfg, size = model.pretrained_cfg, image_config(model)
    architecture = cfg['architecture']
    error = None if is_repo else recorded_error(
        source if is_folder else weights_dir() / f"{architecture}.{cfg.get('tag')}")
    lines = {
        'model': architecture,
        'tags': ', '.join(model_tags(architecture)),
        'weights': source if is_folder or is_repo else _source(source),
        'input': 'x'.join(map(str, size['input_size'])),
        'mean, std': f"{_numbers(size['mean'])}, {_numbers(size['std'])}",
        'classes': str(model.num_classes),
        'parameters': f'{count_parameters(model):,}',
        'MACs': f"{count_macs(model, size['input_size']) / 1e6:,.1f} M",
        'error': f'{error:.2f} %' if error is not None else 'on its card' if is_repo else 'not recorded',
    }
    for name, value in lines.items():
        print(f'{name:<11} {value}')
    k = k_values(model)
    if k:
        print('k' if load else 'k (random, no weights were loaded)')
        for name, value in k.items():
            text = f'{value.item(): .4f}' if value.numel() == 1 else (
                f'{value.min().item(): .4f} to {value.max().item():.4f}, mean {value.mean().item():.4f}')
            print(f'  {name:<20} {text}')


def _verify(argv: List[str]) -> None:
    """check a weights folder or a repo: config, weights, digest, check batch"""
    parser = _parser('verify', _verify)
    parser.add_argument('sources', metavar='FOLDER_OR_REPO', nargs='+',
                        help='a weights folder, or hf-hub:OWNER/NAME, whose files are downloaded for the check')
    args = parser.parse_args(argv)

    from .publish import verify_repo

    for source in map(with_scheme, args.sources):
        differences = (verify_repo(source) if is_repo_name(source) else
                       verify_folder(source.removeprefix('local-dir:')))
        print(f"{source}: intact; logits within {differences['output']:.1e} of those recorded")


def _push(argv: List[str]) -> None:
    """check weights folders and publish them"""
    parser = _parser('push', _push)
    parser.add_argument('folder', metavar='FOLDER', type=Path, nargs='?',
                        help='a weights folder; with --all a folder of weights folders (default: the shipped ones)')
    parser.add_argument('--repo-id', metavar='OWNER/NAME', help='the repo, created if it does not exist')
    parser.add_argument('--all', action='store_true', help='publish all weights folders, each in a repo named after it')
    parser.add_argument('--owner', metavar='OWNER', help='with --all: user or organization of the repos')
    parser.add_argument('--private', action='store_true',
                        help='create repos as private ones; public ones that exist are refused')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to (default: main)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument('--dry-run', action='store_true', help='check, show what would be uploaded, and exit')
    args = parser.parse_args(argv)
    if args.all and (args.repo_id or not args.owner):
        raise UserError('--all takes --owner OWNER and no --repo-id: the repos are named after the folders.')
    if not args.all and (args.owner or not args.repo_id or not args.folder):
        raise UserError('Give FOLDER --repo-id OWNER/NAME, or --all --owner OWNER.')

    from .publish import prepare, prepare_tree, push

    uploads = prepare_tree(args.folder, args.owner) if args.all else [prepare(args.folder, args.repo_id)]
    if args.dry_run:
        for upload in uploads:
            print('\n'.join(upload.describe()))
        print('Nothing was uploaded (--dry-run).')
        return
    for upload in uploads:
        for remark in upload.remarks:
            print(f'{upload.folder}: {remark}')
    for line in push(uploads, private=args.private, revision=args.revision, create_pr=args.create_pr):
        print(line)


def _weights(argv: List[str]) -> None:
    """make a weights folder from a checkpoint of a run"""
    parser = _parser('weights', _weights)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path,
                        help='RUN/checkpoints/step-..., such as that of the best epoch')
    parser.add_argument('--output', metavar='FOLDER', type=Path,
                        help="(default: weights-step-... in the run's folder)")
    args = parser.parse_args(argv)

    from .training.checkpoint_weights import save_checkpoint_weights

    checkpoint = args.checkpoint.absolute()
    output = args.output or checkpoint.parent.parent / f'weights-{checkpoint.name}'
    print(save_checkpoint_weights(checkpoint, output))


def _predict(argv: List[str]) -> int:
    """classify images"""
    parser = _parser('predict', _predict)
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='a file, a folder, or - for a list from stdin')
    parser.add_argument('--model', metavar='NAME_OR_FOLDER', default='lm_resnet20', help=_WHICH)
    parser.add_argument('--topk', type=int, default=3, metavar='N', help='classes per image')
    parser.add_argument('--json', action='store_true',
                        help='print a line of JSON for each image: its path, and classes with '
                             'probabilities from 0 to 1, or an error')
    parser.add_argument('-b', '--batch-size', type=int, default=64, metavar='N', help='images per batch')
    parser.add_argument('--device', metavar='NAME', default='cpu', help='where the network runs')
    args = parser.parse_args(argv)
    for option, value in (('--topk', args.topk), ('--batch-size', args.batch_size)):
        if value < 1:
            raise UserError(f'{option} must be at least 1, not {value}.')

    from .predict import find_images, predict

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors='surrogateescape')  # file names that are not in the terminal's encoding
    paths = find_images(args.images, sys.stdin)
    model = load_model(args.model).to(_device(args.device))
    width = max(map(len, map(printable, paths)), default=0)
    failed = False
    for found in predict(model, paths, args.topk, args.batch_size):
        if found.error is not None:
            failed = True
            print(f'timm-lm: {printable(found.path)} is not a readable image ({found.error})', file=sys.stderr)
        if args.json:
            print(json.dumps(found.as_dict()))
        elif found.error is None:
            classes = '  '.join(f'{printable(name)} {100 * share:.1f} %' for name, share in found.classes)
            print(f'{printable(found.path):<{width}}  {classes}')
    return 1 if failed else 0


def _export(argv: List[str]) -> None:
    """write a network as ONNX, torch.export or TorchScript"""
    parser = _parser('export', _export)
    parser.add_argument('model', metavar='MODEL_OR_FOLDER', help=_WHICH)
    parser.add_argument('--format', choices=('onnx', 'torch-export', 'torchscript'), default='onnx', help='file format')
    parser.add_argument('--output', type=Path, metavar='FILE',
                        help='the file (default: the model\'s name, in the current folder)')
    args = parser.parse_args(argv)

    from .export import FORMATS, export_model
    from .training.places import last_name

    model = load_model(args.model, **(dict(scriptable=True) if args.format == 'torchscript' else {}))
    ending = FORMATS[args.format][1]
    path = args.output or Path(last_name(str(Path(args.model.rpartition(':')[2]).resolve())) + ending)
    difference = export_model(model, args.format, path)
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB, logits within {difference:.1e}, batches of any size')


def _report(argv: List[str]) -> None:
    """write the results page, and add runs to the record"""
    parser = _parser('report', _report)
    parser.add_argument('--add', nargs='+', default=[], metavar='RUN', help='run folders to add first')
    parser.add_argument('--results', type=Path, default=Path('results'), metavar='DIR',
                        help='folder of the record of runs')
    parser.add_argument('--page', type=Path, default=Path('docs/results.md'), metavar='FILE',
                        help='the results page')
    parser.add_argument('--readme', type=Path, metavar='FILE', help='also update the table of networks in this file')
    args = parser.parse_args(argv)

    from .readme_table import write_table
    from .results_page import write_report
    from .run_row import add_runs

    for path in add_runs(args.add, args.results):
        print(path)
    write_report(args.results, args.page)
    print(args.page)
    if args.readme:
        write_table(args.results, args.readme)
        print(args.readme)


def _demo(argv: List[str]) -> None:
    """train, save, reload and evaluate on scikit-learn's digits, in two minutes"""
    parser = _parser('demo', _demo)
    parser.add_argument('--output', default='output/demo', metavar='DIR', help='folder for the demonstration')
    args = parser.parse_args(argv)

    from .demo import demo
    from .training.signals import Interrupted
    from .training.streams import outlasting_output

    with outlasting_output():
        try:
            demo(Path(args.output))
        except Interrupted as e:
            print(f'timm-lm: the demonstration was stopped; `timm-lm demo --output {args.output}` starts a new one',
                  file=sys.stderr, flush=True)
            sys.exit(e.exit_code)


COMMANDS: Dict[str, Callable[[List[str]], Optional[int]]] = {
    'train': _train, 'validate': _validate, 'list': _list, 'info': _info, 'verify': _verify, 'push': _push,
    'recipe': _recipe, 'weights': _weights, 'predict': _predict, 'export': _export, 'report': _report, 'demo': _demo,
}


# Errors of PyTorch and the system that a user can do something about: words in their type or text, and the message.
_FAILURES: Tuple[Tuple[Tuple[str, ...], str], ...] = (
    (('MemoryError', 'not enough memory', "can't allocate memory", 'out of memory'),
     'There is too little memory ({}); use a smaller --batch-size or a smaller network.'),
    (('DataLoader worker (pid', 'unable to allocate shared memory'),  # killed, or a full /dev/shm
     'The processes that read images failed ({}), perhaps for lack of memory or of space in /dev/shm; use fewer '
     f'--workers. A training resumes {RESUME}.'),
    (('no kernel image is available',),
     'This PyTorch has no code for this GPU ({}); install one that has, or give --device cpu.'),
    # where it is raised says little, as the host runs ahead
    (('AcceleratorError', 'CUDA error', 'CUDA driver error', 'cuDNN error', 'HIP error', 'miopenStatus',
      'Triton Error ['),
     f'The device failed ({{}}), perhaps because of another process on it; start again. A training resumes {RESUME}.'),
)


def _failure(error: BaseException) -> str:
    """The message for an error that the user can do something about, '' for others."""
    text = f'{type(error).__name__}: {error}'
    for words, message in _FAILURES:
        if any(word in text for word in words):
            return message.format(one_line(error))
    return ''


def _device(name: str) -> Any:
    try:
        torch.empty(1, device=name).item()
    except (AssertionError, RuntimeError) as e:
        raise UserError(f'--device {name} cannot be used ({one_line(e)}).') from e
    return torch.device(name)


# What the commands show


def _source(name: str) -> str:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        return 'none'
    return 'shipped' if cfg.file else f'hf-hub:{cfg.hf_hub_id}'


def _facts(full_name: str) -> List[str]:
    cfg: Any = timm.get_pretrained_cfg(full_name)
    parameters, macs = network_size(cfg.architecture, cfg.num_classes, cfg.input_size)
    error = recorded_error(weights_dir() / full_name)
    return [
        str(cfg.num_classes),
        f'{parameters / 1e6:.2f} M',
        f'{macs / 1e6:,.1f} M',
        _source(full_name),
        f'{error:.2f} %' if error is not None else '',
    ]


def _numbers(values: Sequence[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _print_table(header: List[str], rows: List[List[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _parser(name: str, command: Callable[[List[str]], Optional[int]]) -> argparse.ArgumentParser:
    title = command.__doc__ or ''
    return Parser(prog=f'timm-lm {name}', description=f'{title[:1].upper()}{title[1:]}.', allow_abbrev=False)


def _tell(line: str) -> None:
    """Print an error line, once for all processes of a machine.

    When one process ends, the launcher ends the others. So all but the first wait for that, and print only if the first
    one had nothing to report.
    """
    if int(os.environ.get('LOCAL_RANK') or 0) > 0:
        time.sleep(PATIENCE)
    print(printable(line), file=sys.stderr)


def _usage() -> str:
    lines = [f'  {name:<10}{command.__doc__}' for name, command in COMMANDS.items()]
    more = '`timm-lm COMMAND --help` describes a command, `timm-lm --version` prints the version'
    return '\n'.join(['usage: timm-lm COMMAND ...', '', 'commands:', *lines, '', more])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Returns:
        0; 1 if some of the input could not be used; 2 after one line on standard error that says what was wrong with
        the input and what to do; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal cannot show do not end a command
        sys.stdout.reconfigure(errors='backslashreplace')
    if argv[:1] == ['--version']:
        print(__version__)
        return 0
    if not argv or argv[0] in ('-h', '--help'):
        print(_usage())
        return 0 if argv else EXIT_USER_ERROR
    command = COMMANDS.get(argv[0])
    try:
        if command is None:
            raise UserError(f"There is no command '{argv[0]}'; the commands are {', '.join(COMMANDS)}.")
        code = command(argv[1:]) or 0
        print(end='', flush=True)  # a closed pipe is noticed here, not when Python exits
        return code
    except UserError as e:
        _tell(f'timm-lm: error: {e}')
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _tell('timm-lm: interrupted')
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as e:
        said = _failure(e)
        if not said:
            raise
        _tell(f'timm-lm: error: {said}')
        return EXIT_USER_ERROR
    except OSError as e:
        if argv[0] not in ('train', 'demo') and reader_is_gone(e):  # the rest is discarded; those two go on without
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        _tell(f'timm-lm: error: {e}; check the path, its permissions, the free space and the connection.')
        return EXIT_USER_ERROR


if __name__ == '__main__':
    sys.exit(main())
