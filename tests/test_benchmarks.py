"""The benchmarks run and write their figures; the bytes kept for backward, which no clock tells, are as promised."""
import json
from pathlib import Path

import pytest
import timm
import torch
from forked import Command

from timm_lm.training.recipes import find_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / 'benchmarks'


def figures(tmp_path, script, *options):
    path = tmp_path / 'figures.json'
    code, _, err = Command(*options, '--json', path, script=BENCHMARKS / script).wait()
    assert code == 0, err
    return json.loads(path.read_text())


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('depth, limit', [(20, 1.03), (56, 1.02)])
def test_bytes_kept_for_backward(depth, limit, compiled, monkeypatch):
    """Compiled, it is the compiler's partition into forward and backward that counts; no code is generated."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import kept_bytes

    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    kept = []
    for name in (f'preact_resnet{depth}', f'lm_resnet{depth}'):
        model = timm.create_model(name).to(memory_format=torch.channels_last).train()
        if compiled:
            torch.compiler.reset()
            model = torch.compile(model, backend='aot_eager_decomp_partition', dynamic=False)

        def forward(model=model):
            with torch.autocast('cpu', dtype=torch.bfloat16):
                return model(images).sum()

        kept.append(kept_bytes(forward))
    assert kept[0] > images.nbytes
    assert kept[1] <= limit * kept[0]


@pytest.mark.parametrize('recipe', ['best_c10', 'regrow_c100', 'plain_first_c10'])
def test_recipes_of_late_epochs_run_shortly(recipe, tmp_path, monkeypatch, few_digits, command):
    """As train_throughput.py has them run, in few epochs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from train_throughput import LATE_OPTIONS, write_recipe_without

    short = write_recipe_without(LATE_OPTIONS, find_recipe(recipe)[0], tmp_path / 'short.yaml')
    code, _, err = command(
        'train', '-c', short, '--data-dir', few_digits, '--input-key', 'image', '--target-key', 'label', '--grow-from',
        '', '--model', 'lm_resnet20', '--batch-size', 64, '--sched', 'cosine', '--warmup-epochs', 0, '--epochs', 3,
        '--dry-run')
    assert code == 0, err


@pytest.mark.parametrize('script', ['training.py', 'inference.py', 'update.py'])
def test_what_would_end_a_measurement_late_is_told_first(script, tmp_path):
    for options, message in ((('--rounds', '0'), '--rounds must be at least 1'),
                             (('--json', tmp_path / 'nowhere' / 'a.json'), 'is a folder, or there is none for it')):
        code, _, err = Command(*options, script=BENCHMARKS / script).wait()
        assert code == 2 and message in err


def test_checkpointing_keeps_less(tmp_path):
    options = ('--depths', '20', '--batch-size', '4', '--rounds', '1')
    plain, lm = figures(tmp_path, 'training.py', *options)['rows']
    assert (plain['network'], plain['bytes ratio'], lm['network']) == ('preact_resnet20', '1.0000', 'lm_resnet20')
    less = figures(tmp_path, 'training.py', *options, '--grad-checkpointing')['rows']
    assert all(float(row['KiB an image kept']) < float(whole['KiB an image kept']) / 2
               for row, whole in zip(less, (plain, lm), strict=True))


def test_inference(tmp_path):
    result = figures(tmp_path, 'inference.py', '--model', 'lm_resnet18', '--peer', 'resnetv2_18', '--batch-sizes', '1',
                     '--rounds', '1')
    assert [row['network'] for row in result['rows']] == [
        'resnetv2_18', 'lm_resnet18', 'lm_resnet18, optimize()', 'resnetv2_18, channels_last']
    assert result['rows'][0]['of resnetv2_18'] == '1.000' and result['machine']['cores'] > 0
