"""Processes that wait for each other: how long, and which one they miss."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

RANKS_WAIT = timedelta(minutes=10)  # for each other in the middle of a run, then it ends
LAST_WORDS_S = 10.0  # that a process whose run failed waits to hear which others are still there


class LostRankError(RuntimeError):
    """Another process has gone or does not answer; the message says which."""


@contextmanager
def naming_lost_ranks(rank: int, world_size: int) -> Iterator[None]:
    """What fails because another process does not answer comes as a LostRankError that says which one.

    Whoever fails tells the launcher's store that it is there, so the one that is missed is the one that does not.
    ValueError and what is no Error are met by all processes at once.
    """
    import torch.distributed as dist

    try:
        yield
    except (RuntimeError, OSError, ArithmeticError) as error:
        lost: list[int] = []
        if world_size > 1:
            waiting = isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError))
            with contextlib.suppress(RuntimeError):  # the store has gone with the process that kept it
                lost = silent_ranks(world_size, rank, waiting)
        if not lost:
            raise
        raise LostRankError(
            f"rank {', '.join(map(str, lost))} has gone, or did not answer for {RANKS_WAIT}: look at what that process "
            "printed last and at its machine, and go on with --resume"
        ) from error


def silent_ranks(world_size: int, rank: int, waiting: bool) -> list[int]:
    """Tell all that this rank's run has failed; if `waiting`, which ranks have not told so after LAST_WORDS_S.

    The store is that of torch's rendezvous, which the launcher keeps, or else rank 0.
    """
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=LAST_WORDS_S if waiting else 1.0)  # who kept the store may have gone already
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        store.set_timeout(patience)
        store.set(f"swiftclr failed {rank}", "")
    except RuntimeError:
        if waiting and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ and rank:
            return [0]  # who keeps it
        raise
    deadline, others = time.monotonic() + LAST_WORDS_S, {other for other in range(world_size) if other != rank}
    while waiting and others and time.monotonic() < deadline:
        others = {other for other in others if not store.check([f"swiftclr failed {other}"])}
        time.sleep(0.1)
    return sorted(others) if waiting else []
