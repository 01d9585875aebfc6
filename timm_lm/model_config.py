"""The config of a network, ``pretrained_cfg``: its input images, its class names, what it was trained on."""
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
    """Record in ``model.pretrained_cfg`` what its weights were trained on, so that it is saved with the config.

    Args:
        model: A network from ``timm.create_model``.
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
    cfg.pop('label_names', None)  # those of the data set that the network's name stands for
    if class_names is not None and len(class_names) == model.num_classes:
        cfg['label_names'] = tuple(class_names)
    if input_size is not None:
        cfg['input_size'] = tuple(input_size)
        cfg.pop('pool_size', None)
        if getattr(model, 'feature_info', None):  # a few networks of timm have none
            cfg['pool_size'] = tuple(-(-side // model.feature_info[-1]['reduction']) for side in input_size[1:])


def label_names(model: TimmModel) -> Tuple[str, ...]:
    """The class names in the config of a network, in the order of their numbers; empty if it has none."""
    names = model.pretrained_cfg.get('label_names') or ()
    if isinstance(names, Mapping):  # number -> name; in JSON the numbers are strings
        numbered = {str(number): str(name) for number, name in names.items()}
        numbers = [str(i) for i in range(len(numbered))]
        names = [numbered[number] for number in numbers] if numbered.keys() == {*numbers} else []  # with gaps
    return tuple(names)


def image_channels(model: TimmModel) -> int:
    """Number of channels of a network's input images."""
    return int(getattr(model, 'in_chans', None) or (model.pretrained_cfg.get('input_size') or [3])[0])


def image_config(model: TimmModel, options: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """timm's data config of a network, for its number of channels: size (C, H, W), resizing, mean and std.

    Args:
        model: The network.
        options: Options of timm's train script, which override the network's config.

    Raises:
        AssertionError: If the options have a mean or a standard deviation for another number of channels.
    """
    channels = image_channels(model)
    config = resolve_data_config({**(options or {}), 'in_chans': channels}, model=model)
    config['input_size'] = (channels, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != channels:  # the network was created with other channels
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config
