"""Checkpoints of a training: complete, written whole or not at all, found again and verified.

A checkpoint is a folder ``step-<updates>``: ``state.safetensors`` holds every tensor that changes (network, optimizer,
averaged weights, random states and running statistics of each process), ``state.json`` the rest with the digests of
both.
"""
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_lm.errors import RESUME, UserError
from timm_lm.files import atomic_folder, replaced, save_tensors, sha256, writing

TENSORS, STATE = 'state.safetensors', 'state.json'
PREFIX = 'step-'
_PARAM_GROUPS = 'param_groups/'  # prefix of tensors that belong to a parameter group


@dataclass
class Progress:
    """How far a training has come: the epoch, and how many of its batches are done.

    All batches of an epoch done: its validation is next. No batch done: the epoch before is over, with its validation.
    """

    epoch: int = 0
    batch: int = 0


@dataclass
class Checkpoint:
    """A checkpoint as read: its folder, its tensors by name, and the rest."""

    folder: Path
    tensors: Dict[str, torch.Tensor]
    state: Dict[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress(**self.state['progress'])

    def group(self, name: str) -> Dict[str, torch.Tensor]:
        """The tensors of one group, by name without its prefix."""
        prefix = f'{name}/'
        return {key[len(prefix):]: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    def process_states(self, rank: int) -> Dict[str, torch.Tensor]:
        """The states of a process, as it gave them to ``save``."""
        return self.group(f'process{rank}')

    @property
    def optimizer(self) -> Dict[str, Any]:
        """The state dict of the optimizer."""
        return _join_optimizer(self.group('optimizer'), self.state['optimizer'])


def _split_optimizer(state: Dict[str, Any]) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """Tensors and the rest of an optimizer's state, which is keyed by the number or the name of a parameter."""
    tensors: Dict[str, torch.Tensor] = {}
    rest: Dict[str, Any] = {}
    for index, values in state['state'].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f'{index}.{key}'] = value
            else:
                rest[f'{index}.{key}'] = value
    groups = []
    for number, group in enumerate(state['param_groups']):  # some optimizers count their steps there
        found = {key: value for key, value in group.items() if isinstance(value, torch.Tensor)}
        tensors.update({f'{_PARAM_GROUPS}{number}/{key}': value for key, value in found.items()})
        groups.append({key: str(value) if isinstance(value, torch.dtype) else value
                       for key, value in group.items() if key not in found})
    return tensors, dict(values=rest, param_groups=groups)


def _join_optimizer(tensors: Dict[str, torch.Tensor], rest: Dict[str, Any]) -> Dict[str, Any]:
    state: Dict[Any, Dict[str, Any]] = {}
    groups = [{key: getattr(torch, value[6:]) if str(value).startswith('torch.') else value
               for key, value in group.items()} for group in rest['param_groups']]
    for name, value in {**tensors, **rest['values']}.items():
        if name.startswith(_PARAM_GROUPS):
            number, _, key = name.removeprefix(_PARAM_GROUPS).partition('/')
            groups[int(number)][key] = value
            continue
        index, _, key = name.rpartition('.')
        state.setdefault(int(index) if index.isdigit() else index, {})[key] = value
    return dict(state=state, param_groups=groups)


def state_digest(state: Dict[str, Any]) -> str:
    """SHA-256 of the values of ``state.json``, without this digest."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def random_states(device: torch.device) -> Dict[str, torch.Tensor]:
    """Random states of this process, of the CPU and of the device that it trains on, by their types."""
    states = {'cpu': torch.get_rng_state()}
    if device.type != 'cpu':
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Restore what ``random_states`` gave; a run that resumes on a device of another type has none for it."""
    torch.set_rng_state(states['cpu'])
    if device.type != 'cpu' and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


class Damaged(UserError):
    """A damaged or incomplete checkpoint."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint; one that was set aside, copied or archived has another."""
    return re.fullmatch(rf'{PREFIX}\d+', folder.name) is not None


class CheckpointStore:
    """The checkpoints of one run, in their own folder."""

    def __init__(self, folder: Path, keep: int = 10):
        """
        Args:
            folder: Where they are.
            keep: How many of the newest to keep.
        """
        self.folder = folder
        self.keep = keep

    @staticmethod
    def name(updates: int) -> str:
        """Name of the checkpoint after this many updates."""
        return f'{PREFIX}{updates:09d}'

    def newest_first(self) -> List[Path]:
        """Folders of the checkpoints, intact or not, and of those that a killed process was replacing."""
        found = [path for path in (*self.folder.glob(f'{PREFIX}*'), *replaced(self.folder, PREFIX))
                 if is_checkpoint(path) and path.is_dir()]
        return sorted(found, key=lambda path: path.name, reverse=True)

    def save(
            self,
            updates: int,
            progress: Progress,
            tensors: Dict[str, Dict[str, torch.Tensor]],
            optimizer: Dict[str, Any],
            process_states: List[Dict[str, torch.Tensor]],
            rest: Dict[str, Any],
            also_keep: Optional[str] = None,
    ) -> Path:
        """Write a checkpoint, and remove the oldest beyond ``keep``.

        Args:
            updates: Optimizer updates so far.
            progress: How far the training has come.
            tensors: Groups of tensors by name, such as the state dict of the network.
            optimizer: State dict of the optimizer.
            process_states: Tensors of each process that the others do not have, such as its ``random_states``.
            rest: JSON-serialisable states.
            also_keep: Name of an older checkpoint to keep.

        Raises:
            UserError: If it cannot be written, as on a full disk; earlier ones stay intact.
        """
        optimizer_tensors, optimizer_rest = _split_optimizer(optimizer)
        groups = dict(tensors, optimizer=optimizer_tensors)
        groups.update({f'process{rank}': states for rank, states in enumerate(process_states)})
        flat = {f'{group}/{key}': tensor for group, named in groups.items() for key, tensor in named.items()}
        state = json.loads(json.dumps(dict(rest, progress=asdict(progress), optimizer=optimizer_rest)))  # as read back
        folder = self.folder / self.name(updates)
        earlier = next((path for path in self.newest_first() if path != folder), None)
        cure = (f'The one before is {earlier}. Make room, then resume {RESUME}.' if earlier else
                'There is none before. Make room, then start again (with --experiment also by --resume auto).')
        with writing(f'The checkpoint {folder}', cure), atomic_folder(folder) as temporary:
            save_tensors(flat, temporary / TENSORS)
            state['sha256'] = sha256(temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(dict(state, state_sha256=state_digest(state))))
        for old in self.newest_first()[self.keep:]:
            if old.name != also_keep:
                shutil.rmtree(old, ignore_errors=True)  # the next one tries again
        return folder

    def remove_unfinished(self) -> None:
        """Remove checkpoints that a killed process left half-written; one that it was replacing is kept."""
        for folder in replaced(self.folder, PREFIX):
            if not (self.folder / folder.name).exists():  # there may be two copies
                os.replace(folder, self.folder / folder.name)
        for folder in self.folder.glob(f'.{PREFIX}*'):
            shutil.rmtree(folder, ignore_errors=True)

    def set_aside_after(self, checkpoint: Optional[Checkpoint]) -> List[Path]:
        """Rename the checkpoints after the one that a run resumes from, damaged or superseded, so that they do not
        count as its newest.

        Args:
            checkpoint: The one it resumes from, None if it starts from scratch.

        Returns:
            Where they are now.
        """
        now = f'{datetime.now():%Y%m%d-%H%M%S-%f}'
        resumed = checkpoint.folder.name if checkpoint else ''
        return [folder.rename(folder.with_name(f'set-aside-{now}-{folder.name}'))
                for folder in self.newest_first() if folder.name > resumed]

    def read(self, folder: Path) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            UserError: If it does not exist or cannot be read.
            Damaged: If it is damaged or incomplete.
        """
        if not folder.is_dir():
            raise UserError(f'There is no checkpoint {folder}; give RUN/checkpoints/step-... (for --resume also auto).')
        try:
            state = json.loads((folder / STATE).read_text(encoding='utf-8'))
            told = state.pop('state_sha256')
            if sha256(folder / TENSORS) != state['sha256'] or told != state_digest(state):
                raise ValueError('its digest differs')
            return Checkpoint(folder, load_file(folder / TENSORS), state)
        except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as e:
            raise Damaged(f'The checkpoint {folder} is damaged or incomplete ({e}).') from e
        except OSError as e:
            raise UserError(f'The checkpoint {folder} cannot be read ({e}); check the disk and its permissions, and '
                            'try again.') from e

    def newest_state(self) -> Dict[str, Any]:
        """What the newest readable checkpoint records besides its tensors, which are not read."""
        for folder in self.newest_first():
            with suppress(OSError, TypeError, ValueError):
                return dict(json.loads((folder / STATE).read_text(encoding='utf-8')))
        return {}

    def newest(self, tell: Any = print) -> Optional[Checkpoint]:
        """The newest intact checkpoint, None if there are no checkpoints; each skipped one is reported.

        Raises:
            UserError: If one cannot be read, or all of them are damaged.
        """
        folders = self.newest_first()
        for folder in folders:
            try:
                return self.read(folder)
            except Damaged as e:
                tell(f'{e} It is skipped for the one before.')
        if folders:
            raise UserError(f'No checkpoint in {self.folder} is intact; restore one, or remove them to start anew.')
        return None
