"""Options of timm's train script that this engine does not support, each with the reason.

One that is set to off, or to timm's default, asks for nothing and is accepted.
"""
import argparse
from typing import Any, Dict

from timm_lm.errors import UserError
from timm_lm.parser import literal, option_name

_SPLITS = 'batches are not split by augmentation here'
_STATIC = 'the shapes of batches are static here'
_RESUME = '--resume continues exactly where a run stopped; to start a new run from its weights use --initial-checkpoint'
REFUSED: Dict[str, str] = {
    **dict.fromkeys(['aug_splits', 'jsd_loss', 'resplit', 'split_bn'], _SPLITS),
    **dict.fromkeys(['epoch_repeats', 'train_num_samples', 'val_num_samples'], 'data sets have a known size here'),
    **dict.fromkeys(['start_epoch', 'no_resume_opt'], _RESUME),
    **dict.fromkeys(['torchscript', 'fuser'], 'training is compiled by torch.compile; use --torchcompile'),
    'local_rank': 'Accelerate manages the processes; use `accelerate launch`',
    **dict.fromkeys(['bn_momentum', 'bn_eps'], 'timm itself passes them to EfficientNets only; use --model-kwargs'),
    **dict.fromkeys(['kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type'],
                    'only logits are distilled here'),
    **dict.fromkeys(['train_img_sizes', 'train_batch_sizes', 'train_size_probs', 'train_size_schedule',
                     'train_size_schedule_spread', 'train_size_random_mix', 'train_batches_per_epoch',
                     'variable_batch_loss_scale', 'naflex_loader', 'naflex_train_seq_lens', 'naflex_max_seq_len',
                     'naflex_patch_sizes', 'naflex_patch_size_probs', 'naflex_loss_scale',
                     'naflex_patchify_channels_first'], _STATIC),
    'data': "it is timm's older name of --data-dir",
    'dataset_trust_remote_code': 'code of a data set is never run',
    'drop_connect': 'timm calls it --drop-path now',
    'amp_impl': "mixed precision is PyTorch's own",
    'fast_norm': 'norms are computed in the precision that autocast chooses',
    'input_img_mode': 'the channels of the images follow --in-chans and --input-size',
    'model_dtype': 'weights are float32; lower precision is --amp',
    'model_ema_force_cpu': 'the average stays on the training device, where it is validated',
    'no_prefetcher': 'batches are always normalised on the device',
    'save_images': 'training saves no images',
    'synchronize_step': 'the host never waits for the device inside a step',
    'tta': 'each image is validated once',
    'use_multi_epochs_loader': 'worker processes persist across epochs anyway',
    'worker_seeding': 'each image has its own seed, whichever worker reads it',
    # of timm 1.0.30 and later
    **dict.fromkeys(['loss', 'loss_class_weight', 'loss_pos_weight', 'loss_weight_power', 'loss_weight_beta',
                     'loss_weight_max', 'class_stats'], 'losses are cross entropy and --bce-loss here'),
    **dict.fromkeys(['multilabel_threshold', 'target_format', 'task'], 'each image has one label here'),
    **dict.fromkeys(['lr_decay_fn', 'lr_stable_timescale'], 'schedules have the options of timm 1.0.26 here'),
    'save_epochs': 'the newest checkpoints are kept; use --checkpoint-hist',
    'stop_epoch': 'a run ends with its schedule; change --epochs',
    'pretrained_cfg_overlay': 'give --pretrained-path, --mean and the like instead',
}

# Other names for them in timm's script.
_OTHER_NAMES = {'local_rank': '--local_rank', 'train_batches_per_epoch': '--train-steps-per-epoch'}

# What timm's script writes for some of them if they were not set.
_TIMM_DEFAULTS: Dict[str, Any] = {
    'amp_impl': 'native', 'kd_token_distill_type': 'soft', 'naflex_loss_scale': 'linear', 'naflex_max_seq_len': 576,
    'naflex_train_seq_lens': [128, 256, 576, 784, 1024], 'train_size_random_mix': 0.1,
    'train_size_schedule': 'constant', 'train_size_schedule_spread': 0.65, 'variable_batch_loss_scale': 'none',
    'worker_seeding': 'all', 'task': 'classification', 'multilabel_threshold': 0.5, 'loss_weight_power': 1.0,
    'loss_weight_beta': 0.999,
}


def add_refused_options(parser: argparse.ArgumentParser) -> None:
    """Add options that end the command with the reason, and that its help does not list."""
    for name in REFUSED:
        names = filter(None, (option_name(name), _OTHER_NAMES.get(name)))
        parser.add_argument(*names, nargs='*', dest=name, action=_Refuse, default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        items = [literal(item) for item in values]
        if not values or asks(self.dest, items[0] if len(items) == 1 else items):
            raise UserError(f'{option_string} is refused: {REFUSED[self.dest]}.')


def asks(name: str, value: Any) -> bool:
    """Whether a value of a refused option asks for something: it is neither off nor timm's default."""
    return bool(value) and value != _TIMM_DEFAULTS.get(name)
