"""All ways to name a network: timm's registry with or without a tag, weights folders, Hub repos."""
import difflib
import os
import re
from pathlib import Path
from typing import Any, Dict, List

import timm

from .errors import UserError, one_line
from .model_config import TimmModel
from .weights_folder import CONFIG_NAME, load_folder, read_config


def our_models() -> List[str]:
    """Names of the networks of this package."""
    return timm.list_models(module='lm_resnet')


def is_ours(name: str) -> bool:
    """Whether a name, with or without a tag, is one of this package's networks."""
    return timm.models.get_arch_name(name) in our_models()


def check_name(name: str) -> None:
    """Check a name of timm's registry, with or without a tag.

    Raises:
        UserError: If the network or the tag is unknown.
    """
    architecture, dot, tag = name.partition('.')
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        hint = f' Did you mean {near[0]}?' if near else ''
        raise UserError(f"There is no model '{architecture}'.{hint} `timm-lm list` shows the names.")
    tags = model_tags(architecture)
    if dot and tag not in tags:
        raise UserError(f"{architecture} has no tag '{tag}'; its tags are: {', '.join(tags) or 'none'}.")


def model_tags(architecture: str) -> List[str]:
    """Tags of a network, the default first."""
    return [name.partition('.')[2] for name in timm.models.get_arch_pretrained_cfgs(architecture) if '.' in name]


def with_default_tag(name: str) -> str:
    """A name of timm's registry without a tag with the default one, if it has any; other names unchanged."""
    tags = model_tags(name) if timm.is_model(name) and '.' not in name and not is_folder_name(name) else []
    return f'{name}.{tags[0]}' if tags else name


def is_folder_name(source: str) -> bool:
    """Whether the name of a network is that of a weights folder, or of a file given instead of one.

    A folder that has the name of a network but no weights, such as a run folder, does not hide the network.
    """
    scheme = re.match('[a-z][a-z_-]+:', source)  # longer than a drive letter
    if source.startswith('local-dir:') or not scheme and re.search(r'[/\\]' if os.name == 'nt' else '/', source):
        return True
    folder = Path(source)
    return (folder / CONFIG_NAME).is_file() if timm.is_model(source) else folder.exists()


def is_repo_name(source: str) -> bool:
    """Whether the name of a network is that of a Hub repo."""
    return source.startswith('hf-hub:')


def with_scheme(source: str) -> str:
    """A name with ``hf-hub:`` in timm's usual spelling; timm also accepts ``hf_hub:`` and capitals."""
    scheme, colon, rest = source.partition(':')
    return f'hf-hub:{rest}' if colon and scheme.lower() in ('hf-hub', 'hf_hub') else source


def timm_source(source: str) -> str:
    """The name of a network as ``timm.create_model`` expects it.

    Args:
        source: A weights folder, ``hf-hub:OWNER/NAME``, or a name of timm's registry with or without a tag.

    Raises:
        UserError: If it is none of these.
    """
    source = with_scheme(source)
    if is_folder_name(source):
        return f"local-dir:{source.removeprefix('local-dir:')}"
    if not is_repo_name(source):
        source = timm.models.get_deprecated_models().get(source) or source
        check_name(source)
    return source


def load_model(source: str, **kwargs: Any) -> TimmModel:
    """Load a network with its weights by any of its names.

    Args:
        source: As in ``timm_source``.
        **kwargs: Further keywords of ``timm.create_model``.

    Returns:
        The network, in evaluation mode.

    Raises:
        UserError: If there is no such network, or it has no weights.
    """
    source = timm_source(source)
    if source.startswith('local-dir:'):
        return load_folder(source.removeprefix('local-dir:'), **kwargs)
    if not is_repo_name(source):
        cfg = timm.get_pretrained_cfg(source)
        if not (cfg and cfg.has_weights):
            others = timm.list_pretrained(f'{timm.models.get_arch_name(source)}.*')
            hint = f"tags with weights: {', '.join(others)}" if others else 'train it, or give a weights folder'
            raise UserError(f'There are no weights of {source}; {hint}.')
    try:
        return timm.create_model(source, pretrained=True, **kwargs).eval()
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f'{source} could not be loaded (its config has no {e}); give a repo of a timm model.') from e
    except Exception as e:
        raise UserError(f'{source} could not be loaded ({one_line(e)}).') from e


def saved_model_args(source: str) -> Dict[str, Any]:
    """Keywords that the network of a weights folder or a repo was created with; none for other names of a network.

    Those of a repo come from the Hub or its cache.
    """
    source = with_scheme(source)
    if is_repo_name(source):
        *_, model_args = timm.models.load_model_config_from_hf(source.removeprefix('hf-hub:'))
        return dict(model_args or {})
    folder = Path(source.removeprefix('local-dir:'))
    return dict(read_config(folder).get('model_args') or {}) if is_folder_name(source) and folder.is_dir() else {}
