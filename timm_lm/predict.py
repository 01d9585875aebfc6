"""Predictions for single images, given as files, folders or lists of files."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.data import create_transform, get_img_extensions

from .encoded import UNREADABLE_IMAGE, convert_image, image_mode
from .errors import UserError, one_line
from .files import files_below
from .model_config import TimmModel, image_config, label_names


@dataclass(frozen=True)
class Prediction:
    """What a network predicts for an image.

    Attributes:
        path: The image as it was given.
        classes: (name, probability), the most probable first; empty if the image is not readable.
        error: Why it is not readable, None if it is.
    """

    path: str
    classes: Tuple[Tuple[str, float], ...] = ()
    error: Optional[str] = None

    def as_dict(self) -> Dict[str, Any]:
        """For a line of JSON."""
        if self.error is not None:
            return dict(image=self.path, error=self.error)
        return dict(image=self.path, classes=[{'class': name, 'probability': p} for name, p in self.classes])


def find_images(names: Sequence[str], lines: Iterable[str] = ()) -> List[Path]:
    """Image files: those named, all below the folders named, and for ``-`` those listed in ``lines``.

    Raises:
        UserError: If a folder holds no image.
    """
    found: List[Path] = []
    for name in names:
        if name == '-':
            found += [Path(line.rstrip('\r\n')) for line in lines if line.strip()]
        elif Path(name).is_dir():
            endings = get_img_extensions(as_set=True)
            images = sorted(path for path in files_below(name) if path.suffix.lower() in endings)
            if not images:
                raise UserError(f'The folder {name} holds no images ({", ".join(sorted(endings))}); others are read if '
                                'the files are named.')
            found += images
        else:
            found.append(Path(name))
    return found


@torch.inference_mode()
def predict(model: TimmModel, paths: Sequence[Union[str, Path]], topk: int = 5,
            batch_size: int = 64) -> Iterator[Prediction]:
    """Classify image files, in their order.

    Args:
        model: A network in evaluation mode; images are resized, cropped and normalised as its config says.
        paths: The files.
        topk: Classes per image.
        batch_size: Images per batch.

    Yields:
        A prediction for each file; one that is not readable has an error, and the others follow.

    Raises:
        UserError: If the network is neither for colour nor for grey images, or its config names an unknown
            interpolation.
    """
    config = image_config(model)
    try:
        transform: Any = create_transform(**config)
    except KeyError as e:
        raise UserError(f'The config of the network names an unknown interpolation, {e}; correct it.') from e
    mode = image_mode(config['input_size'][0])
    names: Sequence[str] = label_names(model)
    if len(names) != model.num_classes:  # none, or those of a head that was replaced
        names = [str(i) for i in range(model.num_classes)]
    device = next(model.parameters()).device
    for start in range(0, len(paths), batch_size):
        some = [str(path) for path in paths[start:start + batch_size]]
        images, errors = {}, {}
        for path in some:
            try:
                with Image.open(path) as image:
                    images[path] = transform(convert_image(image, mode))
            except UNREADABLE_IMAGE as e:
                errors[path] = one_line(e)
        probabilities: Dict[str, torch.Tensor] = {}
        if images:
            batch = torch.stack(list(images.values())).to(device)
            probabilities = dict(zip(images, model(batch).float().softmax(1).cpu()))
        for path in some:
            if path in errors:
                yield Prediction(path, error=errors[path])
                continue
            values, indices = probabilities[path].topk(min(topk, len(names)))
            yield Prediction(path, tuple((names[i], value) for i, value in zip(indices.tolist(), values.tolist())))
