"""Losses: that timm's own give the same value and gradient, and which teachers fit."""

import json

import pytest
import timm
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import LogitDistillationTask

from timm_lm.errors import UserError
from timm_lm.model_config import record_data
from timm_lm.training.accelerator import create_accelerator
from timm_lm.training.losses import Distillation, create_criterion, create_loss, load_teacher
from timm_lm.training.options import parse_options
from timm_lm.weights_folder import save_folder

CLASSES = 10
STUDENT_NORM = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
TEACHER_NORM = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits():
    return (3 * torch.randn(8, CLASSES, generator=seeded())).requires_grad_()


LABELS = torch.arange(8) % CLASSES
MIXED = torch.randn(8, CLASSES, generator=seeded(1)).softmax(1)


def value_and_gradient(loss, targets):
    x = logits()
    value = loss(x, targets)
    value.backward()
    return value.detach(), x.grad


# On labels and mixed targets

@pytest.mark.parametrize('options, targets, expected', [
    ([], LABELS, LabelSmoothingCrossEntropy(0.1)),
    (['--smoothing', '0.3'], LABELS, LabelSmoothingCrossEntropy(0.3)),
    (['--smoothing', '0'], LABELS, torch.nn.CrossEntropyLoss()),
    # mixed targets are smoothed by the mixing
    (['--mixup', '0.2'], MIXED, SoftTargetCrossEntropy()),
    (['--cutmix', '1', '--smoothing', '0.3'], MIXED, SoftTargetCrossEntropy()),
    (['--cutmix-minmax', '0.2', '0.8'], MIXED, SoftTargetCrossEntropy()),
    (['--bce-loss'], LABELS, BinaryCrossEntropy(smoothing=0.1)),
    (['--bce-loss', '--bce-sum', '--smoothing', '0.3'], LABELS, BinaryCrossEntropy(smoothing=0.3, sum_classes=True)),
    (['--bce-loss', '--bce-target-thresh', '0.2', '--mixup', '0.2'], MIXED, BinaryCrossEntropy(target_threshold=0.2)),
    (['--bce-loss', '--bce-pos-weight', '3'], LABELS, BinaryCrossEntropy(smoothing=0.1, pos_weight=3.)),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_loss_of_the_options_is_that_of_timm(options, targets, expected):
    criterion = create_criterion(parse_options(options))
    torch.testing.assert_close(value_and_gradient(criterion, targets), value_and_gradient(expected, targets))


# Beside a teacher


def network(name, seed, norm):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=CLASSES, layers=(1, 1, 1)).eval()
    torch.nn.init.normal_(model.head.fc.weight)  # logits that differ, as those of a trained network
    record_data(model, input_size=(3, 16, 16), **norm)
    return model


@pytest.mark.parametrize('weights', [
    {},
    dict(task_loss_weight=0.3),
    dict(distill_loss_weight=0.6),
    dict(task_loss_weight=0.3, distill_loss_weight=0.6),
    dict(task_loss_weight=0., distill_loss_weight=1.),
], ids=str)
@pytest.mark.parametrize('teacher_norm', [STUDENT_NORM, TEACHER_NORM], ids=['same norm', 'other norm'])
def test_distillation_is_that_of_timm(teacher_norm, weights):
    student, teacher = network('preact_resnet20', 0, STUDENT_NORM), network('preact_resnet20', 1, teacher_norm)
    images = torch.randn(8, 3, 16, 16, generator=seeded())

    def gradients(forward):
        student.zero_grad()
        loss = forward()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in student.named_parameters()}

    task = LogitDistillationTask(
        student, teacher, criterion=torch.nn.CrossEntropyLoss(), temperature=3., verbose=False, **weights)
    ours = Distillation(
        torch.nn.CrossEntropyLoss(), teacher, STUDENT_NORM, teacher_norm, 3., weights.get('task_loss_weight'),
        weights.get('distill_loss_weight'))
    expected, expected_gradients = gradients(lambda: task(images, LABELS)['loss'])
    loss, found = gradients(lambda: ours(images, student(images), LABELS))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, expected_gradients, rtol=1e-4, atol=1e-5)
    assert expected_gradients['stem.conv.weight'].abs().max() > 1e-2
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_of_other_norm_sees_the_images_its_way():
    """The divergence is none if the student's logits are those that the teacher gives to its own images."""
    teacher = network('preact_resnet20', 1, TEACHER_NORM)
    pixels = torch.rand(8, 3, 16, 16, generator=seeded())

    def normalized(norm):
        mean, std = (torch.tensor(norm[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        return (pixels - mean) / std

    loss = Distillation(
        torch.nn.CrossEntropyLoss(), teacher, STUDENT_NORM, TEACHER_NORM, task_weight=0., distill_weight=1.)
    with torch.no_grad():
        own, other = (teacher(normalized(norm)) for norm in (TEACHER_NORM, STUDENT_NORM))
        right, wrong = (loss(normalized(STUDENT_NORM), logits, LABELS) for logits in (own, other))
    assert right < 1e-4 * wrong and wrong > 0.01


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    """Weights folders: a network of ours and one of timm's, for colour images and ten classes."""
    folder = tmp_path_factory.mktemp('teachers')
    torch.manual_seed(0)
    for name, kwargs in (('preact_resnet20', dict(layers=(1, 1, 1))), ('resnet10t', {})):
        model = timm.create_model(name, num_classes=CLASSES, **kwargs)
        record_data(model, input_size=(3, 32, 32), **TEACHER_NORM)
        save_folder(model, folder / name, '', kwargs)
    return folder


@pytest.mark.parametrize('name', ['preact_resnet20', 'resnet10t'])
def test_teacher_of_a_folder(teachers, name):
    args = parse_options(['--kd-model-name', str(teachers / name)])
    student = timm.create_model('lm_resnet20', num_classes=CLASSES, layers=(1, 1, 1))
    teacher = load_teacher(args, student)
    assert teacher.pretrained_cfg['architecture'] == name
    assert tuple(teacher.pretrained_cfg['mean']) == TEACHER_NORM['mean']
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_loss_of_the_options_renormalizes_for_its_teacher(teachers, tmp_path):
    args = parse_options(['--kd-model-name', str(teachers / 'preact_resnet20'), '--kd-temperature', '3',
                          '--task-loss-weight', '0.3', '--distill-loss-weight', '0.6', '--smoothing', '0'])
    student = timm.create_model('lm_resnet20', num_classes=CLASSES, layers=(1, 1, 1))
    config = dict(STUDENT_NORM, input_size=(3, 32, 32))
    accelerator = create_accelerator(args, tmp_path)
    loss = create_loss(args, student, config, accelerator)
    assert loss.autocast == accelerator.autocast
    by_hand = Distillation(
        torch.nn.CrossEntropyLoss(), load_teacher(args, student), STUDENT_NORM, TEACHER_NORM, 3., 0.3, 0.6)
    images = torch.randn(8, 3, 32, 32, generator=seeded())
    torch.testing.assert_close(loss(images, logits(), LABELS), by_hand(images, logits(), LABELS))


@pytest.mark.parametrize('name', ['preact_resnet20', 'resnet10t'])
@pytest.mark.parametrize('kwargs, message', [
    (dict(num_classes=5), 'has num_classes 10, the network has 5; choose another --kd-model-name.'),
    (dict(in_chans=1), 'has in_chans 3, the network has 1; choose another --kd-model-name.'),
])
def test_teacher_that_does_not_fit_is_refused_in_one_line(teachers, name, kwargs, message):
    args = parse_options(['--kd-model-name', str(teachers / name)])
    student = timm.create_model('lm_resnet20', **(dict(num_classes=CLASSES, layers=(1, 1, 1)) | kwargs))
    with pytest.raises(UserError) as e:
        load_teacher(args, student)
    assert str(e.value) == f'The teacher {teachers / name} {message}'


def test_teacher_of_other_classes(teachers, capsys):
    args = parse_options(['--kd-model-name', str(teachers / 'preact_resnet20')])
    student = timm.create_model('lm_resnet20', num_classes=CLASSES, layers=(1, 1, 1))
    names = [str(i) for i in range(CLASSES)]

    def load(theirs, ours):
        config = json.loads((teachers / 'preact_resnet20' / 'config.json').read_text())
        changed = config | (dict(label_names=theirs) if theirs else {})
        (teachers / 'preact_resnet20' / 'config.json').write_text(json.dumps(changed))
        student.pretrained_cfg = student.pretrained_cfg | dict(label_names=ours)
        try:
            load_teacher(args, student)
        finally:
            (teachers / 'preact_resnet20' / 'config.json').write_text(json.dumps(config))
        return capsys.readouterr().out

    assert load(names, names) == load(None, names) == load(names, None) == ''
    assert 'note: No class of the data (0, 1, ' in load([f'nr {name}' for name in names], names)
    with pytest.raises(UserError, match='are not the 10 of the teacher .*, or in another order'):
        load(names[::-1], names)


def test_teacher_of_another_size_of_images_is_refused(tmp_path):
    teacher = timm.create_model('vit_tiny_patch16_224', num_classes=CLASSES, depth=1, img_size=16)
    record_data(teacher, input_size=(3, 16, 16), **TEACHER_NORM)
    save_folder(teacher, tmp_path, '', dict(depth=1, img_size=16))
    student = timm.create_model('lm_resnet20', num_classes=CLASSES, layers=(1, 1, 1))
    args = parse_options(['--kd-model-name', str(tmp_path)])
    with pytest.raises(UserError, match=r'The teacher .* does not take images of 3x32x32 \(Input height'):
        create_loss(args, student, dict(STUDENT_NORM, input_size=(3, 32, 32)), create_accelerator(args, tmp_path))


def test_teacher_that_is_not_there_is_named():
    args = parse_options(['--kd-model-name', 'preact_resnet110'])
    with pytest.raises(UserError, match='There are no weights of preact_resnet110'):
        load_teacher(args, timm.create_model('lm_resnet20', layers=(1, 1, 1)))


def test_teacher_computes_in_the_precision_of_the_training():
    seen = []

    def teacher(images):
        seen.append(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else torch.float32)
        return torch.zeros(8, CLASSES)

    for autocast in ({}, dict(autocast=lambda: torch.autocast('cpu', torch.bfloat16))):
        loss = Distillation(create_criterion(parse_options([])), teacher, STUDENT_NORM, STUDENT_NORM, **autocast)
        loss(torch.zeros(8, 3, 4, 4), logits(), LABELS)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize('options, compiled', [([], False), (['--torchcompile', 'eager'], True)])
def test_teacher_is_compiled_as_the_network_is(teachers, tmp_path, options, compiled):
    args = parse_options(['--kd-model-name', str(teachers / 'preact_resnet20'), *options])
    student = timm.create_model('lm_resnet20', num_classes=CLASSES, layers=(1, 1, 1))
    config = dict(STUDENT_NORM, input_size=(3, 32, 32))
    loss = create_loss(args, student, config, create_accelerator(args, tmp_path))
    assert hasattr(loss.teacher, '_orig_mod') == compiled
