"""The error of this package, bad input told in one line, and words for its messages."""
from typing import Sequence

# How a training goes on, for messages.
RESUME = 'with --resume auto, or without an --experiment with --resume RUN/checkpoints/step-...'


class UserError(RuntimeError):
    """Bad input. The message is one line that says what was wrong and what to do.

    The command line prints it and exits with code 2.
    """


def one_line(what: object, limit: int = 200) -> str:
    """A message, such as an error, on one line of about so many characters; its kind if it has none."""
    text = ' '.join(str(what).split()) or type(what).__name__
    return text if len(text) <= limit else f'{text[:limit]}...'


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
