"""What is watched during training, in float64 NumPy, one row after the other, from the definitions alone.

Contrastive accuracy and entropy: the authors' code (objective.py, run.py) takes them from the logits of the first view
against all second views. Alignment and uniformity: arXiv:2005.10242, section 4.1, with alpha = 2 and t = 2. The linear
classifier: softmax regression by gradient descent on standardised features.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def contrast(first: Array, second: Array, temperature: float) -> dict[str, float]:
    """first (n, D); second (N, D), whose first n rows are of the same images."""
    u, v = ([row / np.linalg.norm(row) for row in rows] for rows in (first, second))
    hits, entropies, distances, potentials = [], [], [], []
    for i, row in enumerate(u):
        p = np.exp(np.array([row @ other for other in v]) / temperature)
        p /= p.sum()
        hits.append(np.argmax(p) == i)
        entropies.append(-sum(x * np.log(x) for x in p if x > 0))
        distances.append(np.linalg.norm(row - v[i]) ** 2)
        potentials += [np.exp(-2 * np.linalg.norm(row - other) ** 2) for j, other in enumerate(v) if j != i]
    return {
        "contrast_accuracy": float(np.mean(hits)),
        "contrast_entropy": float(np.mean(entropies)),
        "alignment": float(np.mean(distances)),
        "uniformity": float(np.log(np.mean(potentials))),
    }


def probe_step(
    weight: Array, bias: Array, features: Array, labels: NDArray[np.int64], lr: float
) -> tuple[Array, Array, float]:
    """One step from weight (C, F) and bias (C,) on features (2m, F), view-major, of labels (m,); and the accuracy."""
    x = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-5)
    weight_grad, bias_grad, hits = np.zeros_like(weight), np.zeros_like(bias), []
    for row, label in zip(x, [*labels, *labels], strict=True):
        logits = weight @ row + bias
        p = np.exp(logits - logits.max())
        p /= p.sum()
        hits.append(np.argmax(logits) == label)
        p[label] -= 1
        weight_grad += np.outer(p, row) / len(x)
        bias_grad += p / len(x)
    return weight - lr * weight_grad, bias - lr * bias_grad, float(np.mean(hits))
