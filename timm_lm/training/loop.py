"""The steps of a training, and the state that they update."""
import argparse
import math
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad, distribute_bn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from timm_lm.errors import UserError, one_line
from timm_lm.layers.steps import k_values
from timm_lm.loader import BatchLoader
from timm_lm.model_config import TimmModel

from .average import AveragedWeights
from .checkpoint import Checkpoint, CheckpointStore, Progress, random_states, restore_random_states
from .epoch_sums import EpochSums
from .evaluate import evaluate
from .losses import create_loss
from .optimizer import begin_momentum, create_optimizer
from .processes import on_main
from .run_log import LiveLine
from .schedule import create_schedule, load_schedule, schedule_state
from .signals import Interrupted, StopSignals
from .two_step_switch import TwoStepSwitch

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
AGREE_SECONDS = 5.  # at most, between checks among processes whether to stop


class Training:
    """The state of a training, and the steps that update it."""

    def __init__(
            self,
            args: argparse.Namespace,
            accelerator: Accelerator,
            model: TimmModel,
            loader: BatchLoader,
            data_config: Dict[str, Any],
            store: CheckpointStore,
            signals: StopSignals,
    ):
        """
        Args:
            args: Options.
            accelerator: Manages device, precision and processes.
            model: The network.
            loader: Training batches of this process.
            data_config: ``mean`` and ``std`` of these batches.
            store: Where checkpoints go.
            signals: Signals that may stop it.

        Raises:
            UserError: If optimizer, schedule or loss cannot be created with these options.
        """
        self.args = args
        self.accelerator = accelerator
        self.loader = loader
        self.store = store
        self.signals = signals
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.fsdp_version = 2 if getattr(accelerator, 'is_fsdp2', False) else int(self.sharded)  # 0 without FSDP
        self.model = model.to(accelerator.device)
        self.two_step_switch = TwoStepSwitch(args, model, self.sharded)
        self.updates_per_epoch = -(-len(loader) // args.grad_accum_steps)
        if self.sharded and args.clip_grad is not None and args.clip_mode == 'agc':
            raise UserError('--clip-mode agc cannot clip sharded weights; use norm or value, or train without FSDP.')
        if self.sharded and args.opt.lower().startswith('lookahead_'):  # saving would count as one of its steps
            raise UserError(f'--opt {args.opt} cannot look ahead with sharded weights; use the optimizer without it.')
        if self.sharded and args.model_ema:
            raise UserError('--model-ema cannot average sharded weights; leave it out, or train without FSDP.')
        self.average = AveragedWeights(
            self.model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        try:
            self.plain_optimizer = create_optimizer(args, model, self.sharded)
        except (AssertionError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f'The optimizer {args.opt} cannot be made with these options ({one_line(e)}).') from e
        if accelerator.scaler is not None and not self.sharded:  # PyTorch's sharded SGD is not fused
            begin_momentum(self.plain_optimizer)
        self.scheduler, self.num_epochs = create_schedule(args, self.plain_optimizer, self.updates_per_epoch)
        for name, value, last in (('mixup-off', args.mixup_off_epoch, self.num_epochs),
                                  ('two-step', args.two_step_epoch, self.num_epochs - 1)):
            if value > last:
                raise UserError(f'--{name}-epoch {value} is never reached: the run has {self.num_epochs} epochs, '
                                'counted from 0; change one of them.')
        # Not compiled with the network: on a GPU the backward pass would use logits rounded to bfloat16, but the
        # maximum and the logarithm of unrounded ones, so that probabilities would not add up to 1.
        self.loss = create_loss(args, model, data_config, accelerator)
        # what is called: self.model compiled, and wrapped for several processes; its weights are those of self.model
        self.network, prepared = accelerator.prepare(model, self.plain_optimizer)
        # Accelerate's wrapper takes longer than a fused step of a small network, and only the scaler needs it
        self.optimizer = self.plain_optimizer if accelerator.scaler is None else prepared
        self.uses_cuda_graphs = bool(args.torchcompile) and accelerator.device.type == 'cuda'
        self.sums = EpochSums(len(loader), accelerator.device)
        # factor on the gradients of a batch, by the number of batches of its update
        self.gradient_scales = {batches: torch.full((), 1 / batches, device=accelerator.device)
                                for batches in range(1, args.grad_accum_steps + 1)}
        # Accelerate adds it to the network, but not with FSDP 2
        self.autocast = accelerator.autocast if self.fsdp_version == 2 else nullcontext
        self.best: Optional[Dict[str, Any]] = None
        self.facts: Dict[str, Any] = {}  # what describes the weights of a checkpoint, besides the options
        self.eval_seconds = 0.
        self.agree_interval = 1  # updates, or validation batches, until processes check with each other again
        self.epoch = 0  # the current one; between two, the one before
        self.start = time.perf_counter()  # in a resumed run earlier, by the time before
        self.live = LiveLine(self.num_epochs, len(loader), accelerator.is_main_process)

    @property
    def learning_rate(self) -> float:
        """The mean over the parameter groups, as timm reports it."""
        rates = [group['lr'] for group in self.plain_optimizer.param_groups]
        return sum(rates) / len(rates)

    @property
    def seconds(self) -> float:
        """Duration of the run so far, including the time before it was resumed."""
        return time.perf_counter() - self.start

    # State

    def _whole_states(self) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
        """State dicts of network and optimizer, gathered if they are sharded."""
        if self.sharded:
            return get_state_dict(self.network, self.plain_optimizer, options=_WHOLE)  # type: ignore[return-value]
        return self.model.state_dict(), self.plain_optimizer.state_dict()

    def final_weights(self) -> Dict[str, torch.Tensor]:
        """What the run ends with: the averaged weights if there are any, otherwise the network's."""
        return self.average.module.state_dict() if self.average else self._whole_states()[0]

    def k_values(self) -> Dict[str, List[float]]:
        """Each ``k`` of the network by its block's name."""
        if not self.two_step_switch.two_steps:  # the whole state need not be collected
            return {}
        if not self.sharded:
            return {name: k.tolist() for name, k in k_values(self.model).items()}
        suffix, whole = '.step.k', get_model_state_dict(self.network, options=_WHOLE)
        return {name[:-len(suffix)]: tensor.tolist() for name, tensor in whole.items() if name.endswith(suffix)}

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint from the main process; the others contribute their parts.

        Raises:
            UserError: If a loss was not finite, as such weights must not become the newest checkpoint.
        """
        self.agree()  # a signal that this tells is left to the caller
        # on the CPU, as each process unpacks what all of them sent
        own = {name: buffer.cpu() for name, buffer in self._own_buffers().items()}
        states = gather_object([random_states(self.accelerator.device) | own])
        model, optimizer = self._whole_states()
        tensors = dict(model=model)
        if self.average:
            tensors['average'] = self.average.module.state_dict()
        rest = dict(
            best=self.best,
            seconds=self.seconds,
            sums=self.sums.of_all_processes(),
            processes=self.accelerator.num_processes,
            fsdp=self.fsdp_version,
            images=len(self.loader.data),
            loader=self.loader.kind,
            batches=len(self.loader),
            epochs=self.num_epochs,
            facts=self.facts,
            scheduler=schedule_state(self.scheduler),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        )
        updates = progress.epoch * self.updates_per_epoch + -(-progress.batch // self.args.grad_accum_steps)
        also_keep = self.best['checkpoint'] if self.best else None
        on_main(self.accelerator, lambda: self.store.save(
            updates, progress, tensors, optimizer, states, rest, also_keep))
        return self.store.folder / self.store.name(updates)

    def resume(self, checkpoint: Checkpoint) -> Progress:
        """Restore the state of a checkpoint.

        Raises:
            UserError: If it is of another number of processes or images, which had other batches, or of another FSDP,
                whose states have other names.
        """
        images = checkpoint.state['images']
        if images != len(self.loader.data):
            raise UserError(f'The run was started with {images:,} training images, the data now has '
                            f'{len(self.loader.data):,}; give the same data, or start another run with another '
                            '--experiment.')
        processes = checkpoint.state['processes']
        if processes != self.accelerator.num_processes:
            raise UserError(f'The run was started with {processes} process(es) and cannot resume with '
                            f'{self.accelerator.num_processes}; start the same number.')
        version = checkpoint.state['fsdp']
        if version != self.fsdp_version:
            before, now = (f'with FSDP version {n}' if n else 'without FSDP' for n in (version, self.fsdp_version))
            raise UserError(f'The run was started {before} and cannot resume {now}; start it as before.')
        if self.sharded:
            set_state_dict(
                self.network, self.plain_optimizer, model_state_dict=dict(checkpoint.group('model')),
                optim_state_dict=checkpoint.optimizer, options=_WHOLE)
        else:
            self.model.load_state_dict(checkpoint.group('model'))
            self.plain_optimizer.load_state_dict(checkpoint.optimizer)
            _match_layouts(self.plain_optimizer)
        if self.average:
            self.average.module.load_state_dict(checkpoint.group('average'))
        if self.scheduler is not None:
            load_schedule(self.scheduler, checkpoint.state['scheduler'])
        if self.accelerator.scaler is not None and checkpoint.state['scaler']:
            self.accelerator.scaler.load_state_dict(checkpoint.state['scaler'])
        self.best = checkpoint.state['best']
        self.start -= checkpoint.state['seconds']
        sums = [total / processes for total in checkpoint.state['sums']]  # each takes its share; the live line shows it
        self.sums.start(checkpoint.progress.batch, *sums)
        own = checkpoint.process_states(self.accelerator.process_index)
        restore_random_states(own, self.accelerator.device)
        for name, buffer in self._own_buffers().items():
            buffer.copy_(own[name])
        checkpoint.tensors.clear()  # not kept in memory until the run ends
        return checkpoint.progress

    def _own_buffers(self) -> Dict[str, torch.Tensor]:
        """Running statistics of one of several processes, which are shared only at the end of an epoch."""
        if self.accelerator.num_processes == 1:
            return {}
        modules = {'model': self.model} | ({'average': self.average.module} if self.average else {})
        return {f'{owner}/{name}': buffer for owner, module in modules.items()
                for name, buffer in module.named_buffers() if buffer.is_floating_point()}

    # Agreement of the processes

    def agree(self, seconds: float = 0.) -> int:
        """Check whether every loss of the epoch was finite, and whether a process received a signal.

        Processes exchange this so that they stop at the same step, and often enough for their launcher, which waits
        for half a minute.

        Args:
            seconds: Duration of an update, or of a validation batch, in this process, if known.

        Returns:
            Number of the signal, 0 for none.

        Raises:
            UserError: If a loss was not finite; it names the first such batch, the rate and the last good checkpoint.
        """
        self.sums.read()
        found = gather_object([(*self.sums.first_not_finite(), self.signals.number, seconds)])
        slowest = max(taken for *_, taken in found)
        if slowest:
            self.agree_interval = max(1, min(self.args.log_interval, int(AGREE_SECONDS / slowest)))
        bad = [(batch, lr) for batch, lr, *_ in found if batch]
        if bad:
            self._refuse_not_finite(*min(bad))
        return max(number for _, _, number, _ in found)

    def _refuse_not_finite(self, first_bad: int, lr: float) -> NoReturn:
        updates, within = divmod(first_bad - 1, self.args.grad_accum_steps)
        # a checkpoint between the last finite batch and the first bad one has the weights that caused it
        ruined = None if within else self.store.name(self.epoch * self.updates_per_epoch + updates)
        good = next((path for path in self.store.newest_first() if path.name != ruined), None)
        rest = f'the last good checkpoint is {good}' if good else 'there is no good checkpoint yet'
        raise UserError(f'The loss is not finite from batch {first_bad} of epoch {self.epoch + 1} on '
                        f'(learning rate {lr:g}); {rest}. Use a smaller learning rate.')

    # Steps

    def train_epoch(self, epoch: int, first_batch: int = 0) -> Dict[str, float]:
        """One pass over the data, or the rest of one. Sums are read from the device only at the log interval.

        Returns:
            Mean ``loss``, accuracy ``top1`` in %, and ``images_per_second`` of the pass, if it had batches left.

        Raises:
            Interrupted: After a signal, with the state saved unless the signal ended the compiler in the first step.
            UserError: If the loss is not finite.
        """
        args, accelerator = self.args, self.accelerator
        self.epoch = epoch
        self.loader.set_epoch(epoch)
        self.agree_interval = 1  # until an update's time is known
        if first_batch == 0:
            self.sums.start()
            self.two_step_switch.start_epoch(epoch, self.network)
        self.network.train()
        batches = len(self.loader)
        images_per_batch = args.batch_size * accelerator.num_processes
        start = time.perf_counter()
        signal_number = 0
        for batch, (images, targets) in enumerate(self.loader.batches(first_batch), start=first_batch):
            done = batch + 1
            is_update = done % args.grad_accum_steps == 0 or done == batches
            try:
                self.step(images, targets, epoch, batch, is_update)
            except RuntimeError as e:
                if self._signal_that_ended_the_compiler(e):
                    raise Interrupted(self.signals.number, next(iter(self.store.newest_first()), None)) from e
                raise
            self.live.advance(epoch, done)
            updates = -(-done // args.grad_accum_steps)
            is_told = is_update and updates % args.log_interval == 0
            if is_told or is_update and accelerator.num_processes > 1 and updates % self.agree_interval == 0:
                self.sums.read()  # waits for the device, which would otherwise still be computing
                seconds = (time.perf_counter() - start) / (done - first_batch)
                signal_number = self.agree(seconds * args.grad_accum_steps)
            if is_told:
                left = seconds * (batches - done + (self.num_epochs - epoch - 1) * batches)
                validations = -(-self.num_epochs // args.val_interval) - epoch // args.val_interval
                left += self.eval_seconds * validations
                error = 100 - 100 * self.sums.correct / (done * args.batch_size)  # of this process
                self.live.show(epoch, done, self.sums.loss / done, error, self.learning_rate,
                               images_per_batch / seconds, left)
            if accelerator.num_processes == 1:
                signal_number = self.signals.number
            if is_update and done < batches:
                progress = Progress(epoch, done)
                if signal_number:
                    self._save_and_stop(progress, signal_number)
                if args.recovery_interval and updates % args.recovery_interval == 0:
                    self.save(progress)
        self.live.close()
        self.agree()
        seconds = time.perf_counter() - start
        loss, correct = self.sums.of_all_processes()
        # after a stop during validation they were already shared, and a mean of equal numbers may round
        if first_batch < batches and accelerator.num_processes > 1 and args.dist_bn and not args.sync_bn:
            averages = [self.average.module] if self.average else []
            for model in (self.model, *averages):
                distribute_bn(model, accelerator.num_processes, args.dist_bn == 'reduce')
        metrics = dict(
            loss=loss / batches / accelerator.num_processes,
            top1=100 * correct / (batches * images_per_batch),
        )
        if first_batch < batches:
            metrics['images_per_second'] = (batches - first_batch) * images_per_batch / seconds
        return metrics

    def step(self, images: torch.Tensor, targets: torch.Tensor, epoch: int, batch: int, is_update: bool) -> None:
        """Forward and backward pass of one batch, and the update when its batches are complete."""
        args = self.args
        accumulate = args.grad_accum_steps
        # the last update may have fewer batches
        of_update = min(accumulate, len(self.loader) - batch // accumulate * accumulate)
        lr = self.learning_rate
        if batch % accumulate == 0:  # in between, gradients are still where the graphs put them
            self._free_graph_outputs()
        scaler = self.accelerator.scaler
        with nullcontext() if is_update else self.accelerator.no_sync(self.network):
            with self.autocast():
                logits = self.network(images)
            logits = logits.float()
            loss = self.loss(images, logits, targets)
            # Accelerate's backward would divide by its own number of batches, three more operations
            (loss if scaler is None else scaler.scale(loss)).backward(self.gradient_scales[of_update])
        if is_update:
            self._update(epoch, batch)
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        self.sums.add(lr, loss.detach(), (logits.detach().argmax(1) == labels).sum())

    def _free_graph_outputs(self) -> None:
        """Tell CUDA graphs that their outputs so far are no longer read."""
        if self.uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _update(self, epoch: int, batch: int) -> None:
        args = self.args
        self.two_step_switch.hold(epoch)
        if args.clip_grad is not None:
            self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        updates = epoch * self.updates_per_epoch + batch // args.grad_accum_steps + 1
        if self.scheduler is not None:
            self.scheduler.step_update(updates)
        if self.average is not None:
            self.average.update(self.model, step=updates)

    def _clip(self) -> None:
        args = self.args
        if self.sharded and args.clip_mode == 'norm':
            self.accelerator.clip_grad_norm_(self.network.parameters(), args.clip_grad)
            return
        self.accelerator.unscale_gradients()
        parameters = model_parameters(self.model, exclude_head='agc' in args.clip_mode)
        dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)

    # Between steps

    def _signal_that_ended_the_compiler(self, error: RuntimeError) -> int:
        """Number of the signal that a terminal sent to the compiler too, 0 if there was none. With several processes
        the launcher ends the others."""
        is_of_compiler = type(error).__module__.startswith(('torch._dynamo', 'torch._inductor'))
        return self.signals.number if is_of_compiler and self.accelerator.num_processes == 1 else 0

    def _save_and_stop(self, progress: Progress, signal_number: int) -> NoReturn:
        folder = self.save(progress)
        self.accelerator.wait_for_everyone()  # when one process ends, the launcher ends the others
        raise Interrupted(signal_number, folder)

    def evaluate(self, loader: BatchLoader, epoch: int) -> Dict[str, float]:
        """Count the errors of the weights that the run would end with now, after an epoch.

        Raises:
            Interrupted: After a signal, with the state saved; a resumed run validates first.
        """
        start = time.perf_counter()
        signal_number, self.agree_interval = 0, 1
        self.network.eval()
        several = self.accelerator.num_processes > 1

        def forward(images: torch.Tensor) -> torch.Tensor:
            self._free_graph_outputs()  # otherwise each batch would be recorded as its own graph
            with self.autocast():
                return self.network(images)

        def until_a_signal() -> Iterator[Any]:
            nonlocal signal_number
            for done, batch in enumerate(loader, start=1):
                yield batch
                if not several:
                    signal_number = self.signals.number
                elif done % self.agree_interval == 0:
                    signal_number = self.agree((time.perf_counter() - start) / done)
                if signal_number:
                    return

        with self._averaged_weights():
            try:
                result = evaluate(forward, until_a_signal(), gather=gather_object)
            except RuntimeError as e:
                signal_number = self._signal_that_ended_the_compiler(e)
                if not signal_number:
                    raise
        if signal_number:
            self._save_and_stop(Progress(epoch, len(self.loader)), signal_number)
        self.eval_seconds = time.perf_counter() - start
        return result

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The averaged weights in the network, in place, so that compiled code stays valid."""
        if self.average is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def end_epoch(self, epoch: int, evaluation: Optional[Dict[str, float]]) -> None:
        """Step the schedule, and record the best epoch.

        Raises:
            UserError: If the run ends with a loss that is not finite.
        """
        if evaluation and epoch + 1 == self.num_epochs and not math.isfinite(evaluation['loss']):
            raise UserError(f'The loss on {self.args.val_split} is not finite after the last epoch, so the run '
                            'ends without weights. Use a smaller learning rate.')
        metric = self.args.eval_metric
        value = evaluation[metric] if evaluation else None
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, value)
        if value is None or not math.isfinite(value):
            return
        if self.best is None or (value < self.best['value'] if metric == 'loss' else value > self.best['value']):
            updates = (epoch + 1) * self.updates_per_epoch
            self.best = dict(metric=metric, value=value, epoch=epoch, checkpoint=self.store.name(updates))

    def stop_after_epoch(self, progress: Progress, folder: Path) -> None:
        """Stop between two epochs after a signal; the checkpoint of the epoch is already written."""
        number = self.agree()
        if number and progress.epoch < self.num_epochs:
            raise Interrupted(number, folder)


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded states the strides of their parameters, as fused kernels read both in the same memory order, and
    their own memory, as on some disks the file that they were read from cannot be removed otherwise."""
    for parameter, state in getattr(optimizer, '_base_optimizer', optimizer).state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                like = parameter if value.shape == parameter.shape else value
                state[name] = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
