"""Runs that die, and their checkpoints: killed and resumed, they end with the weights of the run left alone."""
import csv
import json
import os
import random
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path, PureWindowsPath
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
import yaml
from forked import CONTEXT, Command
from helpers import rewrite
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from timm_lm.decoded import DecodedImages, write_cache
from timm_lm.errors import UserError
from timm_lm.files import atomic_folder, write_text
from timm_lm.precision import cpu_has_bfloat16
from timm_lm.run_row import read_run
from timm_lm.training import train as train_module
from timm_lm.training.checkpoint import CheckpointStore, Progress, random_states, restore_random_states
from timm_lm.training.option_rules import without_effect
from timm_lm.training.options import parse_options
from timm_lm.training.recipes import find_recipe
from timm_lm.training.run_folder import _compare_options, own_run_folder
from timm_lm.training.run_log import RunLog
from timm_lm.training.signals import Interrupted, StopSignals
from timm_lm.training.train import train
from timm_lm.weights_folder import verify_folder

# A network with dropped paths and noise, so that random states count; float32 on the CPU.
OPTIONS = [
    '--model-kwargs', 'layers=(2,1,1)', 'state_noise=0.01', '--drop-path', '0.2', '--epochs', '3',
    '--warmup-epochs', '0',
    '--batch-size', '32', '--no-amp', '--recovery-interval', '1', '--checkpoint-hist', '3', '--experiment', 'run',
]
STEPS = 24  # 3 epochs of 8 batches
CPU = torch.device('cpu')
# The command line in a process that sends itself a signal just before one call, at the same step whenever it runs.
SIGNALLED = """
import multiprocessing
import os
import subprocess
import sys

from timm_lm import cli, weights_folder
from timm_lm.training import checkpoint, loop, run_log

function, is_there = {call}, lambda {where}
calls = 0

def send():
    if {group}:  # by another process, as workers end when it is the one that they work for
        subprocess.run(f'kill -{number} -{{os.getpgrp()}}', shell=True, check=True, start_new_session=True)
    else:
        os.kill(os.getpid(), {number})

def wrapped(*args, **more):
    global calls
    if is_there(*args, **more):
        calls += 1
        print('call', calls, flush=True)
        if calls == {nth}:
            send()
    return function(*args, **more)

{call} = wrapped
if __name__ == '__main__':  # and not in a worker process
    multiprocessing.set_start_method({start!r}, force=True)
    sys.exit(cli.main(sys.argv[1:]))
"""


def arguments(data, output, *more):
    return ['train', '-c', 'demo_digits', '--data-dir', str(data), *OPTIONS, '--output', str(output), *more]


def finish(data, output, *more):
    """Run to the end, from the newest checkpoint if there is one."""
    code, out, err = Command(*arguments(data, output, '--resume', 'auto', *more)).wait()
    assert code == 0, err
    return out


def final_state(output):
    return (output / 'run' / 'weights' / 'model.safetensors').read_bytes()


def checkpoints(output):
    return sorted((output / 'run' / 'checkpoints').glob('step-*'))


def reached(output, updates):
    return lambda: any(int(path.name[5:]) >= updates for path in checkpoints(output))


def signalled(words, folder, number, call, where, nth=1, group=False, start='fork'):
    """Start a command that is sent a signal before the nth call of a function whose arguments are such.

    Args:
        words: Of the command line.
        folder: For the script.
        number: Of the signal.
        call: The function, as SIGNALLED knows it.
        where: Parameters and condition, as in a lambda.
        nth: Of the calls that fulfil the condition; each of them prints "call" with its number.
        group: The signal is sent to all processes of its group.
        start: Method by which it starts workers.
    """
    script = folder / 'signalled.py'
    script.write_text(SIGNALLED.format(call=call, where=where, nth=nth, number=int(number), group=group, start=start))
    return Command(*words, script=script, own_group=group)


@pytest.fixture(scope='module')
def left_alone(few_digits, tmp_path_factory):
    """The run that nobody kills."""
    output = tmp_path_factory.mktemp('alone')
    finish(few_digits, output)
    return output


def cut(folder, target, updates):
    """A copy of a run that ended as it was after so many updates, of those with a checkpoint."""
    run = shutil.copytree(folder / 'run', target / 'run')
    shutil.rmtree(run / 'weights')
    (run / 'result.json').unlink()
    for path in checkpoints(target):
        if int(path.name[5:]) > updates:
            shutil.rmtree(path)


HALF_WRITTEN = 'checkpoint.sha256', "path: path.parent.name.startswith('.step-000000005.')"
KILLS = [  # of one run by turns, each with the newest checkpoint that it leaves
    ('checkpoint.CheckpointStore.save', 'store, updates, *_: updates == 3', 2),
    (*HALF_WRITTEN, 4),
    ('loop.Training._update', 'training, epoch, step: (epoch, step) == (0, 7)', 7),
    ('run_log.RunLog.append', 'log, epoch, *_: epoch == 0', 7),
    ('loop.Training.stop_after_epoch', 'training, progress, _: progress.epoch == 1', 8),
    ('loop.Training._update', 'training, epoch, step: (epoch, step) == (1, 0)', 8),
    ('checkpoint.CheckpointStore.save', 'store, updates, *_: updates == 24', 23),
]


def test_killed_at_several_places(few_digits, left_alone, tmp_path):
    """One run killed again and again: within an epoch, while it writes a checkpoint, and around the end of an epoch."""
    for call, where, newest in KILLS:
        words = arguments(few_digits, tmp_path, '--resume', 'auto')
        code, _, err = signalled(words, tmp_path, signal.SIGKILL, call, where).wait()
        assert code == -signal.SIGKILL, err
        assert checkpoints(tmp_path)[-1].name == f'step-{newest:09d}'
        unfinished = list((tmp_path / 'run' / 'checkpoints').glob('.step-*'))
        assert len(unfinished) == (1 if call == HALF_WRITTEN[0] else 0)
        assert all([path.name for path in folder.iterdir()] == ['state.safetensors'] for folder in unfinished)
        assert not (tmp_path / 'run' / 'weights').exists()
    out = finish(few_digits, tmp_path)
    assert f'Resuming from {checkpoints(tmp_path)[-2]}' in out
    assert final_state(tmp_path) == final_state(left_alone)
    rows, alone = (RunLog(folder / 'run').rows() for folder in (tmp_path, left_alone))
    for row, other in zip(rows, alone, strict=True):
        assert row['epoch'] == other['epoch'] and row['k'] == other['k'] and row['lr'] == other['lr']
        assert row['train']['loss'] == other['train']['loss'] and row['eval']['errors'] == other['eval']['errors']


def test_killed_while_it_writes_the_weights(few_digits, left_alone, tmp_path):
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'weights')
    words = arguments(few_digits, tmp_path, '--resume', 'auto')
    code, _, err = signalled(
        words, tmp_path, signal.SIGKILL, 'weights_folder._write_config', 'model, path, *_: True').wait()
    assert code == -signal.SIGKILL, err
    (unfinished,) = (tmp_path / 'run').glob('.weights.*')
    assert [path.name for path in unfinished.iterdir()] == ['model.safetensors']
    assert 'all epochs are done, the weights are written again' in finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)
    assert not list((tmp_path / 'run').glob('.*weights*'))


def test_killed_from_outside_at_random(few_digits, left_alone, tmp_path):
    """One run, three times; from the start again if it was over first."""
    killed = []  # with which newest checkpoint
    for _ in range(30):
        process = Command(*arguments(few_digits, tmp_path, '--resume', 'auto'))
        newest = int(killed[-1][5:]) if killed else 0
        process.signal_when(reached(tmp_path, newest + random.randrange(1, 8)), signal.SIGKILL)
        code, _, err = process.wait()
        if code == -signal.SIGKILL:
            killed.append(checkpoints(tmp_path)[-1].name)
        else:
            assert code == 0, err
            shutil.rmtree(tmp_path / 'run')
            killed.clear()
        if len(killed) == 3:
            break
    else:
        pytest.fail('every run was over before it was killed three times')
    assert 'Resuming from' in finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone), killed


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_step_and_save(few_digits, left_alone, tmp_path, number, code):
    """In the middle of an epoch, where no checkpoint is written but that of the signal."""
    words = arguments(few_digits, tmp_path, '--recovery-interval', '0')
    process = signalled(
        words, tmp_path, number, 'loop.Training._update', 'training, epoch, step: (epoch, step) == (1, 3)')
    got, _, err = process.wait()
    assert got == code, err
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == 'step-000000012'
    assert json.loads((newest / 'state.json').read_text())['progress'] == dict(epoch=1, batch=4)
    told = f'Stopped by {number.name}; run the same command with --resume '
    line = next(line for line in err.splitlines() if told in line)
    assert line.endswith(f' {newest}')
    code, _, err = Command(*words, '--resume', newest).wait()
    assert code == 0, err
    assert final_state(tmp_path) == final_state(left_alone)


@pytest.mark.parametrize('epoch', [2, 3])
def test_signal_stops_a_validation(few_digits, left_alone, tmp_path, epoch):
    """Of one image a batch; what goes on validates first."""
    words = ['--validation-batch-size', '1', '--recovery-interval', '0']
    third = 64 * (epoch - 1) + 3  # batch of all validations
    process = signalled(arguments(few_digits, tmp_path, *words), tmp_path, signal.SIGTERM,
                        'loop.Training._free_graph_outputs', 'training: not training.network.training', third)
    code, out, err = process.wait()
    assert code == 143, err
    assert f'call {third}\n' in out and f'call {third + 1}\n' not in out
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == f'step-{8 * epoch:09d}'
    assert json.loads((newest / 'state.json').read_text())['progress'] == dict(epoch=epoch - 1, batch=8)
    assert len((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()) == epoch - 1
    assert f'step-{8 * epoch:09d}: epoch {epoch}, validation' in finish(few_digits, tmp_path, *words)
    assert final_state(tmp_path) == final_state(left_alone)
    for row, other in zip(*(RunLog(folder / 'run').rows() for folder in (tmp_path, left_alone)), strict=True):
        assert row['eval']['errors'] == other['eval']['errors'] and row['train']['loss'] == other['train']['loss']
    with open(tmp_path / 'run' / 'summary.csv') as f:  # nothing was trained before the validation
        timed = [bool(row['train_images_per_second']) for row in csv.DictReader(f)]
    assert timed == [number != epoch for number in (1, 2, 3)]


@pytest.mark.parametrize('epoch, number, code', [(1, signal.SIGHUP, 129), (3, signal.SIGTERM, 0)])
def test_signal_between_epochs(few_digits, left_alone, tmp_path, epoch, number, code):
    """When an epoch's metrics are written and its checkpoint is not; after the last epoch the run ends as ever."""
    process = signalled(arguments(few_digits, tmp_path), tmp_path, number,
                        'run_log.RunLog.append', f'log, epoch, *_: epoch == {epoch - 1}')
    got, _, err = process.wait()
    assert got == code, err
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == f'step-{8 * epoch:09d}'
    assert json.loads((newest / 'state.json').read_text())['progress'] == dict(epoch=epoch, batch=0)
    if code:
        assert f'with --resume {newest}' in err
        finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)


WITH_WORKER = ['--loader', 'timm', '--workers', '1', '--recovery-interval', '0', '--epochs', '2',
               '--grad-accum-steps', '4']  # an update needs more batches than are read ahead


@pytest.fixture(scope='module')
def left_alone_with_worker(few_digits, tmp_path_factory):
    output = tmp_path_factory.mktemp('worker')
    train(parse_options(arguments(few_digits, output, *WITH_WORKER)[1:]))
    return output


@pytest.mark.parametrize('number, code, start', [
    (signal.SIGTERM, 143, 'fork'), (signal.SIGTERM, 143, 'forkserver'),  # as Python 3.14 starts workers
    (signal.SIGINT, 130, 'forkserver')])
def test_signal_to_the_whole_group_leaves_the_workers_their_work(
        few_digits, left_alone_with_worker, tmp_path, command, number, code, start):
    """As `timeout`, Slurm and a launcher send it, to the processes that read images too."""
    words = arguments(few_digits, tmp_path, '--resume', 'auto', *WITH_WORKER)
    process = signalled(words, tmp_path, number, 'loop.Training.step',
                        'training, images, targets, epoch, step, _: (epoch, step) == (1, 0)', group=True, start=start)
    got, _, err = process.wait()
    assert not process.group_lives()
    assert got == code, err
    newest = checkpoints(tmp_path)[-1]
    assert json.loads((newest / 'state.json').read_text())['progress'] == dict(epoch=1, batch=4)
    got, _, err = command(*words)
    assert got == 0, err
    assert final_state(tmp_path) == final_state(left_alone_with_worker)


def test_worker_ends_with_the_training(tmp_path):
    """Also if another process forked it, which PyTorch watches instead."""
    script = tmp_path / 'script.py'
    script.write_text("""
import multiprocessing, os, signal, time
from timm_lm.loader import _leave_signals_to_the_parent

def work(ready):
    _leave_signals_to_the_parent(0)
    ready.set()
    time.sleep(60)

context = multiprocessing.get_context('fork')
ready = context.Event()
context.Process(target=work, args=(ready,)).start()
ready.wait()
os.kill(os.getpid(), signal.SIGKILL)
""")
    process = Command(script=script, own_group=True)
    code, _, err = process.wait()
    assert code == -signal.SIGKILL, err
    assert not process.group_lives()


@pytest.mark.parametrize('number, several, code', [
    (signal.SIGTERM, False, -signal.SIGTERM), (signal.SIGINT, False, 1), (signal.SIGTERM, True, 0),
    (signal.SIGHUP, False, 0)])
def test_second_signal_acts_as_ever_but_for_a_hangup(tmp_path, number, several, code):
    """For who will not wait for the end of a step; of several processes each may be sent one signal twice, and of a
    terminal that closes every process is."""
    script = tmp_path / 'script.py'
    script.write_text(f"""
import os, signal
from timm_lm.training.signals import StopSignals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
with StopSignals(several={several}) as signals:
    os.kill(os.getpid(), {int(number)})
    print('noted', signals.number, flush=True)
    os.kill(os.getpid(), {int(number)})
    print('went on', signals.number, flush=True)
""")
    got, out, err = Command(script=script).wait()
    assert got == code and out.startswith(f'noted {int(number)}\n'), err
    assert ('went on' in out) == (several or number == signal.SIGHUP)
    assert ('KeyboardInterrupt' in err) == (number == signal.SIGINT)


def test_shells_of_windows_take_the_checkpoint_as_it_is_told():
    message = str(Interrupted(signal.SIGTERM, PureWindowsPath(r'C:\runs\run\checkpoints\step-000000004')))
    assert message.endswith(' --resume C:/runs/run/checkpoints/step-000000004')


def test_handlers_that_are_not_of_python_are_no_error():
    """Python knows none of those that were set before it began, and says None."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            signals.before[signal.SIGTERM] = None
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignals() as signals:
            for number in (signal.SIGTERM, signal.SIGHUP):  # as the terminal may close while it saves
                os.kill(os.getpid(), number)
                assert signals.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMPILED = ['--torchcompile', '--model-kwargs', 'layers=(2,)', 'channels=(16,)', '--drop-path', '0']


@pytest.fixture
def compile_here(command):
    """Run the command line in this process, where the compiler is imported once: (output, compiled graphs)."""
    def run(*words):
        torch.compiler.reset()
        counters['stats'].clear()
        code, out, err = command(*words)
        torch.compiler.reset()
        assert code == 0, err
        return out, counters['stats']['unique_graphs']
    return run


def test_compiled_run_resumes_bit_for_bit(few_digits, tmp_path, compile_here):
    """Killed while it writes a checkpoint, and after the last batch of an epoch; with averaged weights, which are put
    in the place of the network's for each validation."""
    def words(name):
        return arguments(few_digits, tmp_path / name, '--resume', 'auto', *COMPILED, '--model-ema')

    for place, newest in ((HALF_WRITTEN, 4), (('loop.Training._update', 'training, epoch, step: step == 7'), 7)):
        code, _, err = signalled(words('killed'), tmp_path, signal.SIGKILL, *place).wait()
        assert code == -signal.SIGKILL, err
        assert checkpoints(tmp_path / 'killed')[-1].name == f'step-{newest:09d}'
    for name in ('killed', 'alone'):
        out, _ = compile_here(*words(name))
        assert ('Resuming from' in out) == (name == 'killed')
    assert final_state(tmp_path / 'killed') == final_state(tmp_path / 'alone')


def test_recipes_are_compiled_in_the_precision_that_pays(few_digits, tmp_path, compile_here):
    """The way the CIFAR recipes train: bf16 where it pays, channels_last, torch.compile; here on a small network."""
    words = [word for word in arguments(few_digits, tmp_path, *COMPILED) if word != '--no-amp']
    out, graphs = compile_here(*words)
    precision = 'bfloat16' if cpu_has_bfloat16() else 'float32'
    assert 'compiled by inductor' in out and f'cpu, {precision}, ' in out
    assert graphs == 2  # one to train, one to validate
    verify_folder(tmp_path / 'run' / 'weights')


def test_signal_while_the_network_is_compiled(few_digits, tmp_path):
    """A terminal sends it to the C++ compiler too."""
    compiler, script = tmp_path / 'g++', tmp_path / 'script.py'
    compiler.write_text(f"""#!/bin/sh
for word in "$@"; do
    case "$word" in *.cpp)  # of the network, not one that tries the processor's instructions
        if grep -q 'void *kernel(' "$word" && mkdir {tmp_path / 'told'}; then kill -INT 0; sleep 9; fi;;
    esac
done
exec g++ "$@"
""")
    compiler.chmod(0o755)
    script.write_text(f"""
import os, signal, sys
os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path / 'cache')!r}
from torch._inductor import config  # which read the variable CXX when it was imported
from timm_lm import cli
config.cpp.cxx = (None, {str(compiler)!r})
if hasattr(config, 'cpp_cache_precompile_headers'):
    config.cpp_cache_precompile_headers = False
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
sys.exit(cli.main(sys.argv[1:]))
""")
    words = arguments(few_digits, tmp_path, '--torchcompile', '--model-kwargs', 'layers=(1,)', 'channels=(16,)')
    code, _, err = Command(*words, script=script, own_group=True).wait()
    assert (tmp_path / 'told').is_dir() and code == 130
    assert err.splitlines()[-1] == (
        'timm-lm: Stopped by SIGINT; there is no checkpoint yet, start again (with --resume auto in a folder named by '
        '--experiment)')


def test_damaged_newest_checkpoint_is_passed_over(few_digits, left_alone, tmp_path):
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'weights')
    *_, before, cut, flipped = checkpoints(tmp_path)
    path = cut / 'state.safetensors'
    path.write_bytes(path.read_bytes()[:-10])
    path = flipped / 'state.safetensors'
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    out = finish(few_digits, tmp_path)
    lines = out.splitlines()
    assert any(f'{flipped} is damaged' in line and 'skipped' in line for line in lines)
    assert any(f'{cut} is damaged' in line for line in lines)
    assert f'Resuming from {before}' in out
    assert final_state(tmp_path) == final_state(left_alone)
    # what was passed over is out of the way of the new ones
    aside = {path.name[-14:] for path in (tmp_path / 'run' / 'checkpoints').glob('set-aside-*')}
    assert aside == {cut.name, flipped.name}
    store = CheckpointStore(tmp_path / 'run' / 'checkpoints')
    assert store.read(flipped).progress.epoch == 3
    text = (flipped / 'state.json').read_text()
    (flipped / 'state.json').write_text(text.replace('"epoch": 3', '"epoch": 2'))
    with pytest.raises(UserError, match='is damaged or incomplete .its digest differs'):
        store.read(flipped)
    for name in ('state.safetensors', 'state.json'):
        (flipped / name).unlink()
        told = []
        assert store.newest(told.append).folder == cut
        assert len(told) == 1 and f'{flipped} is damaged' in told[0] and 'skipped' in told[0]


def test_run_without_a_readable_checkpoint_does_not_begin_anew(few_digits, left_alone, tmp_path):
    """All of them damaged, or one that the disk does not give; nothing is changed then."""
    folder = shutil.copytree(left_alone / 'run', tmp_path / 'run')

    def refused(message):
        before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
        code, _, err = Command(*arguments(few_digits, tmp_path, '--resume', 'auto')).wait()
        assert code == 2 and message in err.splitlines()[-1]
        assert before == {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}

    newest = checkpoints(tmp_path)[-1] / 'state.safetensors'
    text = newest.read_bytes()
    newest.unlink()
    newest.mkdir()  # reading it is an error of the system
    with pytest.raises(UserError, match='cannot be read .*check the disk'):
        CheckpointStore(folder / 'checkpoints').newest()
    refused('cannot be read')
    newest.rmdir()
    newest.write_bytes(text)
    for path in checkpoints(tmp_path):
        (path / 'state.json').write_text('{')
    refused('No checkpoint in')


@pytest.mark.parametrize('begun', [False, True])
def test_run_that_went_on_meanwhile_is_left_alone(few_digits, left_alone, tmp_path, monkeypatch, fails, begun):
    """By another process that has ended, so that the folder is free again, while this one read the data."""
    folder = tmp_path / 'run'
    if begun:
        shutil.copytree(left_alone / 'run', folder)
        shutil.rmtree(checkpoints(tmp_path)[-1])
    load = train_module.load_data

    def meanwhile(*args, **kwargs):
        shutil.copytree(left_alone / 'run', folder, dirs_exist_ok=True)
        return load(*args, **kwargs)

    monkeypatch.setattr(train_module, 'load_data', meanwhile)
    line = fails(*arguments(few_digits, tmp_path, '--resume', 'auto'), *([] if begun else ['--seed', '7']))
    assert f'Another process resumed the run in {folder} in the meantime; start again' in line
    names = {path.relative_to(folder) for path in folder.rglob('*')} - {Path('.lock')}
    assert names == {path.relative_to(left_alone / 'run') for path in (left_alone / 'run').rglob('*')} - {Path('.lock')}
    assert all((folder / name).read_bytes() == (left_alone / 'run' / name).read_bytes()
               for name in names if (folder / name).is_file())


def test_checkpoint_holds_what_moves_and_no_more_than_asked_are_kept(left_alone):
    lines = (left_alone / 'run' / 'metrics.jsonl').read_text().splitlines()
    top1 = [json.loads(line)['eval']['top1'] for line in lines]
    best = (top1.index(max(top1)) + 1) * STEPS // 3  # its checkpoint stays too
    kept = sorted({best, *range(STEPS - 2, STEPS + 1)})
    assert [path.name for path in checkpoints(left_alone)] == [f'step-{number:09d}' for number in kept]
    tensors = load_file(checkpoints(left_alone)[-2] / 'state.safetensors')
    assert {name.split('/')[0] for name in tensors} == {'model', 'optimizer', 'process0'}
    assert any(name.endswith('momentum_buffer') for name in tensors)
    state = json.loads((checkpoints(left_alone)[-2] / 'state.json').read_text())
    assert state['progress'] == dict(epoch=2, batch=7)


def test_minutes_are_those_of_all_processes_of_a_run(few_digits, left_alone, tmp_path):
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    shutil.rmtree(checkpoints(tmp_path)[-1])
    path = checkpoints(tmp_path)[-1] / 'state.json'
    rewrite(path, seconds=6000.)
    finish(few_digits, tmp_path)
    assert 100 <= json.loads((tmp_path / 'run' / 'result.json').read_text())['minutes'] < 120
    assert json.loads((checkpoints(tmp_path)[-1] / 'state.json').read_text())['seconds'] > 6000


def test_full_disk_stops_the_run_and_spares_the_earlier_checkpoint(few_digits, left_alone, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle, as on a full one."""
    cut(left_alone, tmp_path, STEPS - 2)
    before = checkpoints(tmp_path)[-1]
    code, _, err = Command(*arguments(few_digits, tmp_path, '--resume', 'auto'), file_limit=100_000).wait()
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert 'could not be written' in last and str(before) in last
    assert checkpoints(tmp_path)[-1] == before
    assert not list((tmp_path / 'run' / 'checkpoints').glob('.step-*'))
    finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)


def test_full_disk_at_the_end_is_told(few_digits, left_alone, tmp_path):
    run = shutil.copytree(left_alone / 'run', tmp_path / 'run')
    shutil.rmtree(run / 'weights')
    code, _, err = Command(*arguments(few_digits, tmp_path, '--resume', 'auto'), file_limit=100_000).wait()
    assert code == 2 and f'The weights in {run} could not be written' in err.strip().splitlines()[-1], err
    assert not (run / 'weights').exists()
    finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)


def test_metrics_cut_short_are_written_anew(few_digits, left_alone, tmp_path):
    """A crash of the machine may leave half a line."""
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    shutil.rmtree(checkpoints(tmp_path)[-1])
    path = tmp_path / 'run' / 'metrics.jsonl'
    path.write_text(path.read_text()[:-40])
    finish(few_digits, tmp_path)
    for name in ('metrics.jsonl', 'summary.csv'):
        rows, alone = ((folder / 'run' / name).read_text().splitlines() for folder in (tmp_path, left_alone))
        assert len(rows) == len(alone)
        assert rows[:-1] == alone[:-1]  # times differ in the last one
    assert final_state(tmp_path) == final_state(left_alone)


def test_going_back_sets_later_checkpoints_aside(few_digits, left_alone, tmp_path, command, fails):
    """So that --resume auto goes on from where the run is now, not from where it was before."""
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    back, *later = checkpoints(tmp_path)
    words = [word for word in arguments(few_digits, tmp_path) if word not in ('--output', str(tmp_path))]
    code, out, err = Command(*words, '--resume', back).wait()
    assert code == 0, err
    aside = sorted((tmp_path / 'run' / 'checkpoints').glob('set-aside-*'))
    assert [path.name[-14:] for path in aside] == [path.name for path in later]
    assert all(f'A later checkpoint is now {path}' in out for path in aside)
    assert final_state(tmp_path) == final_state(left_alone)
    # such a one has weights, and its old name makes it a checkpoint again
    assert 'step-... (rename one that was set aside)' in fails(*words, '--resume', aside[0])
    assert command('weights', aside[0])[0] == 0
    shutil.rmtree(later[0])
    assert f'Resuming from {later[0]}' in finish(few_digits, tmp_path, '--resume', aside[0].rename(later[0]))
    assert final_state(tmp_path) == final_state(left_alone)


def test_result_of_a_later_end_goes(few_digits, left_alone, tmp_path):
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    unfinished = tmp_path / 'run' / 'checkpoints' / '.step-000000003.x'  # as a process killed while it writes leaves
    unfinished.mkdir()
    assert read_run(tmp_path / 'run')['status'] == 'done'
    words = arguments(few_digits, tmp_path, '--resume', checkpoints(tmp_path)[-2])
    code, _, err = Command(*words, file_limit=100_000).wait()
    assert code == 2 and 'could not be written' in err
    assert read_run(tmp_path / 'run')['status'].startswith('stopped after epoch ')
    assert not unfinished.exists()


@pytest.mark.parametrize('log_interval, accumulated', [(1, 1), (50, 1), (1, 2)])
def test_loss_that_is_not_finite_names_batch_rate_and_checkpoint(
        few_digits, tmp_path, fails, log_interval, accumulated):
    words = ['train', '-c', 'demo_digits', '--data-dir', few_digits, *OPTIONS, '--output', tmp_path, '--lr', '1e20',
             '--log-interval', log_interval, '--grad-accum-steps', accumulated, '--no-sched-on-updates']
    line = fails(*words, '--warmup-epochs', '1', '--warmup-lr', '0.001')
    bad, updates = accumulated + 1, 8 // accumulated
    assert f'The loss is not finite from batch {bad} of epoch 2 on (learning rate 7.5e+19)' in line
    *_, good, ruined = checkpoints(tmp_path)  # one is written after each update, the last one after what ruined it
    assert f'the last good checkpoint is {good}.' in line
    assert (good.name, ruined.name) == (f'step-{updates:09d}', f'step-{updates + 1:09d}')
    line = fails(*words, '--experiment', 'at-once')
    assert f'from batch {bad} of epoch 1 on' in line and 'there is no good checkpoint yet' in line


@pytest.mark.parametrize('options, message', [
    ([], 'The loss on test is not finite after the last epoch'),
    (['--val-split', ''], 'The outputs of the network are not finite'),
])
def test_loss_that_is_not_finite_at_the_end_leaves_no_weights(few_digits, tmp_path, fails, options, message):
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, *OPTIONS, '--output', tmp_path, '--lr', '1e20',
                 '--epochs', '1', '--batch-size', '256', *options)
    assert message in line
    assert not (tmp_path / 'run' / 'weights').exists()


@pytest.mark.parametrize('options', [
    ['--grad-accum-steps', '3', '--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup', '--mixup', '0.2',
     '--cutmix', '1', '--mixup-mode', 'elem', '--mixup-off-epoch', '2', '--two-step-epoch', '1', '--opt', 'adamw',
     '--sched', 'plateau', '--patience-epochs', '0', '--lr-noise', '0.3', '0.9', '--layer-decay', '0.8',
     '--clip-grad', '0.1', '--clip-mode', 'agc', '--reprob', '0.3', '--seed', '1', '--smoothing', '0.1'],
    ['--grad-accum-steps', '3', '--opt', 'lookahead_momentum', '--loader', 'timm', '--workers', '0', '--aa', 'rand-m3',
     '--pad-crop', '0', '--sched', 'tanh', '--epochs', '1', '--lr-cycle-limit', '2', '--lr-cycle-decay', '0.5'],
], ids=['in memory', 'by timm'])
def test_all_that_moves_goes_on_bit_for_bit(few_digits, tmp_path, command, options):
    """From the middle of an epoch, its end, and the last update of one, which is of fewer batches."""
    def run(*more):
        code, _, err = command(*arguments(few_digits, tmp_path / 'alone', '--no-sched-on-updates', *options), *more)
        assert code == 0, err
        newest = checkpoints(tmp_path / 'alone')[-1]
        sums = json.loads((newest / 'state.json').read_text())['sums']
        return load_file(newest / 'state.safetensors') | dict(sums=torch.tensor(sums, dtype=torch.float64))

    alone = run('--checkpoint-hist', '99')
    every = checkpoints(tmp_path / 'alone')
    for updates in (5, 3, 2):
        again = run('--checkpoint-hist', '99', '--resume', every[updates - 1])
        assert again.keys() == alone.keys()
        assert [name for name in alone if not torch.equal(alone[name], again[name])] == []


def test_output_that_nobody_reads_does_not_end_a_run(few_digits, left_alone, tmp_path):
    cut(left_alone, tmp_path, STEPS - 1)
    code, _, err = Command(*arguments(few_digits, tmp_path, '--resume', 'auto'), read=False).wait()
    assert (code, err) == (0, '')
    assert final_state(tmp_path) == final_state(left_alone)


FULL = ['os.dup2(os.open("/dev/full", os.O_WRONLY), 1)'] if os.path.exists('/dev/full') else []


@pytest.mark.parametrize('close', ['os.dup2(1, 2)', 'sys.stdout = sys.stderr = None', *FULL])
def test_run_that_nobody_listens_to_tells_by_its_exit_code_that_it_was_stopped(few_digits, tmp_path, close):
    script = tmp_path / 'unheard.py'
    script.write_text(f"""
import os, sys
from timm_lm import cli
from timm_lm.training.loop import Training
step = Training.step

def stop(*args):
    step(*args)
    os.kill(os.getpid(), {int(signal.SIGTERM)})

Training.step = stop
{close}
sys.exit(cli.main(sys.argv[1:]))
""")
    code, *_ = Command(*arguments(few_digits, tmp_path), script=script, read=False).wait()
    assert code == 143
    assert [path.name for path in checkpoints(tmp_path)] == ['step-000000001']


def test_old_checkpoint_that_can_not_be_removed_goes_later(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    nothing = dict(state={}, param_groups=[])
    store.save(1, Progress(0, 1), {}, nothing, [random_states(CPU)], {})
    with monkeypatch.context() as patched:
        patched.setattr(os, 'rmdir', Mock(side_effect=OSError(39, 'Directory not empty')))
        store.save(2, Progress(0, 2), {}, nothing, [random_states(CPU)], {})
    assert [path.name for path in store.newest_first()] == ['step-000000002', 'step-000000001']
    store.save(3, Progress(0, 3), {}, nothing, [random_states(CPU)], {})
    assert [path.name for path in store.newest_first()] == ['step-000000003']


def test_files_have_the_rights_of_any_new_file(tmp_path):
    """Those of tempfile and safetensors are for their owner alone."""
    before = os.umask(0o027)
    try:
        CheckpointStore(tmp_path, keep=1).save(
            1, Progress(0, 1), {}, dict(state={}, param_groups=[]), [random_states(CPU)], {})
        write_text(tmp_path / 'page.md', 'caf\udce9')  # of a folder whose name is not UTF-8
        write_cache(tmp_path / 'cache.safetensors', DecodedImages(torch.zeros(1, 1, 2, 2), torch.zeros(1)))
        with atomic_folder(tmp_path / 'new') as new:  # from the start, as Windows keeps what a folder is made with
            assert new.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob('*')}
    assert modes == {'new': 0o750, 'step-000000001': 0o750, 'state.json': 0o640, 'state.safetensors': 0o640,
                     'page.md': 0o640, 'cache.safetensors': 0o640}
    assert (tmp_path / 'page.md').read_text() == 'caf\\udce9'


def test_other_options_are_refused_by_name(few_digits, left_alone, tmp_path, fails):
    line = fails(*arguments(few_digits, left_alone, '--resume', 'auto', '--seed', '7'))
    assert 'seed (was 42, is 7)' in line
    assert 'name it with --experiment' in fails('train', '-c', 'demo_digits', '--data-dir', few_digits,
                                                '--resume', 'auto')
    options = vars(parse_options(arguments(few_digits, left_alone)[1:]))
    free = {'config', 'resume', 'output', 'experiment', 'data_dir', 'dataset_download', 'log_interval',
            'recovery_interval', 'checkpoint_hist', 'workers', 'pin_mem', 'dry_run', 'log_tensorboard', 'log_wandb',
            'wandb_project', 'wandb_tags', 'wandb_resume_id', 'device', 'torchcompile', 'torchcompile_mode'}
    idle = {name for names, _ in without_effect(options) for name in names}
    _compare_options(Namespace(**options | dict.fromkeys(free, 'other')), left_alone / 'run')
    for names in ({'sched'}, options.keys() - {'sched', *free, *idle}):  # another schedule leaves more of them idle
        with pytest.raises(UserError, match='other options: ') as e:
            _compare_options(Namespace(**options | dict.fromkeys(names, 'other')), left_alone / 'run')
        assert set(re.findall(r'(\w+) \(was ', str(e.value))) == names
    saved = yaml.safe_load((left_alone / 'run' / 'args.yaml').read_text())
    del saved['two_step_epoch']  # as if it were new
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(saved))
    _compare_options(Namespace(**options), tmp_path)


def test_of_two_runs_that_start_at_once_one_is_refused(few_digits, left_alone, tmp_path):
    started = [Command(*arguments(few_digits, tmp_path)) for _ in range(2)]
    codes, _, errors = zip(*(run.wait() for run in started))
    assert sorted(codes) == [0, 2] and 'holds another run' in ''.join(errors), errors
    assert final_state(tmp_path) == final_state(left_alone)
    # also where both have looked into the folder before either makes it
    args = parse_options(arguments(few_digits, tmp_path)[1:])
    with own_run_folder(tmp_path / 'other', args, resumed=False):
        pass
    with pytest.raises(UserError, match='holds another run'), own_run_folder(tmp_path / 'other', args, resumed=False):
        pass


def test_run_that_goes_on_elsewhere_is_left_alone(few_digits, left_alone, tmp_path):
    """As when a scheduler starts a job again whose first process still lives; a killed one is no matter."""
    cut(left_alone, tmp_path, STEPS - 2)
    words = arguments(few_digits, tmp_path, '--resume', 'auto')
    process = signalled(words, tmp_path, signal.SIGSTOP, 'checkpoint.CheckpointStore.save',
                        f'store, updates, *_: updates == {STEPS - 1}')
    standing = psutil.Process(process.pid)

    def files():
        return {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}

    try:
        process.signal_when(lambda: standing.status() == psutil.STATUS_STOPPED, 0)  # wait until it stands still
        before = files()
        other, _, err = Command(*words).wait()
        after = files()
    finally:  # after a failure too, else the tests would wait for it at their end
        process.signal_when(lambda: True, signal.SIGKILL)
        code, *_ = process.wait()
    assert other == 2 and f"The run in {tmp_path / 'run'} is active in another process" in err, err
    assert after == before
    assert code == -signal.SIGKILL
    assert 'Resuming from' in finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)


def test_copies_and_archives_of_checkpoints_are_left_alone(few_digits, left_alone, tmp_path):
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    newest = checkpoints(tmp_path)[-1]
    shutil.copytree(newest, newest.with_name(f'{newest.name}-good'))
    shutil.copytree(newest, newest.with_name(f'{newest.name}.bak'))
    (newest.parent / f'{newest.name}.tar.gz').write_bytes(b'archive')
    assert 'Resuming from' in finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)
    kept = {f'{newest.name}-good', f'{newest.name}.bak', f'{newest.name}.tar.gz'}
    assert kept < {path.name for path in newest.parent.iterdir()}
    assert not list(newest.parent.glob('set-aside-*'))


def test_run_that_moved_without_what_it_began_from(few_digits, weights, tmp_path):
    """To another machine, with its folder and the data alone; and with the weights at another place."""
    start = shutil.copytree(weights.parent, tmp_path / 'here' / 'start')
    words = ['train', '--data-dir', str(few_digits), '--val-split', 'test', '--scale', '1', '1', '--ratio', '1', '1',
             '--color-jitter', '0', '--train-interpolation', 'bilinear', '--interpolation', 'bilinear', '--pad-crop',
             '2', '--epochs', '2', '--warmup-epochs', '0', '--batch-size', '64', '--drop-path', '0.1', '--pretrained',
             '--tag', 'moved', '--experiment', 'run', '--checkpoint-hist', '9']
    code, _, err = Command(*words, '--model', start / 'weights', '--output', tmp_path / 'here').wait()
    assert code == 0, err
    shutil.copytree(tmp_path / 'here' / 'run', tmp_path / 'there' / 'run')
    for path in ('weights', 'result.json', 'checkpoints/step-000000008'):
        place = tmp_path / 'there' / 'run' / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    start.rename(tmp_path / 'away')
    code, out, err = Command(*words, '--model', tmp_path / 'mnt' / 'start' / 'weights', '--output', tmp_path / 'there',
                             '--resume', 'auto').wait()
    assert code == 0 and 'Resuming from' in out, err
    assert final_state(tmp_path / 'there') == final_state(tmp_path / 'here')
    files = [tmp_path / name / 'run' / 'weights' / 'config.json' for name in ('here', 'there')]
    assert files[0].read_text() == files[1].read_text()
    code, _, err = Command(*words, '--model', tmp_path / 'away' / 'other' / 'weights', '--output', tmp_path / 'there',
                           '--resume', 'auto').wait()
    assert code == 2 and 'was started with other options: model (was ' in err


def test_classes_that_were_renamed_meanwhile_are_told(tmp_path, command, fails):
    for split in ('train', 'validation'):
        for name in ('cat', 'dog'):
            for i in range(4):
                path = tmp_path / 'data' / split / name / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(path)
    words = ['train', '--data-dir', tmp_path / 'data', '--num-classes', '2', '--input-size', '3', '16', '16',
             '--no-aug', '--model-kwargs', 'layers=(1,1,1)', '--epochs', '1', '--warmup-epochs', '0', '--batch-size',
             '4', '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    code, _, err = command(*words)
    assert code == 0, err
    for split in ('train', 'validation'):
        (tmp_path / 'data' / split / 'cat').rename(tmp_path / 'data' / split / 'hen')
    assert 'are not the 2 of the run when it was started' in fails(*words)


def test_missing_checkpoint_is_named(few_digits, tmp_path, fails):
    folder = tmp_path / 'run' / 'checkpoints' / 'step-000000001'
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--resume', folder)
    assert f'There is no checkpoint {folder}' in line
    with pytest.raises(UserError, match='There is no checkpoint'):
        CheckpointStore(tmp_path).read(folder)
    assert os.listdir(tmp_path) == []


def test_another_number_of_processes_is_refused(few_digits, left_alone, tmp_path, fails):
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    for path in (tmp_path / 'run' / 'checkpoints').glob('*/state.json'):
        rewrite(path, processes=2)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    for resume in ('auto', checkpoints(tmp_path)[0]):
        words = arguments(few_digits, tmp_path, '--resume', resume)
        line = fails(*words)
        assert 'was started with 2 process(es) and cannot resume with 1' in line
    assert {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()} == before


def test_a_run_whose_rate_follows_the_batch_goes_on(few_digits, tmp_path, command):
    """Without --lr the rate is worked out of the batch, by timm's rule: 0.1 for 256 images."""
    text = find_recipe('demo_digits')[0].read_text()
    (tmp_path / 'recipe.yaml').write_text(re.sub(r'(?m)^lr: .*\n', '', text))
    words = ['train', '-c', tmp_path / 'recipe.yaml', '--data-dir', few_digits, *OPTIONS, '--epochs', '1', '--output',
             tmp_path, '--resume', 'auto']
    assert command(*words)[0] == 0
    shutil.rmtree(checkpoints(tmp_path)[-1])
    code, out, err = command(*words)
    assert code == 0, err
    assert 'Resuming from' in out
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['lr'] == 0.1 * 32 / 256


# Checkpoints by themselves


def save_one(store, value, device=CPU):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).state_dict()
    return store.save(7, Progress(0, 7), dict(model=dict(weight=torch.tensor([value]))), optimizer,
                      [random_states(device)], dict(scheduler=None))


def replace_and_die(folder):
    """Be killed between the two renames that put a checkpoint in the place of an older one."""
    replace, calls = os.replace, []

    def deadly(source, target):
        if calls:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(source)
        replace(source, target)

    os.replace = deadly
    save_one(CheckpointStore(folder), 2.)


def test_checkpoint_that_was_being_replaced_is_found_and_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    folder = save_one(store, 1.)
    writer = CONTEXT.Process(target=replace_and_die, args=(tmp_path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL and not folder.exists()
    found = store.newest()
    assert found.group('model')['weight'] == 1 and found.progress == Progress(0, 7)
    assert store.newest_state()['progress'] == dict(epoch=0, batch=7)
    store.remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert store.read(folder).group('model')['weight'] == 1


@pytest.mark.parametrize('device', ['cuda', 'mps', 'xpu'])
def test_random_states_of_other_devices_come_back(tmp_path, monkeypatch, device):
    """By what PyTorch would tell of a device, which is not there; a run may also go on from or on the CPU."""
    state = torch.tensor([1, 2, 3], dtype=torch.uint8)
    restored = []
    monkeypatch.setattr(getattr(torch, device), 'get_rng_state', lambda: state)
    monkeypatch.setattr(getattr(torch, device), 'set_rng_state', restored.append)
    store = CheckpointStore(tmp_path)
    states = store.read(save_one(store, 1., torch.device(device))).process_states(0)
    restore_random_states(states, torch.device('cpu'))
    assert restored == []
    restore_random_states(states, torch.device(device))
    assert len(restored) == 1 and torch.equal(restored[0], state)
    restore_random_states({'cpu': states['cpu']}, torch.device(device))
    assert len(restored) == 1
