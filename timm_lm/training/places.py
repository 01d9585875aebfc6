"""Paths of a machine as records show them: by their last names, and the command without them."""
import re
import shlex
from pathlib import Path
from typing import List

# An absolute path, alone or after options, quotes, and the prefixes of network and data set names.
_PLACE = re.compile(
    r'((?:-\w=?|--[\w-]+=|\w+=|local-dir:|hfds/|file://|[\[({\'"])*)([/~].*|[A-Za-z]:[\\/].*)', re.DOTALL)


def last_name(source: str) -> str:
    """The last name of a path, or that of the run for its weights folder; a repo of the Hub is left as it is."""
    if source.startswith('hf-hub:'):
        return source
    source = source.removeprefix('local-dir:')
    path = Path(source)
    name = path.parent.name if path.name == 'weights' else path.name  # that of the run
    return folder_name(source) if name in ('', '..') else name


def start_word(model: str, grow_from: str) -> str:
    """How a network uses the weights of another: 'grown from' if the names give another depth, else 'starting from'."""
    depths = [re.findall(r'res\w*?t(\d+)', last_name(name)) for name in (model, grow_from)]
    return 'grown from' if all(depths) and depths[0] != depths[1] else 'starting from'


def folder_name(path: str) -> str:
    """The last name of a path, with ``.`` and ``..`` resolved against the current directory."""
    name = Path(path).name
    return Path(path).resolve().name if name in ('', '..') else name


def command_line(argv: List[str]) -> str:
    """The command as a user would type it again, without what it reveals of this machine.

    DIR stands for the data folder; the run folder is left out, and other absolute paths are cut to their last name.
    """
    shown: List[str] = []
    words = iter(argv)
    for word in words:
        option = word.partition('=')[0]
        if option in ('--data-dir', '--output', '--experiment', '--resume'):
            if '=' not in word:
                next(words, None)
            shown += [option, 'DIR'] if option == '--data-dir' else []
        else:
            shown.append(without_place(word))
    return 'timm-lm ' + shlex.join(shown)


def without_place(word: str) -> str:
    """Cut an absolute path to its last name, keeping an option before it; other words stay as they are."""
    place = _PLACE.fullmatch(word)
    if place is None:
        return word
    path = place[2].replace('\\', '/')
    return place[1] + (last_name(path) or Path(path).name or path)
