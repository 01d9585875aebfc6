"""Files and folders that are written under a temporary name and renamed; their permissions, locks and digests."""
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Dict, Iterator, List, Union

import torch
from safetensors import SafetensorError

from .errors import UserError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_UMASK = threading.Lock()
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
def atomic_file(path: Path, name: str = '') -> Iterator[Path]:
    """A new file to write, which replaces ``path`` when the block ends without an error.

    Args:
        path: The file to write.
        name: Name of the new file until then; must differ between processes if several may write at once.
    """
    temporary = path.with_name(name or f'.{path.name}.new')
    try:
        yield temporary
        give_usual_rights(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def give_usual_rights(path: Path) -> None:
    """Give a file or folder the default permissions; ``tempfile`` and safetensors allow only the owner."""
    with _UMASK:
        umask = os.umask(0o077)  # for a moment, in which other threads may create files
        os.umask(umask)
    with suppress(OSError):  # some network disks have their own permissions
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


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
        for path in (*temporary.rglob('*'), temporary):
            give_usual_rights(path)
        for path in (*(path for path in temporary.rglob('*') if path.is_file()), temporary):
            sync(path)
        _put_in_place(temporary, folder)
        sync(folder.parent)


def own_memory(tensors: Dict[str, torch.Tensor]) -> None:
    """Copy tensors that share memory with an earlier one, as a network's tied weights do; safetensors refuses them.

    Its ``save_model`` would keep only one of the names, but timm's strict loading needs all.

    Args:
        tensors: By name; changed in place.
    """
    seen = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
