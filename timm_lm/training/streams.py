"""Standard output and error that outlast their reader, so that training does too."""
import errno
import os
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Iterator

_NO_READER = (errno.EPIPE, errno.EINVAL) if os.name == 'nt' else (errno.EPIPE,)  # on Windows mostly the latter
_GONE = (errno.EIO, errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))


def reader_is_gone(error: OSError) -> bool:
    """Whether a pipe was written to after its reader had closed it, as `head` does."""
    return error.errno in _NO_READER and error.filename is None


class _Outlasting:
    """A text stream that silently drops its output when its reader (`head`, `tee`, a terminal) is gone, or when the
    disk of its file is full."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as e:
            self._go_on(e)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as e:
            self._go_on(e)

    def _go_on(self, error: OSError) -> None:
        if error.errno not in _GONE and not reader_is_gone(error):
            raise error
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())  # what is still in its buffer goes there, too


@contextmanager
def outlasting_output() -> Iterator[None]:
    """A context in which a lost reader of standard output and error does not end what prints to them."""
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if stream is None:  # closed from the start
                stream = stack.enter_context(open(os.devnull, 'w'))
            stack.enter_context(redirect(_Outlasting(stream)))
        yield
