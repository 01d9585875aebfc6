"""The config of a network, ``pretrained_cfg``: how it sees images, the names of its classes, what it was trained on."""
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from timm.data import resolve_data_config

TimmModel = Any  # a torch.nn.Module with the attributes that timm gives it


def record_data(
        model: TimmModel,
        tag: Optional[str] = None,
        class_names: Optional[Sequence[str]] = None,
        input_size: Optional[Sequence[int]] = None,
        **data_config: Any,
) -> None:
    """Write into ``model.pretrained_cfg`` what its weights were trained on, so that a saved config tells it.

    Args:
        model: A network of ``timm.create_model``.
        tag: Tag of the weights.
        class_names: Names of the classes, unknown if None.
        input_size: Size (C, H, W) of the images.
        **data_config: ``mean``, ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``license``.
    """
    cfg = model.pretrained_cfg
    cfg.update({key: value for key, value in data_config.items() if value is not None})
    cfg['tag'] = tag
    cfg['num_classes'] = model.num_classes
    for key in ('test_input_size', 'test_crop_pct', 'origin_url', 'description', 'label_descriptions'):
        cfg.pop(key, None)
    cfg.pop('label_names', None)  # those of the data set that the name of the network stands for
    if class_names is not None and len(class_names) == model.num_classes:
        cfg['label_names'] = tuple(class_names)
    if input_size is not None:
        cfg['input_size'] = tuple(input_size)
        cfg.pop('pool_size', None)
        if getattr(model, 'feature_info', None):  # a few networks of timm have none
            cfg['pool_size'] = tuple(-(-side // model.feature_info[-1]['reduction']) for side in input_size[1:])


def label_names(model: TimmModel) -> Tuple[str, ...]:
    """Names of the classes as the config of a network has them, in the order of their numbers; none if it has none."""
    names = model.pretrained_cfg.get('label_names') or ()
    if isinstance(names, Mapping):  # number -> name; in JSON numbers are text
        numbered = {str(number): str(name) for number, name in names.items()}
        numbers = [str(i) for i in range(len(numbered))]
        names = [numbered[number] for number in numbers] if numbered.keys() == {*numbers} else []  # some have none
    return tuple(names)


def image_channels(model: TimmModel) -> int:
    """Channels of the images that a network takes."""
    return int(getattr(model, 'in_chans', None) or (model.pretrained_cfg.get('input_size') or [3])[0])


def image_config(model: TimmModel, options: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """How a network sees images, for its own channels: timm's data config, of size (C, H, W), resizing, mean and std.

    Args:
        model: The network.
        options: Of timm's train script, which go before the network's config.

    Raises:
        AssertionError: If the options have a mean or a standard deviation of other channels.
    """
    channels = image_channels(model)
    config = resolve_data_config({**(options or {}), 'in_chans': channels}, model=model)
    config['input_size'] = (channels, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != channels:  # those of a network that was made with other channels
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config
