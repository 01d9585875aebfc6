"""The networks, registered with timm when this package is imported."""
from .lm_resnet import *  # noqa: F403
