"""Options and recipes: timm's dialect, what is refused, and the paper's schedule and weight decay."""
import pytest
import timm
import yaml
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_lm.errors import UserError
from timm_lm.training.factory import create_optimizer
from timm_lm.training.options import REFUSED, build_parser, find_recipe, list_recipes, parse_options


def recipe(tmp_path, **values):
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(values))
    return str(path)


PLAIN = dict(scale=[1, 1], ratio=[1, 1], color_jitter=0, train_interpolation='')


@pytest.mark.parametrize('name', list_recipes())
def test_shipped_recipes_parse_and_name_registered_models(name):
    args = parse_options(['-c', name])
    assert timm.is_model(args.model)
    assert args.device_modules == ['timm_lm']
    header = find_recipe(name).read_text().split('device_modules')[0]
    assert all(line.startswith('#') for line in header.splitlines()) and 'timm' in header


def test_paper_recipe_has_the_rate_of_the_paper_by_epoch():
    """Lu et al. 2018: rate 0.1, divided by 10 at epochs 80 and 120 of 160."""
    args = parse_options(['-c', 'lm_resnet20_c10'])
    model = timm.create_model(args.model)
    optimizer = create_optimizer(args, model)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=390)
    assert epochs == 160
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        for step in range(3):
            scheduler.step_update(epoch * 390 + step + 1)
        scheduler.step(epoch + 1)
    assert rates == pytest.approx([0.1] * 80 + [0.01] * 40 + [0.001] * 40)


def test_paper_recipe_is_plain_momentum():
    args = parse_options(['-c', 'lm_resnet20_c10'])
    optimizer = create_optimizer(args, timm.create_model(args.model))
    group = optimizer.param_groups[0]
    assert (group['momentum'], group['nesterov'], group['dampening']) == (0.9, False, 0)


def test_command_line_goes_before_the_recipe_and_the_recipe_before_defaults(tmp_path):
    path = recipe(tmp_path, epochs=7, warmup_epochs=0, lr='1e-2', model='lm_resnet32', **PLAIN)
    args = parse_options(['-c', path, '--epochs', '9'])
    assert (args.epochs, args.lr, args.model, args.momentum) == (9, 0.01, 'lm_resnet32', 0.9)


def test_defaults_are_those_of_timm():
    """A few of timm's train.py, version 1.0.31."""
    args = build_parser().parse_args([])
    assert (args.opt, args.sched, args.epochs, args.warmup_epochs, args.weight_decay) == ('sgd', 'cosine', 300, 5, 2e-5)
    assert (args.smoothing, args.color_jitter, args.hflip, args.val_split) == (0.1, 0.4, 0.5, 'validation')


def test_booleans_can_be_taken_back():
    args = parse_options(['-c', 'lm_resnet20_c10', '--no-amp', '--no-torchcompile', '--no-channels-last'])
    assert not args.amp and args.torchcompile is None and not args.channels_last


@pytest.mark.parametrize('name', ['mixup', 'start_epoch', 'workers', 'naflex_loader'])
def test_refused_options_tell_the_reason(name, tmp_path):
    with pytest.raises(UserError, match=f'--{name.replace("_", "-")} is refused: .'):
        parse_options([f'--{name.replace("_", "-")}', '1'])
    with pytest.raises(UserError, match=f"'{name}' in .* is refused: .") as e:
        parse_options(['-c', recipe(tmp_path, **{name: 1})])
    assert REFUSED[name] in str(e.value)


@pytest.mark.parametrize('values, message', [
    (dict(epohcs=3), "'epohcs' .* is unknown; did you mean epochs"),
    (dict(epochs='many'), "'epochs' .* can not be 'many'"),
    (dict(amp='yes please'), "'amp' .* must be true or false"),
    (dict(input_size=[3, 32]), "'input_size' .* can not be"),
    (dict(opt_kwargs='nesterov'), "'opt_kwargs' .* must hold pairs"),
    (dict(epochs=0, **PLAIN), '--epochs must be at least 1'),
    (dict(epochs=10, warmup_epochs=0, sched='multistep', decay_milestones=[5, 20], **PLAIN), 'longer than the run'),
    (dict(epochs=10, warmup_epochs=0, sched='multistep', decay_milestones=[5, 5], **PLAIN), 'must increase'),
    (dict(epochs=3, warmup_epochs=5, **PLAIN), '--warmup-epochs 5 leave nothing'),
    (dict(lr=-1, **PLAIN), '--lr must be positive'),
    (dict(scale=[0.5, 1]), '--scale .* is refused'),
])
def test_bad_recipes_are_told_in_one_line(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as e:
        parse_options(['-c', recipe(tmp_path, **values)])
    assert '\n' not in str(e.value)


def test_bad_files_and_arguments(tmp_path):
    with pytest.raises(UserError, match='no recipe .*Did you mean lm_resnet20_c10'):
        parse_options(['-c', 'lm_resnet20_c11'])
    broken = tmp_path / 'broken.yaml'
    broken.write_text('a: [')
    with pytest.raises(UserError, match='not readable YAML'):
        parse_options(['-c', str(broken)])
    with pytest.raises(UserError, match="Unknown argument '--epoch'; did you mean --epochs"):
        parse_options(['-c', 'lm_resnet20_c10', '--epoch', '3'])
    with pytest.raises(UserError, match="takes pairs name=value, not 'fused'"):
        parse_options(['--opt-kwargs', 'fused'])


def test_paper_recipe_decays_all_but_k():
    """The paper's optimizer decays every weight; k is exempt by this package's decision."""
    args = parse_options(['-c', 'lm_resnet20_c10'])
    model = timm.create_model(args.model)
    optimizer = create_optimizer(args, model)
    names = {id(p): name for name, p in model.named_parameters()}
    free = {names[id(p)] for group in optimizer.param_groups if not group['weight_decay'] for p in group['params']}
    assert free == model.no_weight_decay()
    decays = {group['weight_decay'] for group in optimizer.param_groups if group['weight_decay']}
    assert decays == {1e-4}
