"""A training step of an LM network against a plain one: time, bytes kept, peak memory (except with CUDA graphs).

    python benchmarks/training.py [--depths 20 56 --plain-depth 110 --batch-size 128 --compile --device cuda]

Each step is forward, backward and a fused SGD update, in bfloat16 where it pays, in channels_last, on random pixels.
The two take turns in one process; times are medians. The ratio by bytes, for the same depth, follows from what an
update moves at least in addition to a sum, at the bandwidth of a copy: on its own it reads one more state forward;
backward it reads three and writes two, where a sum moves nothing, and autograd then adds the gradient of the history to
that of its state, reading two and writing one; within compiled kernels it reads one more state each way. It is no bound
where states stay in the caches. Bytes kept are those of the storages that autograd saves, each counted once; the peak
is of tensors in addition to those held before a step.
"""
import argparse
from typing import Any, Callable, Dict, Tuple

import timm
import torch
import torch.nn.functional as F
from measure import (
    add_dtype_option,
    add_options,
    history_bytes,
    kept_bytes,
    lower_precision,
    parse,
    pass_seconds,
    peak_bytes,
    print_result,
    take_turns,
)

import timm_lm  # noqa: F401  registers its networks
from timm_lm.allocator import keep_freed_memory

EAGER_PASSES, COMPILED_PASSES = 9, 2  # over a state, in addition to those of a sum


def training_step(
        name: str, args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor,
) -> Tuple[Callable[[], Any], Callable[[], Any], Callable[[], int]]:
    """A step of a new network, its forward pass alone, and a function that counts the bytes of its histories."""
    model = timm.create_model(name).to(args.device, memory_format=torch.channels_last).train()
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    network: Any = torch.compile(model, mode=args.compile_mode, dynamic=False) if args.compile else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

    def forward(network: Any = network) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # CUDA graphs may overwrite the last step's outputs
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == 'bfloat16'):
            return F.cross_entropy(network(images), labels)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, forward, lambda: history_bytes(model, lambda: forward(model))


def main() -> None:
    parser = argparse.ArgumentParser(description='Training step of an LM network against a plain one.')
    parser.add_argument('--depths', type=int, nargs='+', default=[20, 56], metavar='N', help='(default: 20 56)')
    parser.add_argument('--plain-depth', type=int, metavar='N',
                        help='depth of the plain network (default: that of the LM network, its twin)')
    parser.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='(default: 128)')
    parser.add_argument('--compile', action='store_true', help='compile the networks')
    parser.add_argument('--compile-mode', metavar='MODE',
                        help='mode of torch.compile (default: CUDA graphs, reduce-overhead, on a GPU)')
    parser.add_argument('--grad-checkpointing', action='store_true', help='recompute each block in backward')
    add_dtype_option(parser)
    add_options(parser)
    args = parse(parser)
    args.dtype = lower_precision(args)
    args.compile_mode = args.compile_mode or ('reduce-overhead' if args.device == 'cuda' else 'default')

    keep_freed_memory()
    images = torch.randn(args.batch_size, 3, 32, 32, device=args.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch_size,), device=args.device)
    rows = [('network', 'ms a step', 'time ratio', 'ratio by bytes', 'KiB an image kept', 'bytes ratio',
             'peak KiB an image')]
    passes = (COMPILED_PASSES if args.compile else EAGER_PASSES) + args.grad_checkpointing  # one more forward
    second = pass_seconds(args.device)
    for depth in args.depths:
        torch.compiler.reset()  # it compiles only a few networks of a class, and runs others eagerly
        plain, lm = f'preact_resnet{args.plain_depth or depth}', f'lm_resnet{depth}'
        steps, kept, peaks, by_bytes = {}, {}, {}, {}
        for name in (plain, lm):
            steps[name], forward, histories = training_step(name, args, images, labels)
            by_bytes[name] = passes * histories() * second
            kept[name] = kept_bytes(forward) / args.batch_size
            peaks[name] = _peak(steps[name], args)
        seconds = take_turns(steps, args.rounds, args.device)
        rows += [(name, f'{1e3 * seconds[name]:.1f}', f'{seconds[name] / seconds[plain]:.3f}',
                  f'{1 + by_bytes[name] / seconds[plain]:.3f}' if args.plain_depth in (None, depth) else '',
                  f'{kept[name] / 1024:.1f}', f'{kept[name] / kept[plain]:.4f}', peaks[name]) for name in (plain, lm)]
    settings: Dict[str, Any] = dict(
        device=args.device, dtype=args.dtype, batch=args.batch_size,
        compiled=args.compile_mode if args.compile else False,
        checkpointing=args.grad_checkpointing, rounds=args.rounds)
    print_result('training', settings, rows, args.device, args.json)


def _peak(step: Callable[[], Any], args: argparse.Namespace) -> str:
    if args.device == 'cuda' and args.compile and args.compile_mode == 'reduce-overhead':  # graphs have their own pool
        return ''
    return f'{peak_bytes(step, args.device) / args.batch_size / 1024:.1f}'


if __name__ == '__main__':
    main()
