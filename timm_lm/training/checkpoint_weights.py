"""The weights folder of a checkpoint, such as the best epoch or the last one of an abandoned run."""
import argparse
from pathlib import Path

from timm_lm.errors import UserError
from timm_lm.files import writing
from timm_lm.weights_folder import save_folder

from .checkpoint import CheckpointStore
from .network import create_again, import_modules
from .result import run_card, run_result
from .run_folder import ARGS_NAME, read_args


def save_checkpoint_weights(checkpoint: Path, output: Path) -> Path:
    """Write the weights folder of a checkpoint: its averaged weights if it has them, otherwise the network's.

    The card says how far the training had come, but gives no error: an epoch that was chosen by its error on a split
    has no honest figure on that split.

    Args:
        checkpoint: ``RUN/checkpoints/step-...``.
        output: The folder, which must not exist yet.

    Returns:
        The folder.

    Raises:
        UserError: If there is no intact checkpoint, its network cannot be recreated, or the folder cannot be written
            or already exists.
    """
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent
    if not (run / ARGS_NAME).is_file():
        raise UserError(f'{checkpoint} is not a checkpoint of a run; give RUN/checkpoints/step-....')
    args = argparse.Namespace(**read_args(run))
    if output.exists():
        raise UserError(f'{output} already exists; name another folder with --output.')
    found = CheckpointStore(checkpoint.parent).read(checkpoint)
    facts = found.state['facts']
    import_modules(args)  # they may register the network
    model = create_again(facts, found.group('average') or found.group('model'))
    epochs = round(found.progress.epoch + found.progress.batch / found.state['batches'], 2)
    told = run_result(args, model, int(epochs) if epochs == int(epochs) else epochs, found.state['seconds'], facts)
    card = run_card(told | dict(seen_in_training=None, of_epochs=found.state['epochs']), vars(args), model)
    with writing(f'The weights in {output}', 'Make room, or name another folder with --output.'):
        return save_folder(model, output, card, facts['model_args'])
