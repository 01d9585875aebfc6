"""Entry points of ``torch.hub`` for every network: ``torch.hub.load(<this folder>, 'lm_resnet56', source='local')``.

The networks are those of the package next to this file, or of an already imported package of the same version. If
another version is imported, as an installed one is with timm, loading fails with an error that names both: one process
can hold only one of them.
"""
import pathlib
import re

import timm

import timm_lm  # registers the networks; torch.hub puts this folder first on the path

dependencies = ['torch', 'timm']

_here = pathlib.Path(__file__).resolve().parent
_version = re.search("__version__ = '(.+)'", (_here / 'timm_lm' / '__init__.py').read_text(encoding='utf-8')).group(1)
if timm_lm.__version__ != _version:
    raise RuntimeError(
        f'timm-lm {timm_lm.__version__} is imported from {pathlib.Path(timm_lm.__file__).resolve().parents[1]}, but '
        f'{_here} has timm-lm {_version}; create models of the former with timm.create_model, or uninstall it and '
        'restart Python.')

globals().update({name: timm.model_entrypoint(name) for name in timm.list_models(module='lm_resnet')})
