"""The error that commands raise for bad input, and helpers for its one-line messages."""
from typing import Sequence
from unicodedata import category

# How to resume a training run, for messages.
RESUME = 'with --resume auto, or, without --experiment, with --resume RUN/checkpoints/step-...'


class UserError(RuntimeError):
    """Bad input to a command, or to a function that names it.

    The message is one line that says what was wrong and what to do. The command line prints it and exits with code 2.
    """


def printable(name: object) -> str:
    """A name with its control characters escaped, which would break lines or command the terminal."""
    return ''.join(c.encode('unicode_escape').decode() if category(c) == 'Cc' else c for c in str(name))


def one_line(what: object, limit: int = 200) -> str:
    """A message, such as an error, on one line of about ``limit`` characters; its type if it is empty."""
    text = printable(' '.join(str(what).split())) or type(what).__name__
    return text if len(text) <= limit else f'{text[:limit]}...'


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ', '.join(map(printable, names[:5])) + (', ...' if len(names) > 5 else '')
