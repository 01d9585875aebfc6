"""Import hook: when ``timm.models`` has been imported, ``timm_lm`` registers its networks.

PyTorch calls ``autoload`` at the end of ``import torch``, through the entry point group ``torch.backends``. This module
imports nothing heavy and never raises; ``TIMM_LM_AUTOLOAD=0`` turns it off.
"""
import importlib
import os
import sys
import warnings

TARGET = 'timm.models'


def autoload() -> None:
    """Register the networks when ``timm.models`` is there, unless turned off."""
    if os.environ.get('TIMM_LM_AUTOLOAD', '1') == '0':
        return
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    if 'timm_lm' in sys.modules:  # it registers by itself, maybe in another thread; do not wait for that
        return
    try:
        importlib.import_module('timm_lm')
    except Exception as e:
        told = (f'timm-lm could not register its models ({type(e).__name__}: {e}). `import timm_lm` shows the full '
                'error; TIMM_LM_AUTOLOAD=0 turns this off.')
        try:
            warnings.warn(told, stacklevel=2)
        except Warning:  # raised under -W error, which must not stop the import of timm
            print(told, file=sys.stderr)


class _Finder:
    """Finds ``timm.models`` with the other finders, and wraps its loader to register the networks afterwards.

    It is not removed: other threads may be iterating over ``sys.meta_path``, and modules may be dropped and imported
    again.
    """

    def find_spec(self, name, path=None, target=None):
        if name != TARGET or TARGET in sys.modules:
            return None
        # importlib.util.find_spec would wait for all of timm, and deadlock if two threads import it
        for finder in sys.meta_path:
            find_spec = None if isinstance(finder, _Finder) else getattr(finder, 'find_spec', None)
            spec = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                if hasattr(spec.loader, 'exec_module'):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Loads ``timm.models`` with its own loader, then registers the networks."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)  # timm's errors propagate; the finder is there for the next try
        _register()
