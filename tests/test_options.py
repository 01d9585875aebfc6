"""Options and recipes: timm's dialect, what is refused, and what bad values say."""
import json
from pathlib import Path

import pytest
import yaml

from timm_lm.errors import UserError
from timm_lm.training.arguments import build_parser
from timm_lm.training.optimizer import set_learning_rate
from timm_lm.training.options import parse_options
from timm_lm.training.refused import REFUSED


def recipe(tmp_path, **values):
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(values))
    return str(path)


PLAIN = dict(scale=[1, 1], ratio=[1, 1], color_jitter=0, train_interpolation='')


def test_command_line_goes_before_the_recipe_and_the_recipe_before_defaults(tmp_path):
    path = recipe(tmp_path, epochs=7, warmup_epochs=0, lr='1e-2', model='lm_resnet32', **PLAIN)
    args = parse_options(['-c', path, '--epochs', '9'])
    assert (args.epochs, args.lr, args.model, args.momentum) == (9, 0.01, 'lm_resnet32', 0.9)


def test_options_and_defaults_are_those_of_timm():
    """All that timm's train.py has are taken with its default or refused; what it lacks is called an addition."""
    timms = json.loads((Path(__file__).parent / 'data' / 'timm_train_options.json').read_text())['options']
    parser = build_parser()
    additions = next(group for group in parser._action_groups if (group.title or '').startswith('Additions'))
    added = {action.dest for action in additions._group_actions}
    ours = {action.dest: action.default for action in parser._actions if action.dest not in {*added, 'help'}}
    newer = {  # of timm 1.0.30 and later, and an older one
        'amp_impl', 'class_stats', 'loss', 'loss_class_weight', 'loss_pos_weight', 'loss_weight_beta',
        'loss_weight_max', 'loss_weight_power', 'lr_decay_fn', 'lr_stable_timescale', 'multilabel_threshold',
        'pretrained_cfg_overlay', 'save_epochs', 'stop_epoch', 'target_format', 'task'}
    assert len(timms) > 170 and ours.keys() - timms.keys() == newer and not added & timms.keys()
    assert timms.keys() <= ours.keys() | REFUSED.keys()
    differing = {name for name in ours.keys() - REFUSED.keys()
                 if json.loads(json.dumps(ours[name])) != timms[name]}
    assert differing == {'config', 'decay_epochs', 'device', 'model'}
    assert parse_options([]).decay_epochs == timms['decay_epochs'] == 90
    assert (timms['config'], ours['config']) == ('', None)


def test_booleans_can_be_taken_back():
    args = parse_options(['-c', 'paper_c10', '--no-amp', '--no-torchcompile', '--no-channels-last'])
    assert not args.amp and args.torchcompile is None and not args.channels_last


@pytest.mark.parametrize('name', ['tta', 'start_epoch', 'split_bn', 'naflex_loader', 'target_format'])
def test_refused_options_tell_the_reason(name, tmp_path):
    with pytest.raises(UserError, match=f'--{name.replace("_", "-")} is refused: .'):
        parse_options([f'--{name.replace("_", "-")}', '1'])
    with pytest.raises(UserError, match=f"'{name}' in .* is refused: .") as e:
        parse_options(['-c', recipe(tmp_path, **{name: 1})])
    assert REFUSED[name] in str(e.value)


@pytest.mark.parametrize('values, message', [
    (dict(epohcs=3), "'epohcs' .* is unknown; did you mean epochs"),
    (dict(epochs='many'), "'epochs' .* cannot be 'many'"),
    (dict(amp='yes please'), "'amp' .* must be true or false"),
    (dict(input_size=[3, 32]), "'input_size' .* cannot be"),
    (dict(opt_kwargs='nesterov'), "'opt_kwargs' .* must hold pairs"),
    (dict(epochs=0, **PLAIN), '--epochs must be at least 1'),
    (dict(epochs=10, warmup_epochs=0, sched='multistep', decay_milestones=[5, 20], **PLAIN), 'longer than the run'),
    (dict(epochs=10, warmup_epochs=0, sched='multistep', decay_milestones=[5, 5], **PLAIN), 'must increase'),
    (dict(epochs=3, warmup_epochs=5, **PLAIN), '--warmup-epochs 5 leave nothing'),
    (dict(scale=[0.5, 1], loader='memory'), '--loader memory cannot do --scale'),
    (dict(mixup_off_epoch=3), '--mixup-off-epoch does nothing without --mixup or --cutmix or --cutmix-minmax; give'),
    (dict(mixup=0.2, batch_size=15), '--batch-size must be even'),
    (dict(seed=2 ** 32), r'--seed must be less than 2\*\*32'),
    (dict(lr=float('nan')), '--lr must be a finite number'),
    (dict(lr_noise=[0.1, float('inf')]), '--lr-noise must be a finite number'),
    (dict(img_size=0), '--img-size must be positive'),
    (dict(input_size=[3, 32, 0]), '--input-size must be positive'),
    (dict(std=[0.2, 0, 0.2]), '--std must be positive'),
    (dict(lr_base_size=0), '--lr-base-size must be positive'),
    (dict(lr_noise=0.5, lr_noise_pct=0), '--lr-noise-pct must be positive'),
    (dict(sched='step', decay_epochs=0), '--decay-epochs must be positive'),
    (dict(clip_grad=0), '--clip-grad must be positive'),
    (dict(layer_decay=0), '--layer-decay must be positive'),
    (dict(layer_decay=0.9, sched='none'), '--layer-decay is done by the schedule'),
    (dict(lr_noise=0.9, sched='none'), '--lr-noise is done by the schedule'),
    (dict(ratio=[1.5, 0.5]), '--ratio takes two positive numbers, the smaller one first'),
    (dict(smoothing=1), '--smoothing must be at least 0 and less than 1'),
    (dict(cutmix_minmax=[0.8, 0.2]), '--cutmix-minmax takes two increasing shares'),
    (dict(cutmix_minmax=[0.2, 1.5]), '--cutmix-minmax takes two increasing shares'),
    (dict(lr_base_scale='squareroot'), "'lr_base_scale' .* cannot be 'squareroot'; it can be linear, sqrt"),
    (dict(kd_model_name='lm_resnet20', kd_distill_type='feature'), "cannot be 'feature'; it can be logit"),
    (dict(sched='none', warmup_epochs=3), '--warmup-epochs does nothing with --sched none; take a schedule'),
    (dict(sched='none', warmup_prefix=True), '--warmup-prefix does nothing with --sched none'),
    (dict(sched='none', sched_on_updates=True), '--sched-on-updates does nothing with --sched none'),
    (dict(lr_cycle_decay=0.7), '--lr-cycle-decay does nothing without --lr-cycle-limit of at least 2'),
    (dict(cutmix=1.0, mixup_switch_prob=0.7), '--mixup-switch-prob does nothing without --mixup and --cutmix'),
    (dict(val_split='', val_interval=2), '--val-interval does nothing without --val-split'),
    (dict(val_split='', validation_batch_size=8), '--validation-batch-size does nothing without --val-split'),
    (dict(torchcompile='eager', torchcompile_mode='default'), '--torchcompile-mode does nothing with --torchcompile'),
    (dict(data_dir=''), "'data_dir' .* cannot be ''"),
    (dict(lr_cycle_mul=0, lr_cycle_limit=2), '--lr-cycle-mul must be positive'),
    (dict(lr_cycle_limit=0), '--lr-cycle-limit must be at least 1'),
    (dict(num_classes=0), '--num-classes must be at least 1'),
    (dict(in_chans=0), '--in-chans must be at least 1'),
    (dict(in_chans=1, input_size=[3, 32, 32]), '--in-chans 1 and the 3 channels of --input-size differ'),
    (dict(val_split='', eval_metric='top5'), '--eval-metric does nothing without --val-split'),
    (dict(log_wandb=True, wandb_resume_id='abc'), '--wandb-resume-id continues the log of a run; give --resume'),
    (dict(opt='adan', opt_betas=[0.9, 0.99]), '--opt-betas takes 3 numbers with --opt adan'),
    (dict(epochs=10, lr_cycle_mul=0.1, lr_cycle_limit=2, cooldown_epochs=2), '--lr-cycle-mul 0.1 makes cycles so'),
    (dict(lr_noise=[0.9, 0.3]), '--lr-noise takes one or two increasing shares'),
    (dict(lr_noise=[0.1, 0.3, 0.5]), '--lr-noise takes one or two increasing shares'),
    (dict(lr_noise=1.5), '--lr-noise must be between 0 and 1'),
    (dict(gaussian_blur_prob=7), '--gaussian-blur-prob must be between 0 and 1'),
    (dict(aug_repeats=0.5), '--aug-repeats must be 0 or at least 1'),
    (dict(epochs=20, sched='step', decay_epochs=30), 'longer than the run: --decay-epochs 30 with --epochs 20'),
    (dict(epochs=90, sched='step'), 'longer than the run: --decay-epochs 90 with --epochs 90'),
    (dict(epochs=12, sched='plateau'), 'longer than the run: --patience-epochs 10 with --epochs 12'),
    (dict(epochs=60, sched='plateau', patience_epochs=12, val_interval=5), '--epochs 60 and 11 validations after'),
    (dict(epochs=10, sched='plateau', patience_epochs=8, warmup_epochs=5, warmup_prefix=True), '10 validations after'),
    (dict(sched='cosine', decay_milestones=[3]), '--decay-milestones does nothing with --sched cosine; it is for mul'),
    (dict(opt='lookahead_lion', momentum=0.8), '--momentum does nothing with --opt lookahead_lion,'),
    (dict(warmup_epochs=0, warmup_lr=0.1), '--warmup-lr does nothing without --warmup-epochs'),
    (dict(eval_metric='top2'), "'eval_metric' .* cannot be 'top2'"),
])
def test_bad_recipes_are_told_in_one_line(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as e:
        parse_options(['-c', recipe(tmp_path, **values)])
    assert '\n' not in str(e.value)


def test_numbers_below_0_are_refused_where_they_mean_nothing():
    meant = {'mean', 'head_init_scale', 'head_init_bias', 'opt_eps', 'opt_betas', 'layer_decay_min_scale',
             'layer_decay_no_opt_scale', 'lr_noise_std', 'decay_milestones', 'color_jitter', 'bce_target_thresh',
             'bce_pos_weight', 'distill_loss_weight', 'task_loss_weight'}
    numbers = {action.dest: action for action in build_parser()._actions
               if action.type in (int, float) and action.dest not in REFUSED}
    assert meant < numbers.keys() and len(numbers) > 60
    for name in numbers.keys() - meant:
        count = numbers[name].nargs if isinstance(numbers[name].nargs, int) else 1
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(UserError, match=f'^{option} (must|takes two)'):
            parse_options([option, *['-1'] * count])


def test_bad_files_and_arguments(tmp_path):
    with pytest.raises(UserError, match='no recipe .*Did you mean paper_c10'):
        parse_options(['-c', 'paper_c11'])
    broken = tmp_path / 'broken.yaml'
    broken.write_text('a: [')
    with pytest.raises(UserError, match='not readable YAML'):
        parse_options(['-c', str(broken)])
    broken.write_text('tag: 2024-30-06')
    with pytest.raises(UserError, match='not readable YAML .month must be'):
        parse_options(['-c', str(broken)])
    broken.write_text('epochs: 3\nlr: 0.1\nepochs: 4\n')
    with pytest.raises(UserError, match="not readable YAML .'epochs' is there twice"):
        parse_options(['-c', str(broken)])
    with pytest.raises(UserError, match="Unknown argument '--epoch'; did you mean --epochs"):
        parse_options(['-c', 'paper_c10', '--epoch', '3'])
    with pytest.raises(UserError, match="Unknown argument 'images'; name the data with --data-dir"):
        parse_options(['-c', 'paper_c10', 'images'])
    with pytest.raises(UserError, match="takes pairs name=value, not 'fused'"):
        parse_options(['--opt-kwargs', 'fused'])
    with pytest.raises(UserError, match='--wandb-project does nothing without --log-wandb'):
        parse_options(['--wandb-project', 'mine'])


def test_refused_options_that_are_off_ask_for_nothing(tmp_path):
    """The args.yaml that timm's script leaves holds every option."""
    args = parse_options(['-c', recipe(tmp_path, aug_splits=0, jsd_loss=False, train_img_sizes=None, fuser='')])
    assert not hasattr(args, 'aug_splits')


def test_defaults_of_refused_options_ask_for_nothing(tmp_path):
    asked = dict(data=None, worker_seeding='all', naflex_train_seq_lens=[128, 256, 576, 784, 1024],
                 train_size_schedule='constant', task='classification', multilabel_threshold=0.5,
                 loss_weight_power=1.0, loss_weight_beta=0.999)
    assert parse_options(['-c', recipe(tmp_path, **asked)]).data_dir is None
    with pytest.raises(UserError, match="'worker_seeding' .* is refused"):
        parse_options(['-c', recipe(tmp_path, **asked | dict(worker_seeding='part'))])
    with pytest.raises(UserError, match="'data' .* is refused: it is timm's older name of --data-dir"):
        parse_options(['-c', recipe(tmp_path, **asked | dict(data='folder'))])


@pytest.mark.parametrize('words', [
    ['--worker-seeding', 'all'], ['--epoch-repeats', '0.'], ['--aug-splits', '0'], ['--jsd-loss', 'False'],
    ['--naflex-train-seq-lens', '128', '256', '576', '784', '1024'],
])
def test_refused_options_that_ask_for_nothing_pass_on_the_command_line_too(words):
    assert vars(parse_options(words)) == vars(parse_options([]))
    for asked in (words[:1], [words[0], '7']):
        with pytest.raises(UserError, match=f'{words[0]} is refused'):
            parse_options(asked)


def test_multistep_without_milestones_is_a_constant_rate(tmp_path):
    assert parse_options(['-c', recipe(tmp_path, sched='multistep', decay_milestones=[])]).decay_milestones == []


def test_a_leader_can_be_turned_off_without_its_followers(tmp_path):
    path = recipe(tmp_path, model_ema=True, model_ema_decay=0.9, **PLAIN)
    args = parse_options(['-c', path, '--no-model-ema'])
    assert (args.model_ema, args.model_ema_decay) == (False, parse_options([]).model_ema_decay)


def test_options_are_a_recipe_again_after_their_leader_was_turned_off(tmp_path):
    first = parse_options(['-c', 'best_c10', '--no-amp', '--no-torchcompile', '--no-model-ema'])
    values = {name: value for name, value in vars(first).items() if name not in ('config', 'resume', 'dry_run')}
    again = parse_options(['-c', recipe(tmp_path, **values)])
    assert vars(again) == vars(first) | dict(config=again.config)


def test_recipes_for_another_of_their_networks():
    args = parse_options(['-c', 'lm_resnet56.paper_c10'])
    assert (args.model, args.tag, args.epochs) == ('lm_resnet56', 'paper_c10', 160)
    assert parse_options(['-c', 'lm_resnet32.finetune']).model == 'lm_resnet32'
    with pytest.raises(UserError, match='paper_c100 is not for lm_resnext29_8x64d'):
        parse_options(['-c', 'lm_resnext29_8x64d.paper_c100'])
    with pytest.raises(UserError, match='Did you mean lm_resnet56.paper_c10?'):
        parse_options(['-c', 'lm_resnet56.paper_c11'])


@pytest.mark.parametrize('words, lr', [
    ([], 0.1 * 192 / 256),
    (['--lr', '0.3'], 0.3),
    (['--lr-base', '0.2', '--lr-base-size', '96'], 0.4),
    (['--opt', 'adamw'], 0.1 * (192 / 256) ** 0.5),
    (['--opt', 'adamw', '--lr-base-scale', 'linear'], 0.1 * 192 / 256),
    (['--lr-base-scale', 'sqrt'], 0.1 * (192 / 256) ** 0.5),
])
def test_rate_without_lr_follows_the_images_of_an_update(words, lr):
    args = parse_options(['--batch-size', '32', '--grad-accum-steps', '3', *words])
    set_learning_rate(args, num_processes=2)
    assert args.lr == pytest.approx(lr)


def test_unset_variable_is_no_folder():
    with pytest.raises(UserError, match='--data-dir: it is empty, as an unset variable is; name a folder; see'):
        parse_options(['--data-dir', ''])


@pytest.mark.parametrize('sched, epochs', [('step', 90), ('cosine', 90), ('wsd', 0.2), ('rsqrt', 0.2)])
def test_length_of_a_decay_is_that_of_its_schedule(sched, epochs, tmp_path):
    assert parse_options(['-c', recipe(tmp_path, sched=sched, decay_epochs=None)]).decay_epochs == epochs
    assert parse_options(['-c', recipe(tmp_path, sched=sched, decay_epochs=epochs)]).decay_epochs == epochs
    if sched == 'cosine':
        with pytest.raises(UserError, match='--decay-epochs does nothing with --sched cosine'):
            parse_options(['--sched', sched, '--decay-epochs', '7'])
    else:
        assert parse_options(['--sched', sched, '--decay-epochs', '7']).decay_epochs == 7


@pytest.mark.parametrize('words, message', [
    (['--img-size', '64'], '--img-size does nothing with --input-size'),
    (['--lr-base', '0.2'], '--lr-base does nothing with --lr, which may come from the recipe; give that one'),
    (['--no-aug', '--pad-crop', '2'], '--pad-crop does nothing with --no-aug; take that one back, or leave it out'),
    (['--no-aug', '--aa', 'rand-m9'], '--aa does nothing with --no-aug'),
    (['--no-aug', '--recount', '3'], '--recount does nothing with'),
])
def test_options_that_one_of_the_recipe_takes_the_place_of(tmp_path, words, message):
    path = recipe(tmp_path, lr=0.1, input_size=[3, 32, 32], pad_crop=4, torchcompile='inductor',
                  torchcompile_mode='reduce-overhead')
    parse_options(['-c', path])
    assert parse_options(['-c', path, '--torchcompile', 'eager']).torchcompile_mode is None
    off = vars(parse_options(['-c', path, '--no-aug', '--hflip', '0']))
    assert (off['pad_crop'], off['hflip']) == (0, 0)
    del off['config']
    parse_options(['-c', recipe(tmp_path, **off)])  # as a run records it
    with pytest.raises(UserError, match=message):
        parse_options(['-c', path, *words])


def test_values_that_mean_nothing_new_pass(tmp_path):
    assert parse_options(['-c', recipe(tmp_path, decay_epochs=90), '--decay-epochs', '90']).decay_epochs == 90
    assert parse_options(['--sched', 'wsd', '--cooldown-epochs', '1']).cooldown_epochs == 1  # in newer timm
    args = parse_options(['-c', recipe(tmp_path, lr_noise=[], torchcompile='')])
    assert args.lr_noise is None and args.torchcompile is None


def test_words_among_pairs_are_those_of_recipes():
    words = ['a=false', 'b=True', 'c=null', 'd=falsely', 'e=1e-3', 'f={[1]: 2}']
    kwargs = parse_options(['--opt-kwargs', *words]).opt_kwargs
    assert kwargs == dict(a=False, b=True, c=None, d='falsely', e=1e-3, f='{[1]: 2}')


@pytest.mark.parametrize('word', ['--local_rank', '--train-steps-per-epoch'])
def test_other_names_of_refused_options_are_refused_too(word):
    with pytest.raises(UserError, match=f'{word} is refused: .'):
        parse_options([word, '3'])
