"""The learning rate as a pure function of the step: nothing to save, nothing to step twice.

Linear warm-up from 0, then half a cosine down to 0, the peak scaled with the batch.
Chen et al. 2020, arXiv:2002.05709, sections 2.2 and B.1; arithmetic as in the authors' model_util.py.
"""

import math
from typing import Literal

Scaling = Literal["linear", "sqrt", "none"]


def scaled_lr(base_lr: float, batch_size: int, scaling: Scaling) -> float:
    """The peak learning rate of a run whose global batch is `batch_size` images.

    "linear" is base_lr · batch_size / 256 (the paper's 0.3), "sqrt" is base_lr · √batch_size (its 0.075, better
    below 4096), "none" is base_lr.
    """
    if scaling == "linear":
        return base_lr * batch_size / 256
    if scaling == "sqrt":
        return base_lr * math.sqrt(batch_size)
    if scaling == "none":
        return base_lr
    raise ValueError(f'scaling {scaling!r} is none of "linear", "sqrt", "none"')


def warmup_steps(warmup_epochs: float, num_samples: int, batch_size: int) -> int:
    """Steps in `warmup_epochs` passes over `num_samples` images, rounded as the authors round: down, once."""
    return int(warmup_epochs * num_samples // batch_size)


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0: peak · step / warmup_steps, then cosine to 0.

    The first step of a warm-up has learning rate 0, as the authors' has. At and after total_steps it is 0.
    total_steps is the caller's: the authors run epochs · num_samples // batch_size + 1 steps, letting batches
    straddle epochs; our loader drops each epoch's last partial batch, so steps_per_epoch · epochs.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps {warmup_steps} must lie between 0 and total_steps {total_steps}")
    if step < 0:
        raise ValueError(f"step counts from 0, got {step}")
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return step / warmup_steps * peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
