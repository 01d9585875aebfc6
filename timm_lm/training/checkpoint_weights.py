"""A weights folder of a checkpoint: of the best epoch, or of a run that was stopped for good."""
import argparse
from pathlib import Path

import yaml

from timm_lm.errors import UserError
from timm_lm.files import writing
from timm_lm.hub import save_folder

from .checkpoint import CheckpointStore
from .factory import import_modules
from .options import parse_options
from .report import MAKE_ROOM
from .result import finished_model, run_card, tell


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
        UserError: If there is no whole checkpoint, or the folder can not be written or is there already.
    """
    checkpoint = checkpoint.absolute()
    try:
        stored = yaml.safe_load((checkpoint.parent.parent / 'args.yaml').read_text(encoding='utf-8'))
        args = argparse.Namespace(**(vars(parse_options([])) | stored))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as e:
        raise UserError(f'{checkpoint} is not a checkpoint of a run; give RUN/checkpoints/step-....') from e
    if output.exists():
        raise UserError(f'{output} is there already; name another folder with --output.')
    found = CheckpointStore(checkpoint.parent).read(checkpoint)
    facts = found.state.get('facts')
    if facts is None:
        raise UserError(f'{checkpoint} was written by an older version, which kept too little for this; go on with its '
                        'run by --resume, which ends with weights.')
    import_modules(args)  # they may register the network
    model = finished_model(facts, found.group('average') or found.group('model'))
    epochs = round(found.progress.epoch + found.progress.batch / found.state['batches'], 2)
    told = tell(args, model, int(epochs) if epochs == int(epochs) else epochs, found.state['seconds'], facts)
    card = run_card(told | dict(seen_in_training=None, of_epochs=found.state['epochs']), vars(args), model)
    with writing(f'The weights in {output}', MAKE_ROOM):
        return save_folder(model, output, card, facts['model_args'])
