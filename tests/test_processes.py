"""Training with several processes: two real ones that a launcher starts on the CPU.

Each start costs seconds, so one of them does most of the things that the tests look at; see two_processes.py.
"""
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from two_processes import CAN_SHARD, CUTS, LONG, PIECES, identities, loaders, train_command

from timm_lm.errors import UserError
from timm_lm.loader import IGNORE_LABEL
from timm_lm.training.accelerator import LONGEST_WAIT, _refuse_hidden_gpus, create_accelerator
from timm_lm.training.options import parse_options
from timm_lm.weights_folder import verify_folder

# Accelerate's oldest versions have none; where REQUIRE_TOOLS is set, as in CI, lacking it fails
needs_fsdp2 = pytest.mark.skipif(
    not CAN_SHARD and 'REQUIRE_TOOLS' not in os.environ, reason='this Accelerate has no FSDP2')

TIMEOUT = 240  # seconds of one start


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def launcher():
    """`accelerate launch`, or torchrun where that cannot start: it imports transformers, which wants a newer Hub."""
    try:
        import accelerate.commands.launch  # noqa: F401
    except ImportError:
        return ['torch.distributed.run', '--nproc_per_node', '2', '--master_port', free_port()]
    return ['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
            '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', free_port()]


class Launched:
    """A launcher and its two processes; they have a mark of their own, by which they are found and ended."""

    def __init__(self, words, folder, **env):
        self.mark = uuid.uuid4().hex
        self.out, self.err = folder / f'{self.mark}.out', folder / f'{self.mark}.err'
        env = os.environ | dict(OMP_NUM_THREADS='1', TIMM_LM_MARK=self.mark) | env
        with open(self.out, 'w') as out, open(self.err, 'w') as err:
            self.launcher = subprocess.Popen(
                [sys.executable, '-m', *launcher(), *map(str, words)], env=env, stdout=out, stderr=err, cwd=folder,
                start_new_session=True)

    def processes(self):
        """All that are left, by local rank; the launcher has none."""
        found = {}
        for process in psutil.process_iter():
            try:
                env = process.environ()
            except (psutil.Error, OSError):
                continue
            if env.get('TIMM_LM_MARK') == self.mark:
                found.setdefault(env.get('LOCAL_RANK'), []).append(process)
        return found

    def wait(self):
        """Let it end by itself: returns exit code, standard output, standard error; nothing is left behind."""
        code = self.launcher.wait(TIMEOUT)
        deadline = time.monotonic() + 20  # helpers of older compilers see a little later that their parent is gone
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not self.processes()
        return SimpleNamespace(code=code, out=self.out.read_text(), err=self.err.read_text())

    def end(self):
        for processes in self.processes().values():
            for process in processes:
                process.kill()
        self.launcher.wait()


@contextmanager
def launched(words, folder, **env):
    """Start two processes: a script or module and its arguments."""
    run = Launched(words, folder, **env)
    try:
        yield run
    finally:
        run.end()


def checkpoints(folder):
    return sorted(path.name for path in (folder / 'checkpoints').glob('step-*'))


def last_row(folder):
    return json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])


def error_lines(err):
    return [line for line in err.splitlines() if 'timm-lm: ' in line]


def final_state(folder):
    return load_file(folder / 'weights' / 'model.safetensors')


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    """Folder of the runs."""
    return tmp_path_factory.mktemp('processes')


# Python's sitecustomize, which has the second of two processes send itself a signal.
STOPPED = """
import os
import signal

if os.environ.get('RANK') == '1':
    from timm_lm.training.loop import Training

    update = Training._update

    def signalled(training, epoch, step):
        update(training, epoch, step)
        if (epoch, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    Training._update = signalled
"""


@pytest.fixture(scope='module')
def stopped(few_digits, output):
    """A run of the command line of which one process, not the main one, was sent a signal in its second epoch, with
    the third update."""
    (output / 'path').mkdir()
    (output / 'path' / 'sitecustomize.py').write_text(STOPPED)
    path = os.pathsep.join(filter(None, [str(output / 'path'), os.environ.get('PYTHONPATH')]))
    words = train_command(few_digits, output, 'stopped', *LONG)
    with launched(['-m', 'timm_lm.cli', *words], output, PYTHONPATH=path) as run:
        result = run.wait()
    result.checkpoints = checkpoints(output / 'stopped')
    return result


@pytest.fixture(scope='module')
def driven(few_digits, output, stopped):
    """What two_processes.py did, after the stopped run: its result, and the facts of each process."""
    script = Path(__file__).with_name('two_processes.py')
    with launched([script, few_digits, output, free_port()], output) as run:
        result = run.wait()
    paths = [output / f'facts{rank}.json' for rank in range(2)]
    assert all(path.exists() for path in paths), result.err
    result.facts = [json.loads(path.read_text()) for path in paths]
    return result


# Data


@dataclass
class Process:
    """What a loader asks of Accelerate."""

    process_index: int = 0
    num_processes: int = 1
    device: torch.device = torch.device('cpu')


@pytest.mark.parametrize('kind', ['memory', 'timm'])
def test_two_processes_share_each_split_without_overlap(driven, few_digits, kind):
    _, _, *whole = loaders(few_digits, Process(), '--loader', kind, '--no-aug', '--workers', '0', '-b', '16')
    for split, batches in zip(('train', 'test'), whole):
        shards = [facts['shares'][kind][split] for facts in driven.facts]
        assert len(shards[0]) == len(shards[1]) == len(batches.data) / 2
        assert Counter(shards[0] + shards[1]) == Counter(identities(batches))


def test_repeated_augmentation_shows_both_processes_the_same_images(driven):
    """Twice an image for two processes: one each, in the same batch; half of the 256 images make an epoch."""
    first, second = (facts['shares']['repeated'] for facts in driven.facts)
    assert first == second and len(set(first)) == len(first) == 128


@pytest.mark.parametrize('kind', ['memory', 'timm'])
def test_validation_counts_each_image_once_where_nothing_divides(few_digits, kind):
    """64 images for three processes in batches of 21: two of them have none left for the second batch."""
    shards = []
    for rank in range(3):
        *_, batches = loaders(few_digits, Process(rank, 3), '--loader', kind, '--workers', '0', '-vb', '21')
        found = list(batches)
        assert [len(labels) for _, labels in found] == [21, 21]
        shards.append([label for _, labels in found for label in labels.tolist() if label != IGNORE_LABEL])
    assert [len(shard) for shard in shards] == [22, 21, 21]


def test_validation_by_two_processes_is_that_of_one(driven, output):
    """The last batches are not full: 64 images for two processes in batches of 24."""
    last = last_row(output / 'alone')['eval']
    by_one = json.loads((output / 'alone' / 'result.json').read_text())
    assert last['images'] == by_one['images'] == 64
    assert last['errors'] == by_one['errors']
    assert last['loss'] == pytest.approx(by_one['loss'], abs=1e-5)


# Updates


def test_gradient_is_the_mean_of_the_processes(driven):
    for facts in driven.facts:
        assert facts['gradient']['engine'] < 1e-5
        assert facts['gradient']['own'] > 0.01  # a process alone has another one


@pytest.mark.parametrize('cut', ['two', 'four', 'compiled'])
def test_two_processes_make_the_updates_of_one(driven, one_process, output, cut):
    """A global batch of 64 in two pieces, or in four with accumulation, on a network without batch statistics."""
    assert largest_difference(final_state(output / cut), one_process) < 1e-5
    told, expected = (last_row(output / name)['train'] for name in (cut, 'one'))
    assert told['loss'] == pytest.approx(expected['loss'], rel=1e-4)
    assert told['top1'] == pytest.approx(expected['top1'], abs=0.4)  # one of the 256 images


@pytest.fixture(scope='module')
def one_process(few_digits, output):
    from timm_lm.cli import main
    assert main(train_command(few_digits, output, 'one', *PIECES, *CUTS['one'])) == 0
    return final_state(output / 'one')


def test_running_statistics_are_shared_after_an_epoch(driven):
    """Those of the network and of its average, where processes keep their own during an epoch."""
    for facts in driven.facts:
        assert len(facts['statistics']) == 2
        for statistics in facts['statistics']:
            assert statistics['apart_before'] > 1e-3
            assert statistics['equal_after']
            assert statistics['from_mean'] < 1e-6


def test_running_statistics_of_the_first_process_or_of_each(driven):
    """By --dist-bn broadcast, and none at all by an empty one or with --sync-bn, which shares them in each step."""
    for facts in driven.facts:
        assert facts['of_sync_bn'] == 0
        assert len(facts['broadcast']) == 4 and facts['unshared'] == []
        for statistics in facts['broadcast']:
            assert statistics['apart_before'] > 1e-3
            assert statistics['equal_after'] and statistics['from_first'] == 0


@pytest.mark.parametrize('options, broadcast', [([], True), (['--no-ddp-bb'], False)])
def test_what_processes_are_told_to_do_for_each_other(tmp_path, options, broadcast):
    """Whether the first one sends its running statistics within an epoch too, and how long all wait."""
    accelerator = create_accelerator(parse_options(options), tmp_path)
    assert accelerator.ddp_handler.broadcast_buffers == broadcast
    assert accelerator.init_handler.timeout == LONGEST_WAIT


@pytest.mark.parametrize('tasks', [1, 2])
def test_tasks_of_slurm_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch, tasks):
    """But not a single one in a job that has room for more."""
    for name, value in (('SLURM_NTASKS', 2), ('SLURM_PROCID', 0), ('SLURM_STEP_NUM_TASKS', tasks)):
        monkeypatch.setenv(name, str(value))
    with nullcontext() if tasks == 1 else pytest.raises(UserError, match='srun started 2 tasks, which would train 2'):
        create_accelerator(parse_options([]), tmp_path)


@pytest.mark.parametrize('seen', [1, 2])
def test_process_that_does_not_see_its_gpu_is_told(monkeypatch, seen):
    """The second one of a machine; without GPUs here, by what PyTorch and Accelerate would tell of them."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: seen)
    process = SimpleNamespace(
        distributed_type=DistributedType.MULTI_GPU, device=torch.device('cuda', 1 % seen), local_process_index=1)
    with nullcontext() if seen == 2 else pytest.raises(UserError, match=r'Process 2 of this machine sees 1 GPU\(s\)'):
        _refuse_hidden_gpus(process)


def test_rate_follows_the_batch_of_both_processes(driven, output):
    """By timm's rule, 0.1 for 256 images, where the recipe tells none."""
    assert yaml.safe_load((output / 'own' / 'args.yaml').read_text())['lr'] == 0.1 * 2 * 32 / 256


@needs_fsdp2
@pytest.mark.parametrize('name', ['sharded', 'resumed'])
def test_sharded_training_ends_like_that_of_one_process(driven, one_process, output, name):
    """FSDP2, and a sharded run that was cut back to the middle of an epoch and gone on with."""
    verify_folder(output / name / 'weights')
    assert largest_difference(final_state(output / name), one_process) < 1e-5
    told, expected = ({block: torch.tensor(k) for block, k in last_row(output / run)['k'].items()}
                      for run in (name, 'one'))
    assert largest_difference(told, expected) < 1e-5
    if name == 'resumed':
        assert f"Resuming from {output / 'resumed' / 'checkpoints' / 'step-000000006'}: epoch 2, batch 3" in driven.out
        assert largest_difference(final_state(output / name), final_state(output / 'sharded')) == 0


@needs_fsdp2
def test_sharded_batch_norms_go_on_with_the_statistics_of_each_process(driven, output):
    whole, resumed = (final_state(output / name) for name in ('sharded_norms', 'resumed_norms'))
    assert whole['norm.running_mean'].abs().max() > 0.1
    assert largest_difference(whole, resumed) == 0
    assert f"Resuming from {output / 'resumed_norms' / 'checkpoints' / 'step-000000002'}: " in driven.out


@needs_fsdp2
def test_run_that_was_sharded_otherwise_is_told(driven):
    for before, now in (('with FSDP version 2', 'without FSDP'), ('without FSDP', 'with FSDP version 2')):
        assert f'timm-lm: error: The run was started {before} and cannot resume {now}; start it as' in driven.out


# One voice, one writer


def test_only_the_main_process_writes(driven, output):
    main, other = (facts['written'] for facts in driven.facts)
    assert any(path.startswith(str(output / 'alone' / 'weights')) for path in main)
    assert not other
    verify_folder(output / 'alone' / 'weights')


def test_each_thing_is_told_once(stopped, driven, output):
    lines = stopped.out.splitlines()
    assert 'batches    16 images x 2 processes, 8 updates an epoch' in lines
    assert len(lines) > 10 and len(set(lines)) == len(lines)
    assert driven.out.count(f"{output / 'alone' / 'weights'}: error ") == 1


def test_bad_input_is_told(driven, few_digits, output):
    for facts in driven.facts:
        code, told = facts['bad']
        assert code == 2 and f"timm-lm: error: The data folder {few_digits / 'missing'} does not exist" in told
    assert not (output / 'bad').exists()


def test_run_folder_that_one_process_does_not_see_is_told(driven, output):
    for facts, own in zip(driven.facts, (output, output / 'other_disk')):
        code, told = facts['apart']
        assert code == 2 and f'The processes do not find the same checkpoint in {own / "alone"};' in told
    assert not (output / 'other_disk').exists()


def newest_progress(folder):
    newest = folder / 'checkpoints' / checkpoints(folder)[-1]
    return json.loads((newest / 'state.json').read_text())['progress']


def test_processes_ask_each_other_between_the_lines_of_the_log(driven, output):
    """After the first update, and every second one, which take 5 seconds in the slower process."""
    for facts in driven.facts:
        code, told = facts['asked']
        assert code == 143, told
    assert newest_progress(output / 'asked') == dict(epoch=0, batch=6)


def test_signal_to_one_process_breaks_off_the_validation_of_both(driven, output):
    for facts in driven.facts:
        code, told, batches = facts['validating']
        assert (code, batches) == (143, 1), told
    assert newest_progress(output / 'validating') == dict(epoch=0, batch=2)


def test_images_that_fit_in_the_memory_of_one_process_alone(driven, output):
    for facts in driven.facts:
        code, told = facts['little']
        assert code == 2 and 'fit into the memory of some processes and not of others; give --loader timm' in told
    assert not (output / 'little').exists()


@pytest.mark.parametrize('name, line', [
    ('other_data', 'The processes find different data'),
    ('other_precision', 'Some machines have no instructions for bfloat16 and others have; give --no-amp to all')])
def test_machines_that_differ_are_told(driven, output, name, line):
    for facts in driven.facts:
        code, told = facts[name]
        assert code == 2 and f'timm-lm: error: {line}' in told
    assert not (output / name).exists()


def test_run_without_a_name_has_one_folder(driven):
    first, second = (facts['unnamed'] for facts in driven.facts)
    assert first == second and '/20000101-000000-000000-lm_resnet20' in first


def test_disk_of_the_main_process_that_is_full_ends_all(driven, output):
    for facts in driven.facts:
        assert facts['full'][0] == 2 and 'could not be written (No space left on device)' in facts['full'][1]
    assert checkpoints(output / 'full') == ['step-000000008']


# Ends


def test_signal_to_one_process_stops_both_at_one_step(stopped, output):
    assert stopped.code != 0
    line, = error_lines(stopped.err)
    newest = output / 'stopped' / 'checkpoints' / stopped.checkpoints[-1]
    assert line == f'timm-lm: Stopped by SIGTERM; run the same command with --resume {newest}'
    assert '[rank' not in stopped.err
    assert stopped.checkpoints == ['step-000000008', 'step-000000011']  # that of an epoch, and that of the signal
    state = load_file(newest / 'state.safetensors')
    assert not torch.equal(state['process0/cpu'], state['process1/cpu'])


@pytest.mark.parametrize('name, updates', [('stopped', 11), ('killed', 12)])
def test_run_that_was_cut_short_ends_like_the_one_left_alone(driven, output, name, updates):
    """Stopped by the signal, or all processes killed in the middle of an epoch; gone on with by two processes."""
    assert f"Resuming from {output / name / 'checkpoints' / f'step-{updates:09d}'}: epoch 2, batch " in driven.out
    assert largest_difference(final_state(output / name), final_state(output / 'alone')) == 0
    for key in ('loss', 'top1'):
        ends = [[json.loads(line)['train'][key] for line in (output / run / 'metrics.jsonl').read_text().splitlines()]
                for run in (name, 'alone')]
        assert ends[0] == ends[1]


def test_loss_that_is_not_finite_on_one_process_stops_both(driven, output):
    """Only batch 3 of the second epoch of process 1 is bad; the gradient spoils the other one's from batch 4 on."""
    assert driven.code != 0
    line, = error_lines(driven.err)
    assert line.startswith('timm-lm: error: The loss is not finite from batch 3 of epoch 2 on')
    assert f"the last good checkpoint is {output / 'poisoned' / 'checkpoints' / 'step-000000008'}" in line
    assert checkpoints(output / 'poisoned') == ['step-000000008']
    assert not re.search(r'\[rank\d\].*(Traceback|Error)', driven.err)
