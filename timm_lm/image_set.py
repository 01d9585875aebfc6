"""A decoded split, and its cache on disk in the assets folder of the Hub's cache."""
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import sha256, sync


@dataclass(frozen=True)
class ImageSet:
    """A decoded split.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        class_names: Names in the order of the labels, if the data set tells them.
        remark: What a person should know of how it was read.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: Optional[Tuple[str, ...]] = None
    remark: str = ''

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> 'ImageSet':
        """The same images on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def part(self, start: int, stop: int) -> 'ImageSet':
        """The images from one index to another, without the latter."""
        return replace(self, images=self.images[start:stop], labels=self.labels[start:stop])


def cache_path(paths: List[Path], settings: Dict[str, Any]) -> Optional[Path]:
    """Where the decoded split is kept: known by the contents of its files, None if there is no place for a cache."""
    from huggingface_hub import cached_assets_path
    content = [sha256(path) for path in paths]
    key = hashlib.sha256(json.dumps([3, content, settings], sort_keys=True).encode()).hexdigest()[:32]
    try:
        return cached_assets_path('timm-lm', namespace='decoded') / f'{key}.safetensors'
    except (OSError, ValueError):
        return None


def read_cache(path: Optional[Path]) -> Optional[ImageSet]:
    """The decoded split, None if there is no whole one."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, 'pt') as f:
            names = json.loads((f.metadata() or {})['class_names'])
            return ImageSet(f.get_tensor('images'), f.get_tensor('labels'), tuple(names) if names else None)
    except (SafetensorError, KeyError, ValueError, OSError):
        return None  # cut short or of another kind: decoded anew and written over


def write_cache(path: Optional[Path], data: ImageSet) -> None:
    """Write beside and rename; a cache that can not be written (full disk, no right) is done without."""
    if path is None:
        return
    temporary = None
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, suffix='.tmp')
        os.close(fd)
        save_file(dict(images=data.images, labels=data.labels), temporary,
                  metadata=dict(class_names=json.dumps(data.class_names)))
        sync(Path(temporary))
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
