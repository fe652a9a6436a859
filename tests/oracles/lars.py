"""One LARS update of one tensor in float64, from the formula the SimCLR authors implement in lars_optimizer.py."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def lars_update(
    w: Array, g: Array, v: Array, *, lr: float, momentum: float, weight_decay: float, eta: float, excluded: bool
) -> tuple[Array, Array]:
    """The weight and the momentum after one step. `excluded` tensors see neither decay nor trust ratio."""
    trust = 1.0
    if not excluded:
        g = g + weight_decay * w
        w_norm, g_norm = np.sqrt(np.sum(w * w)), np.sqrt(np.sum(g * g))
        if w_norm > 0 and g_norm > 0:
            trust = eta * w_norm / g_norm
    v = momentum * v + lr * trust * g
    return w - v, v
