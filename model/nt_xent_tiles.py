"""NT-Xent in tiles of the matrix, none of which is stored: the CPU's implementation, and any device's without kernels.

Among this rank's own rows only one triangle of tiles is computed, each a product, an exp and a sum that stay in the
cache; the mirror image of a tile is its transpose. Tiles whose columns are other ranks' rows have no mirror image here
and serve this rank's rows alone. Products, in units of M x M x D: 1/2 for the sums, 1/2 + 1 for the gradient, where
storing e would take 1 + 2. The loss and the letters are explained in `model.nt_xent`.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.nt_xent_rows import Gather, shift, unit_rows

TILE_ON_CPU = 512  # 1 MiB of fp32, which the second-level cache holds; 256 and 1024 took 5 to 70 % longer at 4096 rows
TILE_ON_GPU = 4096


def forward(
    z: Tensor, temperature: float, operands: str, gather: Gather, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), u (M, D), r (M,) and miss (2n,); this rank's rows are [first, first + 2n) of the gathered M."""
    n = len(z) // 2
    local, _ = unit_rows(z)
    u = gather(local)
    sums = u.new_zeros(2 * n)

    def shares(e: Tensor, _own: slice, _columns: slice, mirrored: bool) -> tuple[Tensor, Tensor | None]:
        return e.sum(1), e.sum(0) if mirrored else None

    add_tiles(sums, u, first, temperature, operands, shares)
    positive = (local[:n] * local[n:]).sum(1).repeat(2) / temperature - shift(temperature) * math.log(2)
    r = 1 / (sums + positive.exp())
    loss = F.softplus(sums.log() - positive, threshold=50).mean()  # log(1 + Q / e_ip), exact for tiny and huge ratios
    return loss, u, gather(r), sums * r


def backward(
    grad: Tensor, z: Tensor, u: Tensor, r: Tensor, miss: Tensor, temperature: float, operands: str, first: int
) -> Tensor:
    """dz (2n, D) in the type of z."""
    n = len(z) // 2
    inverse_length = unit_rows(z)[1]
    local, local_r = u[first : first + 2 * n], r[first : first + 2 * n]
    du = torch.zeros_like(local)

    def shares(e: Tensor, own: slice, columns: slice, mirrored: bool) -> tuple[Tensor, Tensor | None]:
        e *= local_r[own, None] + r[columns]
        return e @ u[columns], e.T @ local[own] if mirrored else None

    add_tiles(du, u, first, temperature, operands, shares)
    du -= (miss + miss.roll(n))[:, None] * local.roll(n, 0)
    du -= (du * local).sum(1, keepdim=True) * local
    return (du * (inverse_length * (grad / (temperature * 2 * n)))).to(z.dtype)


def add_tiles(
    total: Tensor, u: Tensor, first: int, temperature: float, operands: str, shares: Callable[..., tuple]
) -> None:
    """Adds every tile's shares to total (2n, ...), one number or row for each row of this rank.

    shares(e, rows, columns, mirrored) gets a tile of e with self and positive pairs at 0, its rows (of this rank) and
    its columns (of the gathered rows), and returns what its rows receive and, if mirrored, what its columns do.

    Both views are cut into the same blocks, so the other views of a block are exactly another block, and both kinds of
    excluded pairs lie on the main diagonals of square tiles.

    On the CPU each tile is computed by one thread. A plain loop with torch's own threads, which meet after every
    product, exp and sum, took 1.12, 1.05 and 1.19 times as long at 1024, 4096 and 16384 rows (2 threads on 2 cores of
    an EPYC that others used too) where OMP_WAIT_POLICY=PASSIVE lets them sleep, as in train.py; 1.3 and 4 times where
    they spin, and more the busier the machine. benchmarks.loss times both. This thread adds the shares in the order of
    the tiles, so the result is the same for any number of threads.
    """
    n = len(total) // 2
    local = u[first : first + 2 * n]
    on_cpu = u.device.type == "cpu"
    edge = TILE_ON_CPU if on_cpu else TILE_ON_GPU
    first_views = _cut(0, n, edge)
    blocks = first_views + [slice(block.start + n, block.stop + n) for block in first_views]
    count = len(blocks)
    pairs = [(i, (k - i) % count) for k in range(count) for i in range(count)]  # another order rounds differently
    tiles = [(i, j, slice(first + blocks[j].start, first + blocks[j].stop)) for i, j in pairs if i <= j]
    others = _cut(0, first, edge) + _cut(first + 2 * n, len(u), edge)
    tiles += [(i, i, columns) for columns in others for i in range(count)]
    bits, zero = shift(temperature), u.new_zeros(())

    def compute(tile: tuple[int, int, slice]) -> tuple[Tensor, Tensor | None]:
        i, j, columns = tile
        e = torch.addmm(zero, local[blocks[i]], u[columns].T, beta=0, alpha=1 / temperature)
        if bits:
            e -= bits * math.log(2)
        e.exp_()
        if columns.start - first in (blocks[i].start, (blocks[i].start + n) % (2 * n)):
            e.fill_diagonal_(0)
        return shares(e, blocks[i], columns, j != i)

    threads = min(_caller.num_threads, len(tiles)) if on_cpu else 1
    with _products(u.device.type, operands):
        for (i, j, _), (own, mirrored) in zip(tiles, _in_order(compute, tiles, threads), strict=True):
            total[blocks[i]] += own
            if mirrored is not None:
                total[blocks[j]] += mirrored


def _in_order(compute: Callable[[Any], Any], tiles: Iterable[Any], threads: int) -> Iterator[Any]:
    """compute(tile) for every tile, yielded in their order. `threads` threads work at most two tiles a thread ahead."""
    if threads == 1:
        yield from map(compute, tiles)
        return
    ahead: deque[Future] = deque()
    for tile in tiles:
        ahead.append(_pool(threads).submit(compute, tile))
        if len(ahead) > 2 * threads:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


class _Caller(threading.local):
    """For every thread that calls nt_xent: how many threads torch gave an operation before `one_thread_each`."""

    num_threads = 1


_caller = _Caller()


@contextmanager
def one_thread_each(device: str) -> Iterator[None]:
    """On the CPU, torch runs each operation inside the block on one thread; `add_tiles` gives the others tiles."""
    if device != "cpu":
        yield
        return
    before = _caller.num_threads, torch.get_num_threads()
    _caller.num_threads = before[1]
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _caller.num_threads = before[0]
        torch.set_num_threads(before[1])


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run torch's operations alone. set_num_threads holds for the calling thread and for new ones."""
    barrier = threading.Barrier(threads + 1)

    def alone() -> None:
        torch.get_num_threads()  # a thread's first call sets its number to the process's, and would undo the next line
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        barrier.wait()

    pool = ThreadPoolExecutor(threads, "nt_xent")
    for _ in range(threads):
        pool.submit(alone)
    barrier.wait()
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads


def _cut(start: int, stop: int, edge: int) -> list[slice]:
    """[start, stop) in the fewest near-equal pieces of at most edge."""
    pieces = -(-(stop - start) // edge)
    bounds = [start + (stop - start) * k // pieces for k in range(pieces + 1)] if pieces else []
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


@contextmanager
def _products(device: str, operands: str) -> Iterator[None]:
    """fp32 matrix products read bf16 inside the block if asked to, fp32 otherwise, whatever the process has set.

    torch has one such switch for all threads: products that other threads start meanwhile follow it too.
    """
    matmul: Any = (torch.backends.mkldnn if device == "cpu" else torch.backends.cuda).matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if operands == "bf16" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
