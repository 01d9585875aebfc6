"""Updates that Triton kernels compute: the kernels themselves, in Triton's interpreter, and which updates they take."""
import json
from pathlib import Path

import pytest
import torch
from helpers import OUR_PATH, fresh_python

from timm_lm.eager import runs_eagerly
from timm_lm.layers import fused_two_step as module
from timm_lm.layers import steps, two_step

TESTS = Path(__file__).parent
SIZE = 64  # elements of a large state, in these tests


@pytest.fixture(scope='module')
def errors():
    told = fresh_python(TESTS / 'interpreted_kernels.py', cwd=TESTS, TRITON_INTERPRET='1', PYTHONPATH=OUR_PATH)
    return json.loads(told.stdout)


def test_kernels_compute_the_formula_and_its_gradients(errors):
    low = {name: errors.pop(name) for name in ('torch.bfloat16', 'torch.float16')}
    assert len(errors) == 13
    for name, found in errors.items():
        assert max(found) < 2e-6, name
    for name, found in low.items():
        *states, dk = found
        assert max(states) < 2 * torch.finfo(getattr(torch, name[6:])).eps and dk < 2e-6, name  # the interpreter cuts


def states(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    f, x, x_prev = (torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(3))
    return f, x, x_prev, torch.tensor([-0.1])


@pytest.fixture
def can_fuse(monkeypatch):
    """Whether an update would be fused if these tensors lay on a GPU with Triton."""
    monkeypatch.setattr(module, 'FUSED_ON', 'cpu')
    monkeypatch.setattr(module, 'FUSED_SIZE', SIZE)
    monkeypatch.setattr(module, '_has_triton', lambda device: True)
    return lambda *tensors: runs_eagerly(*tensors) and module.can_fuse(*tensors)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_large_states_are_fused(can_fuse, dtype, layout):
    assert can_fuse(*states(2, 4, 3, 3, dtype=dtype, layout=layout))


def other_cases():
    f, x, x_prev, k = states(2, 4, 3, 3)
    last = torch.channels_last
    wide = torch.randn(2, 4, 3, 6)[..., ::2]
    return {
        'small': states(1, 4, 3, 3),
        'float64': states(2, 4, 3, 3, dtype=torch.float64),
        'branch in lower precision': (f.bfloat16(), x, x_prev, k),
        'history in lower precision': (f, x, x_prev.bfloat16(), k),
        'branch in another layout': (f.contiguous(memory_format=last), x, x_prev, k),
        'history in another layout': (f, x, x_prev.contiguous(memory_format=last), k),
        'history of one image': (f, x, x_prev[:1], k),
        'gaps': (wide, wide, wide, k),
        'k by channel': (f, x, x_prev, torch.zeros(4, 1, 1)),
    }


@pytest.mark.parametrize('name', other_cases())
def test_others_are_not_fused(can_fuse, name):
    assert not can_fuse(*other_cases()[name])


def test_no_transform_sees_a_fused_update(can_fuse, monkeypatch):
    f, x, x_prev, k = states(2, 4, 3, 3)
    asked, fused = [], []
    monkeypatch.setattr(steps, 'fused_two_step', lambda *states: fused.append(states) or states[0])

    def update(f):
        asked.append(f)
        return two_step(f, x, x_prev, k)

    torch.vmap(update)(f[None])
    torch.vmap(lambda weight: weight * update(f))(torch.ones(2))  # none of the states is a batch
    torch.func.jvp(update, (f,), (x,))
    torch.func.grad(lambda f: update(f).sum())(f)
    torch.jit.trace(update, f, check_trace=False)
    torch.compile(update, backend='eager', fullgraph=True)(f)
    assert len(asked) >= 6 and not fused
    update(f)
    assert len(fused) == 1


def test_older_gpus_have_no_kernels_in_bfloat16(can_fuse, monkeypatch):
    device = torch.device('cuda', 0)
    for capability, has in (((7, 5), False), ((8, 0), True)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, 'get_device_capability', lambda device, capability=capability: capability)
            assert module._has_bfloat16.__wrapped__(device) == has
            patch.setattr(module, '_has_bfloat16', lambda device, has=has: has)
            assert can_fuse(*states(2, 4, 3, 3, dtype=torch.bfloat16)) == has and can_fuse(*states(2, 4, 3, 3))


def test_kernels_that_do_not_run_are_told_and_passed_by(can_fuse, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(module, 'FUSED_ON', 'cpu')
    monkeypatch.setattr(module, 'FUSED_SIZE', SIZE)
    module._has_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton's kernels do not run there"):  # on the CPU it has none
        assert not module.can_fuse(*states(2, 4, 3, 3))
    module._has_triton.cache_clear()
