"""LM-ResNet and LM-ResNeXt for timm: importing this package registers the networks.

With the package installed, importing timm registers them; see ``_timm_lm_autoload``.
"""
__version__ = '0.1.0'

import timm  # noqa: F401  first, to wait for another thread that is in the middle of importing it

from .depth import grow
from .errors import UserError
from .inference import optimize
from .models import LMResNet

__all__ = ['LMResNet', 'UserError', '__version__', 'grow', 'optimize']
