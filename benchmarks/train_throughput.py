"""Images per second and peak memory of `timm-lm train` against timm's own, unmodified train script.

    python benchmarks/train_throughput.py --timm-train CHECKOUT/train.py --data-dir FOLDER [--recipe paper_c10]

In one run, on the same Parquet data and machine, in turns and each in its own process:

- `timm-lm train` with the recipe;
- timm's script with the same recipe, hence the same precision, memory layout and compilation (float32 on a device
  without bfloat16, where `timm-lm train` would not use the recipe's precision);
- timm's script with the recipe minus these, that is with timm's defaults: float32, contiguous, eager, 4 workers;
- a bare loop of the same steps on random pixels, about as fast as these kernels allow (`one_training.py`).

An epoch is `--steps` batches of the training split. Both engines measure the seconds of an epoch of training, from
requesting its first batch to its last update. The first epoch, which compiles, does not count; the rate is that of the
others together, and the result is the median of the rounds.

Memory is the peak of one epoch of `timm-lm train` on all the data, with validation, checkpoint and saved weights,
relative to that of `one_training.py bare`, and to that of the same loop when it keeps freed memory, as `timm-lm train`
does on the CPU. All start with empty compiler caches.

timm's script reads Parquet with the package `datasets`. Runs and caches are in a temporary folder that is deleted.
"""
import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
import yaml
from measure import columns, machine, machine_line

from timm_lm.errors import UserError
from timm_lm.machine import usable_cores
from timm_lm.parquet import find_parquet
from timm_lm.precision import asked_precision, no_bfloat16
from timm_lm.training.optimizer import has_fused_kernel
from timm_lm.training.options import parse_options

ONE_TRAINING = Path(__file__).resolve().parent / 'one_training.py'
AMP_OPTIONS = ('amp', 'amp_dtype')
LATE_OPTIONS = ('mixup_off_epoch', 'two_step_epoch')  # epochs that a short run does not reach
# Keys of a recipe that are off in timm's defaults.
SPEED_OPTIONS = (*AMP_OPTIONS, 'channels_last', 'torchcompile', 'torchcompile_mode')
BARE_LINE = re.compile(r'([\d.]+) images/s')  # of an epoch of one_training.py
# timm's line of a batch: epoch, batch, batches, ..., (mean seconds, mean images/s of the epoch so far)
TIMM_LINE = re.compile(r'Train: (\d+) \[ *(\d+)/(\d+) .*?\( *[\d.]+s, +([\d.]+)/s\)')
LAST_LINES = 12  # of the output of a command that failed


@dataclass(frozen=True)
class Engine:
    """One of the trainings to compare.

    Attributes:
        name: Its name in the table.
        command: Command line; the run folder's place and name are added to it.
        rates: Images/s of each epoch, from the run folder and what the command printed.
    """

    name: str
    command: List[str]
    rates: Callable[[Path, str], List[float]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Compare timm-lm train with timm\'s own train script.')
    parser.add_argument('--timm-train', type=Path, required=True, metavar='FILE', help='train.py of timm\'s repository')
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='Parquet data in the Hub\'s layout')
    parser.add_argument('--recipe', default='paper_c10', metavar='NAME', help='shipped recipe or YAML file')
    parser.add_argument('--model', default='lm_resnet20', metavar='NAME', help='network (default: lm_resnet20)')
    parser.add_argument('--batch-size', type=int, metavar='N', help='(default: the recipe\'s)')
    parser.add_argument('--torchcompile-mode', metavar='MODE', help='(default: the recipe\'s)')
    parser.add_argument('--steps', type=int, default=100, metavar='N', help='batches per epoch (default: 100)')
    parser.add_argument('--epochs', type=int, default=3, metavar='N', help='the first does not count (default: 3)')
    parser.add_argument('--rounds', type=int, default=3, metavar='N', help='runs of each engine (default: 3)')
    parser.add_argument('--workers', type=int, default=usable_cores(), metavar='N',
                        help='worker processes of timm\'s loader with the same options (default: cores)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--no-memory', action='store_true', help='do not measure memory, which takes a whole epoch')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures there')
    return parser


# Processes


def run(command: Sequence[str], folder: Path, caches: str = 'caches') -> str:
    """Run a command in a folder, with its caches in there too.

    Returns:
        What it printed.

    Raises:
        UserError: If it failed, with the last lines of its output.
    """
    places = dict(HF_ASSETS_CACHE='assets', HF_DATASETS_CACHE='datasets', TORCHINDUCTOR_CACHE_DIR='inductor')
    caches_env = {name: str(folder / caches / place) for name, place in places.items()}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **caches_env}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors='replace')
    if done.returncode:
        lines = '\n'.join(f'    {line}' for line in done.stdout.splitlines()[-LAST_LINES:])
        raise UserError(f'`{shlex.join(command)}` failed with exit code {done.returncode}; its last lines:\n{lines}')
    return done.stdout


def our_command(*argv: str) -> List[str]:
    return [sys.executable, '-m', 'timm_lm.cli', *argv]


def check_timm_script(script: Path) -> Dict[str, str]:
    """Versions of timm and `datasets` that timm's script will import.

    Raises:
        UserError: If there is no such script, or `datasets` is missing.
    """
    if not script.is_file():
        raise UserError(f'There is no script {script}; give train.py of a checkout of timm with --timm-train.')
    # run next to the script, which imports the timm of its checkout if there is one
    code = 'import json, datasets, timm; print(json.dumps(dict(timm=timm.__version__, datasets=datasets.__version__)))'
    done = subprocess.run([sys.executable, '-c', code], cwd=script.parent, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ['no message'])[-1]
        raise UserError(f'timm\'s script reads Parquet with the package `datasets`, and importing that and timm failed '
                        f'({reason}); install it in this environment or put it on PYTHONPATH.')
    return json.loads(done.stdout.splitlines()[-1])


# Data and recipes


def write_subset(data_dir: Path, split: str, rows: int, folder: Path) -> int:
    """Write the first rows of a split as a separate data set, with the same columns and metadata.

    Returns:
        Number of rows, which is smaller than ``rows`` if the split is.

    Raises:
        UserError: If the split is missing or not readable.
    """
    tables: List[Any] = []
    try:
        for path in find_parquet(data_dir, split):
            tables.append(pq.read_table(path).slice(0, rows - sum(map(len, tables))))
            if sum(map(len, tables)) == rows:
                break
        table = pa.concat_tables(tables)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"The split '{split}' in {data_dir} could not be read ({e}); copy it again.") from e
    folder.mkdir()
    pq.write_table(table, folder / f'{split}-00000-of-00001.parquet')
    return len(table)


def count_rows(data_dir: Path, split: str) -> int:
    return sum(pq.read_metadata(path).num_rows for path in find_parquet(data_dir, split)) if split else 0


def write_recipe_without(left_out: Sequence[str], recipe: Path, path: Path) -> Path:
    """Write a recipe without some options, which timm's script has no option to turn off."""
    values = yaml.safe_load(recipe.read_text(encoding='utf-8'))
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if name not in left_out}))
    return path


# Throughput


def our_rates(folder: Path, _printed: str) -> List[float]:
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [row['train']['images_per_second'] for row in rows]


def timm_rates(_folder: Path, printed: str) -> List[float]:
    """Images/s of each epoch, from the mean in the line of its last batch."""
    rates = {}
    for epoch, batch, batches, rate in TIMM_LINE.findall(printed):
        if int(batch) + 1 == int(batches):
            rates[int(epoch)] = float(rate)
    return [rates[epoch] for epoch in sorted(rates)]


def bare_rates(_folder: Path, printed: str) -> List[float]:
    return [float(rate) for rate in BARE_LINE.findall(printed)]


def measure_rate(engine: Engine, folder: Path, name: str, epochs: int) -> float:
    """Images/s of all epochs but the first.

    Raises:
        UserError: If the run failed, or does not report its rates.
    """
    printed = run([*engine.command, '--output', str(folder / 'runs'), '--experiment', name], folder)
    rates = engine.rates(folder / 'runs' / name, printed)
    if len(rates) != epochs:
        raise UserError(f'{engine.name} reported the rates of {len(rates)} of {epochs} epochs; its last lines:\n'
                        + '\n'.join(printed.splitlines()[-LAST_LINES:]))
    return statistics.harmonic_mean(rates[1:])  # epochs have the same number of images


def measure_rates(engines: List[Engine], folder: Path, epochs: int, rounds: int) -> List[List[float]]:
    """Images/s of each engine in each round; the engines take turns."""
    rates: List[List[float]] = [[] for _ in engines]
    for i in range(1, rounds + 1):
        for number, engine in enumerate(engines):
            rate = measure_rate(engine, folder, f'{i}-{number}', epochs)
            rates[number].append(rate)
            print(f'round {i}/{rounds}  {rate:9.1f} images/s  {engine.name}', file=sys.stderr, flush=True)
    return rates


# Memory


def write_bare_options(options: List[str], device: str, images: int, steps: int, epochs: int, path: Path) -> Path:
    """Write the options of the bare loop, with the optimizer that our engine uses."""
    args = parse_options(options)
    cfg = timm.get_pretrained_cfg(args.model)
    bare = {name: value for name, value in vars(args).items() if name != 'config'} | dict(
        device=device,
        images=images,
        input_size=args.input_size or (list(cfg.input_size) if cfg else [3, 224, 224]),
        num_classes=args.num_classes or (cfg.num_classes if cfg else 1000),
        steps=steps,
        epochs=epochs,
        opt_kwargs=dict(fused=True) | args.opt_kwargs if has_fused_kernel(args.opt, device) else args.opt_kwargs,
    )
    path.write_text(json.dumps(bare, default=str))
    return path


def measure_memory(options: List[str], data_dir: Path, device: str, steps: int, folder: Path) -> Dict[str, Any]:
    """Peak memory of our engine, of the bare loop, and of the bare loop that keeps freed memory.

    Args:
        options: Command line of a training with the recipe.
        data_dir: All the data.
        device: Device of all.
        steps: Batches that the bare loop trains on.
        folder: Temporary folder.

    Returns:
        ``timm_lm``, ``bare`` and ``keeping`` in bytes, the ratios of the first to the others, ``ratio`` and
        ``ratio_keeping``, and ``kind`` of memory.
    """
    args = parse_options(options)
    images = count_rows(data_dir, args.train_split) + count_rows(data_dir, args.val_split)
    bare = str(write_bare_options(options, device, images, steps, 1, folder / 'memory.json'))
    ours = ['train', *options, '--data-dir', str(data_dir), '--epochs', '1', '--device', device,
            '--output', str(folder / 'runs'), '--experiment', 'memory']
    commands = dict(bare=['bare', bare], keeping=['keeping', bare], timm_lm=['engine', *ours])
    peaks = {}
    for name, argv in commands.items():
        report = folder / f'{name}-peak.json'
        run([sys.executable, str(ONE_TRAINING), str(report), *argv], folder, caches=f'{name}-caches')
        peaks[name] = json.loads(report.read_text())
        print(f"memory     {peaks[name]['bytes'] / 2**20:9.1f} MiB       {name}", file=sys.stderr, flush=True)
    of = {name: peak['bytes'] for name, peak in peaks.items()}
    return dict(**of, ratio=of['timm_lm'] / of['bare'], ratio_keeping=of['timm_lm'] / of['keeping'],
                kind=peaks['bare']['kind'])


# The comparison


def versions(of_script: Dict[str, str]) -> Dict[str, str]:
    names = ('timm-lm', 'torch', 'accelerate')
    return {'python': platform.python_version(), **{name: version(name) for name in names}, **of_script}


def compare(args: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """Run all engines.

    Returns:
        Figures, machine, versions and commands, for the table and the file.
    """
    of_script = check_timm_script(args.timm_train)
    data_dir, script = args.data_dir.resolve(), str(args.timm_train.resolve())
    recipe = args.recipe if Path(args.recipe).is_file() else run(
        our_command('recipe', args.recipe, '--path'), folder).splitlines()[-1]
    recipe_path = Path(recipe).resolve()
    recipe_name = recipe_path.stem
    parse_options(['-c', str(recipe_path)])  # raises if something is wrong with it
    left_out = (*LATE_OPTIONS, *(AMP_OPTIONS if no_bfloat16(args.device) else ()))  # our engine drops the latter then
    if any(name in yaml.safe_load(recipe_path.read_text(encoding='utf-8')) for name in left_out):
        recipe_path = write_recipe_without(left_out, recipe_path, folder / 'short.yaml')

    mode = ['--torchcompile-mode', args.torchcompile_mode] if args.torchcompile_mode else []
    # a short run has no room for the recipe's schedule
    training = ['--model', args.model, '--sched', 'cosine', '--warmup-epochs', '0', '--cooldown-epochs', '0']
    if args.batch_size is not None:
        training += ['--batch-size', str(args.batch_size)]
    same = ['-c', str(recipe_path), *mode, *training]
    plain = ['-c', str(write_recipe_without(SPEED_OPTIONS, recipe_path, folder / 'plain.yaml')), *training]
    options = parse_options(same)
    images = write_subset(data_dir, options.train_split, args.steps * options.batch_size, folder / 'data')
    steps = images // options.batch_size
    if steps == 0:
        raise UserError(f'The training split in {data_dir} has {images} images, fewer than a batch of '
                        f'{options.batch_size}; use a smaller --batch-size.')

    # neither engine counts validation in its rate
    short = ['--epochs', str(args.epochs), '--val-split', '', '--device', args.device]
    of_timm = ['--dataset', f'hfds/{folder / "data"}', *short]
    bare = write_bare_options(same, args.device, images, steps, args.epochs, folder / 'bare.json')
    engines = [
        Engine('timm-lm train', our_command('train', *same, '--data-dir', str(folder / 'data'), *short), our_rates),
        Engine('timm train.py, same options', [sys.executable, script, *same, *of_timm, '--workers', str(args.workers)],
               timm_rates),
        Engine('timm train.py, float32, contiguous, eager, 4 workers', [sys.executable, script, *plain, *of_timm],
               timm_rates),
        Engine('bare loop, the steps alone', [
            sys.executable, str(ONE_TRAINING), str(folder / 'bare-peak.json'), 'keeping', str(bare)], bare_rates),
    ]
    rates = measure_rates(engines, folder, args.epochs, args.rounds)
    medians = [statistics.median(of_engine) for of_engine in rates]
    memory = None if args.no_memory else measure_memory(same, data_dir, args.device, steps, folder)
    return dict(
        machine=machine(args.device),
        versions=versions(of_script),
        settings=dict(
            recipe=recipe_name, precision=asked_precision(vars(options)), model=args.model,
            device=args.device, batch_size=options.batch_size, steps=steps,
            epochs=args.epochs, rounds=args.rounds, workers=args.workers),
        engines=[
            dict(name=engine.name, images_per_second=median, rounds=of_engine, ratio=medians[0] / median,
                 command=shlex.join(engine.command))
            for engine, of_engine, median in zip(engines, rates, medians)
        ],
        memory=memory,
    )


def table(result: Dict[str, Any]) -> str:
    """The figures as text."""
    where, settings = result['machine'], result['settings']
    lines = [
        machine_line(where),
        ', '.join(f'{name} {number}' for name, number in result['versions'].items()),
        f"{settings['model']} with {settings['recipe']} in {settings['precision']} on {settings['device']}, "
        f"batch {settings['batch_size']}, {settings['steps']} steps per epoch, epochs 2 to {settings['epochs']}, "
        f"median of {settings['rounds']} round(s), {settings['workers']} workers of timm's loader",
        '',
    ]
    rows = [('training', 'images/s', 'lowest', 'highest', 'ours is faster by')]
    for engine in result['engines']:
        spread = [engine['images_per_second'], min(engine['rounds']), max(engine['rounds'])]
        ratio = '' if engine is result['engines'][0] else f"{engine['ratio']:.2f} x"
        rows.append((engine['name'], *(f'{rate:,.0f}' for rate in spread), ratio))
    lines += columns(rows)
    memory: Optional[Dict[str, Any]] = result['memory']
    if memory:
        lines += ['', *columns([
            (memory['kind'], 'MiB', 'ours is larger by'),
            ('timm-lm train, all data', f"{memory['timm_lm'] / 2**20:,.0f}", ''),
            ('bare loop with the data', f"{memory['bare'] / 2**20:,.0f}", f"{memory['ratio']:.3f} x"),
            ('the same, keeping freed memory', f"{memory['keeping'] / 2**20:,.0f}",
             f"{memory['ratio_keeping']:.3f} x"),
        ])]
    commands: List[str] = [f"  {engine['command']}" for engine in result['engines']]
    return '\n'.join([*lines, '', 'commands, each with its own --output and --experiment:', *commands])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.epochs < 2 or min(args.steps, args.rounds) < 1 or args.workers < 0:
        parser.error('--epochs must be at least 2, --steps and --rounds at least 1, --workers not negative')
    try:
        if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
            raise UserError(f'{args.json} is a folder, or its folder does not exist; name a file in one that does.')
        with tempfile.TemporaryDirectory() as folder:
            result = compare(args, Path(folder).resolve())
        print(table(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + '\n')
    except UserError as e:
        print(f'train_throughput: error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
