"""LM-ResNet and LM-ResNeXt for timm: importing this package registers the networks.

With the package installed, timm registers them by itself; see ``_timm_lm_autoload``.
"""
__version__ = '0.1.0'

import timm  # noqa: F401  first, so that another thread in the middle of its import is waited for

from .depth import grow
from .errors import UserError
from .inference import optimize
from .models import LMResNet

__all__ = ['LMResNet', 'UserError', '__version__', 'grow', 'optimize']
