"""Signals that stop a training between two steps."""
import signal
import threading
from pathlib import Path
from typing import Any, Dict


class Interrupted(Exception):
    """A signal stopped the training; its state was saved.

    Attributes:
        exit_code: 128 + number of the signal: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int, folder: Path):
        super().__init__(f'Stopped by {signal.Signals(number).name}; go on by the same command with --resume '
                         f'{folder}')
        self.exit_code = 128 + number


class StopSignals:
    """Notes SIGTERM and SIGINT, so that the running step can end; the second one acts as ever.

    Of several processes each may be sent the same signal twice, by its launcher too; there the second one is nothing.
    """

    def __init__(self, several: bool = False):
        self.several = several
        self.number = 0
        self.before: Dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        self._give_back()

    def _note(self, number: int, _frame: Any) -> None:
        self.number = number
        if not self.several:
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self.before.items():
            if handler is not None:  # one that was not set from Python can not be given back
                signal.signal(number, handler)
        self.before = {}
