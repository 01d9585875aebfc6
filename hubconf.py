"""Entry points of ``torch.hub`` for every network: ``torch.hub.load(<this folder>, 'lm_resnet56', source='local')``.

The networks are those of the package next to this file, or of an already imported package of the same version. If
another version is imported or installed, loading fails with an error that names both: one process can hold only one of
them.
"""
import importlib.machinery
import pathlib
import re
import sys

dependencies = ['torch', 'timm']


def _version(package):
    """The version of a package folder, read without importing it."""
    match = re.search(r"^__version__ = '(.+)'$", (package / '__init__.py').read_text(encoding='utf-8'), re.MULTILINE)
    return match.group(1) if match else 'unknown'


def _refuse_other_version(package):
    """Raise if the ``timm_lm`` that this process has, or would have without ``torch.hub``, has another version.

    It may already be imported without anyone asking: an installed one is imported with timm.
    """
    module = sys.modules.get('timm_lm')
    if module is not None:
        origin, version, state = module.__file__, module.__version__, 'imported'
    else:
        # while loading, torch.hub puts this folder first on the path
        hidden = bool(sys.path) and pathlib.Path(sys.path[0]).resolve() == package.parent
        spec = importlib.machinery.PathFinder.find_spec('timm_lm', sys.path[hidden:])
        if spec is None or spec.origin is None:
            return
        origin, version, state = spec.origin, _version(pathlib.Path(spec.origin).parent), 'installed'
    other = pathlib.Path(origin).resolve().parent
    if other != package and version != _version(package):
        raise RuntimeError(
            f'timm-lm {version} is {state} from {other.parent}, but {package.parent} has timm-lm {_version(package)}; '
            'create models of the former with timm.create_model, or uninstall it and restart Python.')


_refuse_other_version(pathlib.Path(__file__).resolve().parent / 'timm_lm')

import timm  # noqa: E402

import timm_lm  # noqa: E402, F401  (registers the networks)

globals().update({name: timm.model_entrypoint(name) for name in timm.list_models(module='lm_resnet')})
