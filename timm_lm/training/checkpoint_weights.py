"""A weights folder of a checkpoint: of the best epoch, or of a run that was stopped for good."""
import argparse
from pathlib import Path

import yaml

from timm_lm.errors import UserError
from timm_lm.files import writing
from timm_lm.hub import save_folder

from .batches import resolve_input_config
from .checkpoint import CheckpointStore
from .factory import finished_model, import_modules
from .options import parse_options
from .report import MAKE_ROOM
from .result import describe_trained, made_with, run_card, run_facts


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
        UserError: If there is no whole checkpoint, its network can not be made any more, or the folder can not be
            written or is there already.
    """
    run = checkpoint.parent.parent
    try:
        stored = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f'{checkpoint} is not a checkpoint of a run; give RUN/checkpoints/step-....') from e
    if output.exists():
        raise UserError(f'{output} is there already; name another folder with --output.')
    args = argparse.Namespace(**(vars(parse_options([])) | stored))
    found = CheckpointStore(checkpoint.parent).read(checkpoint)
    import_modules(args)
    model = finished_model(args, found.group('average') or found.group('model'))
    facts = found.state.get('facts')
    if facts is None:
        raise UserError(f'{checkpoint} was written by an older version, which kept too little for this; go on with its '
                        'run by --resume, which ends with weights.')
    describe_trained(args, model, resolve_input_config(args, model), facts['class_names'])
    progress = found.progress
    batches = found.state['images'] // (args.batch_size * found.state['processes'])
    epochs = round(progress.epoch + progress.batch / batches, 2)
    told = run_facts(
        args, model, epochs=int(epochs) if epochs.is_integer() else epochs, seconds=found.state['seconds'],
        processes=found.state['processes'], **{name: facts[name] for name in ('command', 'hardware', 'versions')})
    card = run_card(told | dict(seen_in_training=None, of_epochs=args.epochs), vars(args), model)
    with writing(f'The weights in {output}', MAKE_ROOM):
        return save_folder(model, output, card, made_with(args))
