"""The fast profile's colour and normalisation on the CPU, by torch.

The graph can do both, and does on GPUs; but DALI's operators for them take one pixel at a time on a CPU, where matrix
products take a vector: a third of the time.
"""

import math

import torch
from torch import Tensor

from pipeline.views import ViewConfig

_PIXELS = 16  # a vector of so many pixels' channels is what the per-channel numbers are repeated to


def finish(levels: Tensor, colour: Tensor, mean_colour: Tensor, config: ViewConfig) -> Tensor:
    """Views (n, S, S, 3), float32: levels x recoloured to A x + B m, clipped to [0, 255], and normalised.

    levels (n, S, S, 3) uint8; A `colour` and B `mean_colour` (n, 3, 3) as in `pipeline.views.Draws`; m the mean of each
    view.
    """
    n, size = levels.shape[:2]
    pixels = math.gcd(_PIXELS, size * size)
    x = levels.float()
    mean, std = 255 * torch.tensor(config.mean), 255 * torch.tensor(config.std)
    sums = x.view(n, -1, 3 * pixels).sum(1).view(n, pixels, 3).sum(1)
    shift = (torch.bmm(mean_colour, sums[:, :, None] / size**2)[:, :, 0] - mean) / std
    views = torch.bmm(x.view(n, -1, 3), (colour / std[:, None]).mT)
    low, high = (bound.repeat(pixels) for bound in (-mean / std, (255 - mean) / std))
    views.view(n, -1, 3 * pixels).add_(shift.repeat(1, pixels)[:, None]).clamp_(low, high)
    return views.view(levels.shape)
