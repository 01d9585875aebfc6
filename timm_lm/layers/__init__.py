"""The mathematics of multi-step residual networks: updates and noise, independent of any network."""
from .state_noise import StateNoise
from .steps import EulerStep, TwoStep, two_step

__all__ = ['EulerStep', 'StateNoise', 'TwoStep', 'two_step']
