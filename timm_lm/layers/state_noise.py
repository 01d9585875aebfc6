"""Noise on the state of a residual network after each block, a discretised stochastic differential equation."""
import torch
from torch import nn

NOISE_TYPES = ('gaussian', 'uniform')


class StateNoise(nn.Module):
    """Adds noise to the state in training; the identity in evaluation.

    Source: the noise injection experiments of Lu et al. 2018 (arXiv 1710.10121), which used a level of 0.001.
    """

    def __init__(self, level: float, noise_type: str = 'gaussian'):
        """
        Args:
            level: Standard deviation of the Gaussian, or upper end of the uniform distribution U(0, level).
            noise_type: ``'gaussian'`` or ``'uniform'`` (one-sided).

        Raises:
            ValueError: If the type is unknown or the level is negative.
        """
        super().__init__()
        if noise_type not in NOISE_TYPES:
            raise ValueError(f"Unknown noise_type '{noise_type}', use one of {', '.join(NOISE_TYPES)}.")
        if level < 0:
            raise ValueError(f'The level of state noise must not be negative, got {level}.')
        self.level = level
        self.noise_type = noise_type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        noise = torch.randn_like(x) if self.noise_type == 'gaussian' else torch.rand_like(x)
        return x + self.level * noise

    def extra_repr(self) -> str:
        return f'level={self.level}, noise_type={self.noise_type}'
