"""The card of a weights folder: rendered from its template, and read for the error it records."""
import re
from pathlib import Path
from typing import Any, Dict, Optional, Union

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from .names import is_ours, model_tags
from .weights_folder import CARD_NAME

CARD_TEMPLATE = Path(__file__).with_name('MODEL_CARD.md')


def render_card(
        name: str,
        dataset: str,
        dataset_name: str,
        split: str,
        error: Optional[float],
        license: str = 'apache-2.0',
        base_model: Optional[str] = None,
        **fields: Any,
) -> str:
    """Render the card's template.

    Args:
        name: Model name with tag.
        dataset: Id of the data set on the Hub.
        dataset_name: Its display name.
        split: The split that was evaluated.
        error: Top-1 error on it in %, none if None.
        license: License of the weights, as the Hub's identifier or timm's.
        base_model: Id of the repo that the training started from, None if there is none.
        **fields: The other fields of the template.
    """
    results = None
    if error is not None:
        common: Dict[str, Any] = dict(
            task_type='image-classification', task_name='Image Classification',
            dataset_type=dataset or _identifier(dataset_name), dataset_name=dataset_name, dataset_split=split)
        results = [
            EvalResult(metric_type='accuracy', metric_name='Top-1 accuracy (%)',
                       metric_value=round(100 - error, 2), **common),
            EvalResult(metric_type='error', metric_name='Top-1 error (%)', metric_value=round(error, 2), **common),
        ]
    # those that timm names after a network or a company are not identifiers of the Hub
    named: Dict[str, Any] = dict(license=license)
    if license.endswith('-license'):
        named = dict(license='other', license_name=license)
    data = ModelCardData(
        **named, library_name='timm', pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-lm', 'transformers'],
        datasets=[dataset] if dataset else None, metrics=['accuracy'], model_name=name, eval_results=results,
        base_model=base_model)
    architecture, _, tag = name.partition('.')
    ours = is_ours(architecture)
    return str(ModelCard.from_template(
        data, template_path=str(CARD_TEMPLATE), name=name, architecture=architecture, ours=ours,
        listed=ours and tag in model_tags(architecture), dataset=dataset, dataset_name=dataset_name, split=split,
        error=error, **fields))


def _identifier(name: str) -> str:
    """A name as the Hub takes it for the type of a data set: it refuses cards with other characters there."""
    return re.sub('[^A-Za-z0-9_.-]+', '-', name).strip('-') or 'unknown'


def recorded_error(folder: Union[str, Path]) -> Optional[float]:
    """The top-1 error in % that a folder's card records for the split it names, None if it records none."""
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        return None
    try:
        data: Any = ModelCard(path.read_text(encoding='utf-8-sig')).data
        return next((float(r.metric_value) for r in data.eval_results or [] if r.metric_type == 'error'), None)
    except (OSError, TypeError, AttributeError, ValueError, YAMLError):
        return None  # an unreadable card records nothing
