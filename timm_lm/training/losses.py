"""Training losses: on labels or mixed targets, and with a teacher."""
import argparse
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.loss import BinaryCrossEntropy
from torch import nn

from timm_lm.data import check_class_names
from timm_lm.errors import UserError
from timm_lm.model_config import TimmModel, image_channels, image_config, label_names
from timm_lm.names import load_model

from .batches import check_input
from .option_rules import mixes


def create_criterion(args: argparse.Namespace) -> nn.Module:
    """Logits (N, classes) and labels (N,) or targets (N, classes) to a loss; mixed targets are already smoothed."""
    smoothing = 0. if mixes(args) else args.smoothing
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing=smoothing, target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def load_teacher(args: argparse.Namespace, student: TimmModel, is_main: bool = True) -> TimmModel:
    """The teacher network, by any name that ``load_model`` takes.

    Raises:
        UserError: If there is none, or it does not fit the student.
    """
    teacher = load_model(args.kd_model_name)
    sizes = [dict(num_classes=model.num_classes, in_chans=image_channels(model)) for model in (student, teacher)]
    for what, ours in sizes[0].items():
        theirs = sizes[1][what]
        if theirs != ours:
            raise UserError(f'The teacher {args.kd_model_name} has {what} {theirs}, the network has {ours}; choose '
                            'another --kd-model-name.')
    remark = check_class_names(label_names(student), label_names(teacher), of=f'the teacher {args.kd_model_name}')
    if remark and is_main:
        print(f'note: {remark}', flush=True)
    return teacher.requires_grad_(False)


class Distillation(nn.Module):
    """Loss on labels plus divergence from a teacher's logits, both softened by a temperature.

    ``task_weight * loss(logits, targets) + distill_weight * T**2 * KL(teacher / T || student / T)``, as timm's
    ``LogitDistillationTask``. Source: Hinton, Vinyals, Dean 2015, section 2.
    """

    def __init__(
            self,
            criterion: nn.Module,
            teacher: Any,
            student_norm: Dict[str, Sequence[float]],
            teacher_norm: Dict[str, Sequence[float]],
            temperature: float = 4.,
            task_weight: Optional[float] = None,
            distill_weight: Optional[float] = None,
            autocast: Callable[[], ContextManager[Any]] = nullcontext,
    ):
        """
        Args:
            criterion: Loss on logits and targets.
            teacher: Images (N, C, H, W), normalised its way, to logits (N, classes).
            student_norm: ``mean`` and ``std`` of the input images.
            teacher_norm: ``mean`` and ``std`` that the teacher expects.
            temperature: T.
            task_weight: Weight of the loss on targets, 1 if None.
            distill_weight: Weight of the divergence; if None, 1 - task weight, or 1 if that is None too.
            autocast: Returns the context in which the teacher runs.
        """
        super().__init__()
        self.criterion = criterion
        self.teacher = teacher
        self.temperature = temperature
        self.autocast = autocast
        self.task_weight = 1. if task_weight is None else task_weight
        if distill_weight is None:
            distill_weight = 1. if task_weight is None else 1. - task_weight
        self.distill_weight = distill_weight
        scale, shift = _renormalization(student_norm, teacher_norm)
        self.same_norm = bool((scale == 1).all() and (shift == 0).all())
        self.register_buffer('scale', scale, persistent=False)
        self.register_buffer('shift', shift, persistent=False)

    scale: torch.Tensor
    shift: torch.Tensor

    def forward(self, images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of a batch: images (N, C, H, W), the student's logits (N, classes), labels (N,) or (N, classes)."""
        with torch.no_grad(), self.autocast():
            wanted = self.teacher(images if self.same_norm else images * self.scale + self.shift).float()
        divergence = F.kl_div(
            F.log_softmax(logits / self.temperature, 1), F.log_softmax(wanted / self.temperature, 1),
            reduction='batchmean', log_target=True) * self.temperature ** 2
        return self.task_weight * self.criterion(logits, targets) + self.distill_weight * divergence


def _renormalization(student: Dict[str, Sequence[float]],
                     teacher: Dict[str, Sequence[float]]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, shape (C, 1, 1), from the student's to the teacher's normalised images."""
    mean, std, teacher_mean, teacher_std = (
        torch.tensor(norm[key], dtype=torch.float64).view(-1, 1, 1)
        for norm in (student, teacher) for key in ('mean', 'std'))
    return (std / teacher_std).float(), ((mean - teacher_mean) / teacher_std).float()


def create_loss(args: argparse.Namespace, model: TimmModel, data_config: Dict[str, Any],
                accelerator: Accelerator) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of (images, logits, targets) on its device, with a teacher if the options name one."""
    criterion = create_criterion(args).to(accelerator.device)
    if not args.kd_model_name:
        return lambda images, logits, targets: criterion(logits, targets)
    teacher: Any = load_teacher(args, model, accelerator.is_main_process)
    check_input(teacher, data_config, f'The teacher {args.kd_model_name}')
    norm = image_config(teacher)
    teacher.to(accelerator.device, memory_format=torch.channels_last if args.channels_last else None)
    if args.torchcompile:
        teacher = torch.compile(
            teacher, backend=args.torchcompile, mode=args.torchcompile_mode or 'default', dynamic=False)
    return Distillation(
        criterion, teacher, data_config, norm, args.kd_temperature, args.task_loss_weight, args.distill_loss_weight,
        accelerator.autocast).to(accelerator.device)
