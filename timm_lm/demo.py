"""The whole workflow in two minutes: train on scikit-learn's digits, save, reload through timm, evaluate, plot."""
import io
import json
import shutil
import time
from pathlib import Path
from typing import Sequence

import numpy as np
import timm
import torch
from PIL import Image

from .data import load_images
from .errors import UserError
from .loader import MemoryLoader
from .model_config import TimmModel
from .training.evaluate import evaluate
from .training.options import parse_options
from .training.train import train

SPLITS = ('test', 'train')


def write_digits(folder: Path, limit: int = 0) -> Path:
    """Write scikit-learn's handwritten digits (1,797 images of 8x8 pixels) as Parquet in the Hub's layout.

    Args:
        folder: Where to; created if missing.
        limit: Number of images to use, all if 0.

    Raises:
        UserError: If scikit-learn is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise UserError("The digits come with scikit-learn; install it with `pip install 'timm-lm[demo]'`.") from e

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[:limit or None]
    test_size = len(order) // 5
    features = {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': [str(i) for i in range(10)]}}
    metadata = {'huggingface': json.dumps({'info': {'features': features}})}
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(SPLITS, (order[:test_size], order[test_size:])):
        cells = [dict(bytes=_png(digits.images[row]), path=f'{row}.png') for row in rows]
        table = pa.table(dict(
            image=pa.array(cells, pa.struct([('bytes', pa.binary()), ('path', pa.string())])),
            label=pa.array(digits.target[rows], pa.int64()),
        )).replace_schema_metadata(metadata)
        pq.write_table(table, folder / _file_name(split))
    return folder


def _file_name(split: str) -> str:
    return f'{split}-00000-of-00001.parquet'


def _png(digit: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((digit * (255 / 16)).astype(np.uint8)).save(buffer, format='PNG')
    return buffer.getvalue()


def demo(output: Path, options: Sequence[str] = ()) -> Path:
    """Run the demonstration.

    Args:
        output: Folder for data, run and plots; what an earlier demonstration left there is replaced.
        options: Further options for the training.

    Returns:
        The run folder.
    """
    data = output / 'digits'
    is_ours = data.is_dir() and {file.name for file in data.iterdir()} <= {_file_name(split) for split in SPLITS}
    if output.is_file() or output.exists() and any(output.iterdir()) and not is_ours:
        raise UserError(f'{output} holds something else, not a demonstration; give another folder with --output.')
    write_digits(data)  # first, as they mark the folder as ours
    shutil.rmtree(output / 'run', ignore_errors=True)
    start = time.perf_counter()
    run = train(
        parse_options(['-c', 'demo_digits', '--data-dir', str(data), '--output', str(output), '--experiment',
                       'run', *options]),
        command='timm-lm demo')
    seconds = time.perf_counter() - start

    # What a user of timm does with the result
    model: TimmModel = timm.create_model(f"local-dir:{run / 'weights'}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    images = load_images('test', data, input_size=cfg['input_size'], interpolation=cfg['interpolation'])
    result = evaluate(model, MemoryLoader(images, 64, cfg['mean'], cfg['std']))
    with torch.inference_mode():
        first = next(iter(MemoryLoader(images, 1, cfg['mean'], cfg['std'])))
        answer = cfg['label_names'][int(model(first[0]).argmax())]
    print(f"Trained in {seconds:.0f} s. timm.create_model('local-dir:{run / 'weights'}', pretrained=True) is wrong on "
          f"{result['errors']} of {result['images']} test digits ({100 - result['top1']:.2f} %); it classifies the "
          f'first, a {int(first[1])}, as a {answer}.')
    print(f"Curves are in {run / 'curves.png'}, the values of k in {run / 'k.png'}.")
    return run
