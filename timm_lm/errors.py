"""The one error of this package that a user can mend: bad input, told in one line."""


class UserError(RuntimeError):
    """Bad input. The message is one line that says what was wrong and what to do.

    The command line prints it and exits with code 2.
    """
