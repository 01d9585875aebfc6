"""The shipped recipes: what their headers promise, the paper's figures, plain twins, and what fine-tuning trains."""
import re

import pytest
import timm
import torch
import yaml
from timm.layers import DropPath
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_lm.errors import UserError
from timm_lm.layers import StateNoise
from timm_lm.training import optimizer as optimizer_module
from timm_lm.training.arguments import build_parser
from timm_lm.training.batches import resolve_input_config
from timm_lm.training.network import create_model
from timm_lm.training.optimizer import create_optimizer
from timm_lm.training.options import parse_options
from timm_lm.training.recipes import find_recipe, list_recipes, recipe_title

# Lu et al., ICML 2018 (arXiv 1710.10121), their settings of training: rate 0.1, divided by 10 at the two epochs.
#        recipe:          (epochs, drops at, batch, weight decay)
PAPER = {
    'paper_c10':          (160, (80, 120), 128, 1e-4),
    'plain_first_c10':    (160, (80, 120), 128, 1e-4),
    'paper_c100':         (300, (150, 225), 128, 1e-4),
    'resnext_c100':       (300, (150, 225), 128, 5e-4),
    'sd_c10':             (500, (250, 375), 128, 1e-4),
    'noise_c10':          (500, (250, 375), 128, 1e-4),
    'paper_in1k':         (90, (30, 60), 256, 1e-4),
}  # fmt: skip
ON_CIFAR = [name for name in list_recipes() if re.search(r'_c100?$', name)]
FINETUNING = [name for name in list_recipes() if name.startswith('finetune')]
NETWORK = re.compile(r'\b(?:lm_|preact_)res\w+|\bresnetv2_\d+')


def header(name):
    lines = find_recipe(name)[0].read_text().splitlines()
    first_option = next(i for i, line in enumerate(lines) if not line.startswith('#'))
    return [line[1:].strip() for line in lines[:first_option]]


def networks(name):
    return NETWORK.findall(' '.join(header(name)))


def values(name):
    return yaml.safe_load(find_recipe(name)[0].read_text())


def twin_of(network):
    return re.sub('^lm_resnet', 'resnetv2_' if network in ('lm_resnet50', 'lm_resnet101') else 'preact_resnet',
                  network).replace('lm_resnext', 'preact_resnext')


def twins():
    """(recipe, network, its plain twin) of all headers."""
    return {(name, network, twin_of(network)) for name in list_recipes() for network in networks(name)
            if network.startswith('lm_') and name not in ('plain_first_c10', *FINETUNING)}


def build(name, *argv):
    """Options, network, optimizer and schedule of a recipe, made as a training makes them."""
    args = parse_options(['-c', name, *argv])
    model = create_model(args)
    optimizer = create_optimizer(args, model)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    return args, model, optimizer, scheduler, epochs


def groups(optimizer, model):
    """Name of each trained parameter -> its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group['params']}


@pytest.fixture(scope='module', params=PAPER)
def paper(request):
    """Name of a recipe of the paper, and what it builds; one test steps the schedule."""
    return request.param, build(request.param)


# Headers


@pytest.mark.parametrize('name', list_recipes())
def test_recipe_parses_and_tells_what_it_is(name):
    args = parse_options(['-c', name])
    assert args.device_modules == ['timm_lm']
    assert args.tag == name
    named = networks(name)
    assert args.model in named
    assert all(timm.is_model(network) for network in named)
    if name in PAPER or name.startswith('best'):
        assert args.model == named[0]
    lines = header(name)
    assert recipe_title(name) == lines[0]
    assert lines[0].endswith('.') and not lines[1], 'the first line stands alone'


@pytest.mark.parametrize('name', list_recipes())
def test_header_names_what_timm_ignores(name):
    """timm's script takes unknown keys in silence, so the header must name each one, and no other option is new."""
    text = ' '.join(header(name))
    assert "timm's own train.py" in text
    ours = next(group for group in build_parser()._action_groups if (group.title or '').startswith('Additions'))
    unknown_to_timm = {action.dest for action in ours._group_actions} & set(values(name))
    for option in unknown_to_timm:
        assert re.search(rf'\b{option}\b', text), option
    assert ('not cropped' in text or 'not crop' in text) == ('pad_crop' in unknown_to_timm)


def test_headers_name_the_plain_twins():
    for name, network, twin in twins():
        assert twin in networks(name), (name, network)


def test_plain_first_has_no_twin_of_its_own():
    assert 'paper_c10' in ' '.join(header('plain_first_c10'))


# The paper's figures


def test_rate_of_the_paper_by_epoch(paper):
    name, (_, _, optimizer, scheduler, epochs) = paper
    rates = []
    for epoch in range(epochs):
        rates.append([group['lr'] for group in optimizer.param_groups])
        for step in range(3):
            scheduler.step_update(epoch * 10 + step + 1)
        scheduler.step(epoch + 1)
    length, (first, second), _, _ = PAPER[name]
    expected = [0.1] * first + [0.01] * (second - first) + [0.001] * (length - second)
    assert len(rates) == length
    for group in zip(*rates):
        assert group == pytest.approx(expected, rel=1e-12)


def test_optimizer_of_the_paper(paper):
    """Plain momentum 0.9; weight decay on every weight, norms and biases too. k is exempt by our decision."""
    name, (args, model, optimizer, _, _) = paper
    _, _, batch, decay = PAPER[name]
    assert (args.batch_size, args.grad_accum_steps, args.clip_grad, args.warmup_epochs) == (batch, 1, None, 0)
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group['momentum'], group['nesterov'], group['dampening']) == (0.9, False, 0)
    decays = {parameter: group['weight_decay'] for parameter, group in groups(optimizer, model).items()}
    assert set(decays) == {parameter for parameter, _ in model.named_parameters()}
    assert {parameter for parameter, value in decays.items() if value == 0} == model.no_weight_decay()
    assert model.no_weight_decay() and all(parameter.endswith('step.k') for parameter in model.no_weight_decay())
    assert {value for value in decays.values() if value} == {decay}
    assert {'norm.weight', 'norm.bias', 'head.fc.bias'} <= set(decays)


@pytest.mark.parametrize('spares', {False, optimizer_module._TIMM_SPARES})
def test_weight_decay_of_the_paper_spares_k_with_any_timm(monkeypatch, spares):
    """Newer timm makes such groups by itself; for older ones they are made here."""
    monkeypatch.setattr(optimizer_module, '_TIMM_SPARES', spares)
    args = parse_options(['-c', 'paper_c10'])
    model = timm.create_model('lm_resnet20')
    optimizer = create_optimizer(args, model)
    decays = {name: group['weight_decay'] for name, group in groups(optimizer, model).items()}
    assert decays.keys() == {name for name, _ in model.named_parameters()}
    assert {name for name, value in decays.items() if value == 0} == model.no_weight_decay()
    assert set(decays.values()) == {0., args.weight_decay}


def test_augmentation_of_the_paper(paper):
    """CIFAR: 4 pixels of padding, a crop, a flip. ImageNet: crops of 224 with scale augmentation, a flip."""
    name, (args, *_) = paper
    assert args.hflip == 0.5
    for option in ('color_jitter', 'smoothing', 'vflip', 'reprob', 'mixup', 'cutmix', 'drop'):
        assert getattr(args, option) == 0, option
    assert args.aa is None and args.train_crop_mode is None and not args.model_ema
    if name == 'paper_in1k':
        assert (args.pad_crop, args.scale, args.ratio) == (0, [0.08, 1], pytest.approx([3 / 4, 4 / 3]))
    else:
        assert (args.pad_crop, args.scale, args.ratio) == (4, [1, 1], [1, 1])


@pytest.mark.parametrize('name, data, size, crop_pct, mean, std', [
    # means and deviations of the pixels of the train splits; those of ImageNet are torchvision's
    ('paper_c10', 'hfds/uoft-cs/cifar10', 32, 1, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ('lm_resnet20.paper_c100', 'hfds/uoft-cs/cifar100', 32, 1, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ('resnext_c100', 'hfds/uoft-cs/cifar100', 32, 1, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ('preact_resnet20.best_c100', 'hfds/uoft-cs/cifar100', 32, 1, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ('paper_in1k', 'hfds/ILSVRC/imagenet-1k', 224, 0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])
def test_images_and_classes(name, data, size, crop_pct, mean, std):
    args = parse_options(['-c', name])
    with torch.device('meta'):
        model = timm.create_model(args.model, num_classes=args.num_classes)
    config = resolve_input_config(args, model)
    assert args.dataset == data
    assert (config['input_size'], config['crop_pct']) == ((3, size, size), crop_pct)
    assert (tuple(config['mean']), tuple(config['std'])) == (mean, std)
    assert model.num_classes == {'cifar10': 10, 'cifar100': 100, 'imagenet-1k': 1000}[data.split('/')[-1]]


@pytest.mark.parametrize('name', ['sd_c10', 'lm_resnet110.sd_c10', 'preact_resnet56.sd_c10'])
def test_stochastic_depth_rises_linearly_to_a_half(name):
    """The paper drops block l of L with 0.5 l/L (Huang et al. 2016). timm begins with 0 at the first block, which
    therefore differs by 0.5/L, the last one by nothing."""
    _, model, _, _, _ = build(name)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0. for block in blocks]
    count = len(rates)
    assert count == {'lm_resnet110': 54}.get(name.split('.')[0], 27)
    assert rates == pytest.approx([0.5 * i / (count - 1) for i in range(count)], abs=1e-6)
    paper = [0.5 * i / count for i in range(1, count + 1)]
    differences = [ours - theirs for ours, theirs in zip(rates, paper)]
    assert differences[0] == pytest.approx(-0.5 / count) and differences[-1] == pytest.approx(0)
    assert differences == sorted(differences)


@pytest.mark.parametrize('name', ['noise_c10', 'preact_resnet56.noise_c10'])
def test_noise_after_each_block(name):
    """Level 0.001, Lu et al. 2018."""
    _, model, _, _, _ = build(name)
    noises = [block.noise for stage in model.stages for block in stage.blocks]
    assert all(isinstance(noise, StateNoise) for noise in noises)
    assert {(noise.level, noise.noise_type) for noise in noises} == {(0.001, 'gaussian')}


@pytest.mark.parametrize('name, other, differing', [
    ('plain_first_c10', 'paper_c10', {'tag', 'two_step_epoch'}),
    ('resnext_c100', 'paper_c100', {'model', 'weight_decay', 'tag'}),
    ('noise_c10', 'sd_c10', {'tag', 'drop_path', 'model_kwargs'}),
    ('best_c100', 'best_c10', {'tag', 'dataset', 'target_key', 'num_classes', 'mean', 'std'}),
])
def test_recipes_that_differ_in_little(name, other, differing):
    first, second = values(name), values(other)
    assert {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)} == differing


def test_plain_first_switches_before_the_first_drop():
    args = parse_options(['-c', 'plain_first_c10'])
    assert 0 < args.two_step_epoch < PAPER['plain_first_c10'][1][0]


# Plain twins


@pytest.mark.parametrize('network, twin', sorted({pair[1:] for pair in twins()}))
def test_twin_is_the_network_without_its_history(network, twin):
    with torch.device('meta'):
        ours, plain = (dict(timm.create_model(model).named_parameters()) for model in (network, twin))
    added = [parameter for parameter in ours if '.step.' in parameter or '.history.' in parameter]
    assert added
    assert {parameter: p.shape for parameter, p in ours.items() if parameter not in added} == {
        parameter: p.shape for parameter, p in plain.items()}


def test_network_by_the_name_of_its_weights():
    by_name, by_option = (
        vars(parse_options(argv)) for argv in (['-c', 'preact_resnet56.paper_c10'],
                                               ['-c', 'paper_c10', '--model', 'preact_resnet56']))
    assert {key for key in by_name if by_name[key] != by_option[key]} == {'config'}


# Loaders and speed


@pytest.mark.parametrize('name', [*ON_CIFAR, *FINETUNING, 'demo_digits'])
def test_small_images_can_be_kept_in_memory(name):
    assert parse_options(['-c', name, '--loader', 'memory']).pad_crop > 0


def test_imagenet_is_read_by_workers():
    assert parse_options(['-c', 'paper_in1k']).workers == 8
    with pytest.raises(UserError, match='--scale'):
        parse_options(['-c', 'paper_in1k', '--loader', 'memory'])


@pytest.mark.parametrize('name', [*ON_CIFAR, 'paper_in1k'])
def test_speed(name):
    """Full batches of validation, so that one compiled graph, a CUDA graph for small images, serves all of them."""
    args = parse_options(['-c', name])
    assert (args.amp, args.amp_dtype, args.channels_last, args.torchcompile) == (True, 'bfloat16', True, 'inductor')
    images = 50_000 if name == 'paper_in1k' else 10_000
    assert images % args.validation_batch_size == 0
    assert args.torchcompile_mode == (None if name == 'paper_in1k' else 'reduce-overhead')


# The best recipes


@pytest.mark.parametrize('name', ['best_c10', 'best_c100'])
def test_best_recipes_end_at_rest(name):
    """Nesterov, rate 0.1 after warm-up and near 0 at the end; unmixed images and averaged weights by then."""
    args, model, optimizer, scheduler, epochs = build(name)
    assert all(group['nesterov'] for group in optimizer.param_groups)
    decays = {parameter: group['weight_decay'] for parameter, group in groups(optimizer, model).items()}
    assert decays['stem.conv.weight'] == 5e-4
    assert all(decays[parameter] == 0 for parameter in [*model.no_weight_decay(), 'norm.weight', 'head.fc.bias'])
    rates = []
    for update in range(epochs * 10):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step_update(update + 1)
    assert rates[0] == 0.01 and max(rates) == pytest.approx(0.1, rel=5e-3) and rates[-1] < 1e-6
    assert args.model_ema and 0 < args.mixup_off_epoch < epochs
    assert (1 / (1 - args.model_ema_decay)) < 390 * (epochs - args.mixup_off_epoch)  # 390 updates an epoch


# Fine-tuning


def trained_by_a_step(name, *argv):
    """Names of the parameters that one update changes, and the model."""
    args, model, optimizer, _, _ = build(name, '--num-classes', '5', *argv)
    before = {parameter: p.detach().clone() for parameter, p in model.named_parameters()}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(model.train()(images), torch.arange(4)).backward()
    optimizer.step()
    return {parameter for parameter, p in model.named_parameters() if not torch.equal(p, before[parameter])}, model


def test_finetuning_starts_from_pretrained_weights():
    _, model, _, _, _ = build('finetune', '--num-classes', '5')
    pretrained = timm.create_model('lm_resnet20', pretrained=True)
    assert torch.equal(model.stem.conv.weight, pretrained.stem.conv.weight)
    assert model.head.fc.weight.shape[0] == 5


def test_finetune_trains_the_whole_network():
    trained, model = trained_by_a_step('finetune')
    assert trained == {parameter for parameter, _ in model.named_parameters()}


def test_finetune_head_trains_only_the_head():
    trained, model = trained_by_a_step('finetune_head', '--no-pretrained')
    assert trained == {'head.fc.weight', 'head.fc.bias'}
    assert {parameter for parameter, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize('network', ['lm_resnet20', 'lm_resnet110'])
def test_finetune_layer_decay_slows_the_lower_layers(network):
    args, model, optimizer, scheduler, _ = build('finetune_layer_decay', '--model', network, '--no-pretrained')
    scheduler.step_update(args.warmup_epochs * 10)
    rates = {parameter: group['lr'] for parameter, group in groups(optimizer, model).items()}
    assert set(rates) == {parameter for parameter, _ in model.named_parameters()}
    top = rates['head.fc.weight']
    assert top == pytest.approx(0.02, rel=0.01)
    blocks = len([name for name, _ in model.named_modules() if re.fullmatch(r'stages\.\d+\.blocks\.\d+', name)])
    assert rates['stem.conv.weight'] == pytest.approx(max(0.85 ** (blocks + 1), 0.05) * top)
    last = max((name for name in rates if name.startswith('stages.2.blocks.')), key=lambda n: int(n.split('.')[3]))
    assert rates[last] == rates['norm.weight'] == pytest.approx(0.85 * top)
    ordered = [rate for parameter, rate in rates.items() if parameter.startswith('stages.')]
    assert min(ordered) >= 0.05 * top * (1 - 1e-9)
