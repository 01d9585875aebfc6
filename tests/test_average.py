"""The averaged weights are timm's, and made with less work."""
import pytest
import timm
import torch
from timm.utils import ModelEmaV3

from timm_lm.training.average import AveragedWeights


@pytest.mark.parametrize('warmup', [True, False])
def test_average_is_that_of_timm(warmup):
    torch.manual_seed(0)
    model = timm.create_model('lm_resnet20', layers=(1, 1, 1))
    ours, timms = (kind(model, decay=0.9, use_warmup=warmup) for kind in (AveragedWeights, ModelEmaV3))
    for step in range(1, 4):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else step)
        for average in (ours, timms):
            average.update(model, step=step)
    expected, found = timms.module.state_dict(), ours.module.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(value == 6 for name, value in found.items() if name.endswith('num_batches_tracked'))


def test_average_goes_on_after_weights_were_loaded():
    """State dicts are made once: what is loaded goes into the same tensors."""
    model = timm.create_model('lm_resnet20', layers=(1, 1, 1))
    average = AveragedWeights(model, decay=0.5)
    average.update(model)
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    average.module.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    average.update(model)
    assert all((value == (0.5 if value.is_floating_point() else 1)).all()
               for value in average.module.state_dict().values())
