"""A training, from options to a run folder: data, network, optimizer, loop, checkpoints, weights.

The loop is an ordinary one on Accelerate, which manages device, precision and processes.
"""
import argparse
import copy
import shlex
import shutil
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from timm_lm.allocator import keep_freed_memory, release_freed_memory
from timm_lm.errors import RESUME, UserError, one_line
from timm_lm.files import writing
from timm_lm.loader import BatchLoader
from timm_lm.model_config import TimmModel

from .accelerator import create_accelerator, settle_layout, settle_precision
from .batches import check_input, create_loader, load_data, resolve_input_config
from .checkpoint import Checkpoint, CheckpointStore, Progress
from .loop import Training
from .network import create_model, import_modules, prepare_network
from .optimizer import set_learning_rate
from .plan import describe_data, describe_run, describe_schedule
from .processes import differs, on_main
from .result import record_trained_on, run_facts, save_weights
from .run_folder import RESULT_NAME, find_checkpoint, own_run_folder, run_folder
from .run_log import MAKE_ROOM, RunLog, epoch_table, write_line
from .signals import StopSignals


def train(args: argparse.Namespace, command: str = '') -> Path:
    """Train with the given options.

    Args:
        args: Options of ``parse_options``.
        command: The command line, for the card.

    Returns:
        The run folder. It holds ``args.yaml``, ``summary.csv``, ``metrics.jsonl``, ``result.json``, ``curves.png``,
        ``k.png``, ``checkpoints/`` and the weights folder ``weights/``; with ``dry_run`` it is not created.

    Raises:
        UserError: If options and data do not fit together, or the loss is no longer finite.
        Interrupted: After SIGTERM, SIGINT or SIGHUP, with the state saved if there was any.
    """
    args = copy.deepcopy(args)  # what is filled in is for this training
    import_modules(args)

    # Device, precision and processes
    folder = run_folder(args)
    # like the rate, before the options are compared with those of the run
    remarks = [settle_precision(args), settle_layout(args)]
    accelerator = create_accelerator(args, folder)
    if differs(args.amp):
        raise UserError('Some machines have no instructions for bfloat16 and others have; give --no-amp to all of '
                        'them.')
    if not (args.experiment or args.resume):
        (folder,) = broadcast_object_list([folder])  # which has the time in its name
    tell = accelerator.on_main_process(partial(print, flush=True))
    for remark in filter(None, remarks):
        tell(f'note: {remark}')
    set_learning_rate(args, accelerator.num_processes)

    # The checkpoint to resume from
    store = CheckpointStore(folder / 'checkpoints', keep=args.checkpoint_hist)
    found = store.newest_first()
    checkpoint = find_checkpoint(args, folder, store, tell=accelerator.on_main_process(write_line))
    if differs(checkpoint and checkpoint.state['sha256']):
        raise UserError(f'The processes do not find the same checkpoint in {folder}; the run folder must be on a '
                        'disk that all machines see.')

    # Network
    set_seed(args.seed)
    recorded = checkpoint.state['facts'] if checkpoint else {}
    model = create_model(args, recorded)

    # Data
    data_config = resolve_input_config(args, model)
    check_input(model, data_config, args.model)
    train_set, eval_set = load_data(args, model, data_config, accelerator, checkpoint)
    train_loader = create_loader(args, train_set, data_config, accelerator, model.num_classes, is_training=True)
    eval_loader = create_loader(args, eval_set, data_config, accelerator, model.num_classes) if eval_set else None

    # Optimizer, schedule, loss
    record_trained_on(args, model, data_config, train_set.class_names)
    # gets the final weights: without all that training wraps around the network
    unwrapped = copy.deepcopy(model) if accelerator.is_main_process else None
    model = prepare_network(args, model, accelerator)
    set_seed((args.seed + accelerator.process_index) % 2 ** 32)  # each process drops different paths
    signals = StopSignals(several=accelerator.num_processes > 1)
    training = Training(args, accelerator, model, train_loader, data_config, store, signals)
    training.facts = run_facts(args, model, command, accelerator.device, accelerator.num_processes, recorded)
    tell(describe_run(args, model, training.facts['start'], train_loader, eval_loader, accelerator, folder))
    for remark in describe_data(model, [data for data in (train_set, eval_set) if data is not None]):
        tell(f'note: {remark}')
    del train_set, eval_set  # on a GPU the loaders have their own copies
    if args.dry_run:
        tell(describe_schedule(args, training.updates_per_epoch, training.num_epochs))
        return folder

    progress = training.resume(checkpoint) if checkpoint else Progress()  # refused before anything is changed
    accelerator.wait_for_everyone()
    with ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(
            own_run_folder(folder, args, checkpoint is not None, partial(_check_unchanged, store, found))))
        _run(args, accelerator, training, eval_loader, folder, checkpoint, progress, unwrapped)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _run(
        args: argparse.Namespace,
        accelerator: Accelerator,
        training: Training,
        eval_loader: Optional[BatchLoader],
        folder: Path,
        checkpoint: Optional[Checkpoint],
        progress: Progress,
        unwrapped: Optional[TimmModel],
) -> None:
    """Train from the checkpoint, or the start, to the weights."""
    log = RunLog(folder)
    on_main(accelerator, lambda: _clear_way(args, training, log, checkpoint, progress))
    _start_trackers(args, accelerator, folder)

    # Epochs
    release_freed_memory()  # of decoding
    if accelerator.device.type == 'cpu':
        keep_freed_memory()
    evaluation: Optional[Dict[str, float]] = None
    with training.signals, closing(training.live):
        for epoch in range(progress.epoch, training.num_epochs):
            metrics = training.train_epoch(epoch, progress.batch if epoch == progress.epoch else 0)
            lr = training.learning_rate
            last = epoch + 1 == training.num_epochs
            evaluation = None
            if eval_loader is not None and (last or (epoch + 1) % args.val_interval == 0):
                release_freed_memory()
                evaluation = training.evaluate(eval_loader, epoch)
                release_freed_memory()
            training.end_epoch(epoch, evaluation)
            k = training.k_values()
            on_main(accelerator, partial(log.append, epoch, metrics, evaluation, lr, k))
            if accelerator.is_main_process:
                write_line(epoch_table(epoch, training.num_epochs, metrics, evaluation, lr))
            for tracker in accelerator.trackers:
                tracker.log(_tracked(epoch, metrics, evaluation, lr, tracker.name), step=epoch)
            saved = training.save(Progress(epoch + 1))
            training.stop_after_epoch(Progress(epoch + 1), saved)

    # Weights and pictures
    release_freed_memory()
    final = training.final_weights()

    def end() -> None:
        assert unwrapped is not None  # in the main process
        _tell_best(training)
        seen = evaluation or (log.rows()[-1]['eval'] if log.rows() else None)
        unwrapped.load_state_dict({name: tensor.cpu() for name, tensor in final.items()})
        with writing(f'The weights in {folder}', MAKE_ROOM):
            save_weights(args, unwrapped, folder, eval_loader, seen, training.num_epochs, training.seconds,
                         training.facts)
        with writing(f'The pictures in {folder}', MAKE_ROOM):
            log.plot()

    on_main(accelerator, end)


def _clear_way(args: argparse.Namespace, training: Training, log: RunLog, checkpoint: Optional[Checkpoint],
               progress: Progress) -> None:
    """Move what a run left after the checkpoint to resume from out of the way, and print where it resumes."""
    if args.resume:
        training.store.remove_unfinished()
        for unfinished in log.folder.glob('.weights.*'):  # by a killed process; they are written again
            shutil.rmtree(unfinished, ignore_errors=True)
    if checkpoint is not None:
        place = f'batch {progress.batch + 1}' if progress.batch < len(training.loader) else 'validation'
        where = (f'epoch {progress.epoch + 1}, {place}' if progress.epoch < training.num_epochs else
                 'all epochs are done, the weights are written again')
        print(f'Resuming from {training.store.folder / checkpoint.folder.name}: {where}', flush=True)
    if args.resume:
        for aside in training.store.set_aside_after(checkpoint):
            print(f'A later checkpoint is now {aside}', flush=True)
    log.truncate(progress.epoch)  # last: rows without checkpoints are cut next time, checkpoints without rows stay
    if progress.epoch < training.num_epochs:
        (log.folder / RESULT_NAME).unlink(missing_ok=True)  # from the earlier end of the run


def _tell_best(training: Training) -> None:
    best = training.best
    if best is None:
        return
    path = training.store.folder / best['checkpoint']  # gone if the run was resumed before it and found no better one
    where = f' (`timm-lm weights {shlex.quote(path.as_posix())}` writes its weights)' if path.is_dir() else ''
    write_line(f"best {best['metric']} {best['value']:.4g} after epoch {best['epoch'] + 1}{where}; the weights saved "
               'are those of the last epoch')


def _check_unchanged(store: CheckpointStore, found: List[Path]) -> None:
    """Another process may have run there until now, while this one read the checkpoint and the data."""
    if store.newest_first() != found:
        raise UserError(f'Another process resumed the run in {store.folder.parent} in the meantime; start again.')


def _start_trackers(args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> None:
    if not accelerator.log_with:
        return
    wandb = dict(name=folder.name, tags=args.wandb_tags, dir=str(folder))
    if args.wandb_resume_id:
        wandb.update(id=args.wandb_resume_id, resume='must')
    plain = bool, int, float, str
    options = {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}

    def start() -> None:
        try:
            accelerator.init_trackers(args.wandb_project or 'timm-lm', config=options, init_kwargs=dict(wandb=wandb))
        except Exception as e:
            if not type(e).__module__.startswith('wandb.'):
                raise
            raise UserError(f'Weights & Biases could not start ({one_line(e)}); log in, keep its log on disk with '
                            f'WANDB_MODE=offline, or leave --log-wandb out, and resume {RESUME}.') from e

    on_main(accelerator, start)


def _tracked(epoch: int, train: Dict[str, float], evaluation: Optional[Dict[str, float]], lr: float,
             tracker: str) -> Dict[str, float]:
    """Metrics of an epoch: to Weights & Biases under timm's names, to TensorBoard in groups."""
    separator = '/' if tracker == 'tensorboard' else '_'
    named = {'train': train, 'eval': evaluation or {}}
    values = {f'{split}{separator}{name}': value for split, found in named.items() for name, value in found.items()}
    return {'epoch': epoch, 'lr': lr} | values
