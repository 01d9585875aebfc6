"""A weights folder of a checkpoint: of the best epoch, or of a run that was stopped for good."""
import argparse
from pathlib import Path
from typing import Any, Dict

from timm_lm.errors import UserError, one_line
from timm_lm.files import writing
from timm_lm.model_config import TimmModel
from timm_lm.weights_folder import save_folder

from .checkpoint import Checkpoint, CheckpointStore
from .network import create_again, import_modules
from .result import run_card, run_result
from .run_folder import ARGS_NAME, read_args


def save_checkpoint_weights(checkpoint: Path, output: Path) -> Path:
    """Write the weights folder of a checkpoint: its averaged weights if there are, else the network's.

    The card tells how far the training had come, and no error: an epoch that was chosen by its error on a split has no
    honest figure on that split.

    Args:
        checkpoint: ``RUN/checkpoints/step-...``.
        output: The folder, which is not there yet.

    Returns:
        The folder.

    Raises:
        UserError: If there is no whole checkpoint, its network cannot be made again, or the folder cannot be written
            or is there already.
    """
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent
    if not (run / ARGS_NAME).is_file():
        raise UserError(f'{checkpoint} is not a checkpoint of a run; give RUN/checkpoints/step-....')
    args = argparse.Namespace(**read_args(run))
    if output.exists():
        raise UserError(f'{output} is there already; name another folder with --output.')
    found = CheckpointStore(checkpoint.parent).read(checkpoint)
    facts = found.state['facts']
    import_modules(args)  # they may register the network
    model = _network(facts, found, checkpoint)
    epochs = round(found.progress.epoch + found.progress.batch / found.state['batches'], 2)
    told = run_result(args, model, int(epochs) if epochs == int(epochs) else epochs, found.state['seconds'], facts)
    card = run_card(told | dict(seen_in_training=None, of_epochs=found.state['epochs']), vars(args), model)
    with writing(f'The weights in {output}', 'Make room, or name another folder with --output.'):
        return save_folder(model, output, card, facts['model_args'])


def _network(facts: Dict[str, Any], checkpoint: Checkpoint, folder: Path) -> TimmModel:
    """The network of a run with the weights of a checkpoint, whatever became of the weights that the run began with."""
    try:
        model = create_again(facts)
        model.load_state_dict(checkpoint.group('average') or checkpoint.group('model'))
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        name = facts['pretrained_cfg']['architecture']
        raise UserError(f'The network {name} of {folder} cannot be made again by its name and arguments '
                        f'({one_line(e)}); see to the versions of timm and timm-lm.') from e
    return model
