"""Signals that stop a training between two steps."""
import shlex
import signal
import threading
from pathlib import Path
from typing import Any, Dict, Iterable, Optional

_STOPS = ('SIGTERM', 'SIGINT', 'SIGHUP')  # the last from a terminal that closes; not on Windows


class Interrupted(Exception):
    """A signal stopped the training; its state was saved, if there was any.

    Attributes:
        exit_code: 128 + number of the signal: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, number: int, checkpoint: Optional[Path]):
        how = ('run the same command with --resume ' + shlex.quote(checkpoint.as_posix()) if checkpoint else
               'there is no checkpoint yet, start again (with --resume auto in a folder named by --experiment)')
        super().__init__(f'Stopped by {signal.Signals(number).name}; {how}')
        self.exit_code = 128 + number


class StopSignals:
    """Records SIGTERM, SIGINT and SIGHUP, so that the current step can end; a second one acts as usual, except SIGHUP.

    With several processes, each may get the same signal twice, as its launcher also sends it; the second is ignored.
    """

    def __init__(self, several: bool = False):
        self.several = several
        self.number = 0
        self.before: Dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in _STOPS if hasattr(signal, name)]
            self.before = {number: signal.signal(number, self._note) for number in numbers
                           if not (self._is_hangup(number) and signal.getsignal(number) == signal.SIG_IGN)}  # by nohup
        return self

    def __exit__(self, *_: Any) -> None:
        self._give_back(self.before)

    def _note(self, number: int, _frame: Any) -> None:
        self.number = self.number or number
        if not self.several:  # a hangup may come after another signal, and twice
            self._give_back(number for number in self.before if not self._is_hangup(number))

    @staticmethod
    def _is_hangup(number: int) -> bool:
        return number == getattr(signal, 'SIGHUP', None)

    def _give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self.before[number] is not None:  # one that was not set from Python cannot be restored
                signal.signal(number, self.before[number])
