"""Figures of matplotlib: made without a screen, and written whole or not at all."""
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import atomic_file


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    The backend that the environment names may be missing: a notebook names one that its commands may not have.
    """
    named = None if 'matplotlib' in sys.modules else os.environ.pop('MPLBACKEND', None)
    try:
        from matplotlib.figure import Figure
    finally:
        if named is not None:
            os.environ['MPLBACKEND'] = named
    if named:
        import matplotlib
        with suppress(ValueError):
            matplotlib.rcParams['backend'] = named
    return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG under a temporary name, and rename it; the same figure gives the same file."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format='png', metadata={'Software': None})
