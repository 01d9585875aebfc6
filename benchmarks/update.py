"""The two-step update alone against the plain residual sum, and against the time that their bytes need.

    python benchmarks/update.py [--dtype bfloat16 --device cuda]

An update needs at least three reads and a write forward (plain: two and a write), and three reads and two writes
backward (plain: none). Next to each time is the time for these bytes at the bandwidth of a copy, which is measured in
turn with the updates.
"""
import argparse
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch
from measure import add_dtype_option, add_options, lower_precision, parse, print_result, take_turns

from timm_lm.allocator import keep_freed_memory
from timm_lm.layers import two_step

# States (N, C, H, W): the stages of the CIFAR networks, the first of ImageNet's bottleneck networks. On a GPU the
# small ones take less time than their launch, so they have larger batches there, of 100 MB in bfloat16.
SHAPES = ((128, 16, 32, 32), (128, 64, 8, 8), (64, 256, 56, 56))
LARGE_SHAPES = ((3200, 16, 32, 32), (12800, 64, 8, 8), (64, 256, 56, 56))


def plain(f: torch.Tensor, x: torch.Tensor, x_prev: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return x + f


def measure_shape(shape: Tuple[int, ...], args: argparse.Namespace) -> List[Tuple[str, ...]]:
    """Rows of the table for states of one shape."""
    dtype = getattr(torch, args.dtype)

    def state() -> torch.Tensor:
        tensor = torch.randn(shape, device=args.device, dtype=dtype)
        return tensor.contiguous(memory_format=torch.channels_last).requires_grad_()

    f, x, x_prev, g = state(), state(), state(), state().detach()
    inputs = (f, x, x_prev, torch.tensor(-0.1, device=args.device, requires_grad=True))

    def forward(update: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return update(*inputs)

    def both(update: Callable[..., torch.Tensor]) -> Any:
        return torch.autograd.grad(update(*inputs), inputs[:2] if update is plain else inputs, g)

    updates: Dict[str, Callable[..., torch.Tensor]] = {
        'plain': plain, 'two-step': two_step, 'two-step, compiled': torch.compile(two_step, dynamic=False)}
    peers: Dict[str, Callable[[], Any]] = {'copy': g.clone}
    moved = {'copy': 2}  # reads and writes of a state
    for name, update in updates.items():
        peers[f'{name}, forward'] = partial(forward, update)
        peers[f'{name}, forward and backward'] = partial(both, update)
        moved[f'{name}, forward'] = 3 if update is plain else 4
        moved[f'{name}, forward and backward'] = 3 if update is plain else 4 + 5
    seconds = take_turns(peers, args.rounds, args.device, repeats=10)
    one = seconds['copy'] / 2
    return [(name, 'x'.join(map(str, shape)), f'{1e6 * value:.0f}', f'{1e6 * one * moved[name]:.0f}',
             f'{value / one / moved[name]:.2f}') for name, value in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description='The two-step update against the plain sum.')
    add_dtype_option(parser)
    add_options(parser)
    args = parse(parser)
    args.dtype = lower_precision(args)

    keep_freed_memory()
    rows: List[Tuple[str, ...]] = [('work', 'shape', 'us', 'us for its bytes', 'ratio')]
    for shape in SHAPES if args.device == 'cpu' else LARGE_SHAPES:
        rows += measure_shape(shape, args)
    print_result('update', dict(device=args.device, dtype=args.dtype, rounds=args.rounds), rows, args.device, args.json)


if __name__ == '__main__':
    main()
