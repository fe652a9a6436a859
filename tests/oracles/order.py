"""The law of pipeline/order.py once more, sample by sample, with Python's integers and lists."""

import math
from collections.abc import Sequence

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & MASK
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def permuted(x: int, count: int, key: Sequence[int]) -> int:
    golden, k = 0x9E3779B97F4A7C15, 0
    for part in key:
        k = mix((k + golden + part) & MASK)
    a = max(8, math.ceil(math.sqrt(count)))
    b = max(8, math.ceil(count / a))
    while True:
        first, second = divmod(x, b)
        for r in range(8):
            round_key = mix((k + r * golden) & MASK)
            if r % 2:
                second = (second + mix((first + round_key) & MASK)) % b
            else:
                first = (first + mix((second + round_key) & MASK)) % a
        x = first * b + second
        if x < count:
            return x


def arranged(things: Sequence[int], key: Sequence[int]) -> list[int]:
    """The thing that stands first, second, ...: place x holds thing number permuted(x)."""
    return [things[permuted(x, len(things), key)] for x in range(len(things))]


def epoch_of(shards: Sequence[int], batch_size: int, seed: int, epoch: int, window: int, lanes: int) -> list[int]:
    """The samples of an epoch, in the order of their positions."""
    starts = [sum(shards[:i]) for i in range(len(shards))]
    line = [
        (shard, starts[shard] + i) for shard in arranged(range(len(shards)), (seed, 0)) for i in range(shards[shard])
    ]
    orders = []
    for lane in range(lanes):
        mine = line[len(line) * lane // lanes : len(line) * (lane + 1) // lanes]
        pieces = [[sample for at, sample in mine if at == shard] for shard in dict.fromkeys(at for at, _ in mine)]
        pieces = [pieces[i] for i in arranged(range(len(pieces)), (seed, 1, epoch, lane))]
        num = math.ceil(len(pieces) / window) if window else 1
        order = []
        for number in range(num):
            inside = pieces[len(pieces) * number // num : len(pieces) * (number + 1) // num]
            order += arranged([sample for piece in inside for sample in piece], (seed, 2, epoch, lane, number))
        orders.append(order)
    each = batch_size // lanes
    steps = len(line) // lanes // each
    return [sample for step in range(steps) for order in orders for sample in order[step * each : (step + 1) * each]]
