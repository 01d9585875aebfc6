"""The command line: what it prints, and how it fails."""
import re
import signal
from pathlib import Path

import pytest
import timm
from forked import Command

from timm_lm import cli
from timm_lm.card import recorded_error
from timm_lm.models._weights import weights_dir
from timm_lm.names import our_models

CHECKOUT = Path(__file__).resolve().parents[1]


def test_list_shows_every_network_and_tag(command):
    code, out, _ = command('list')
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:2] == ['model', 'classes']
    names = [line.split()[0] for line in lines[1:]]
    assert {name.partition('.')[0] for name in names} == set(our_models())
    row = next(line for line in lines if line.startswith('lm_resnet56.paper_c10 ')).split()
    assert row[1:4] == ['10', '0.86', 'M']


def test_list_of_pretrained_names_only_weights_that_exist(command):
    code, out, _ = command('list', '--pretrained')
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert code == 0 and sorted(names) == sorted(timm.list_pretrained(['lm_res*', 'preact_res*']))
    row = next(line for line in out.splitlines() if line.startswith('lm_resnet20.best_c10 '))
    assert 'shipped' in row and row.endswith(f" {recorded_error(weights_dir() / 'lm_resnet20.best_c10'):.2f} %")


def test_info_tells_parameters_macs_tags_and_k(command):
    code, out, _ = command('info', 'lm_resnet20')
    assert code == 0
    fields = {line.split()[0]: line for line in out.splitlines()}
    assert fields['parameters'].endswith('272,384')
    # stem 0.442 M, blocks 3 x 4.719 M + (3.539 + 2 x 4.719) M twice, shortcuts 2 x 0.131 M, head 0.001 M
    assert fields['MACs'].endswith('40.8 M')
    assert 'demo_c10' in fields['tags']
    model = timm.create_model('lm_resnet20', pretrained=True)
    error = recorded_error(weights_dir() / f"lm_resnet20.{model.pretrained_cfg['tag']}")
    assert fields['error'].split() == ['error', f'{error:.2f}', '%']
    ks = [line.split() for line in out.splitlines() if line.startswith('  stages.')]
    assert ks == [[name, f'{k.item():.4f}'] for name, k in model.k_values().items()] and len(ks) == 6


def test_info_of_a_folder_shows_its_k(command, weights):
    from timm_lm.weights_folder import load_folder
    code, out, _ = command('info', weights)
    assert code == 0
    for name, k in load_folder(weights).k_values().items():
        line = next(line for line in out.splitlines() if line.strip().startswith(name))
        assert float(line.split()[-1]) == pytest.approx(k.item(), abs=5e-5)


def test_info_of_a_folder_that_is_not_there_shows_no_other_network(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'lm_resnet20 does not exist' in fails('info', 'local-dir:lm_resnet20')


def test_info_of_a_plain_network_has_no_k(command):
    code, out, _ = command('info', 'preact_resnet20')
    assert code == 0 and 'stages.' not in out and '272,378' in out


def test_info_of_hub_weights_needs_no_network(command):
    code, out, _ = command('info', 'lm_resnet18')
    assert code == 0 and 'hf-hub:timm/resnetv2_18.ra4_e3600_r224_in1k' in out and 'random' in out


def test_recipe_lists_prints_and_locates(command):
    code, out, _ = command('recipe')
    assert code == 0 and any(line.startswith('paper_c10  ') for line in out.splitlines())
    code, out, _ = command('recipe', 'paper_c10')
    assert code == 0 and 'decay_milestones: [81, 121]' in out
    code, path, _ = command('recipe', 'paper_c10', '--path')
    assert Path(path.strip()).read_text() == out
    assert command('recipe', 'lm_resnet20.paper_c10', '--path')[1] == path
    code, other, _ = command('recipe', 'preact_resnet56.paper_c10')
    assert other == out.replace('model: lm_resnet20', 'model: preact_resnet56') != out
    code, plain, _ = command('recipe', 'preact_resnet56.paper_c10', '--timm')
    assert code == 0 and [line for line in other.splitlines() if line not in plain.splitlines()] == [
        'tag: paper_c10', 'pad_crop: 4']
    code, tuned, _ = command('recipe', r'runs\demo.finetune')
    assert code == 0 and r'model: runs\demo' in tuned.splitlines()


def test_demonstration_that_is_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('timm_lm.training.loop.Training.step', lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as e:
        cli.main(['demo', '--output', str(tmp_path / 'demo')])
    err = capsys.readouterr().err
    assert e.value.code == 130 and 'Traceback' not in err
    assert err.strip().splitlines()[-1].startswith('timm-lm: the demonstration was stopped; `timm-lm demo --output ')


@pytest.mark.parametrize('argv, message', [
    (['nope'], "no command 'nope'"),
    (['info', 'lm_resnet21'], "no model 'lm_resnet21'"),
    (['info', 'lm_resnet20.nope'], "no tag 'nope'"),
    (['list', 'resnet50'], "No network matches 'resnet50'"),
    (['validate', 'lm_resnet20.best_c10'], 'No data was named'),
    (['predict', 'photo.png', '--device', 'meta'], '--device meta cannot be used'),
    (['validate'], 'MODEL_OR_FOLDER'),
    (['validate', 'lm_resnet20.best_c10', '--data-dir', 'no/such/folder'], 'no/such/folder does not exist'),
    (['validate', 'lm_resnet20.best_c10', '--batch-size', '0'], '--batch-size must be at least 1'),
    (['validate', 'lm_resnet20.best_c10', '--workers', '-1'], '--workers must be at least 0'),
    (['demo', '--output', 'README.md/demo'], 'README.md/demo'),
    (['report', '--page', 'README.md/page.md'], 'README.md'),
    (['train', '-c', 'nope'], "no recipe 'nope'"),
    (['recipe', 'nope'], "no recipe 'nope'"),
    (['train', '-c'], 'expected one argument'),
    (['info', 'hf_hub:owner/name'], 'hf-hub:owner/name could not be loaded'),
    (['validate', __file__], 'is a file; give the folder of a model.safetensors'),
    (['recipe', 'lm_resnet56.paper_c10', '--path'], '`timm-lm recipe --path paper_c10` prints, and --model lm_'),
    (['recipe', 'lm_resnet32.distill_c100'], 'The recipe distill_c100 is not for lm_resnet32'),
    (['weights', 'no/such/step-1'], 'is not a checkpoint of a run; give RUN/checkpoints/step-'),
    (['verify', 'no/such/folder'], 'no/such/folder does not exist'),
    (['verify', 'local-dir:no/such/folder'], 'no/such/folder does not exist'),
    (['info', 'lm_resnet20.'], "lm_resnet20 has no tag ''; its tags are: "),
])
def test_bad_arguments(fails, monkeypatch, argv, message):
    monkeypatch.chdir(CHECKOUT)
    assert message in fails(*argv)


def test_validate_refuses_data_of_other_classes(fails, weights, tmp_path):
    import numpy as np
    from test_data import write_parquet
    write_parquet(tmp_path / 'test.parquet', [np.zeros((16, 16), np.uint8)], [50])
    assert 'labels up to 50' in fails('validate', weights, '--data-dir', tmp_path)
    write_parquet(tmp_path / 'test.parquet', [np.zeros((16, 16), np.uint8)], [-1])
    assert 'labels from -1 on' in fails('validate', weights, '--data-dir', tmp_path)


def test_folder_of_a_run_with_the_name_of_a_network(command, few_digits, tmp_path, monkeypatch):
    """It has no weights when the last epoch is over; the name goes on to be the network's."""
    monkeypatch.chdir(tmp_path)
    code, _, err = command(
        'train', '--pretrained', '--model', 'lm_resnet20.best_c10', '--data-dir', few_digits, '--epochs', 1,
        '--warmup-epochs', 0, '--batch-size', 128, '--val-split', '', '--output', '.', '--experiment', 'lm_resnet20')
    assert code == 0, err
    code, out, err = command('info', 'lm_resnet20')
    assert code == 0 and '272,384' in out and re.search(r'(?m)^weights +shipped$', out), err
    assert command('info', 'lm_resnet20/weights')[0] == 0


def test_usage_version_and_a_closed_pipe(command):
    import timm_lm
    assert command('--version')[:2] == (0, f'{timm_lm.__version__}\n')
    code, out, _ = command()
    assert code == 2 and 'commands:' in out
    assert command('--help')[0] == 0
    assert Command('recipe', 'paper_c10', read=False).wait() == (0, '', '')


def test_a_pipe_closed_on_windows(tmp_path):
    """Where writing to it is an invalid argument."""
    script = tmp_path / 'script.py'
    script.write_text("""
import errno, io, sys
from timm_lm import cli
from timm_lm.training import streams

class Output(io.FileIO):
    def write(self, data):
        try:
            return super().write(data)
        except BrokenPipeError:
            raise OSError(errno.EINVAL, 'Invalid argument')

streams._NO_READER = (errno.EINVAL,)
sys.stdout = io.TextIOWrapper(io.BufferedWriter(Output(1, 'w', closefd=False)))
sys.exit(cli.main(['recipe', 'paper_c10']))
""")
    assert Command(script=script, read=False).wait() == (0, '', '')


def test_demo_runs_the_whole_job(tmp_path, capsys, with_pictures):
    from timm_lm.demo import demo
    run = demo(tmp_path / 'demo', ['--epochs', '2', '--warmup-epochs', '0', '--model-kwargs', 'layers=(2,2,2)'])
    out = capsys.readouterr().out
    assert 'of 359 test digits' in out
    for name in ('curves.png', 'k.png', 'weights/model.safetensors'):
        assert (run / name).is_file()


def test_demo_spares_a_folder_of_something_else(tmp_path, fails):
    (tmp_path / 'mine').write_text('mine')
    assert 'holds something else' in fails('demo', '--output', tmp_path)
    assert (tmp_path / 'mine').read_text() == 'mine'
    assert 'holds something else' in fails('demo', '--output', tmp_path / 'mine')
    folder = tmp_path / 'data'
    (folder / 'digits').mkdir(parents=True)
    (folder / 'digits' / 'mine.parquet').write_text('mine')
    assert 'holds something else' in fails('demo', '--output', folder)
    assert (folder / 'digits' / 'mine.parquet').read_text() == 'mine'


def test_ctrl_c_in_a_command(monkeypatch, command):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, 'validate', stop)
    assert command('validate') == (130, '', 'timm-lm: interrupted\n')


@pytest.mark.parametrize('name, defaults', [
    ('train', dict(val_split='validation', epochs='300', scale='0.08 1.0', model='lm_resnet20')),
    ('validate', dict(val_split='test', batch_size='50', device='cpu')),
])
def test_help_tells_defaults_once(name, defaults):
    code, out, _ = Command(name, '--help').wait()
    text = ' '.join(out.split())
    assert code == 0
    for option, value in defaults.items():
        _, _, rest = text.rpartition(f"--{option.replace('_', '-')} ")
        assert f'(default: {value})' in rest.partition(' --')[0], option
    assert 'None)' not in text and ') (default' not in text
