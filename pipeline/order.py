"""Which sample stands at which position of an epoch: a pure function of numbers, without a file or a state.

Samples are counted in the order of the shards, positions from the start of an epoch. Global batch b of B images holds
the positions [b B, (b + 1) B), so the order knows neither processes nor micro-batches nor where a run was interrupted.

The law, for `lanes` L and `window` w:

1. The shards in the order `permute(shards, seed, 0)`, once for the run, make one long line of samples. Lane l is the
   l-th of L equal parts of it, [l N // L, (l + 1) N // L): some shards and, at either end, perhaps a piece of one.
2. In an epoch a lane's pieces take the order `permute(pieces, seed, 1, epoch, l)`. They are cut into the fewest windows
   of at most w pieces, of numbers that differ by at most one, and the samples of the v-th window take the order
   `permute(samples, seed, 2, epoch, l, v)`. What the windows give one after another is the order of the lane.
3. A batch takes B / L samples from every lane: position b B + l B / L + i is sample b B / L + i of lane l.

With one lane and a window of all shards, as on a local disk, this is a permutation of the whole data set. Smaller
windows bound what must be near at a time, and lanes let a node do with its own part of the shards, the same in every
epoch: both are for object storage. An epoch has N // L // (B / L) batches; the rest of each lane, another one in every
epoch, is left out.

`permute` is a cipher, so nothing is shuffled and no permutation is held: a position costs some tens of operations, the
memory is a few numbers per shard, and a billion samples take no longer than a thousand. Feistel networks on any number
of elements by walking cycles: Black and Rogaway 2002, "Ciphers with arbitrary finite domains". Lanes that stay with
their shards: canonical nodes of MosaicML Streaming.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
ROUNDS = 8
LEAST = 8  # smaller factors would mix few elements badly
_GOLDEN, _FIRST, _SECOND, _MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64 - 1


class Division(NamedTuple):
    """How an epoch divides into batches, and a batch among processes; see `divide`."""

    steps_per_epoch: int
    local_batch_size: int  # images of one process in a batch
    micro_batch: int  # images that a process takes at a time
    num_micro_batches: int  # of one process in a batch


def divide(
    samples: int,
    batch_size: int,
    *,
    world_size: int = 1,
    micro_batch: int = 0,
    lanes: int = 1,
    address: str = "the data set",
) -> Division:
    """The arithmetic of a run. micro_batch 0 is a process's whole batch; address stands in the messages.

    Raises ValueError for a batch that does not divide into processes, lanes and micro-batches, or is larger than an
    epoch.
    """
    if micro_batch < 0:
        raise ValueError(f"micro_batch {micro_batch} is negative; expected a number of images, or 0 for all")
    for number, name in ((world_size, "processes"), (lanes, "lanes")):
        if batch_size < 1 or batch_size % number:
            raise ValueError(f"batch_size {batch_size} does not divide into {number} {name}")
    local = batch_size // world_size
    count, rest = divmod(local, micro_batch or local)
    if rest:
        near = sorted((n for n in range(1, local + 1) if local % n == 0), key=lambda n: abs(n - micro_batch))[:3]
        raise ValueError(
            f"micro_batch {micro_batch} does not divide the {local} images of a process's batch; near are "
            f"{', '.join(map(str, sorted(near)))}"
        )
    steps = samples // lanes // (batch_size // lanes)
    if not steps:
        where = f" in {lanes} lanes" if lanes > 1 else ""
        raise ValueError(
            f"{address} has {samples} samples{where}, fewer than one batch of {batch_size}; lower the batch size"
        )
    return Division(steps, local, micro_batch or local, count)


def _mix(z: int) -> int:
    """The finaliser of splitmix64."""
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def _mix_all(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of each element; products of uint64 wrap by themselves."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def permute(numbers: Numbers, count: int, *key: int) -> Numbers:
    """Where a permutation of range(count), one for each `key` of integers, puts `numbers`.

    The key becomes one of 64 bits: from k = 0 on, k = mix(k + golden + part) for each part of it. A number x stands for
    the pair (x // b, x % b), with a = max(8, sqrt(count) rounded up) and b = max(8, count / a rounded up). In round r,
    r = 0 ... 7, the first of the pair moves on by mix(second + mix(k + r golden)) modulo a, or if r is odd the second
    by mix(first + mix(k + r golden)) modulo b. A result of `count` or more goes through all rounds again.
    """
    k = 0
    for part in key:
        k = _mix((k + _GOLDEN + part) & _MASK)
    a = max(LEAST, math.isqrt(count - 1) + 1)
    b = max(LEAST, -(-count // a))
    sides, keys = (np.uint64(a), np.uint64(b)), [np.uint64(_mix((k + r * _GOLDEN) & _MASK)) for r in range(ROUNDS)]

    def cipher(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        pair = [x // sides[1], x % sides[1]]
        for r, round_key in enumerate(keys):
            moved, other = r % 2, 1 - r % 2
            pair[moved] = (pair[moved] + _mix_all(pair[other] + round_key) % sides[moved]) % sides[moved]
        return pair[0] * sides[1] + pair[1]

    placed = cipher(numbers.astype(np.uint64))
    while len(walking := np.flatnonzero(placed >= count)):
        placed[walking] = cipher(placed[walking])
    return placed.astype(np.int64)


@dataclass(frozen=True)
class _Lane:
    """A lane in one epoch: its pieces in their order, and where windows begin among pieces and samples."""

    shards: Numbers  # of each piece
    first: Numbers  # first sample of each piece
    starts: Numbers  # samples of the lane before each piece, and in all
    pieces: Numbers  # pieces before each window, and in all
    windows: Numbers  # samples before each window, and in all


class Order:
    """The samples of every epoch. Read-only; `samples_at` may be called from any thread."""

    def __init__(
        self,
        shards: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        window: int = 0,
        lanes: int = 1,
        shuffle: bool = True,
    ) -> None:
        """
        shards      samples in each shard
        batch_size  images per step over all processes, a multiple of lanes
        window      shards whose samples are mixed together; 0: all of a lane
        lanes       streams that share out the shards
        shuffle     False: every epoch goes through the samples as they lie, and windows and lanes do not count
        Raises ValueError for numbers out of range, and as `divide`.
        """
        self.samples, self.batch_size, self.seed = sum(shards), batch_size, seed
        self.window, self.lanes, self.shuffle = (
            min(window or len(shards), len(shards)),
            lanes if shuffle else 1,
            shuffle,
        )
        if window < 0 or lanes < 1:
            raise ValueError(f"window {window} and lanes {lanes}: expected at least 0 and at least 1")
        self.steps_per_epoch = divide(self.samples, batch_size, lanes=self.lanes).steps_per_epoch
        self._from_each = batch_size // self.lanes
        self._starts = np.concatenate([[0], np.cumsum(shards, dtype=np.int64)])
        self._lane = lru_cache(2 * self.lanes)(self._lay_out)  # of two epochs: reading ahead comes to the next one

    def samples_at(self, epoch: int, positions: Numbers) -> Numbers:
        """The samples (n,) at positions (n,) of an epoch."""
        if not self.shuffle:
            return positions
        batch, place = np.divmod(positions, self.batch_size)
        lanes, place = np.divmod(place, self._from_each)
        place += batch * self._from_each
        samples = np.empty_like(positions)
        for lane in np.unique(lanes).tolist():
            samples[lanes == lane] = self._in_lane(epoch, lane, place[lanes == lane])
        return samples

    def substitutes(self, epoch: int, position: int) -> Iterator[int]:
        """The samples that may stand for a damaged one: that of its place in the next batch, in the one after, ...

        so from its own lane, and not one of the same batch twice; behind the last batch comes the first one, and after
        all batches the next place.
        """
        positions = self.steps_per_epoch * self.batch_size
        for further in range(1, positions):
            at = position + further * self.batch_size + further // self.steps_per_epoch
            yield int(self.samples_at(epoch, np.array([at % positions]))[0])

    def lanes_of(self, start: int, stop: int) -> range:
        """The lanes that places [start, stop) of every batch come from."""
        return range(start // self._from_each, (stop - 1) // self._from_each + 1)

    def shards_of(self, epoch: int, lane: int) -> list[list[int]]:
        """The shards of each window of a lane, in the order in which they are needed."""
        laid = self._lane(epoch, lane)
        return [part.tolist() for part in np.split(laid.shards, laid.pieces[1:-1])]

    def windows_of(self, epoch: int, lane: int, step: int) -> range:
        """The numbers of the windows of a lane that batch `step` takes samples from."""
        ends = np.array([step, step + 1]) * self._from_each - [0, 1]
        first, last = (np.searchsorted(self._lane(epoch, lane).windows, ends, "right") - 1).tolist()
        return range(first, last + 1)

    def _in_lane(self, epoch: int, lane: int, places: Numbers) -> Numbers:
        laid = self._lane(epoch, lane)
        windows = np.searchsorted(laid.windows, places, "right") - 1
        placed = np.empty_like(places)
        for window in np.unique(windows).tolist():
            here, start, stop = windows == window, laid.windows[window], laid.windows[window + 1]
            key = self.seed, 2, epoch, lane, window
            placed[here] = start + permute(places[here] - start, int(stop - start), *key)
        piece = np.searchsorted(laid.starts, placed, "right") - 1
        return laid.first[piece] + placed - laid.starts[piece]

    def _lay_out(self, epoch: int, lane: int) -> _Lane:
        shards = permute(np.arange(len(self._starts) - 1), len(self._starts) - 1, self.seed, 0)
        sizes = np.diff(self._starts)[shards]
        ends = np.cumsum(sizes)
        start, stop = (self.samples * number // self.lanes for number in (lane, lane + 1))
        low, high = np.maximum(ends - sizes, start), np.minimum(ends, stop)
        mine = np.flatnonzero(low < high)
        mine = mine[permute(np.arange(len(mine)), len(mine), self.seed, 1, epoch, lane)]
        starts = np.concatenate([[0], np.cumsum((high - low)[mine])])
        first = self._starts[shards[mine]] + (low - (ends - sizes))[mine]
        num = -(-len(mine) // self.window)
        pieces = np.arange(num + 1) * len(mine) // num
        return _Lane(shards[mine], first, starts, pieces, starts[pieces])
