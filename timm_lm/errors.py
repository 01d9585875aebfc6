"""The one error of this package that a user can mend: bad input, told in one line, with few of many names."""
from typing import Sequence


class UserError(RuntimeError):
    """Bad input. The message is one line that says what was wrong and what to do.

    The command line prints it and exits with code 2.
    """


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
