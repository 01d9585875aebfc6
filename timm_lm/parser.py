"""The argument parser of all commands, the spelling of options, and conversions of their values."""
import argparse
import ast
from typing import Any, NoReturn

from .errors import UserError


class _Help(argparse.HelpFormatter):
    """Help that appends each meaningful default that the text does not mention."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        told = '(default' in text or isinstance(action, argparse._HelpAction)
        if told or action.default in (None, False, '', argparse.SUPPRESS) or action.default in ([], {}):
            return text
        value = ' '.join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f'{text} (default: {value})'


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError, and shows defaults in its help."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault('formatter_class', _Help)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message[0].upper()}{message[1:]}; see `{self.prog} --help`.')


def option_name(name: str) -> str:
    """An option as the command line spells it."""
    return '--' + name.replace('_', '-')


def literal(text: str) -> Any:
    """The value of a Python literal or of YAML's word for one; other text unchanged."""
    words = {'true': True, 'false': False, 'null': None, 'none': None}  # as recipes may write them
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as ast documents them
        return text


class KeyValues(argparse.Action):
    """``name=value`` pairs, the values as Python literals."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for pair in values:
            name, separator, value = pair.partition('=')
            if not separator:
                raise UserError(f"{option_string} takes pairs name=value, not '{pair}'.")
            pairs[name] = literal(value)
        setattr(namespace, self.dest, pairs)
