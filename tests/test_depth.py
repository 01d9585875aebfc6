"""Growing a network in depth: the deep one takes the steps of the shallow one in smaller pieces."""
import copy
import json
import shutil

import pytest
import timm
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file

import timm_lm
from timm_lm.depth import repeated_blocks
from timm_lm.errors import UserError
from timm_lm.models import LMResNet
from timm_lm.training.places import start_word

SMALL = dict(layers=(2, 2, 2))


def net(name='lm_resnet20', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | kwargs)).eval()


@pytest.mark.parametrize('shallow, deep, expected', [
    (3, 3, [0, 1, 2]),
    (5, 9, [0, 1, 1, 2, 2, 3, 3, 4, 4]),
    (3, 5, [0, 1, 1, 2, 2]),
    (3, 4, [0, 1, 1, 2]),
    (2, 5, [0, 1, 1, 1, 1]),
    (1, 1, [0]),
])
def test_blocks_after_the_first_are_repeated_evenly(shallow, deep, expected):
    assert repeated_blocks(shallow, deep) == expected


@pytest.mark.parametrize('shallow, deep', [(3, 2), (1, 2)])
def test_no_block_to_repeat_is_told(shallow, deep):
    with pytest.raises(UserError, match=f'{shallow} blocks of a stage cannot become {deep}'):
        repeated_blocks(shallow, deep)


def test_same_depth_is_a_copy():
    shallow = net()
    grown = timm_lm.grow(shallow, net(zero_init_last=True))
    assert all(torch.equal(a, b) for a, b in zip(shallow.state_dict().values(), grown.state_dict().values()))


@pytest.mark.parametrize('per_channel', [False, True])
def test_plain_network_becomes_a_two_step_one(per_channel):
    """With k = 0 it computes the same; deeper, the same as the plain network that is grown."""
    plain = net('preact_resnet20').eval()
    images = torch.randn(2, 3, 32, 32)
    for layers in ((2, 2, 2), (3, 4, 2)):
        expected = timm_lm.grow(plain, net('preact_resnet20', layers=layers)).eval()(images)
        grown = timm_lm.grow(plain, net(layers=layers, k_per_channel=per_channel)).eval()
        assert len(grown.k_values()) == sum(layers) - 3 and not any(k.any() for k in grown.k_values().values())
        torch.testing.assert_close(grown(images), expected)


class Constant(torch.nn.Module):
    """Stands for the last convolution of a branch: a constant, scaled by a weight as the convolution is."""

    def __init__(self, channels):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(channels, 1, 1, dtype=torch.float64))

    def forward(self, x):
        return self.weight.expand(len(x), -1, *x.shape[-2:])


@pytest.mark.parametrize('name', ['preact_resnet20', 'lm_resnet20'])
def test_constant_branches_end_in_the_same_place(name):
    """A stage of the deep network moves as far as that of the shallow one, but for products of two k."""
    ends = {}
    for size in (1e-2, 1e-3):
        nets = [net(name, layers=layers).double() for layers in ((3, 3, 3), (7, 6, 4))]
        for model in nets:
            for stage in model.stages:
                for block in stage.blocks:
                    block.conv2 = Constant(block.conv2.out_channels)
        shallow, deep = nets
        for i, k in enumerate(shallow.k_values()):
            shallow.get_submodule(k).step.k.data.fill_(size * (-1) ** i * (1 + i))
        x = x_prev = shallow.stem(torch.randn(1, 3, 32, 32, dtype=torch.float64))
        timm_lm.grow(shallow, deep)
        states = [(x, x_prev)] * 2
        for stages in zip(shallow.stages, deep.stages):
            # each stage from the state in which the shallow network enters it
            states = [stage(*states[0]) for stage in stages]
            ends.setdefault(size, []).append((states[0][0] - states[1][0]).abs().max().item())
    for far, near in zip(*ends.values()):
        assert far < 1e-10 if name.startswith('preact') else near < far / 50 < 0.01


def test_trained_network_grown_sees_the_same_in_photographs():
    """Of the 340 pieces of two photographs most are named alike; undivided branches leave little of that."""
    from sklearn.datasets import load_sample_images
    shallow = timm.create_model('lm_resnet20.best_c10', pretrained=True).eval()
    photos = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]) / 255
    photos = torch.nn.functional.interpolate(photos[:, :, :416, :640], scale_factor=1 / 4, mode='area')
    pieces = photos.unfold(2, 32, 8).unfold(3, 32, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
    mean, std = (torch.tensor(shallow.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    deep = timm_lm.grow(shallow, timm.create_model('lm_resnet32')).eval()
    with torch.inference_mode():
        expected, grown = (model((pieces - mean) / std).argmax(1) for model in (shallow, deep))
        for stage, old in zip(deep.stages, shallow.stages):
            repeated = repeated_blocks(len(old.blocks), len(stage.blocks))
            for block, source in zip(stage.blocks, repeated):
                block.last_conv().weight.mul_(repeated.count(source))
        undivided = deep((pieces - mean) / std).argmax(1)
    assert len(expected.unique()) >= 5
    assert (grown == expected).float().mean() > 0.5 > 0.4 > (undivided == expected).float().mean()


def test_first_k_of_a_stage_stays():
    """Of a network with a history before each stage, as LM-ResNeXt has it."""
    kwargs = dict(cardinality=2, base_width=4)
    shallow, deep = (net('lm_resnext29_8x64d', layers=(n, n, n), k_init=0.25, **kwargs) for n in (2, 3))
    timm_lm.grow(shallow, deep)
    k = deep.k_values()
    assert {name: value.item() for name, value in k.items() if name.endswith('blocks.0')} == {
        'stages.1.blocks.0': 0.25, 'stages.2.blocks.0': 0.25}
    assert any(value.item() != 0.25 for value in k.values())


def test_first_k_of_a_stage_that_changes_no_shape_follows_the_step_behind():
    kwargs = dict(channels=(8, 8), output_stride=1, k_init=0.5)
    grown = timm_lm.grow(net(layers=(2, 2), **kwargs), net(layers=(4, 3), **kwargs))
    assert {name: value.item() for name, value in grown.k_values().items()} == {
        'stages.0.blocks.1': 0.5, 'stages.0.blocks.2': 0., 'stages.0.blocks.3': 0.,
        'stages.1.blocks.0': 1.5, 'stages.1.blocks.1': 0.5, 'stages.1.blocks.2': 0.}


@pytest.mark.parametrize('shallow, deep', [(10, 7), (10, 0), (0, 7)])
def test_head_of_other_classes_stays_as_it_was_made(shallow, deep):
    new = net(layers=(3, 3, 3), num_classes=deep)
    head = copy.deepcopy(new.head.state_dict())
    old = net(num_classes=shallow)
    grown = timm_lm.grow(old, new)
    assert grown.num_classes == deep and grown.head.state_dict().keys() == head.keys()
    assert all(torch.equal(tensor, head[name]) for name, tensor in grown.head.state_dict().items())
    assert torch.equal(grown.stem.conv.weight, old.stem.conv.weight)


@pytest.mark.parametrize('shallow, deep, message', [
    (dict(name='lm_resnet20'), dict(name='preact_resnet20'), 'A two-step network cannot start a plain one'),
    (dict(name='preact_resnext29_8x64d', base_width=4), dict(name='lm_resnext29_8x64d', base_width=4),
     'differ in more than depth: in stages.1.blocks.0.history'),
    (dict(channels=(8, 16, 32)), dict(), 'differ in more than depth'),
    (dict(in_chans=1), dict(), 'differ in more than depth'),
    (dict(layers=(2, 2), channels=(16, 32)), dict(), 'differ in more than depth'),
    (dict(layers=(3, 3, 3)), dict(), '3 blocks of a stage cannot become 2'),
])
def test_what_can_not_be_grown_is_told_and_left_alone(shallow, deep, message):
    deep = net(**deep)
    before = {name: tensor.clone() for name, tensor in deep.state_dict().items()}
    with pytest.raises(UserError, match=message):
        timm_lm.grow(net(**shallow), deep)
    assert all(torch.equal(before[name], tensor) for name, tensor in deep.state_dict().items())


def test_network_of_timm_can_not_be_grown():
    with pytest.raises(UserError, match='A ResNet cannot be grown'):
        timm_lm.grow(timm.create_model('resnet18'), net())


@pytest.mark.parametrize('name', ['lm_resnet20', 'preact_resnet20'])
@pytest.mark.parametrize('which', [0, 1])
def test_optimized_network_can_not_be_grown(name, which):
    nets = [net(name, layers=(n, n, n)) for n in (2, 3)]
    nets[which] = timm_lm.optimize(nets[which])
    with pytest.raises(UserError, match='before they are optimized for inference'):
        timm_lm.grow(*nets)


@pytest.mark.parametrize('wrap', [
    torch.nn.utils.parametrizations.weight_norm, lambda conv: torch.nn.utils.prune.identity(conv, 'weight')])
def test_network_of_made_weights_can_not_be_grown_to(wrap):
    """Their division would be lost."""
    nets = [net(norm_layer='groupnorm1', layers=(n, n, n)) for n in (2, 3)]
    for model in nets:
        for stage in model.stages:
            for block in stage.blocks:
                wrap(block.last_conv())
    with pytest.raises(UserError, match='as by weight norm or pruning, cannot be grown to'):
        timm_lm.grow(*nets)


# By the command line

FEW = ['-c', 'demo_digits', '--no-torchcompile', '--epochs', 1, '--warmup-epochs', 0]
DEEP = ['--model-kwargs', 'layers=(3,3,4)']


def test_training_starts_from_the_grown_weights(few_digits, weights, tmp_path, command):
    """At a rate of almost nothing; the saved weights stand on their own, and the run goes on where it stopped."""
    words = ['train', *FEW, *DEEP, '--data-dir', few_digits, '--grow-from', weights, '--lr', 1e-12, '--weight-decay', 0,
             '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    code, out, err = command(*words)
    assert code == 0 and f', starting from the weights of `{weights.parent.name}`\n' in out, err
    card = (tmp_path / 'run' / 'weights' / 'README.md').read_text()
    assert f'1 epoch, starting from the weights of `{weights.parent.name}`, seed 42, ' in card
    saved = load_file(tmp_path / 'run' / 'weights' / 'model.safetensors')
    grown = timm_lm.grow(timm.create_model(f'local-dir:{weights}', pretrained=True),
                         net(layers=(3, 3, 4), in_chans=1))
    for name, parameter in grown.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), msg=name)
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['parameters'] == sum(
        p.numel() for p in grown.parameters())
    code, out, err = command(*words)
    assert code == 0 and 'Resuming from' in out, err


def test_grown_network_tells_how_it_sees_images():
    shallow = timm.create_model('lm_resnet20.best_c100', pretrained=True)
    grown = timm_lm.grow(shallow, timm.create_model('lm_resnet32', num_classes=100)).pretrained_cfg
    assert all(grown[name] == shallow.pretrained_cfg[name] for name in ('mean', 'std', 'input_size', 'label_names'))
    other = timm_lm.grow(shallow, timm.create_model('lm_resnet32', num_classes=7)).pretrained_cfg
    assert other['mean'] == grown['mean'] and not other.get('label_names') and other['architecture'] == 'lm_resnet32'
    images = dict(input_size=(3, 128, 128), crop_mode='border')
    shallow = timm.create_model('lm_resnet18', pretrained_cfg=images)
    cfg = timm_lm.grow(shallow, timm.create_model('lm_resnet34')).pretrained_cfg
    assert images.items() <= cfg.items() and not {'test_input_size', 'test_crop_pct'} & cfg.keys()
    direct = LMResNet(layers=(3, 3, 3), channels=(16, 32, 64))
    assert not hasattr(timm_lm.grow(LMResNet(layers=(3, 3, 3), channels=(16, 32, 64)), direct), 'pretrained_cfg')


def test_grown_network_sees_images_as_the_shallow_one(few_digits, weights, tmp_path, command):
    shallow = shutil.copytree(weights, tmp_path / 'shallow')
    config = json.loads((shallow / 'config.json').read_text())
    config['pretrained_cfg'] |= dict(mean=[0.25], std=[0.75], input_size=[1, 24, 24])
    (shallow / 'config.json').write_text(json.dumps(config))
    given = ['--model', 'lm_resnet20', *DEEP, '--in-chans', 1, '--num-classes', 10, '--val-split', 'test', '--data-dir',
             few_digits, '--grow-from', shallow, '--no-aug', '--epochs', 1, '--warmup-epochs', 0]
    for more, mean, size in (([], [0.25], 24), (['--mean', 0.5, '--img-size', 16], [0.5], 16)):
        code, _, err = command('train', *given, *more, '--output', tmp_path, '--experiment', f'run{size}')
        assert code == 0, err
        found = json.loads((tmp_path / f'run{size}' / 'weights' / 'config.json').read_text())['pretrained_cfg']
        assert (found['mean'], found['std'], found['input_size']) == (mean, [0.75], [1, size, size])


@pytest.mark.parametrize('options, message', [
    (['--grow-from', 'lm_resnet21'], "--grow-from lm_resnet21 cannot start lm_resnet20: There is no model"),
    (['--grow-from', 'lm_resnet20.best_c10', '--input-size', 3, 16, 16, *DEEP, '--pretrained'],
     '--pretrained and --grow-from both set the initial weights'),
    (['--grow-from', 'lm_resnet20.best_c10'], 'differ in more than depth'),
])
def test_bad_starts_are_told(few_digits, tmp_path, fails, options, message):
    assert message in fails('train', *FEW, '--data-dir', few_digits, '--output', tmp_path, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('model, start, word', [
    ('lm_resnet56', 'lm_resnet32.best_c10', 'grown from'),
    ('lm_resnet20', 'lm_resnet20.best_c100', 'starting from'),
    ('lm_resnet20', 'preact_resnet20.best_c10', 'starting from'),
    ('lm_resnet56', '/runs/20260101-000000-lm_resnet32-32/weights', 'grown from'),
    ('lm_resnet20', '/runs/20260101-000000-lm_resnet20-32/weights', 'starting from'),
    ('lm_resnext29_16x64d', 'hf-hub:owner2/lm_resnext29_8x64d', 'starting from'),
    ('lm_resnet56', '/runs/20epochs/weights', 'starting from')])
def test_word_for_a_start(model, start, word):
    assert start_word(model, start) == word
