"""The Triton kernels of the update against its formula in float64; run with TRITON_INTERPRET=1, without a GPU.

Prints JSON: for each case the largest error of the output and of each gradient, as shares of its norm.
"""
import json

import timm
import torch
from torch.autograd import grad

import timm_lm  # noqa: F401  registers its networks
from timm_lm.layers import fused_two_step as module
from timm_lm.layers.fused_two_step import fused_two_step
from timm_lm.layers.two_step_kernels import BLOCK

SHAPES = {'a part of a block': (2, 3, 5, 7), 'blocks and a part': (2, 16, 13, 12), 'whole blocks': (2, 16, 8, 2 * 8)}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
K_SHAPES = ((), (1,), (1, 1, 1))


def formula(f, x, x_prev, k):
    return f + (1 - k) * x + k * x_prev


def draw(shape, dtype, layout):
    tensors = [torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]


def error(found, expected):
    assert found.shape == expected.shape and found.isfinite().all(), found
    return ((found.double() - expected).norm() / expected.norm()).item()


def errors(states, k, g):
    """Of the output, with and without gradients, and of the gradients."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (*states, k)]
    expected = formula(*wide)
    wanted = grad(expected, wide, g.double())
    out = fused_two_step(*states, k)
    with torch.no_grad():
        assert torch.equal(fused_two_step(*states, k), out)
    assert out.dtype == states[1].dtype and out.stride() == states[1].stride()
    found = grad(out, (*states, k), g)
    assert all(a.dtype == b.dtype for a, b in zip(found, (*states, k)))
    return [error(out, expected), *map(error, found, wanted)]


def second_derivatives():
    """Of a function of the update, by the fused one and by the formula."""
    results = []
    for update in (fused_two_step, formula):
        torch.manual_seed(1)
        states, _ = draw((2, 3, 4, 4), torch.float32, torch.contiguous_format)
        k = torch.tensor(-0.3, requires_grad=True)
        first = grad(update(*states, k).pow(3).sum(), (*states, k), create_graph=True)
        results.append(grad(sum((value ** 2).sum() for value in first), (*states, k)))
    return [error(found, expected.double()) for found, expected in zip(*results)]


def batch_of_gradients(states, k, g):
    out = fused_two_step(*states, k)
    found = grad(out, (*states, k), torch.stack([g, 2 * g]), is_grads_batched=True)
    wanted = grad(formula(*states, k), (*states, k), g)
    return [error(both[i], (i + 1) * right.double()) for both, right in zip(found, wanted) for i in (0, 1)]


def history_in_another_layout(states, k, g):
    """As hooks on what autograd saves may give it back."""
    def unpack(tensor):
        unpack.count += 1
        return tensor.contiguous() if unpack.count == 2 and tensor.dim() == 4 else tensor

    unpack.count = 0
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = fused_two_step(*states, k)
    return list(map(error, grad(out, (*states, k), g),
                    grad(formula(*(t.double() for t in (*states, k))), (*states, k), g.double())))


def network_that_recomputes():
    """A network whose first fused update, at which the kernels are tried, is within a block that is recomputed."""
    gradients = []
    for module.FUSED_ON in ('cpu', 'nowhere'):
        torch.manual_seed(0)
        model = timm.create_model('lm_resnet20', layers=(3, 1, 1)).train()
        model.set_grad_checkpointing()
        model(torch.randn(2, 3, 8, 8)).logsumexp(1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert module._has_triton.cache_info().currsize  # an update asked for the kernels
    norm = max(right.norm() for right in gradients[1])
    return [((found - right).norm() / norm).item() for found, right in zip(*gradients)]


def main():
    module.FUSED_SIZE = 1
    told = {'recomputed': network_that_recomputes()}
    torch.manual_seed(0)
    assert 2 * 16 * 8 * 16 % BLOCK == 0 and 2 * BLOCK < 2 * 16 * 13 * 12
    for number, (name, shape) in enumerate(SHAPES.items()):
        k = torch.full(K_SHAPES[number], -0.3, requires_grad=True)
        for layout_name, layout in LAYOUTS.items():
            states, g = draw(shape, torch.float32, layout)
            told[f'{name}, {layout_name}'] = errors(states, k, g)
    k = torch.tensor(0.7, requires_grad=True)
    states, g = draw((2, 16, 8, 8), torch.float32, torch.channels_last)
    told['gradient of other strides'] = errors(states, k, g.contiguous())
    told['gradient of one value'] = errors(states, k, torch.ones(()).expand(g.shape))
    told['a batch of gradients'] = batch_of_gradients(states, k, g)
    told['history in another layout'] = history_in_another_layout(states, k, g)
    for dtype in (torch.bfloat16, torch.float16):
        told[str(dtype)] = errors(*draw((2, 16, 8, 8), dtype, torch.channels_last)[:1], k, g.to(dtype))
    told['second derivatives'] = second_derivatives()
    f, x, x_prev = (tensor.detach() for tensor in states)
    fused_two_step(f, x, x_prev, k).sum().backward()  # alone; the others are not asked for
    told['k alone'] = [error(k.grad, (x_prev - x).double().sum())]
    print(json.dumps(told))


if __name__ == '__main__':
    main()
