"""Latency of an LM network against the plain network of the same depth, as created and optimized for inference.

    python benchmarks/inference.py [--model lm_resnet50 --peer resnetv2_50 --batch-sizes 1 64 --device cuda]

All take turns in one process, in float32 (bfloat16 with --amp); the figures are medians. The ratio by bytes, for a
peer of the same depth, follows from what the updates of the network as created move at least: one state more than sums,
at the bandwidth of a copy.
"""
import argparse
from functools import partial

import timm
import torch
from measure import add_options, history_bytes, parse, pass_seconds, print_result, take_turns

import timm_lm
from timm_lm.allocator import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description='Latency of an LM network against a plain one.')
    parser.add_argument('--model', default='lm_resnet50', help='(default: %(default)s)')
    parser.add_argument('--peer', default='resnetv2_50', help='a plain network of timm (default: %(default)s)')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 64], metavar='N', help='(default: 1 64)')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--compile', action='store_true', help='also measure compiled networks')
    add_options(parser)
    args = parse(parser)

    keep_freed_memory()
    plain = timm.create_model(args.peer).eval().requires_grad_(False).to(args.device)
    network = timm.create_model(args.model).eval().requires_grad_(False).to(args.device)
    optimized = timm_lm.optimize(network)
    networks = {args.peer: plain, args.model: network, f'{args.model}, optimize()': optimized,
                f'{args.peer}, channels_last': timm.create_model(args.peer).eval().requires_grad_(False).to(
                    args.device, memory_format=torch.channels_last)}
    if args.compile:
        mode = 'reduce-overhead' if args.device == 'cuda' else None
        networks |= {
            f'{name}, compiled': torch.compile(networks[name], mode=mode, dynamic=False)  # type: ignore[dict-item]
            for name in (args.peer, f'{args.model}, optimize()')}

    rows = [('network', 'batch', 'ms', f'of {args.peer}', 'ratio by bytes')]
    second = pass_seconds(args.device)
    size = network.pretrained_cfg['input_size']
    layers, of_peer = (sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) for net in (network, plain))
    with torch.inference_mode(), torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.amp):
        for batch_size in args.batch_sizes:
            torch.compiler.reset()  # it compiles for a few sizes only, and runs others eagerly
            images = torch.randn(batch_size, *size, device=args.device)
            peers = {name: partial(net, images) for name, net in networks.items()}
            seconds = take_turns(peers, args.rounds, args.device)
            by_bytes = {args.model: 1 + history_bytes(network, peers[args.model]) * second / seconds[args.peer]
                        } if layers == of_peer else {}
            rows += [(name, str(batch_size), f'{1e3 * value:.1f}', f'{value / seconds[args.peer]:.3f}',
                      f'{by_bytes[name]:.3f}' if name in by_bytes else '') for name, value in seconds.items()]
    settings = dict(device=args.device, amp=args.amp, input='x'.join(map(str, size)), rounds=args.rounds)
    print_result('inference', settings, rows, args.device, args.json)


if __name__ == '__main__':
    main()
