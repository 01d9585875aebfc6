"""What two processes do under a launcher for test_processes.py: one thing after another in one group of processes.

Each process leaves ``facts<rank>.json``; the last thing is a training that must fail.
"""
import io
import json
import os
import shutil
import signal
import sys
import traceback
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import copy, deepcopy
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import accelerate
import torch
import torch.nn.functional as F
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object, set_seed

from timm_lm import cli
from timm_lm import data as data_module
from timm_lm.errors import UserError
from timm_lm.loader import IGNORE_LABEL, BatchLoader
from timm_lm.training import accelerator as accelerator_module
from timm_lm.training import loop, run_folder
from timm_lm.training import train as train_module
from timm_lm.training.accelerator import create_accelerator
from timm_lm.training.batches import create_loader, load_split, resolve_input_config
from timm_lm.training.checkpoint import CheckpointStore
from timm_lm.training.epoch_sums import EpochSums
from timm_lm.training.network import create_model
from timm_lm.training.options import parse_options
from timm_lm.training.recipes import find_recipe
from timm_lm.training.run_log import RunLog
from timm_lm.training.signals import StopSignals

# Batch norm, random crops, 8 batches an epoch; the last batch of the validation is not full.
LONG = ['--epochs', '3', '--batch-size', '16', '--validation-batch-size', '24', '--log-interval', '1',
        '--resume', 'auto', '--model-ema', '--model-ema-decay', '0.9', '--drop-path', '0.2']
# Nothing that depends on how a global batch of 64 is cut into pieces; 4 updates an epoch.
PIECES = ['--model-kwargs', 'layers=(2,1,1)', 'norm_layer=groupnorm1', '--no-aug', '--epochs', '2', '--lr', '0.01',
          '--clip-grad', '0.5', '--two-step-epoch', '1']
CUTS = dict(one=['--batch-size', '64'], two=['--batch-size', '32'],
            four=['--batch-size', '16', '--grad-accum-steps', '2'])
# Batch norms, whose running statistics differ between the processes within an epoch.
NORMS = ['--epochs', '1', '--batch-size', '32', '--recovery-interval', '1', '--no-ddp-bb']
# What `accelerate launch --use_fsdp --fsdp_version 2` with a wrap policy gives to its processes.
SHARDED = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP',
               FSDP_TRANSFORMER_CLS_TO_WRAP='BasicBlock', FSDP_CPU_RAM_EFFICIENT_LOADING='true')
CAN_SHARD = hasattr(accelerate.utils.fsdp_utils, 'fsdp2_prepare_model')


def train_command(data, output, name, *more):
    """Arguments of ``timm-lm`` for a small network with one two-step block, in float32."""
    return ['train', '-c', 'demo_digits', '--data-dir', str(data), '--model-kwargs', 'layers=(2,1,1)',
            '--warmup-epochs', '0', '--no-amp', '--output', str(output), '--experiment', name, *more]


@contextmanager
def after_each_update(act):
    """Have trainings call ``act`` with epoch and step after each update."""
    update = loop.Training._update

    def followed(self, epoch, step):
        update(self, epoch, step)
        act(epoch, step)

    with patch.object(loop.Training, '_update', followed):
        yield


def kill_in_the_middle(data, output, port):
    """Start a training in copies of these processes that kill themselves after the fifth update of the second epoch."""
    child = os.fork()
    if not child:
        os.environ.pop('TORCHELASTIC_USE_AGENT_STORE', None)  # a meeting place of their own
        os.environ['MASTER_PORT'] = port
        try:
            with after_each_update(lambda *at: os.kill(os.getpid(), signal.SIGKILL) if at == (1, 4) else None):
                cli.main(train_command(data, output, 'killed', *LONG, '--recovery-interval', '1'))
        finally:
            os._exit(1)  # without a traceback, if the other one was killed first
    os.waitpid(child, 0)


def loaders(data, accelerator, *more):
    """(arguments, data config, batches of training, batches of validation) of this process."""
    args = parse_options(train_command(data, 'none', 'none', *more)[1:])
    config = resolve_input_config(args, create_model(args))
    batches = [create_loader(args, load_split(args, split, config, False, is_training), config, accelerator, 10,
                             is_training) for split, is_training in (('train', True), ('test', False))]
    return args, config, *batches


def identities(batches):
    """A number for each image that counts, by its pixels."""
    return [zlib.crc32(image.numpy().tobytes()) for images, labels in batches
            for image, label in zip(images.contiguous(), labels.tolist()) if label != IGNORE_LABEL]


def shares(data, accelerator):
    """The images that this process gets, by kind of loader."""
    found = {}
    for kind in ('memory', 'timm'):
        _, _, training, validation = loaders(
            data, accelerator, '--loader', kind, '--no-aug', '--workers', '0', '-b', '16', '-vb', '24')
        found[kind] = dict(train=identities(training), test=identities(validation))
    _, _, training, _ = loaders(data, accelerator, '--no-aug', '-b', '16', '--aug-repeats', '2')
    found['repeated'] = identities(training)
    return found


def gradient(data, accelerator, folder):
    """The engine's gradient against that of plain PyTorch, the mean over the batches of both processes.

    Returns:
        Largest differences, as shares of the largest value: between both, and of this process alone from the mean.
    """
    args, config, loader, _ = loaders(data, accelerator, '-b', '16')
    set_seed(0)
    model = create_model(args).to(memory_format=torch.channels_last)
    plain = deepcopy(model).train()
    training = loop.Training(args, accelerator, model, loader, config, CheckpointStore(folder), StopSignals())
    training._update = lambda epoch, batch: None
    training.network.train()
    training.step(*next(iter(loader)), epoch=0, batch=0, is_update=True)
    means, own = [torch.zeros_like(p) for p in plain.parameters()], None
    for rank in range(accelerator.num_processes):
        other = copy(loader)
        other.rank = rank
        images, labels = next(iter(other))
        gradients = torch.autograd.grad(F.cross_entropy(plain(images), labels), list(plain.parameters()))
        means = [mean + g / accelerator.num_processes for mean, g in zip(means, gradients)]
        own = gradients if rank == loader.rank else own
    scale = max(g.abs().max().item() for g in means)

    def apart(others):
        return max((g - other).abs().max().item() for g, other in zip(means, others)) / scale

    return dict(engine=apart([p.grad for p in training.model.parameters()]), own=apart(own))


@contextmanager
def watched_statistics(seen):
    """Note what ``distribute_bn`` finds in the processes and leaves there."""
    distribute_bn = loop.distribute_bn

    def gathered(model):
        own = torch.cat([b.flatten() for name, b in model.named_buffers() if 'running' in name])
        all_ranks = [torch.empty_like(own) for _ in range(2)]
        torch.distributed.all_gather(all_ranks, own)
        return all_ranks

    def watched(model, *rest):
        before = gathered(model)
        distribute_bn(model, *rest)
        after = gathered(model)
        seen.append(dict(apart_before=(before[0] - before[1]).abs().max().item(),
                         equal_after=torch.equal(*after),
                         from_first=(after[0] - before[0]).abs().max().item(),
                         from_mean=(after[0] - (before[0] + before[1]) / 2).abs().max().item()))

    with patch.object(loop, 'distribute_bn', watched):
        yield


@contextmanager
def sharding():
    """Have Accelerate shard on the CPU, too, which PyTorch can; by itself it leaves out FSDP there."""
    os.environ.update(SHARDED)
    PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        for name in SHARDED:
            del os.environ[name]
        PartialState._shared_state['distributed_type'] = DistributedType.MULTI_CPU


def cut_back(folder, target, updates):
    """A copy of a run as it was when it had made so many updates."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / 'weights')
    for path in (target / 'checkpoints').glob('step-*'):
        if int(path.name[5:]) > updates:
            shutil.rmtree(path)


def told(words):
    """Run a command without waiting for who tells first; returns its code and what it tells."""
    with patch.object(cli, 'PATIENCE', 0), redirect_stderr(io.StringIO()) as err:
        try:
            return [cli.main(words), err.getvalue()]
        except SystemExit as e:
            return [e.code, err.getvalue()]
        except Exception:  # the tests of the other trainings are to go on
            return [None, traceback.format_exc()]


def apart(data, output, rank):
    """Go on with a run whose folder is on a disk that only the main process sees; returns what is told."""
    return told(train_command(data, output if rank == 0 else output / 'other_disk', 'alone', *LONG))


def on_a_full_disk(data, output):
    """Train where the main process can write no checkpoint after the first; returns what each process is told."""
    save = CheckpointStore.save

    def full(self, updates, *rest):
        if updates > 8:
            raise UserError('The checkpoint could not be written (No space left on device).')
        return save(self, updates, *rest)

    with patch.object(CheckpointStore, 'save', full):
        return told(train_command(data, output, 'full', *LONG, '--dist-bn', 'broadcast'))


def stop_itself():
    """By two signals, as a process may get that of its launcher too."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


def asked(data, output, rank):
    """Train where a signal to the slower process is asked for between the lines of the log, at most every 5 seconds,
    by clocks that move while a process waits for the updates of its device; returns what is told."""
    now, agree, read = 0., loop.Training.agree, EpochSums.read

    def act(epoch, step):
        if rank == 1 and step == 4:
            stop_itself()

    def waits(self):
        nonlocal now
        now += (2.5 if rank == 1 else 1.) * (len(self.rates) - self.read_batches)
        read(self)

    def agreed(self, *rest):
        number = agree(self, *rest)
        assert len({*gather_object([self.agree_interval])}) == 1  # else one would wait for the other for hours
        return number

    clock = SimpleNamespace(perf_counter=lambda: now)
    with (after_each_update(act), patch.multiple(loop, AGREE_SECONDS=5., time=clock),
          patch.object(loop.Training, 'agree', agreed), patch.object(EpochSums, 'read', waits)):
        return told(train_command(data, output, 'asked', *LONG, '--log-interval', '1000'))


def validating(data, output, rank):
    """Train where a signal to the other process comes with the first of four batches of the validation.

    Returns:
        What is told, and the batches that this process validated.
    """
    free, batches = loop.Training._free_graph_outputs, 0

    def signalled(self):
        nonlocal batches
        free(self)
        if not self.network.training:
            batches += 1
            if rank == 1:
                stop_itself()

    with patch.object(loop.Training, '_free_graph_outputs', signalled):
        words = train_command(data, output, 'validating', *LONG, '-b', '64', '-vb', '8', '--dist-bn', '')
        return [*told(words), batches]


def little_memory(data, output, rank):
    """Train where the images fit in the memory of the main process alone; returns what is told."""
    with patch.object(data_module, 'MEMORY_LIMIT', 0 if rank else data_module.MEMORY_LIMIT):
        return told(train_command(data, output, 'little', *LONG))


def of_other_data(data, output, rank):
    """Train where each process finds as many images as the other, but not the same; returns what is told."""
    split = 'train[128:]' if rank else 'train[:128]'
    return told(train_command(data, output, 'other_data', *LONG, '--train-split', split))


def in_other_precision(data, output, rank):
    """Train where only the main process has instructions for bfloat16; returns what is told."""
    with patch.object(accelerator_module, 'no_bfloat16', lambda device_type: 'it has none' if rank else ''):
        return told(train_command(data, output, 'other_precision', *LONG, '--amp'))


def unnamed(data, output, rank):
    """The folder of a run without a name, which has the time in it, by clocks that differ."""
    words = train_command(data, output, '', '--dry-run')[1:]
    clock = SimpleNamespace(now=lambda: datetime(2000, 1, 1 + rank))
    with patch.object(run_folder, 'datetime', clock), redirect_stdout(io.StringIO()):
        return str(train_module.train(parse_options(words)))


def poison_one_process():
    """Make the third batch of the second epoch of process 1 unusable."""
    batches = BatchLoader.batches

    def poisoned(self, start=0):
        for step, (images, labels) in enumerate(batches(self, start), start):
            if self.is_training and self.rank == 1 and self.epoch == 1 and step == 2:
                images = images * float('nan')
            yield images, labels

    BatchLoader.batches = poisoned


def main(data, output, port):
    rank = int(os.environ['RANK'])
    written = []

    def note(event, arguments):
        writes = event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree'):
            written.append(str(arguments[0]))

    def train(name, *more):
        try:
            cli.main(train_command(data, output, name, *more))
        except Exception:  # the tests of the other trainings are to go on
            traceback.print_exc()

    kill_in_the_middle(data, output, port)
    PartialState.destroy_process_group = lambda self, group=None: None  # one group for all trainings
    RunLog.plot = lambda self: None  # pictures take time
    accelerator = create_accelerator(parse_options([]), output)
    facts = dict(shares=shares(data, accelerator), gradient=gradient(data, accelerator, output))

    recipe = output / f'without_rate{rank}.yaml'
    text = find_recipe('demo_digits')[0].read_text()
    recipe.write_text(''.join(line for line in text.splitlines(True) if not line.startswith('lr:')))

    sys.addaudithook(note)
    train('alone', *LONG)
    train('stopped', *LONG)
    train('killed', *LONG)
    train('two', *PIECES, *CUTS['two'])
    with (patch.object(train_module, 'prepare_network', lambda args, model, accelerator: model),  # as if on GPUs
          patch.object(loop, 'distribute_bn') as distribute):
        train('four', *PIECES, *CUTS['four'], '--sync-bn')
    facts['of_sync_bn'] = distribute.call_count
    train('compiled', *PIECES, *CUTS['two'], '--torchcompile', 'aot_eager')
    facts['statistics'] = []
    with watched_statistics(facts['statistics']):
        train('own', '-c', str(recipe), '--epochs', '1', '--batch-size', '32', '--no-ddp-bb', '--model-ema',
              '--model-ema-decay', '0.5')
    facts['bad'] = told(train_command(data / 'missing', output, 'bad'))
    facts['apart'] = apart(data, output, rank)
    facts['broadcast'], facts['unshared'] = [], []
    with watched_statistics(facts['broadcast']):
        facts['full'] = on_a_full_disk(data, output)
    facts['asked'] = asked(data, output, rank)
    with watched_statistics(facts['unshared']):
        facts['validating'] = validating(data, output, rank)
    facts['little'] = little_memory(data, output, rank)
    facts['other_data'] = of_other_data(data, output, rank)
    facts['other_precision'] = in_other_precision(data, output, rank)
    facts['unnamed'] = unnamed(data, output, rank)
    facts['written'] = [path for path in written if str(output) in path]
    (output / f'facts{rank}.json').write_text(json.dumps(facts))

    if CAN_SHARD:
        def train_sharded(*words):
            with sharding():
                train(*words)

        train_sharded('sharded', *PIECES, *CUTS['two'], '--recovery-interval', '2')
        train_sharded('sharded_norms', *NORMS)
        if rank == 0:
            cut_back(output / 'sharded', output / 'resumed', 6)
            cut_back(output / 'sharded_norms', output / 'resumed_norms', 2)
        torch.distributed.barrier()
        train_sharded('resumed', *PIECES, *CUTS['two'], '--resume', 'auto')
        train_sharded('resumed_norms', *NORMS, '--resume', 'auto')
        refused = [told(train_command(data, output, 'sharded_norms', *NORMS, '--resume', 'auto'))]
        with sharding():
            refused.append(told(train_command(data, output, 'two', *PIECES, *CUTS['two'], '--resume', 'auto')))
        if rank == 0:
            print(*refused, sep='\n')
    poison_one_process()
    return cli.main(train_command(data, output, 'poisoned', '--epochs', '2', '--batch-size', '16'))


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
