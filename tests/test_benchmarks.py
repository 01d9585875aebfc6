"""The benchmarks run and write their figures; the bytes kept for backward, which no clock tells, are as promised."""
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from forked import Command

from timm_lm.errors import UserError
from timm_lm.training.recipes import find_recipe

sys.path.append(str(Path(__file__).resolve().parents[1] / 'benchmarks'))

import train_throughput as throughput
import update
from measure import history_bytes, kept_bytes

BENCHMARKS = Path(update.__file__).parent


def figures(tmp_path, script, *options):
    path = tmp_path / 'figures.json'
    code, _, err = Command(*options, '--json', path, script=BENCHMARKS / script).wait()
    assert code == 0, err
    return json.loads(path.read_text())


@pytest.mark.parametrize('depth, compiled', [(20, False), (56, False), (20, True)])
def test_bytes_kept_for_backward(depth, compiled):
    """The two-step keeps the two projected shortcuts and its k, and nothing else that the plain network does not.

    Compiled, it is the compiler's partition into forward and backward that counts; no code is generated.
    """
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
    shortcuts = 8 * (32 * 16 * 16 + 64 * 8 * 8) * 2  # in bfloat16
    assert kept[0] > images.nbytes and shortcuts / 2 < kept[1] - kept[0] <= shortcuts + 1024
    histories = 8 * (depth - 8) // 6 * (16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8) * 4  # one a block but the first ones
    assert compiled or history_bytes(model, lambda: model(images)) == histories


@pytest.mark.parametrize('recipe', ['best_c10', 'regrow_c100', 'plain_first_c10'])
def test_recipes_of_late_epochs_run_shortly(recipe, tmp_path, few_digits, command):
    """As train_throughput.py has them run, in few epochs."""
    short = throughput.write_recipe_without(throughput.LATE_OPTIONS, find_recipe(recipe)[0], tmp_path / 'short.yaml')
    code, _, err = command(
        'train', '-c', short, '--data-dir', few_digits, '--input-key', 'image', '--target-key', 'label', '--grow-from',
        '', '--model', 'lm_resnet20', '--batch-size', 64, '--sched', 'cosine', '--warmup-epochs', 0, '--epochs', 3,
        '--dry-run')
    assert code == 0, err


@pytest.mark.parametrize('script', ['training.py', 'inference.py', 'update.py'])
def test_what_would_end_a_measurement_late_is_told_first(script, tmp_path):
    for options, message in ((('--rounds', '0'), '--rounds must be at least 1'),
                             (('--json', tmp_path / 'nowhere' / 'a.json'), 'or its folder does not exist')):
        code, _, err = Command(*options, script=BENCHMARKS / script).wait()
        assert code == 2 and message in err


def test_checkpointing_keeps_less(tmp_path):
    options = ('--depths', '20', '--batch-size', '4', '--rounds', '1')
    plain, lm = figures(tmp_path, 'training.py', *options)['rows']
    assert (plain['network'], lm['network']) == ('preact_resnet20', 'lm_resnet20')
    assert 1 < float(lm['bytes ratio']) < 1.1 and float(lm['ratio by bytes']) >= float(plain['ratio by bytes']) == 1
    assert float(lm['peak KiB an image']) > float(plain['peak KiB an image']) > 100
    options = ('--depths', '20', '--plain-depth', '20', *options[2:])
    less = figures(tmp_path, 'training.py', *options, '--grad-checkpointing')['rows']
    assert all(float(row['KiB an image kept']) < float(whole['KiB an image kept']) / 2
               for row, whole in zip(less, (plain, lm), strict=True))


def test_update(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)  # the compiler takes its time
    monkeypatch.setattr(update, 'SHAPES', ((2, 4, 8, 8), (1, 2, 4, 4)))
    path = tmp_path / 'figures.json'
    monkeypatch.setattr(sys, 'argv', ['update.py', '--dtype', 'float32', '--rounds', '1', '--json', str(path)])
    update.main()
    rows = json.loads(path.read_text())['rows']
    work = ['copy', *(f'{name}, {work}' for name in ('plain', 'two-step', 'two-step, compiled')
                      for work in ('forward', 'forward and backward'))]
    assert [(row['shape'], row['work']) for row in rows] == [
        (shape, name) for shape in ('2x4x8x8', '1x2x4x4') for name in work]
    assert rows[0]['ratio'] == '1.00' and all(float(row['ratio']) > 0 for row in rows)


def test_inference(tmp_path):
    result = figures(tmp_path, 'inference.py', '--model', 'lm_resnet18', '--peer', 'resnetv2_18', '--batch-sizes', '1',
                     '--rounds', '1')
    assert [row['network'] for row in result['rows']] == [
        'resnetv2_18', 'lm_resnet18', 'lm_resnet18, optimize()', 'resnetv2_18, channels_last']
    assert [bool(row['ratio by bytes']) for row in result['rows']] == [False, True, False, False]
    assert all(float(row['of resnetv2_18']) > 0 for row in result['rows']) and result['machine']['cores'] > 0


def test_both_engines_and_the_bare_loop_are_measured(few_digits, tmp_path, monkeypatch):
    """One short training of each; timm's script by the lines that it prints."""
    options = ['-c', 'demo_digits', '--no-torchcompile', '--no-amp', '--batch-size', '16', '--model-kwargs',
               'layers=(1,1,1)', '--epochs', '2', '--warmup-epochs', '0', '--log-interval', '1']
    subset = tmp_path / 'subset'
    assert throughput.write_subset(few_digits, 'train', 64, subset) == 64
    assert throughput.count_rows(subset, 'train') == 64
    one = [sys.executable, str(BENCHMARKS / 'one_training.py')]
    ours = throughput.Engine('ours', [*one, str(tmp_path / 'ours.json'), 'engine', 'train', *options, '--data-dir',
                                      str(subset), '--val-split', ''], throughput.our_rates)
    bare = throughput.write_bare_options(options, 'cpu', 64, 4, 2, tmp_path / 'bare')
    loop = throughput.Engine('bare', [*one, str(tmp_path / 'bare.json'), 'keeping', str(bare)], throughput.bare_rates)
    for rates in throughput.measure_rates([ours, loop], tmp_path, epochs=2, rounds=1):
        assert rates[0] > 0
    for name in ('ours', 'bare'):
        memory = json.loads((tmp_path / f'{name}.json').read_text())
        assert memory['bytes'] > 1 << 27 and memory['kind'] == 'peak resident set'  # PyTorch alone takes more
    with pytest.raises(UserError, match='ours reported the rates of 2 of 3 epochs'):
        monkeypatch.setattr(throughput, 'run', lambda command, folder: 'no more lines')
        throughput.measure_rate(ours, tmp_path, '1-0', epochs=3)
    monkeypatch.undo()
    with pytest.raises(UserError, match='failed with exit code 2; its last lines:\n    why'):
        throughput.run([sys.executable, '-c', "import sys; print('why'); sys.exit(2)"], tmp_path)


def test_table_of_both_engines():
    engines = [dict(name=name, images_per_second=rate, rounds=[rate, rate + 10], ratio=300 / rate, command=f'run {name}'
                    )
               for name, rate in (('ours', 300.), ('theirs', 200.), ('plain', 100.))]
    lines = throughput.table(dict(
        machine=dict(cpu='CPU', cores=2, threads=2, system='Linux', gpu=None), versions=dict(torch='2.0'),
        settings=dict(recipe='paper_c10', precision='float32', model='lm_resnet20', device='cpu', batch_size=128,
                      steps=4, epochs=2, rounds=2, workers=4), engines=engines,
        memory=dict(kind='peak resident set', timm_lm=11 << 20, bare=10 << 20, keeping=8 << 20, ratio=1.1,
                    ratio_keeping=1.375))).splitlines()
    cells = [re.split('  +', line.strip()) for line in lines]
    assert ['ours', '300', '300', '310'] in cells
    assert ['theirs', '200', '200', '210', '1.50 x'] in cells and ['plain', '100', '100', '110', '3.00 x'] in cells
    assert ['bare loop with the data', '10', '1.100 x'] in cells
    assert ['the same, keeping freed memory', '8', '1.375 x'] in cells
    assert [line.strip() for line in lines[-3:]] == ['run ours', 'run theirs', 'run plain']


def test_rates_of_timms_script_are_those_of_whole_epochs(tmp_path):
    lines = [f'Train: {epoch} [{batch:>4d}/100 ({batch}%)]  Loss: 2.31 (2.31)  Time: 0.1s, {rate + batch:>7.2f}/s  '
             f'(0.1s, {rate:>7.2f}/s)  LR: 1.000e-01  Data: 0.01 (0.01)'
             for epoch, rate in ((0, 500.), (1, 700.)) for batch in (0, 50, 99)]
    assert throughput.timm_rates(tmp_path, '\n'.join(lines)) == [500., 700.]
