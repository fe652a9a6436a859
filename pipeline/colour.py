"""The fast profile's colour and normalisation on the CPU, by torch.

The graph can do both, and does on GPUs; but DALI's operators for them take one pixel at a time on a CPU, where matrix
products take a vector: a third of the time.
"""

import math

import torch
from torch import Tensor

from pipeline.views import ViewConfig

_VECTOR = 16  # pixels to whose channels the numbers per channel are repeated
_AT_ONCE = 2**20  # pixels: what stands between levels and views stays small, and small views are not many small tasks


def finish(
    levels: Tensor, colour: Tensor, mean_colour: Tensor, config: ViewConfig, out: Tensor | None = None
) -> Tensor:
    """Views (n, S, S, 3), float32: levels x recoloured to A x + B m, clipped to [0, 255], and normalised; in `out`.

    levels (n, S, S, 3) uint8; A `colour` and B `mean_colour` (n, 3, 3) as in `pipeline.views.Draws`; m the mean of each
    view.
    """
    mean, std = 255 * torch.tensor(config.mean), 255 * torch.tensor(config.std)
    area = levels.shape[1] * levels.shape[2]
    pixels = math.gcd(_VECTOR, area)
    low, high = (bound.repeat(pixels) for bound in (-mean / std, (255 - mean) / std))
    views = torch.empty(levels.shape) if out is None else out
    parts = (every.split(max(1, _AT_ONCE // area)) for every in (levels, colour, mean_colour, views))
    for x, A, B, view in zip(*parts, strict=True):
        x, n = x.float(), len(x)
        sums = x.view(n, -1, 3 * pixels).sum(1).view(n, pixels, 3).sum(1)
        shift = (torch.bmm(B, sums[:, :, None] / area)[:, :, 0] - mean) / std
        torch.bmm(x.view(n, area, 3), (A / std[:, None]).mT, out=view.view(n, area, 3))
        view.view(n, -1, 3 * pixels).add_(shift.repeat(1, pixels)[:, None]).clamp_(low, high)
    return views
