"""Runs that die: killed at any moment and resumed, they end with the weights of the run that was left alone."""
import json
import os
import random
import re
import shutil
import signal

import pytest
import yaml
from forked import Command
from safetensors.torch import load_file

from timm_lm.errors import UserError
from timm_lm.results import read_run
from timm_lm.training.checkpoint import CheckpointStore
from timm_lm.training.options import parse_options
from timm_lm.training.recipes import find_recipe
from timm_lm.training.report import RunLog
from timm_lm.training.run_folder import own_run_folder

# A network with dropped paths and noise, so that random states count; float32 on the CPU.
OPTIONS = [
    '--model-kwargs', 'layers=(2,2,2)', 'state_noise=0.01', '--drop-path', '0.2', '--epochs', '3',
    '--warmup-epochs', '0',
    '--batch-size', '32', '--no-amp', '--recovery-interval', '1', '--checkpoint-hist', '3', '--experiment', 'run',
]
STEPS = 24  # 3 epochs of 8 batches


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


def kill_when(data, output, condition, signal_number=signal.SIGKILL, *more):
    """Start or resume a run, and send a signal as soon as the condition holds; returns (exit code, standard error)."""
    process = Command(*arguments(data, output, '--resume', 'auto', *more))
    process.signal_when(condition, signal_number)
    code, _, err = process.wait()
    return code, err


def reached(output, updates):
    return lambda: any(int(path.name[5:]) >= updates for path in checkpoints(output))


@pytest.fixture(scope='module')
def left_alone(few_digits, tmp_path_factory):
    """The run that nobody kills."""
    output = tmp_path_factory.mktemp('alone')
    finish(few_digits, output)
    return output


def test_killed_at_random_and_around_the_end_of_an_epoch(few_digits, left_alone, tmp_path):
    """One run killed three times: at a random step, at the last batch of an epoch, and at another random one."""
    seed = random.randrange(2 ** 32)
    rng = random.Random(seed)
    points = [rng.randrange(1, 5), 7, rng.randrange(10, 16)]
    for updates in points:
        if updates == 7 and reached(tmp_path, 7)():  # it was killed late, and is to be killed there
            for path in checkpoints(tmp_path):
                if int(path.name[5:]) >= 7:
                    shutil.rmtree(path)
        code, _ = kill_when(few_digits, tmp_path, reached(tmp_path, updates))
        assert code == -signal.SIGKILL, seed
        assert not (tmp_path / 'run' / 'weights').exists()
    out = finish(few_digits, tmp_path)
    assert 'Going on from' in out
    assert final_state(tmp_path) == final_state(left_alone), seed
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    alone = [json.loads(line) for line in (left_alone / 'run' / 'metrics.jsonl').read_text().splitlines()]
    for row, other in zip(rows, alone, strict=True):
        assert row['epoch'] == other['epoch'] and row['k'] == other['k'] and row['lr'] == other['lr']
        assert row['train']['loss'] == other['train']['loss'] and row['eval']['errors'] == other['eval']['errors']


def test_killed_while_a_checkpoint_is_written(few_digits, left_alone, tmp_path):
    """Kill at the sight of a half-written folder, until one is left behind; its run ends as if nothing had been."""
    folder = tmp_path / 'run' / 'checkpoints'
    for _ in range(20):
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        code, _ = kill_when(few_digits, tmp_path, lambda: any(folder.glob('.step-*')))
        if code == -signal.SIGKILL and any(folder.glob('.step-*')):
            break
    else:
        pytest.fail('no kill hit a checkpoint being written')
    finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_step_and_save(few_digits, left_alone, tmp_path, number, code):
    """In the middle of an epoch, where no checkpoint is written but that of the signal; tried again if it came late."""
    for _ in range(10):
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        process = Command(*arguments(few_digits, tmp_path, '--recovery-interval', '0', '--log-interval', '1'))
        process.signal_when(lambda process=process: 'epoch 2/3 step 1/8' in process.printed(), number)
        got, _, err = process.wait()
        state = json.loads((checkpoints(tmp_path)[-1] / 'state.json').read_text())
        if got == code and state['progress']['batch'] > 0:
            break
    else:
        pytest.fail(f'no signal stopped a run within an epoch: {err}')
    told = f'Stopped by {number.name}; go on by the same command with --resume '
    assert state['progress']['epoch'] in (1, 2)
    line = next(line for line in err.splitlines() if told in line)
    words = arguments(few_digits, tmp_path, '--recovery-interval', '0')
    code, _, err = Command(*words, '--resume', line.rpartition(' ')[2]).wait()
    assert code == 0, err
    assert final_state(tmp_path) == final_state(left_alone)


@pytest.mark.parametrize('epoch', [2, 3])
def test_signal_stops_a_validation(few_digits, left_alone, tmp_path, epoch):
    """Of one image a batch; what goes on validates first. Tried again if the signal came late."""
    slow = ['--validation-batch-size', '1', '--log-interval', '8', '--recovery-interval', '0']
    for _ in range(10):
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        process = Command(*arguments(few_digits, tmp_path, *slow))
        process.signal_when(lambda process=process: f'epoch {epoch}/3 step 8/8' in process.printed(), signal.SIGTERM)
        code, _, err = process.wait()
        state = json.loads((checkpoints(tmp_path)[-1] / 'state.json').read_text())
        if state['progress'] == dict(epoch=epoch - 1, batch=8):
            break
    else:
        pytest.fail(f'no signal stopped a run in a validation: {err}')
    assert code == 143 and checkpoints(tmp_path)[-1].name == f'step-{8 * epoch:09d}'
    assert len((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()) == epoch - 1
    assert f'step-{8 * epoch:09d}: epoch {epoch}, validation' in finish(few_digits, tmp_path, *slow)
    assert final_state(tmp_path) == final_state(left_alone)
    for row, other in zip(*(RunLog(folder / 'run').rows() for folder in (tmp_path, left_alone)), strict=True):
        assert row['eval']['errors'] == other['eval']['errors'] and row['train']['loss'] == other['train']['loss']


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_whole_group_leaves_the_workers_their_work(few_digits, tmp_path, number, code):
    """As `timeout`, Slurm and a launcher send it, to the processes that read images too."""
    words = ['--loader', 'timm', '--workers', '1', '--recovery-interval', '0', '--log-interval', '1', '--epochs', '2']
    finish(few_digits, tmp_path / 'alone', *words)
    for _ in range(10):
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        process = Command(*arguments(few_digits, tmp_path, *words), own_group=True)
        process.signal_when(lambda process=process: 'epoch 2/2 step 1/8' in process.printed(), number)
        got, _, err = process.wait()
        assert not process.group_lives()
        assert got in (0, code), err
        state = json.loads((checkpoints(tmp_path)[-1] / 'state.json').read_text())
        if got == code and state['progress']['batch'] in range(1, 8):
            break
    else:
        pytest.fail(f'no signal stopped a run within an epoch: {err}')
    finish(few_digits, tmp_path, *words)
    assert final_state(tmp_path) == final_state(tmp_path / 'alone')


@pytest.mark.parametrize('number, several, code', [
    (signal.SIGTERM, False, -signal.SIGTERM), (signal.SIGINT, False, 1), (signal.SIGTERM, True, 0)])
def test_second_signal_acts_as_ever(tmp_path, number, several, code):
    """For who will not wait for the end of a step; of several processes each may be sent one signal twice."""
    script = tmp_path / 'script.py'
    script.write_text(f"""
import os
from timm_lm.training.signals import StopSignals
with StopSignals(several={several}) as signals:
    os.kill(os.getpid(), {int(number)})
    print('noted', signals.number, flush=True)
    os.kill(os.getpid(), {int(number)})
    print('went on', signals.number, flush=True)
""")
    got, out, err = Command(script=script).wait()
    assert got == code and out.startswith(f'noted {int(number)}\n'), err
    assert ('went on' in out) == several and ('KeyboardInterrupt' in err) == (number == signal.SIGINT)


def test_compiled_run_resumes_bit_for_bit(few_digits, tmp_path):
    small = ['--torchcompile', '--model-kwargs', 'layers=(1,1,1)', '--drop-path', '0']
    finish(few_digits, tmp_path / 'alone', *small)
    code, _ = kill_when(few_digits, tmp_path / 'killed', reached(tmp_path / 'killed', 5), signal.SIGKILL, *small)
    assert code == -signal.SIGKILL
    finish(few_digits, tmp_path / 'killed', *small)
    assert final_state(tmp_path / 'killed') == final_state(tmp_path / 'alone')


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
    assert any(f'{flipped} is not whole' in line and 'passed over' in line for line in lines)
    assert any(f'{cut} is not whole' in line for line in lines)
    assert f'Going on from {before}' in out
    assert final_state(tmp_path) == final_state(left_alone)
    # what was passed over is out of the way of the new ones
    aside = {path.name[-14:] for path in (tmp_path / 'run' / 'checkpoints').glob('set-aside-*')}
    assert aside == {cut.name, flipped.name}
    assert CheckpointStore(tmp_path / 'run' / 'checkpoints').read(flipped).progress.epoch == 3


def test_checkpoint_holds_what_moves_and_no_more_than_asked_are_kept(left_alone):
    lines = (left_alone / 'run' / 'metrics.jsonl').read_text().splitlines()
    top1 = [json.loads(line)['eval']['top1'] for line in lines]
    best = (top1.index(max(top1)) + 1) * STEPS // 3  # its checkpoint stays too
    kept = sorted({best, *range(STEPS - 2, STEPS + 1)})
    assert [path.name for path in checkpoints(left_alone)] == [f'step-{number:09d}' for number in kept]
    tensors = load_file(checkpoints(left_alone)[-2] / 'state.safetensors')
    assert {name.split('/')[0] for name in tensors} == {'model', 'optimizer', 'epoch', 'random0'}
    assert any(name.endswith('momentum_buffer') for name in tensors)
    state = json.loads((checkpoints(left_alone)[-2] / 'state.json').read_text())
    assert state['progress'] == dict(epoch=2, batch=7)


def test_full_disk_stops_the_run_and_spares_the_earlier_checkpoint(few_digits, left_alone, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle, as on a full one."""
    code, _ = kill_when(few_digits, tmp_path, reached(tmp_path, 3))
    assert code == -signal.SIGKILL
    before = checkpoints(tmp_path)[-1]
    code, _, err = Command(*arguments(few_digits, tmp_path, '--resume', 'auto'), file_limit=100_000).wait()
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert 'could not be written' in last and str(before) in last
    assert CheckpointStore(tmp_path / 'run' / 'checkpoints').newest() is not None
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


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='the system has no /dev/full')
@pytest.mark.parametrize('name', ['metrics.jsonl', 'summary.csv'])
def test_full_disk_for_the_metrics_is_told(tmp_path, name):
    (tmp_path / name).symlink_to('/dev/full')
    log = RunLog(tmp_path)
    with pytest.raises(UserError, match='could not be written .*No space left.* --resume auto'):
        log.append(0, dict(loss=1., top1=2., images_per_second=3.), None, 0.1, {})


def test_going_back_sets_later_checkpoints_aside(few_digits, left_alone, tmp_path):
    """So that --resume auto goes on from where the run is now, not from where it was before."""
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    back, *later = checkpoints(tmp_path)
    command = [word for word in arguments(few_digits, tmp_path) if word not in ('--output', str(tmp_path))]
    code, out, err = Command(*command, '--resume', back).wait()
    assert code == 0, err
    aside = sorted((tmp_path / 'run' / 'checkpoints').glob('set-aside-*'))
    assert [path.name[-14:] for path in aside] == [path.name for path in later]
    assert all(f'A later checkpoint is now {path}' in out for path in aside)
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


def test_loss_that_is_not_finite_names_batch_rate_and_checkpoint(few_digits, tmp_path, fails):
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, *OPTIONS, '--output', tmp_path, '--lr',
                 '1e20', '--log-interval', '1')
    assert 'The loss is not finite from batch ' in line and re.search(r'learning rate [\d.]+e\+(19|20)', line)
    batch = int(line.split('from batch ')[1].split()[0])
    epoch = int(line.split('of epoch ')[1].split()[0])
    good = checkpoints(tmp_path)[-1]  # one is written after each batch
    assert str(good) in line and int(good.name[5:]) == 8 * (epoch - 1) + batch - 1


def test_other_options_are_refused_by_name(few_digits, left_alone, fails):
    line = fails(*arguments(few_digits, left_alone, '--resume', 'auto', '--seed', '7'))
    assert 'seed (was 42, is 7)' in line
    assert 'name it with --experiment' in fails('train', '-c', 'demo_digits', '--data-dir', few_digits,
                                                '--resume', 'auto')


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
    words = arguments(few_digits, tmp_path, '--resume', 'auto')
    process = Command(*words)
    process.signal_when(reached(tmp_path, 3), signal.SIGSTOP)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    code, _, err = Command(*words).wait()
    assert code == 2 and f"The run in {tmp_path / 'run'} goes on in another process" in err, err
    assert {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()} == before
    process.signal_when(lambda: True, signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL
    assert 'Going on from' in finish(few_digits, tmp_path)
    assert final_state(tmp_path) == final_state(left_alone)


def test_missing_checkpoint_is_named(few_digits, tmp_path, fails):
    folder = tmp_path / 'run' / 'checkpoints' / 'step-000000001'
    line = fails('train', '-c', 'demo_digits', '--data-dir', few_digits, '--resume', folder)
    assert str(folder) in line and 'not whole' in line
    with pytest.raises(UserError, match='not whole'):
        CheckpointStore(tmp_path).read(folder)
    assert os.listdir(tmp_path) == []


def test_another_number_of_processes_is_refused(few_digits, left_alone, tmp_path, fails):
    shutil.copytree(left_alone / 'run', tmp_path / 'run')
    for path in (tmp_path / 'run' / 'checkpoints').glob('*/state.json'):
        path.write_text(json.dumps(dict(json.loads(path.read_text()), processes=2)))
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    for resume in ('auto', checkpoints(tmp_path)[0]):
        words = arguments(few_digits, tmp_path, '--resume', resume)
        line = fails(*words)
        assert 'was started with 2 process(es) and can not go on with 1' in line
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
    assert 'Going on from' in out
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['lr'] == 0.1 * 32 / 256
