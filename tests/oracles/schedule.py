"""The authors' schedule (model_util.py: learning_rate_schedule, get_train_steps), written out from the formulas."""

import numpy as np


def peak(base: float, batch: int, scaling: str) -> float:
    return {"linear": base * batch / 256.0, "sqrt": base * np.sqrt(batch)}[scaling]


def total_steps(num_samples: int, epochs: int, batch: int) -> int:
    return num_samples * epochs // batch + 1


def warm(num_samples: int, warmup_epochs: float, batch: int) -> int:
    return int(round(warmup_epochs * num_samples // batch))


def learning_rates(peak: float, total: int, warm: int) -> np.ndarray:
    """Every step's learning rate at once; the cosine is clamped at its end, as tf.train.cosine_decay is."""
    step = np.arange(total + 5, dtype=np.float64)
    decayed = np.clip((step - warm) / (total - warm), 0, 1)
    cosine = peak * 0.5 * (1 + np.cos(np.pi * decayed))
    return np.where(step < warm, step / max(warm, 1) * peak, cosine)
