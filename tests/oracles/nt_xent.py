"""NT-Xent in float64 NumPy, written from equation 1 of arXiv:2002.05709 and nothing else.

    sim(a, b) = a.b / (|a| |b|)
    loss_i    = -log( exp(sim(z_i, z_p) / tau) / sum over k != i of exp(sim(z_i, z_k) / tau) ),  p the other view of i

The loss is the mean over all 2n rows. The gradient is the chain rule applied to these two lines, one row after the
other, with respect to the projections as they arrive, before normalisation. The paper leaves the zero vector open; here
its similarity to everything is 0 and its gradient is 0.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def other_view(i: int, rows: int) -> int:
    """The row of the same image: views are stacked, so rows i and i + n come from image i."""
    return (i + rows // 2) % rows


def similarity(z: Array) -> Array:
    """(2n, 2n) cosine similarities of the rows of z (2n, D)."""
    lengths = np.sqrt((z * z).sum(axis=1))
    outer = lengths[:, None] * lengths[None, :]
    return np.divide(z @ z.T, outer, out=np.zeros_like(outer), where=outer > 0)


def nt_xent(z: Array, temperature: float) -> float:
    """Mean NT-Xent of z (2n, D), view-major."""
    sim = similarity(z) / temperature
    losses = []
    for i in range(len(z)):
        others = np.delete(sim[i], i)
        largest = others.max()
        losses.append(largest + np.log(np.exp(others - largest).sum()) - sim[i, other_view(i, len(z))])
    return float(np.mean(losses))


def nt_xent_gradient(z: Array, temperature: float) -> Array:
    """d nt_xent / d z, (2n, D)."""
    rows = len(z)
    sim = similarity(z)
    lengths = np.sqrt((z * z).sum(axis=1, keepdims=True))
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    unit = z * inverse
    gradient = np.zeros_like(z)
    for i in range(rows):
        weight = np.exp((sim[i] - np.delete(sim[i], i).max()) / temperature)
        weight[i] = 0.0
        d_sim = weight / weight.sum()
        d_sim[other_view(i, rows)] -= 1.0
        d_sim /= temperature * rows
        # sim(z_i, z_k) pulls z_i towards unit_k and z_k towards unit_i, each only across its own direction.
        gradient[i] += (d_sim[:, None] * (unit - sim[i][:, None] * unit[i])).sum(axis=0) * inverse[i]
        gradient += d_sim[:, None] * (unit[i] - sim[i][:, None] * unit) * inverse
    return gradient


def rounded(z: Array, temperature: float, to: Callable[[Array], Array]) -> tuple[float, Array]:
    """Loss and gradient in float64 but for what a matrix unit would be given: unit rows and pair weights go through
    `to`. Positives stay exact. The distance from here to the exact values is what the operands' precision costs.
    """
    rows = len(z)
    lengths = np.sqrt((z * z).sum(axis=1, keepdims=True))
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    unit = z * inverse
    given = to(unit)
    partner = np.array([other_view(i, rows) for i in range(rows)])
    positive = (unit * unit[partner]).sum(axis=1) / temperature
    logits = given @ given.T / temperature
    logits[np.arange(rows), np.arange(rows)] = -np.inf
    logits[np.arange(rows), partner] = -np.inf
    largest = np.maximum(logits.max(axis=1), positive)
    negatives = np.exp(logits - largest[:, None]).sum(axis=1)
    log_sum = largest + np.log(negatives + np.exp(positive - largest))
    weights = np.exp(logits - log_sum[:, None]) + np.exp(logits - log_sum[None, :])
    miss = negatives * np.exp(largest - log_sum)
    d_unit = to(weights) @ given - (miss + miss[partner])[:, None] * unit[partner]
    d_unit -= (d_unit * unit).sum(axis=1, keepdims=True) * unit
    return float((log_sum - positive).mean()), d_unit * inverse / (temperature * rows)


def to_fp16(x: Array) -> Array:
    """fp16 of x 2^14, back at scale: the range that weights have after the kernels' scaling, harmless for unit rows."""
    return np.ldexp(np.ldexp(x, 14).astype(np.float16).astype(np.float64), -14)


def to_mantissa(bits: int) -> Callable[[Array], Array]:
    """Rounding to nearest even with `bits` bits after the point and any exponent: 7 is bf16, 10 tf32, 23 fp32."""

    def to(x: Array) -> Array:
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(np.ldexp(mantissa, bits + 1)), exponent - bits - 1)

    return to
