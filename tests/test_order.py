"""The order of samples: its law, held to an oracle; each sample once an epoch; as well mixed as independent draws."""

import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pipeline.order import Order, permute
from tests.oracles.order import epoch_of, permuted


def samples_of(order: Order, epoch: int) -> list[int]:
    return order.samples_at(epoch, np.arange(order.steps_per_epoch * order.batch_size)).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 63, 64, 65, 66, 1000, 1_281_167, 10**9, 2**40 + 1])
def test_a_permutation_is_the_oracles(count: int) -> None:
    at = np.unique(np.random.default_rng(count).integers(0, count, 50))
    for key in ((0,), (5, 1, 2), (2**63 - 1, 0, 7)):
        assert permute(at, count, *key).tolist() == [permuted(x, count, key) for x in at.tolist()]


@pytest.mark.parametrize("count", [1, 2, 5, 64, 65, 1000, 4097])
def test_a_permutation_takes_each_number_once(count: int) -> None:
    for key in range(5):
        assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_permutations_of_few_elements_are_as_likely(count: int) -> None:
    """Chi-square of 40 draws for each of count! permutations, within 4 deviations of its mean."""
    kinds = math.factorial(count)
    found = Counter(tuple(permute(np.arange(count), count, 9, key).tolist()) for key in range(40 * kinds))
    chi_square = sum((n - 40) ** 2 / 40 for n in found.values()) + 40 * (kinds - len(found))
    assert abs(chi_square - (kinds - 1)) < 4 * math.sqrt(2 * (kinds - 1))


def test_neighbours_are_parted_in_a_large_permutation() -> None:
    """The distance of what stood side by side is spread evenly: chi-square over 20 bins of 20,000 pairs."""
    count = 1_281_167
    x = np.random.default_rng(0).integers(0, count - 1, 20_000)
    distance = (permute(x + 1, count, 3) - permute(x, count, 3)) % count
    bins = np.bincount(distance * 20 // count, minlength=20)
    assert ((bins - 1000) ** 2 / 1000).sum() < 19 + 4 * math.sqrt(38)


@pytest.mark.parametrize("shards", [[5, 5, 5, 5, 3], [1, 20, 3, 7], [12]])
@pytest.mark.parametrize(("window", "lanes"), [(0, 1), (1, 1), (2, 1), (3, 2), (1, 4), (0, 2), (100, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_is_the_oracles(shards: list[int], window: int, lanes: int, epoch: int) -> None:
    order = Order(shards, 4, seed=11, window=window, lanes=lanes)
    assert samples_of(order, epoch) == epoch_of(shards, 4, 11, epoch, window, lanes)


@pytest.mark.parametrize(("window", "lanes"), [(0, 1), (4, 1), (3, 4), (0, 8)])
def test_each_sample_comes_once_an_epoch_but_for_the_rest_of_each_lane(window: int, lanes: int) -> None:
    """Less than one batch's share of a lane is left out, and others each time: over 30 epochs every sample comes."""
    shards, batch_size = [50 + i % 7 for i in range(20)], 64
    order = Order(shards, batch_size, seed=1, window=window, lanes=lanes)
    seen = set()
    for epoch in range(30):
        samples = samples_of(order, epoch)
        assert len(set(samples)) == len(samples) == order.steps_per_epoch * batch_size
        assert 0 <= sum(shards) - len(samples) < batch_size + lanes
        seen |= set(samples)
    assert seen == set(range(sum(shards)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [samples_of(Order([30] * 4, 8, seed=seed), epoch) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 2)]
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 12  # of 120; one on average


def test_a_window_holds_what_its_shards_hold_and_no_more() -> None:
    """What reads ahead goes by `shards_of` and `windows_of`: each batch takes its samples from these windows alone."""
    shards, batch_size = [40] * 30, 32
    order = Order(shards, batch_size, seed=4, window=4, lanes=2)
    starts = np.cumsum([0, *shards])
    for epoch in range(2):
        for lane in range(2):
            windows = order.shards_of(epoch, lane)
            assert max(map(len, windows)) <= 4
            for step in range(order.steps_per_epoch):
                positions = np.arange(16) + step * batch_size + lane * 16
                used = np.searchsorted(starts, order.samples_at(epoch, positions), "right") - 1
                near = {shard for window in order.windows_of(epoch, lane, step) for shard in windows[window]}
                assert set(used.tolist()) <= near


def test_a_lane_keeps_its_shards_in_every_epoch() -> None:
    """So what a node has fetched serves it again, and lanes share only the shards that are cut in two."""
    order = Order([40] * 30, 32, seed=4, window=4, lanes=4)
    held = [
        {shard for part in order.shards_of(epoch, lane) for shard in part} for lane in range(4) for epoch in (0, 1, 7)
    ]
    for lane in range(4):
        assert held[3 * lane] == held[3 * lane + 1] == held[3 * lane + 2]
    assert sum(len(held[3 * lane]) for lane in range(4)) <= 30 + 3


def test_a_damaged_sample_gives_way_to_samples_of_its_lane_in_other_batches() -> None:
    """Every other position of the epoch is tried once, those of the same batch last; never itself."""
    order = Order([10] * 4, 8, seed=2, lanes=2, window=1)
    everything, positions = samples_of(order, 1), order.steps_per_epoch * 8
    others = list(order.substitutes(1, 11))
    assert others[0] == everything[19]
    assert sorted(others) == sorted(set(everything) - {everything[11]})
    lane = {everything[i] for i in range(positions) if i % 8 < 4}
    assert set(others[: order.steps_per_epoch - 1]) <= lane
    single = Order([4, 4], 8, seed=2)
    assert sorted(single.substitutes(0, 3)) == sorted(set(range(8)) - {int(single.samples_at(0, np.array([3]))[0])})


def test_batches_of_class_sorted_shards_are_as_mixed_as_independent_draws() -> None:
    """100 shards of one class each, batches of 250: chi-square of the class counts, summed over 40 batches.

    Independent draws without putting back give a mean of (classes - 1)(1 - batch / samples) a batch.
    """
    order = Order([100] * 100, 250, seed=6)
    samples = np.array(samples_of(order, 0)).reshape(40, 250) // 100
    chi_square = sum(((np.bincount(batch, minlength=100) - 2.5) ** 2 / 2.5).sum() for batch in samples)
    expected = 40 * 99 * (1 - 250 / 10_000)
    assert abs(chi_square - expected) < 4 * math.sqrt(2 * 40 * 99)


def test_without_shuffle_positions_are_samples() -> None:
    assert samples_of(Order([3, 4, 5], 5, seed=1, window=1, shuffle=False), 2) == list(range(10))


def test_a_billion_samples_take_milliseconds_and_a_few_numbers_for_each_shard() -> None:
    """100,000 shards; on record 2.5 ms for 8,192 positions (one core of an AMD EPYC), a tenth of a second to begin."""
    tracemalloc.start()
    order = Order([10_000] * 100_000, 8192, seed=3)
    order.samples_at(0, np.arange(8192))
    start = time.perf_counter()
    for batch in range(5):
        order.samples_at(0, np.arange(8192) + 8192 * (batch + 100_000))
    assert (time.perf_counter() - start) / 5 < 0.1
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200 * 100_000  # bytes: two hundred for each shard, of which the order keeps a part


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 6, "lanes": 4}, "batch_size 6 does not divide into 4 lanes"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 200}, "100 samples, fewer than one batch of 200"),
        ({"batch_size": 10, "window": -1}, "window -1"),
        ({"batch_size": 10, "lanes": 0}, "lanes 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Order([50, 50], **{"seed": 0, **options})  # type: ignore[arg-type]
