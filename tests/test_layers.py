"""The two-step update and the state noise, by themselves."""
from collections import UserList

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from timm_lm.layers import EulerStep, StateNoise, TwoStep, two_step

SHAPE = (2, 3, 4, 5)
# a scalar inside the initial range, one value a channel across the stable range -1 < k < 1
KS = {
    'scalar': torch.tensor(-0.07, dtype=torch.float64),
    'per channel': torch.tensor([-0.9, 0.3, 0.8], dtype=torch.float64).view(3, 1, 1),
}


@pytest.fixture(params=KS)
def k(request):
    return KS[request.param].clone()


@pytest.fixture
def states():
    """Branch, state and history in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_update_is_the_formula(states, k, layout):
    """And it keeps the layout of the states, as do the gradients."""
    f, x, x_prev = states = [t.contiguous(memory_format=layout).requires_grad_() for t in states]
    out = two_step(f, x, x_prev, k)
    torch.testing.assert_close(out, f + (1 - k) * x + k * x_prev, rtol=0, atol=1e-14)
    for tensor in (out, *torch.autograd.grad(out, states, torch.ones_like(out))):
        assert tensor.stride() == x.stride()


def test_update_makes_one_state_and_leaves_what_it_is_given(states, k):
    given = [t.clone() for t in (*states, k)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = two_step(*states, k)
    taken = {event.name: event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0}
    assert taken == {'aten::lerp': out.nbytes}
    for tensor, before in zip((*states, k), given):
        assert torch.equal(tensor, before)


def test_k_zero_is_euler_and_k_one_takes_the_history_alone(states):
    f, x, x_prev = states
    assert torch.equal(two_step(f, x, x_prev, torch.tensor(0.)), EulerStep()(f, x, x_prev))
    assert torch.equal(two_step(f, x, x_prev, torch.tensor(1.)), f + x_prev)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_constant_trajectory_is_kept(states, k, dtype):
    """The roots of the recurrence are 1 and -k: without f, x[n] = x[n-1] stays, to the last bit in any precision."""
    x = states[1].to(dtype)
    assert torch.equal(two_step(torch.zeros_like(x), x, x.clone(), k), x)


def test_derivatives(states, k):
    inputs = [t.requires_grad_() for t in (*states, k)]
    assert gradcheck(two_step, inputs, check_forward_ad=True)
    assert gradgradcheck(two_step, inputs)


def test_backward_keeps_nothing_but_the_states(states, k):
    """A difference of states kept in each block would be one more activation in memory."""
    inputs = [t.requires_grad_() for t in (*states, k)]
    held = {t.data_ptr() for t in inputs}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        two_step(*inputs)
    assert saved
    assert all(t.data_ptr() in held for t in saved)


def test_compiled_derivatives(states, k):
    torch.compiler.reset()
    inputs = [t.requires_grad_() for t in (*states, k)]
    compiled = torch.compile(two_step, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), two_step(*inputs), rtol=0, atol=1e-14)
    assert gradcheck(compiled, inputs)


def test_compiled_dk_is_not_rounded_to_the_precision_of_the_states(k):
    """A sum of 323 or 969 ones takes more than the 8 bits of a bfloat16."""
    torch.compiler.reset()
    ones = torch.ones(1, 3, 17, 19, dtype=torch.bfloat16)
    k = k.float().requires_grad_()
    compiled = torch.compile(two_step, backend='aot_eager', fullgraph=True)
    compiled(ones, torch.zeros_like(ones), ones, k).sum().backward()
    assert torch.equal(k.grad, ones.float().sum_to_size(k.shape))


def test_vmap_over_k(states):
    ks = torch.linspace(-0.9, 0.9, 5, dtype=torch.float64)
    batched = torch.func.vmap(two_step, in_dims=(None, None, None, 0))(*states, ks)
    torch.testing.assert_close(batched, torch.stack([two_step(*states, k) for k in ks]))


def test_vmap_over_the_branch_alone(states, k):
    f, x, x_prev = states
    fs = torch.stack([f, 2 * f])
    batched = torch.func.vmap(two_step, in_dims=(0, None, None, None))(fs, x, x_prev, k)
    torch.testing.assert_close(batched, torch.stack([two_step(f, x, x_prev, k) for f in fs]))


def test_compiled_gradients_by_k_of_each_image(states, k):
    """torch.func within torch.compile."""
    torch.compiler.reset()

    def gradients(f, x, x_prev):
        def loss(k, *states):
            return two_step(*states, k).square().sum()
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(k, f, x, x_prev)

    compiled = torch.compile(gradients, backend='aot_eager', fullgraph=True)(*states)
    torch.testing.assert_close(compiled, gradients(*states))
    assert compiled.shape == (SHAPE[0], *k.shape)


def test_jvp_and_vjp_by_k(states, k):
    f, x, x_prev = states

    def update(k):
        return two_step(f, x, x_prev, k)

    _, tangent = torch.func.jvp(update, (k,), (torch.ones_like(k),))
    torch.testing.assert_close(tangent, x_prev - x)
    _, vjp = torch.func.vjp(update, k)
    cotangent = torch.ones_like(x)
    torch.testing.assert_close(vjp(cotangent)[0], (x_prev - x).sum_to_size(k.shape))


def test_history_of_another_dtype_follows_the_state(states):
    f, x, x_prev = states
    out = two_step(f.float(), x.float(), x_prev, KS['scalar'])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), two_step(*states, KS['scalar']), rtol=0, atol=1e-6)


@pytest.mark.parametrize('per_channel, shape', [(False, (1,)), (True, (3,))])
def test_module_is_the_update_with_its_own_k(states, per_channel, shape):
    step = TwoStep(3, per_channel=per_channel, dtype=torch.float64)
    assert step.k.shape == shape
    assert list(step.state_dict()) == ['k']
    f, x, x_prev = states
    k = step.k.detach().view(-1, 1, 1)
    torch.testing.assert_close(step(f, x, x_prev), f + (1 - k) * x + k * x_prev, rtol=0, atol=1e-14)


def test_k_starts_uniform_in_its_range():
    k = TwoStep(100_000, per_channel=True).k.detach()
    assert k.min() >= -0.1 and k.max() <= 0
    # U(-0.1, 0): mean -0.05, standard deviation 0.1 / sqrt(12) = 0.0289
    assert k.mean().item() == pytest.approx(-0.05, abs=1e-3)
    assert k.std().item() == pytest.approx(0.0289, abs=1e-3)
    other = TwoStep(1000, k_init=UserList([0.2, 0.3]), per_channel=True).k  # such as the lists of OmegaConf
    assert other.min() >= 0.2 and other.max() <= 0.3


def test_k_starts_from_a_number():
    step = TwoStep(3, k_init=-0.25, per_channel=True)
    assert step.k.tolist() == [-0.25] * 3
    with torch.no_grad():
        step.k.fill_(torch.nan)
    step.reset_parameters()
    assert step.k.tolist() == [-0.25] * 3


@pytest.mark.parametrize('noise_type, mean, std', [
    ('gaussian', 0., 0.001),
    ('uniform', 0.0005, 0.000289),  # U(0, level): level / 2 and level / sqrt(12)
])
def test_noise_distribution(noise_type, mean, std):
    torch.manual_seed(0)
    added = StateNoise(0.001, noise_type)(torch.zeros(1_000_000, dtype=torch.float64))
    assert added.mean().item() == pytest.approx(mean, abs=5e-6)
    assert added.std().item() == pytest.approx(std, rel=0.01)
    if noise_type == 'uniform':
        assert added.min() >= 0 and added.max() <= 0.001
