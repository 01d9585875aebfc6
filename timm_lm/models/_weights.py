"""Where pretrained weights come from: shipped with the package, published on the Hub, or nowhere."""
import json
from functools import cache
from pathlib import Path
from typing import Any, Dict, Optional

from timm_lm.errors import UserError
from timm_lm.files import sha256

WEIGHTS_NAME = 'model.safetensors'
DIGESTS_NAME = 'SHA256SUMS'
PUBLISHED_NAME = 'published.json'

_PACKAGE = Path(__file__).resolve().parents[1]


def weights_dir() -> Path:
    """The folder of the weights that ship: inside an installed package, at the top of a checkout."""
    installed, checkout = _PACKAGE / 'weights', _PACKAGE.parent
    if not installed.is_dir() and (checkout / 'pyproject.toml').is_file() and (checkout / 'weights').is_dir():
        return checkout / 'weights'
    return installed


def read_digests(folder: Path) -> Dict[str, str]:
    """Digests by path, relative to the folder, of its ``SHA256SUMS``; empty if there is none."""
    table = folder / DIGESTS_NAME
    if not table.is_file():
        return {}
    return {path: digest for digest, path in (line.split(maxsplit=1) for line in table.read_text().splitlines())}


@cache
def _published(folder: Path) -> Dict[str, Dict[str, str]]:
    path = folder / PUBLISHED_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def weight_source(name: str, cfg: Dict[str, Any]) -> Dict[str, Any]:
    """Complete a pretrained config with the nearest source of its weights.

    Args:
        name: Model name with tag.
        cfg: Pretrained config without a source, or with one that is left as it is.

    Returns:
        The config with ``file`` if the weights ship, else with ``hf_hub_id`` if they are recorded as published, else
        unchanged.
    """
    folder = weights_dir()
    file = folder / name / WEIGHTS_NAME
    if file.is_file():
        return dict(cfg, file=str(file))
    record = _published(folder).get(name)
    if record:
        return dict(cfg, hf_hub_id=f"{record['repo_id']}@{record['revision']}")
    return cfg


def check_shipped(file: Optional[str]) -> None:
    """Compare weights that ship, a file or its folder, with the table of digests. Those from elsewhere pass.

    Raises:
        UserError: If the file is gone, is not in the table, or differs from it.
    """
    folder = weights_dir()
    if file is None or folder not in Path(file).parents:
        return
    path = Path(file) / WEIGHTS_NAME if Path(file).is_dir() else Path(file)
    expected = read_digests(folder).get(path.relative_to(folder).as_posix())
    remedy = 'install timm-lm again, or restore the file'
    if not path.is_file():
        raise UserError(f'The shipped weights {path} are missing; {remedy}.')
    if expected is None:
        raise UserError(f'The shipped weights {path} have no digest in {folder / DIGESTS_NAME}; {remedy}.')
    if sha256(path) != expected:
        raise UserError(f'The shipped weights {path} are damaged (SHA-256 differs from {DIGESTS_NAME}); {remedy}.')
