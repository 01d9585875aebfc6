"""Export of networks to ONNX, torch.export and TorchScript, each file checked against the network."""
import io
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import torch

from .errors import UserError, one_line
from .files import temporary_folder
from .model_config import TimmModel, image_config

TOLERANCE = 1e-4  # of the largest logit: other kernels add in another order

Run = Callable[[torch.Tensor], torch.Tensor]


def _batch() -> Tuple[Dict[int, Any]]:
    return ({0: torch.export.Dim('batch', min=1, max=65536)},)


def _to_onnx(model: TimmModel, images: torch.Tensor, path: Path) -> Run:
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; run `pip install 'timm-lm[export]'`.")
    import onnxruntime
    names: Dict[str, Any] = dict(input_names=['images'], output_names=['logits'])
    if torch.__version__ >= '2.6':
        program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=_batch(), verbose=False, **names)
        assert program is not None
        program.save(str(path))
    else:  # the newer exporter of torch 2.5 fails if the batch is dynamic
        axes = dict(images={0: 'batch'}, logits={0: 'batch'})
        torch.onnx.export(model, (images,), str(path), dynamo=False, dynamic_axes=axes, **names)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    except Exception as e:  # its own errors, which have no other base class
        raise UserError(f'onnxruntime cannot read the file ({one_line(e)}); install a newer version.') from e
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _to_program(model: TimmModel, images: torch.Tensor, path: Path) -> Run:
    buffer = io.BytesIO()  # PyTorch aborts the process if the disk is full
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=_batch()), buffer)
    path.write_bytes(buffer.getbuffer())
    return torch.export.load(path).module()


def _to_script(model: TimmModel, images: torch.Tensor, path: Path) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.torch.jit', FutureWarning)  # deprecated, but still in use
        buffer = io.BytesIO()  # as above
        torch.jit.save(torch.jit.script(model), buffer)
        path.write_bytes(buffer.getbuffer())
        return torch.jit.load(path)


# Format -> (function that writes it, file extension)
FORMATS: Dict[str, Tuple[Callable[[TimmModel, torch.Tensor, Path], Run], str]] = {
    'onnx': (_to_onnx, '.onnx'),
    'torch-export': (_to_program, '.pt2'),
    'torchscript': (_to_script, '.pt'),
}


def _write(model: TimmModel, images: torch.Tensor, path: Path, kind: str) -> Run:
    try:
        return FORMATS[kind][0](model, images, path)
    except UserError:
        raise
    except (RuntimeError, torch.jit.frontend.FrontendError) as e:
        raise UserError(f'The network cannot be written as {kind} ({one_line(e)}); try another --format.') from e


@torch.no_grad()
def export_model(model: TimmModel, kind: str, path: Path) -> float:
    """Write a network in another format, for batches of any size.

    The file is written under a temporary name, loaded, and compared with the network on batches of 1, 2 and 5 images
    before it is renamed.

    Args:
        model: A network in evaluation mode on the CPU, created with ``scriptable=True`` for TorchScript.
        kind: A name of ``FORMATS``.
        path: The file.

    Returns:
        The largest difference of the logits, relative to the largest logit.

    Raises:
        UserError: If a package is missing, the network cannot be exported, the file cannot be written, or it computes
            something else.
    """
    ending = FORMATS[kind][1]
    if not path.name or path.is_dir():
        raise UserError(f'{path} is a folder; name a file with --output.')
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, *image_config(model)['input_size'], generator=generator)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent, f'.{path.name}.') as folder:
            temporary = folder / path.with_suffix(ending).name  # weights outside an ONNX file are named after it
            run = _write(model, images[:2], temporary, kind)
            difference = 0.
            for batch in (images[:1], images[:2], images):
                expected = model(batch)
                found = (run(batch) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
                if not found.item() <= TOLERANCE:  # also if it is NaN
                    raise UserError(f'The exported file computes something else (difference {found.item():.1e} of the '
                                    'largest logit); nothing was written. Try another --format.')
                difference = max(difference, found.item())
            beside = [data for data in folder.iterdir() if data != temporary]
            for data in beside:  # weights stored outside a large ONNX file
                os.replace(data, path.parent / data.name)
            os.replace(temporary, path)
    except OSError as e:
        raise UserError(f'{path} cannot be written ({e}); choose another --output.') from e
    return difference
