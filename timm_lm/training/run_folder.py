"""The folder of a run: its place, its options and result, and the checkpoint that a run resumes from."""
import argparse
import errno
import json
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, Optional

import yaml
from timm.models import parse_model_name, safe_model_name

from timm_lm.errors import UserError, one_line
from timm_lm.files import write_text

from .checkpoint import Checkpoint, CheckpointStore, is_checkpoint
from .option_rules import without_effect
from .places import last_name

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

ARGS_NAME = 'args.yaml'
RESULT_NAME = 'result.json'  # of a finished run
# Options that may differ between a run and its resumption.
FREE_OPTIONS = (
    'config', 'resume', 'output', 'experiment', 'data_dir', 'dataset_download', 'log_interval', 'recovery_interval',
    'checkpoint_hist', 'workers', 'pin_mem', 'dry_run', 'log_tensorboard', 'log_wandb', 'wandb_project', 'wandb_tags',
    'wandb_resume_id', 'device', 'torchcompile', 'torchcompile_mode',
)
_PLACES = ('model', 'grow_from', 'kd_model_name', 'initial_checkpoint', 'pretrained_path', 'class_map')
_OTHER_RUN = ('The run folder {} holds another run; give another --experiment, resume it with --resume auto, or '
              'remove it.')


def run_folder(args: argparse.Namespace) -> Path:
    """The path of the run folder, which is not created yet.

    Raises:
        UserError: If a run is to be resumed and none is named, or two are.
    """
    if args.resume not in ('', 'auto'):
        if Path(args.resume).parent.name != 'checkpoints' or not is_checkpoint(Path(args.resume)):
            raise UserError(f'--resume {args.resume} is not a checkpoint; give RUN/checkpoints/step-... (rename one '
                            'that was set aside), or auto for the newest of a run.')
        folder = Path(args.resume).parent.parent
        named = (args.output or str(folder.parent), args.experiment or folder.name)
        if Path(*named).resolve() != folder.resolve():
            raise UserError(f'--resume continues in the folder of the checkpoint, {folder}, not in {Path(*named)}; '
                            'leave out --output and --experiment.')
        return folder
    if args.resume == 'auto' and not args.experiment:
        raise UserError('--resume auto looks in the folder of a run; name it with --experiment.')
    model = safe_model_name(last_name(args.model).removeprefix('hf-hub:'), remove_source=False)
    name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S-%f}-{model}'
    folder = Path(args.output or 'output/train') / name
    if {*'#?'} & {*str(folder)} and parse_model_name(f'local-dir:{folder}')[1] != str(folder):
        raise UserError(f'This version of timm cannot load weights from {folder}, as it cuts paths at # and ?; choose '
                        'another --output and --experiment.')
    return folder


def find_checkpoint(args: argparse.Namespace, folder: Path, store: CheckpointStore,
                    tell: Callable[[str], None]) -> Optional[Checkpoint]:
    """The checkpoint to resume from, None to start from scratch.

    Raises:
        UserError: If the folder holds another run, or one with other options.
    """
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise UserError(f'The run folder {folder} cannot be created, a file is in its way; choose another --output.')
    if not args.resume:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(_OTHER_RUN.format(folder))
        return None
    if (folder / ARGS_NAME).is_file():
        _compare_options(args, folder)
    if args.resume != 'auto':
        return store.read(Path(args.resume))
    return store.newest(tell)


def read_result(folder: Path) -> Dict[str, Any]:
    """What a finished run has in ``result.json``, nothing for an unfinished one."""
    path = folder / RESULT_NAME
    return dict(json.loads(path.read_text(encoding='utf-8'))) if path.is_file() else {}


def read_args(folder: Path) -> Dict[str, Any]:
    """The options that a run was started with, from its ``args.yaml``.

    Raises:
        UserError: If it has no such file, or a damaged one.
    """
    path = folder / ARGS_NAME
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f'The options of the run in {path} cannot be read ({one_line(e)}); restore the file.') from e
    if not isinstance(args, dict):
        raise UserError(f'{path} holds no options of a run; restore the file.')
    return args


def _without_folder(name: str, value: Any) -> Any:
    """An option's value; of a path, the last name, as what is there may have moved with the run."""
    return last_name(value) if value and name in _PLACES else value


def _compare_options(args: argparse.Namespace, folder: Path) -> None:
    before = read_args(folder)
    now = yaml.safe_load(yaml.safe_dump(vars(args)))
    before = now | before
    idle = {name for options in (now, before) for names, _ in without_effect(options) for name in names}
    differing = [name for name in now if name not in (*FREE_OPTIONS, *idle)
                 and _without_folder(name, now[name]) != _without_folder(name, before[name])]
    if differing:
        shown = ', '.join(f'{name} (was {before[name]}, is {now[name]})' for name in differing)
        raise UserError(f'The run in {folder} was started with other options: {shown}; give the same, or start another '
                        'run with another --experiment.')


@contextmanager
def own_run_folder(folder: Path, args: argparse.Namespace, resumed: bool,
                   check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Create the folder, keep other processes out of it, and write the options of a new run.

    Args:
        folder: The run folder.
        args: Options.
        resumed: Whether the run resumes from a checkpoint.
        check: Called when others are kept out, before anything is written; what it raises is propagated.

    The lock is a POSIX one: the system releases it however the process ends, and workers do not inherit it. On Windows
    and disks without locks there is none.

    Raises:
        UserError: If the folder cannot be written, another run was started there in the meantime, or another process
            runs there.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'checkpoints').mkdir(exist_ok=bool(args.resume))  # fails for all but the first of several at once
            _lock(stack.enter_context(open(folder / '.lock', 'a')), folder)
            check()
            if not resumed:
                left_out = ('config', 'resume', 'dry_run')
                options = {name: value for name, value in vars(args).items() if name not in left_out}
                write_text(folder / ARGS_NAME, yaml.safe_dump(options, sort_keys=True))
        except FileExistsError as e:
            raise UserError(_OTHER_RUN.format(folder)) from e
        except OSError as e:
            cure = 'copy it to a disk that can be, and resume it there' if resumed else (
                'choose another place with --output')
            raise UserError(f'The run folder {folder} cannot be written ({e}); {cure}.') from e
        yield


def _lock(file: IO[str], folder: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f'The run in {folder} is active in another process; wait for it to end, or stop it.') from e
