"""A decoded split, and its cache on disk in the assets folder of the Hub's cache."""
import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from safetensors import SafetensorError, safe_open

from .files import atomic_file, save_tensors

UNUSED_DAYS = 30  # after which a cached split is removed


@dataclass(frozen=True)
class DecodedImages:
    """A decoded split.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        class_names: Names in the order of the labels, if the data set has them.
        remark: What the user should know about how it was read.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: Optional[Tuple[str, ...]] = None
    remark: str = ''

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> 'DecodedImages':
        """The same images on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def part(self, start: int, stop: int) -> 'DecodedImages':
        """The images from ``start`` up to ``stop``, exclusive."""
        return replace(self, images=self.images[start:stop], labels=self.labels[start:stop])


def cache_path(source: Sequence[str], settings: Dict[str, Any]) -> Optional[Path]:
    """Where the decoded split is cached, None if there is no place for a cache.

    Args:
        source: What identifies it, such as the digests of its files.
        settings: How it is decoded.
    """
    from huggingface_hub import cached_assets_path
    key = hashlib.sha256(json.dumps([source, settings], sort_keys=True).encode()).hexdigest()[:32]
    try:
        return cached_assets_path('timm-lm', namespace='decoded') / f'{key}.safetensors'
    except (OSError, ValueError):
        return None


def stamp(files: Sequence[str], labels: torch.Tensor) -> str:
    """Digest of the paths, inodes, sizes, times and labels of files, which changes with them.

    Raises:
        OSError: If one of them is gone.
    """
    facts = [(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
             for path, found in zip(files, map(os.stat, files))]
    return hashlib.sha256(json.dumps([facts, labels.tolist()]).encode()).hexdigest()


def read_cache(path: Optional[Path], content: str = '') -> Optional[DecodedImages]:
    """The decoded split, None if there is no intact one of this content."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, 'pt') as f:
            metadata = f.metadata() or {}
            names = json.loads(metadata['class_names'])
            if metadata['content'] != content:
                return None
            data = DecodedImages(f.get_tensor('images'), f.get_tensor('labels'), tuple(names) if names else None)
        with suppress(OSError):
            os.utime(path)  # it is in use
        return data
    except (SafetensorError, KeyError, ValueError, OSError):
        return None  # truncated or of another format: decoded again and overwritten


def write_cache(path: Optional[Path], data: DecodedImages, content: str = '') -> None:
    """Write a temporary file and rename it; if it cannot be written (full disk, no permission), there is no cache.

    Args:
        path: From ``cache_path``.
        data: The decoded split.
        content: What ``read_cache`` must ask for, if the path does not determine it.
    """
    if path is None:
        return
    with suppress(OSError, SafetensorError), atomic_file(path) as temporary:
        save_tensors(dict(images=data.images, labels=data.labels), temporary,
                     dict(class_names=json.dumps(data.class_names), content=content))
    _remove_unused(path.parent)


def _remove_unused(folder: Path) -> None:
    """Remove what was not read for a month, such as that of moved data, and what killed processes left."""
    now, found = time.time(), []
    with suppress(OSError):
        found = list(folder.iterdir())
    for path in found:
        with suppress(OSError):  # that of another user, or removed by another process
            days = (now - path.stat().st_mtime) / 86400
            if days > (UNUSED_DAYS if path.suffix == '.safetensors' and path.name[0] != '.' else 1):
                path.unlink()
