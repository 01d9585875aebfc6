"""Weights folders in the layout of a Hub repo: written atomically, and verifiable anywhere.

A folder holds ``model.safetensors``, ``config.json`` (timm's, also read by transformers), ``README.md`` (the card) and
``test/rand_tensors.safetensors``: one random batch and what the network computes from it, under timm's names (input,
features, pre_logits, output), with the SHA-256 of the weights in its metadata.
"""
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models._hub import save_config_for_hf

from .errors import UserError, one_line
from .files import atomic_folder, save_tensors, sha256, write_text
from .model_config import TimmModel, image_config, label_names
from .models._weights import WEIGHTS_NAME, check_shipped

CONFIG_NAME = 'config.json'
CARD_NAME = 'README.md'
CHECK_NAME = 'test/rand_tensors.safetensors'
CHECK_BATCH = 2
CHECK_TOLERANCE = 1e-4  # relative to the largest value: float32 convolutions differ that much between machines


# Writing


def _write_config(model: TimmModel, path: Any, model_args: Dict[str, Any], dtype: torch.dtype) -> None:
    names = label_names(model)
    save_config_for_hf(
        model,
        path,
        model_config=dict(label_names=list(names)) if names else {},
        model_args=dict(model_args),
    )
    config = json.loads(path.read_text())
    config['pretrained_cfg'].pop('label_names', None)
    # the class count is at the top level; transformers rejects a second one in the arguments
    config.get('model_args', {}).pop('num_classes', None)
    if not config.get('model_args'):
        config.pop('model_args', None)
    if dtype != torch.float32:  # transformers would compute in the precision of the file, timm does not
        config['torch_dtype'] = 'float32'
    path.write_text(json.dumps(config, indent=2) + '\n')


@torch.inference_mode()
def _check_tensors(model: TimmModel, images: torch.Tensor) -> Dict[str, torch.Tensor]:
    features = model.forward_features(images)
    tensors = dict(
        input=images,
        features=features,
        pre_logits=model.forward_head(features, pre_logits=True),
        output=model.forward_head(features),
    )
    # some of timm's networks return the features of several branches, in a list
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def save_folder(
        model: TimmModel,
        folder: Union[str, Path],
        card: str,
        model_args: Optional[Dict[str, Any]] = None,
        dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a weights folder, completely or not at all.

    Args:
        model: A network from ``timm.create_model``, with a config written by ``record_data``.
        folder: Where to write it; an existing folder is replaced once the new one is complete.
        card: Text of the card.
        model_args: Keywords, besides the class count, that the network was created with.
        dtype: Precision of the saved floating-point tensors.

    Returns:
        The folder.

    Raises:
        UserError: If the network's outputs are not finite.
    """
    args = dict(model_args or {})
    in_chans = getattr(model, 'in_chans', 3)
    if in_chans != 3:
        args['in_chans'] = in_chans
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
             for name, tensor in model.state_dict().items()}
    with atomic_folder(folder) as temporary:
        weights = temporary / WEIGHTS_NAME
        save_tensors(state, weights, dict(format='pt'))
        _write_config(model, temporary / CONFIG_NAME, args, dtype)
        write_text(temporary / CARD_NAME, card)
        reloaded = timm.create_model(f'local-dir:{temporary}', pretrained=True).eval()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(CHECK_BATCH, *image_config(model)['input_size'], generator=generator)
        tensors = _check_tensors(reloaded, images)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f'The outputs of the network are not finite, so {folder} was not written; use a smaller '
                            'learning rate.')
        (temporary / CHECK_NAME).parent.mkdir()
        save_tensors(tensors, temporary / CHECK_NAME, dict(model_sha256=sha256(weights)))
    return Path(folder)


# Reading


def read_config(folder: Path) -> Dict[str, Any]:
    """The config of a weights folder, for a network that timm knows.

    Raises:
        UserError: If it is missing or damaged, or timm does not know its network.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture, cfg = config['architecture'], config.get('pretrained_cfg', {})
        if not isinstance(architecture, str) or not isinstance(cfg, dict):
            raise TypeError('architecture must be a name, pretrained_cfg a table')
        channels = (cfg.get('input_size') or [3])[0]
        if any(len(cfg.get(key) or [0]) not in (1, channels) for key in ('mean', 'std')):
            raise ValueError(f'mean and std must have {channels} values')
    except FileNotFoundError:
        raise UserError(f'{folder} has no {CONFIG_NAME}; give a weights folder, such as RUN/weights.') from None
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(f'{path} is not a readable timm config ({type(e).__name__}: {e}); restore the file.') from e
    if not timm.is_model(architecture):
        raise UserError(f"{path} names the architecture '{architecture}', which timm does not know.")
    return config


def load_folder(folder: Union[str, Path], **kwargs: Any) -> TimmModel:
    """Load the network of a weights folder, after checks that report what is wrong.

    Args:
        folder: A weights folder.
        **kwargs: Further keywords of ``timm.create_model``.

    Returns:
        The network, in evaluation mode.

    Raises:
        UserError: If the folder is missing or incomplete, or its weights are damaged or of another network.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f'{folder} is a file; give the folder of a {WEIGHTS_NAME} and its {CONFIG_NAME}. To train from '
                        'a file, use --initial-checkpoint.')
    if not folder.is_dir():
        raise UserError(f'The weights folder {folder} does not exist; give a folder with {WEIGHTS_NAME} and '
                        f'{CONFIG_NAME}.')
    architecture = read_config(folder)['architecture']
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise UserError(f'{folder} has no {WEIGHTS_NAME}; other formats are not read, convert them to safetensors.')
    _compare_digest(folder)
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
    except Exception as e:
        options = ' with these options' if kwargs else ''
        raise UserError(f'The config or the weights of {folder} do not fit the network {architecture}{options} '
                        f'({one_line(e)}); give a folder where they do.') from e


def _compare_digest(folder: Path) -> None:
    weights, check = folder / WEIGHTS_NAME, folder / CHECK_NAME
    check_shipped(str(weights.resolve()))
    if not check.is_file():
        return
    try:
        with safe_open(check, 'pt') as f:
            recorded = (f.metadata() or {}).get('model_sha256')
    except SafetensorError as e:
        raise UserError(f'{check} is damaged or no safetensors file ({e}); copy or download the folder again.') from e
    if recorded is not None and sha256(weights) != recorded:
        raise UserError(f'{weights} is damaged or was changed: its SHA-256 is not the one recorded in {CHECK_NAME}; '
                        'copy or download the folder again.')


def verify_folder(folder: Union[str, Path]) -> Dict[str, float]:
    """Check a weights folder: config, weights, digest, and the network's outputs for the check batch.

    Args:
        folder: A weights folder.

    Returns:
        The largest difference of each check tensor, relative to its largest value.

    Raises:
        UserError: If anything is missing or damaged, or the outputs differ.
    """
    folder = Path(folder)
    model = load_folder(folder)
    path = folder / CHECK_NAME
    if not path.is_file():
        raise UserError(f'{folder} has no {CHECK_NAME} to check the weights with; they load, but are not verified.')
    try:
        expected = load_file(path)
        actual = _check_tensors(model, expected['input'])
        differences = {
            name: ((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12)).item()
            for name in actual if name != 'input'
        }
    except (SafetensorError, KeyError, RuntimeError) as e:
        raise UserError(f'{path} does not hold a check batch of this network ({e}); download the folder again.') from e
    for name in differences:
        if not differences[name] <= CHECK_TOLERANCE:
            raise UserError(f"{folder} computes a different '{name}' than recorded (difference "
                            f"{differences[name]:.1e} of the largest value); the weights or the config were changed.")
    return differences
