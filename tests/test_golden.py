"""Our LM-ResNet-20 against the authors' network: seeded tensors and what their code computes from them.

``data/authors_mresnet20.safetensors`` holds the weights of an untrained depth-20 network of the authors' code under
their names, an input, and float64 results. Their ``ks`` is the coefficient of x[n], so ``k = 1 - ks``.
"""
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_lm.layers.steps import two_steps

TOLERANCE = 1e-10  # relative to the largest value, float64


def our_name(name):
    """Our name of one of the authors' weights, or None if our network has no such tensor."""
    top, _, rest = name.partition('.')
    if top in ('conv1', 'bn', 'fc'):
        return {'conv1': 'stem.conv', 'bn': 'norm', 'fc': 'head.fc'}[top] + '.' + rest
    if top in ('downsample21', 'downsample31'):
        stage = int(top[-2]) - 1
        module, field = rest.removeprefix('downsample.').split('.')
        return f"stages.{stage}.blocks.0.downsample.{ {'0': 'norm', '2': 'conv'}[module] }.{field}"
    index, field = rest.split('.', 1) if top == 'blocks' else (rest, 'step.k')
    stage, block = divmod(int(index), 3)
    if top == 'ks' and block == 0:  # blocks without a two-step update
        return None
    return f"stages.{stage}.blocks.{block}.{field.replace('bn', 'norm')}"


@pytest.fixture(scope='module')
def golden():
    return load_file(Path(__file__).parent / 'data' / 'authors_mresnet20.safetensors')


@pytest.fixture
def model(golden):
    """The network in float64 with the authors' weights."""
    state = {}
    for name, tensor in golden.items():
        target = None if name.startswith('golden.') else our_name(name)
        if target is None:
            continue
        tensor = tensor.double()
        if name.startswith('ks.'):
            tensor = 1 - tensor
        state[target] = tensor[:, :, None, None] if target == 'head.fc.weight' else tensor
    model = timm.create_model('lm_resnet20').double()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith('num_batches_tracked') for name in missing)
    return model


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def dk(model, images):
    (model(images) ** 2).mean().backward()
    return torch.cat([step.k.grad for step in two_steps(model).values()])


def test_logits_in_evaluation_mode(model, golden):
    logits = model.eval()(golden['golden.input'].double())
    assert relative_error(logits, golden['golden.logits_eval']) < TOLERANCE


def test_logits_in_training_mode(model, golden):
    logits = model.train()(golden['golden.input'].double())
    assert relative_error(logits, golden['golden.logits_train']) < TOLERANCE


@pytest.mark.parametrize('checkpointing', [False, True])
def test_derivatives_by_k(model, golden, checkpointing):
    model.set_grad_checkpointing(checkpointing)
    expected = golden['golden.dk_train'].view(3, 3)[:, 1:].flatten()
    assert relative_error(dk(model.train(), golden['golden.input'].double()), expected) < TOLERANCE


def test_flipped_sign_of_k_is_noticed(model, golden):
    with torch.no_grad():
        for step in two_steps(model).values():
            step.k.neg_()
    images = golden['golden.input'].double()
    assert relative_error(model.eval()(images), golden['golden.logits_eval']) > 1e-3
    expected = golden['golden.dk_train'].view(3, 3)[:, 1:].flatten()
    assert relative_error(dk(model.train(), images), expected) > 1e-3
