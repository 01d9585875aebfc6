"""Code that the benchmarks share: timing in turns, the machine, bytes saved, moved and held, and tables."""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch

from timm_lm.layers import TwoStep
from timm_lm.machine import processor_name, usable_cores
from timm_lm.precision import no_bfloat16

torch.backends.cudnn.benchmark = True  # as in timm's scripts


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that times in turns."""
    parser.add_argument('--rounds', type=int, default=20, metavar='N', help='timings of each (default: 20)')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='(default: cpu)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there')


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options, and reject those that would only fail after the measurement."""
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error('--rounds must be at least 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU that PyTorch can use, and there is none')
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f'{args.json} is a folder, or its folder does not exist')
    return args


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """The option that ``lower_precision`` reads."""
    parser.add_argument('--dtype', choices=['bfloat16', 'float32'],
                        help='(default: bfloat16, or float32 on a device that has no instructions for it)')


def lower_precision(args: argparse.Namespace) -> str:
    """Name of the precision to measure in: the requested one, otherwise the one that pays on the device."""
    return args.dtype or ('float32' if no_bfloat16(args.device) else 'bfloat16')


def machine(device: str) -> Dict[str, Any]:
    """Names of processor and GPU, cores and threads."""
    return dict(cpu=processor_name(), cores=usable_cores(), threads=torch.get_num_threads(), system=platform.platform(),
                gpu=torch.cuda.get_device_name() if device == 'cuda' else None)


def machine_line(where: Dict[str, Any]) -> str:
    """The machine in words."""
    gpu = f"{where['gpu']}, " if where['gpu'] else ''
    return f"{gpu}{where['cpu']}, {where['cores']} core(s), {where['threads']} thread(s), {where['system']}"


def columns(rows: Sequence[Tuple[str, ...]]) -> List[str]:
    """Lines of a table, with the first column left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows]


def take_turns(
        peers: Mapping[str, Callable[[], Any]],
        rounds: int,
        device: str,
        warmup: int = 3,
        repeats: int = 1,
) -> Dict[str, float]:
    """Time peers in turns, so that a slow moment of the machine affects all of them.

    Args:
        peers: Name -> the work.
        rounds: Timings of each.
        device: Where it runs; a GPU is synchronised.
        warmup: Runs of each that do not count, such as those that compile.
        repeats: Runs per timing.

    Returns:
        Median seconds of one run.
    """
    def wait() -> None:
        if device == 'cuda':
            torch.cuda.synchronize()

    seconds: Dict[str, List[float]] = {name: [] for name in peers}
    for work in peers.values():
        for _ in range(warmup):
            work()
    for _ in range(rounds):
        for name, work in peers.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            wait()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(of_peer) for name, of_peer in seconds.items()}


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that autograd saves for backward, each storage counted once, including the parameters."""
    storages: Dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # kept alive until the sum is computed
    total = sum(storages.values())
    del result
    return total


def history_bytes(network: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the histories that the two-step updates of a network read in one forward pass."""
    found: List[int] = []
    hooks = [module.register_forward_hook(lambda _module, states, _out: found.append(states[2].nbytes))
             for module in network.modules() if isinstance(module, TwoStep)]
    forward()
    for hook in hooks:
        hook.remove()
    return sum(found)


def pass_seconds(device: str) -> float:
    """Seconds per byte read or written, from copying a tensor that fits into no cache."""
    tensor = torch.ones(2 ** 25, device=device)
    seconds = take_turns({'copy': tensor.clone}, 10, device, repeats=3)['copy']
    return seconds / (2 * tensor.nbytes)


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Peak bytes of tensors during a step, in addition to those held before it."""
    step()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def print_result(name: str, settings: Dict[str, Any], rows: Sequence[Tuple[str, ...]], device: str,
                 path: Optional[Path]) -> None:
    """Print a table with its machine, and write it as JSON if a path is given."""
    import timm

    import timm_lm
    versions = {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                'timm-lm': timm_lm.__version__}
    where = machine(device)
    print(machine_line(where))
    print(', '.join(f'{package} {number}' for package, number in versions.items()))
    print(', '.join(f'{key} {value}' for key, value in settings.items()), end='\n\n')
    print('\n'.join(columns(rows)), flush=True)
    if path:
        result = dict(benchmark=name, machine=where, versions=versions, settings=settings,
                      rows=[dict(zip(rows[0], row)) for row in rows[1:]])
        path.write_text(json.dumps(result, indent=2) + '\n')
