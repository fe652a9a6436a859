"""Processes that share the work on shards, one function, many tasks, results in order; and cores that they share."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

DECODERS = "PIL.Image", "pipeline.graph"  # what workers that look at images import

Task = TypeVar("Task")
Result = TypeVar("Result")


def local_world_size() -> int:
    """Processes that were launched on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_of_cores() -> int:
    """Of this process among those that were launched on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def in_order(
    function: Callable[[Task], Result], tasks: Iterator[Task], workers: int, preload: Sequence[str] = DECODERS
) -> Iterator[Result]:
    """Map in order. One worker is this process; more start from one server that has imported `preload`, and end with
    this process. They need the `if __name__ == "__main__":` of multiprocessing, and functions that can be pickled.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
    try:
        yield from pool.map(function, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a pool's workers would wait for ever for its next task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
