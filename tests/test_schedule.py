"""The schedule is the authors', step by step."""

import numpy as np
import pytest

from model.schedule import learning_rate, scaled_lr, warmup_steps
from tests.oracles import schedule as oracle

IMAGENET = 1_281_167

# reference: the authors' arithmetic for ImageNet, 100 epochs, 10 of them warm-up, worked out by hand
TABLE = [  # batch, total steps, warm-up steps, peak linear (0.3), peak sqrt (0.075)
    (256, 500_456, 50_045, 0.3, 1.200),
    (512, 250_228, 25_022, 0.6, 1.697),
    (1024, 125_114, 12_511, 1.2, 2.400),
    (2048, 62_557, 6_255, 2.4, 3.394),
    (4096, 31_279, 3_127, 4.8, 4.800),
    (8192, 15_640, 1_563, 9.6, 6.788),
]


@pytest.mark.parametrize(("batch", "total", "warm", "linear", "sqrt"), TABLE)
def test_peaks_and_warmup_are_the_published_ones(batch, total, warm, linear, sqrt):
    """The numbers of the paper's two scaling rules, and the oracle agrees with the table it is used beside."""
    assert scaled_lr(0.3, batch, "linear") == oracle.peak(0.3, batch, "linear") == pytest.approx(linear, rel=1e-12)
    assert scaled_lr(0.075, batch, "sqrt") == oracle.peak(0.075, batch, "sqrt")
    assert scaled_lr(0.075, batch, "sqrt") == pytest.approx(sqrt, abs=5e-4)  # the table has three decimals
    assert scaled_lr(0.3, batch, "none") == 0.3
    assert warmup_steps(10, IMAGENET, batch) == warm == oracle.warm(IMAGENET, 10, batch)
    assert oracle.total_steps(IMAGENET, 100, batch) == total


@pytest.mark.parametrize(("peak", "total", "warm"), [(4.8, 31_279, 3_127), (1.0, 100, 0), (0.6, 40, 39)])
def test_every_step_equals_the_oracle(peak, total, warm):
    """From step 0 to beyond the end, within float64 rounding."""
    ours = [learning_rate(s, peak=peak, total_steps=total, warmup_steps=warm) for s in range(total + 5)]
    # the last steps are differences 1 + cos(·) near 0, hence the absolute part
    np.testing.assert_allclose(ours, oracle.learning_rates(peak, total, warm), rtol=1e-12, atol=1e-15 * peak)


def test_the_shape_of_the_curve():
    """0 at the start, the peak where warm-up ends, half of it midway down the cosine, 0 at the end and after."""

    def lr(step):
        return learning_rate(step, peak=4.8, total_steps=1100, warmup_steps=100)

    assert lr(0) == 0
    assert lr(50) == 2.4
    assert lr(100) == 4.8
    assert lr(600) == pytest.approx(2.4)
    assert 0 < lr(1099) < 1e-4
    assert lr(1100) == lr(5000) == 0
    assert learning_rate(6, peak=1, total_steps=7, warmup_steps=7) == 6 / 7, "a run may be warm-up only"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learning_rate(-1, peak=1, total_steps=10, warmup_steps=2), "counts from 0"),
        (lambda: learning_rate(0, peak=1, total_steps=10, warmup_steps=11), "warmup_steps 11"),
        (lambda: scaled_lr(0.3, 256, "cubic"), "cubic"),
    ],
)
def test_nonsense_is_refused(call, message):
    """A schedule that cannot be meant is an error that names the value."""
    with pytest.raises(ValueError, match=message):
        call()
