"""Files and folders that are written under a temporary name and renamed; files of tensors, locks and digests."""
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import UserError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_OLD = '.old.'  # in the name of a folder that holds one that is being replaced


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    try:
        fd = os.open(path, os.O_RDWR if os.name == 'nt' else os.O_RDONLY)  # Windows flushes only files open for writing
    except PermissionError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # from network disks that do not support this for folders
            raise
    finally:
        os.close(fd)


def _put_in_place(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}{_OLD}'))
    os.replace(folder, aside / folder.name)
    try:
        os.replace(new, folder)
    except BaseException:  # also an interrupt, which may come after the replacement
        if not folder.exists():
            os.replace(aside / folder.name, folder)
        shutil.rmtree(aside)  # not reached if the old one could not be put back
        raise
    shutil.rmtree(aside)


def whole_entries(folder: Path) -> List[Path]:
    """The entries of a folder, sorted, without what a killed process left unfinished or set aside."""
    return sorted(folder.glob('[!.]*'))


def files_below(folder: Union[str, Path]) -> Iterator[Path]:
    """All files below a folder, following links, as timm does in a folder of images."""
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, and rename it."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8', errors='backslashreplace', newline='\n')  # undecodable names


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A new file to write, which replaces ``path`` when the block ends without an error."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')  # several processes may write at once
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that lock it; no lock on Windows, or on disks that have none."""
    with ExitStack() as stack:
        if fcntl is not None:
            fd = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, fd)
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def replaced(parent: Path, prefix: str) -> List[Path]:
    """Folders that a killed process was replacing: set aside, with no new one in their place.

    Args:
        parent: Where the folders were.
        prefix: Prefix of their names.
    """
    aside = parent.glob(f'.{prefix}*{_OLD}*/{prefix}*')
    return [path for path in aside if not (parent / path.name).exists()]


@contextmanager
def writing(what: str, cure: str) -> Iterator[None]:
    """Report in one line if something cannot be written.

    Args:
        what: What is written.
        cure: What to do.

    Raises:
        UserError: If the block fails to write, as on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise UserError(f'{what} could not be written ({e}). {cure}') from e


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder, removed when the block ends if it is still there.

    Those of ``tempfile`` are their owner's alone, which on Windows also what is moved out of them remains.

    Args:
        parent: Where to make it.
        prefix: Prefix of its name.
    """
    folder = parent / f'{prefix}{secrets.token_hex(4)}'
    folder.mkdir()
    try:
        yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


@contextmanager
def atomic_folder(folder: Union[str, Path]) -> Iterator[Path]:
    """A new folder to write into, which replaces ``folder`` when the block ends without an error."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent, f'.{folder.name}.') as temporary:
        yield temporary
        for path in (*(path for path in temporary.rglob('*') if path.is_file()), temporary):
            sync(path)
        _put_in_place(temporary, folder)
        sync(folder.parent)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Optional[Dict[str, str]] = None) -> None:
    """Write a safetensors file with the permissions of any new file; safetensors gives them to the owner alone.

    Tensors that share memory, as a network's tied weights do, are written one by one. safetensors refuses them, and its
    ``save_model`` would keep only one of the names, but timm's strict loading needs all.

    Args:
        tensors: By name, on any device.
        path: The file.
        metadata: Texts for its header.
    """
    own: Dict[str, torch.Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in places else tensor
        places.add(place)
    path.touch()
    mode = path.stat().st_mode
    save_file(own, path, metadata)
    with suppress(OSError):  # some network disks have their own permissions
        path.chmod(mode)
