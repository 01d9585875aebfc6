"""Where pretrained weights come from (shipped, published on the Hub, or nowhere), and digests of the shipped ones."""
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Dict, Optional

from timm_lm.errors import UserError, one_line
from timm_lm.files import sha256, whole_entries, write_text

WEIGHTS_NAME = 'model.safetensors'
DIGESTS_NAME = 'SHA256SUMS'
PUBLISHED_NAME = 'published.json'

_REMEDY = 'install timm-lm again, or restore the file'
_PACKAGE = Path(__file__).resolve().parents[1]


def weights_dir() -> Path:
    """The folder of the shipped weights: inside an installed package, or at the top of a checkout."""
    installed, checkout = _PACKAGE / 'weights', _PACKAGE.parent
    if not installed.is_dir() and (checkout / 'pyproject.toml').is_file() and (checkout / 'weights').is_dir():
        return checkout / 'weights'
    return installed


def read_digests(folder: Path) -> Dict[str, str]:
    """The digests in a folder's ``SHA256SUMS``, by path relative to the folder; empty if there is none.

    Raises:
        UserError: If the file is damaged.
    """
    table = folder / DIGESTS_NAME
    if not table.is_file():
        return {}
    text = table.read_text(encoding='utf-8', errors='replace')
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    if any(len(words) != 2 for words in lines):
        raise UserError(f'The digests of weights in {table} are damaged; {_REMEDY}.')
    return {path: digest for digest, path in lines}


def write_digests(folder: Path) -> None:
    """Write ``SHA256SUMS`` for all weights folders in a folder."""
    found = [path / WEIGHTS_NAME for path in whole_entries(folder) if (path / WEIGHTS_NAME).is_file()]
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in found}
    if digests != read_digests(folder):
        write_text(folder / DIGESTS_NAME, ''.join(f'{digest}  {path}\n' for path, digest in digests.items()))


@cache
def _published(folder: Path) -> Dict[str, Dict[str, str]]:
    """The record of weights on the Hub. A damaged one only warns, as importing this package reads it."""
    path = folder / PUBLISHED_NAME
    try:
        record = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        return {name: dict(repo_id=where['repo_id'], revision=where['revision']) for name, where in record.items()}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
        warnings.warn(f'The record of published weights in {path} is damaged ({one_line(e)}) and ignored; {_REMEDY}.',
                      stacklevel=2)
        return {}


def weight_source(name: str, cfg: Dict[str, Any]) -> Dict[str, Any]:
    """Complete a pretrained config with the nearest source of its weights.

    Args:
        name: Model name with tag.
        cfg: Pretrained config, with or without a source of its own.

    Returns:
        The config with ``file`` if the weights ship, otherwise with ``hf_hub_id`` if they are recorded as published,
        otherwise unchanged.
    """
    folder = weights_dir()
    file = folder / name / WEIGHTS_NAME
    if file.is_file():
        return dict(cfg, file=str(file))
    record = _published(folder).get(name)
    if record:
        return dict(cfg, hf_hub_id=f"{record['repo_id']}@{record['revision']}")
    return cfg


def sources_of_tags(name: str, cfgs: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """The configs of a network's tags with the sources of their weights, for ``generate_default_cfgs``.

    Args:
        name: The network.
        cfgs: Pretrained configs by tag. The first one fixes the number of classes of the bare name.

    Returns:
        The configs by name and tag. timm's default is the first one with weights for as many classes as the first
        tag, or the first tag if there is none.
    """
    found = {tag: weight_source(f'{name}.{tag}', cfg) for tag, cfg in cfgs.items()}
    first = next(iter(found))
    with_weights = [tag for tag, cfg in found.items() if {'file', 'hf_hub_id'} & cfg.keys()]
    default = next((tag for tag in with_weights if found[tag]['num_classes'] == found[first]['num_classes']), first)
    if with_weights and with_weights[0] != default:  # timm would take that one; the mark and last place make ours win
        found[f'{default}*'] = found.pop(default)
    return {f'{name}.{tag}': cfg for tag, cfg in found.items()}


def is_shipped(file: Optional[str]) -> bool:
    """Whether a file of weights, or its folder, is among the shipped ones."""
    return file is not None and weights_dir() in Path(file).parents


def check_shipped(file: Optional[str]) -> None:
    """Check shipped weights, a file or its folder, against the table of digests. Other weights pass unchecked.

    Raises:
        UserError: If the file is missing, is not in the table, or does not match it.
    """
    if file is None or not is_shipped(file):
        return
    folder = weights_dir()
    path = Path(file) / WEIGHTS_NAME if Path(file).is_dir() else Path(file)
    expected = read_digests(folder).get(path.relative_to(folder).as_posix())
    if not path.is_file():
        raise UserError(f'The shipped weights {path} are missing; {_REMEDY}.')
    if expected is None:
        raise UserError(f'The shipped weights {path} have no digest in {folder / DIGESTS_NAME}; {_REMEDY}.')
    if sha256(path) != expected:
        raise UserError(f'The shipped weights {path} are damaged (SHA-256 differs from {DIGESTS_NAME}); {_REMEDY}.')
