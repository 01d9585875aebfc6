"""What the processes of a training do for each other, apart from the steps."""
from contextlib import contextmanager
from typing import Any, Callable, Iterator

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from timm_lm.errors import UserError


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> None:
    """Do something only in the main process; if it fails there, all processes fail the same way.

    Otherwise the others would wait for the main process where they next meet.

    Raises:
        UserError: That of the main process, also for an OSError there.
    """
    error = None
    if accelerator.is_main_process:
        try:
            work()
        except (OSError, UserError) as e:
            error = e
    (told,) = broadcast_object_list([None if error is None else str(error)])
    if error is not None:
        raise error
    if told is not None:
        raise UserError(told)


def differs(value: Any) -> bool:
    """Whether a value is not the same in all processes."""
    return len({*gather_object([value])}) > 1


@contextmanager
def first_of_machine_first(accelerator: Accelerator) -> Iterator[None]:
    """Like ``local_main_process_first``, but if the first one fails, the others are released too, to fail likewise."""
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_local_main_process:
            accelerator.wait_for_everyone()
